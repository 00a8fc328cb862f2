"""Rows of layernorm_ffn and its parts (norms, bias_act), and linear_cross_entropy.

The baseline is plain PyTorch, as a model has it. A row of GEMMs passes at its ratio or at 90 % of
the bare GEMMs of the same shapes (out= into warm memory, nothing between them).

GEMMs of D x F on M rows: forward 2, backward 4 more, 2 M D F FLOPs each.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench import peers
from bench.harness import DTYPES, Case, Contest, Setting, compiled, step

SHARE = 0.9


def ffn(setting: Setting, rows: int, d: int, f: int, dtype: str, train: bool) -> Contest:
    t = DTYPES[dtype]
    shapes = [(rows, d), (f, d), (f,), (d, f), (d,), (d,), (d,)]
    leaves = [(torch.randn(s) * (s[-1] ** -0.5 if i in (1, 3) else 1)).to(t) for i, s in
              enumerate(shapes)]  # fmt: skip
    for x in leaves:
        x.requires_grad_(train)
    do = [torch.randn(rows, d).to(t)]

    def stock(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, g: Any, b: Any) -> Tensor:
        hidden = F.gelu(F.linear(F.layer_norm(x, (d,), g, b), w1, b1))
        return x + F.linear(hidden, w2, b2)

    def fused(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, g: Any, b: Any) -> Tensor:
        return fastattn.layernorm_ffn(
            x, w1, b1, w2, b2, norm_weight=g, norm_bias=b, backend=setting.backend
        )

    x, w1, w2, dy = leaves[0].detach(), leaves[1].detach(), leaves[3].detach(), do[0]
    u = torch.randn(rows, f).to(t)
    out_u, out_x = torch.empty_like(u), torch.empty_like(x)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)

    def gemm() -> None:
        torch.mm(x, w1.t(), out=out_u)
        torch.mm(u, w2.t(), out=out_x)
        if train:
            torch.mm(dy, w2, out=out_u)
            torch.mm(dy.t(), u, out=dw2)
            torch.mm(u, w1, out=out_x)
            torch.mm(u.t(), x, out=dw1)

    other = {"torch.compile": step(compiled(stock), leaves, do, train)} if setting.peers else {}
    return Contest(
        step(stock, leaves, do, train), step(fused, leaves, do, train), other, gemm,
        flops=(3 if train else 1) * 4.0 * rows * d * f,
        bytes=float(t.itemsize * (2 * rows * d + 2 * d * f)) * (2 if train else 1),
    )  # fmt: skip


def rows_of(setting: Setting, kind: str, rows: int, d: int, dtype: str, train: bool) -> Contest:
    """Passes over memory. kind: "add_norm" (dropout 0.1, two results), "layer", "rms", "act"."""
    t = DTYPES[dtype]
    count = {"add_norm": 2, "act": 1}.get(kind, 1)
    leaves = [torch.randn(rows, d).to(t) for _ in range(count)]
    leaves += [torch.randn(d).to(t) for _ in range({"add_norm": 2, "layer": 2}.get(kind, 1))]
    for x in leaves:
        x.requires_grad_(train)
    do = [torch.randn(rows, d).to(t) for _ in range(count)]
    stock, fused, more = _pass(kind, d, setting.backend)
    others = {name: step(fn, leaves, do, train) for name, fn in more.items()}
    if setting.peers:
        others["torch.compile"] = step(compiled(stock), leaves, do, train)
    moved = {"add_norm": 4, "act": 2}.get(kind, 2) + (train and {"add_norm": 5}.get(kind, 3))
    return Contest(
        step(stock, leaves, do, train), step(fused, leaves, do, train), others,
        flops=8.0 * rows * d * (3 if train else 1),  # about: mean, variance, scale and shift
        bytes=float(moved * rows * d * t.itemsize),
    )  # fmt: skip


def _pass(kind: str, d: int, backend: str) -> tuple[Any, Any, dict[str, Any]]:
    """Stock, fused, and libraries' peers."""
    if kind == "add_norm":

        def stock(x: Any, residual: Any, g: Any, b: Any) -> tuple[Tensor, Tensor]:
            s = residual + F.dropout(x, 0.1)
            return F.layer_norm(s, (d,), g, b), s

        def fused(x: Any, residual: Any, g: Any, b: Any) -> tuple[Tensor, Tensor]:
            return fastattn.add_layer_norm(x, residual, g, b, dropout_p=0.1, backend=backend)

        return stock, fused, {}
    if kind == "act":
        return (
            lambda x, b: F.gelu(x + b),
            lambda x, b: fastattn.bias_act(x, b, backend=backend),
            {},
        )
    liger = peers.norm(kind)
    if kind == "layer":
        more = {} if liger is None else {"liger": lambda x, g, b: liger(x, g, b, 1e-5)}
        return (
            lambda x, g, b: F.layer_norm(x, (d,), g, b),
            lambda x, g, b: fastattn.layer_norm(x, d, g, b, backend=backend),
            more,
        )
    more = {} if liger is None else {"liger": lambda x, g: liger(x, g, None, 1e-6)}
    return (
        lambda x, g: F.rms_norm(x, (d,), g, 1e-6),
        lambda x, g: fastattn.rms_norm(x, d, g, 1e-6, backend=backend),
        more,
    )


def loss(
    setting: Setting, rows: int, d: int, vocabulary: int, ignored: float, dtype: str
) -> Contest:
    """Forward and both gradients; a hidden state of std 0.05."""
    t = DTYPES[dtype]
    x = (torch.randn(rows, d) * 0.05).to(t).requires_grad_()
    w = (torch.randn(vocabulary, d) * d**-0.5).to(t).requires_grad_()
    target = torch.randint(vocabulary, (rows,))
    target[torch.rand(rows) < ignored] = -100

    def stock(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), target)

    def fused(x: Tensor, w: Tensor) -> Tensor:
        return fastattn.linear_cross_entropy(x, w, target)

    one = [torch.ones((), dtype=t)], [torch.ones(())]
    others = {}
    if setting.peers:
        others["torch.compile"] = step(compiled(stock), [x, w], one[0], True)
    liger = peers.loss()
    if liger is not None:
        others["liger"] = step(lambda x, w: liger(x, w, target), [x, w], one[0], True)
    return Contest(
        step(stock, [x, w], one[0], True),
        step(fused, [x, w], one[1], True),
        others,
        flops=6.0 * int((target != -100).sum()) * d * vocabulary,
        bytes=2.0 * t.itemsize * (rows + vocabulary) * d,
    )


def _ffn_cases(dtype: str) -> list[Case]:
    cases = []
    for train in (False, True):
        word, mode = ("fwd+bwd", "train") if train else ("fwd", "fwd")
        target = {"fp32": (1.15, 1.1), "bf16": (1.3, 1.25)}[dtype][train]
        for d in (384, 768):
            for rows in (128, 2048):
                cases.append(Case(
                    f"{dtype}_{mode}_d{d}_m{rows}", f"D={d} F={4 * d} M={rows} {dtype} {word}",
                    dtype, partial(ffn, rows=rows, d=d, f=4 * d, dtype=dtype, train=train),
                    target, SHARE,
                ))  # fmt: skip
    for d in (384, 768):
        cases.append(Case(
            f"{dtype}_one_row_d{d}", f"D={d} F={4 * d} one row {dtype} fwd", dtype,
            partial(ffn, rows=1, d=d, f=4 * d, dtype=dtype, train=False), 1.2, SHARE, roof="copy",
        ))  # fmt: skip
    return cases


_PASSES = {
    "add_norm": "dropout + add + norm",
    "layer": "layer norm",
    "rms": "RMS norm",
    "act": "bias + gelu",
}


def _pass_cases(dtype: str) -> list[Case]:
    cases = []
    for kind, what in _PASSES.items():
        for train in (False, True):
            word, mode = ("fwd+bwd", "train") if train else ("fwd", "fwd")
            cases.append(Case(
                f"{dtype}_{mode}_{kind}", f"{what}, 2048 x 768, {dtype} {word}", dtype,
                partial(rows_of, kind=kind, rows=2048, d=768, dtype=dtype, train=train),
                2.0 if kind == "add_norm" else None, roof="copy",
                tag="table" if kind == "add_norm" else "beside",
            ))  # fmt: skip
    return cases


def _loss_cases(dtype: str) -> list[Case]:
    return [
        Case(
            f"{dtype}_train_loss_{word}",
            f"linear + loss, 2048 x 384 x 30522, {ignored:.0%} ignored, {dtype} fwd+bwd", dtype,
            partial(loss, rows=2048, d=384, vocabulary=30522, ignored=ignored, dtype=dtype), target,
        )
        for word, ignored, target in (("dense", 0.0, 1.05), ("sparse", 0.85, 4.0))
    ]  # fmt: skip


CASES: dict[str, Case] = {
    case.name: case
    for group in (_ffn_cases, _pass_cases, _loss_cases)
    for dtype in ("fp32", "bf16")
    for case in group(dtype)
}
