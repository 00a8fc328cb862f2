"""Rows of layernorm_ffn, add_layer_norm and linear_cross_entropy on the CPU.

    python -m bench.layernorm_ffn --case NAME

The baseline is plain PyTorch, as a model has it. The bare GEMMs of the same shapes (out= into
warm memory, nothing between them) take turns with both in the same rounds: "share" is their time
over the fused call's. A row passes at its ratio or at 90 % of the bare GEMMs.

GEMMs of D x F on M rows: forward 2, backward 4 more, 2 M D F FLOPs each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.contest import Case, Compiler, Contest, parser, run, step
from bench.harness import DTYPES


def ffn(compiler: Compiler, rows: int, d: int, f: int, dtype: str, train: bool) -> Contest:
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
        return fastattn.layernorm_ffn(x, w1, b1, w2, b2, norm_weight=g, norm_bias=b)

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

    steps = [step(fn, leaves, do, train) for fn in (stock, fused, compiler(stock))]
    return Contest(steps[0], steps[1], gemm, steps[2])


def add_norm(compiler: Compiler, rows: int, d: int, dtype: str, train: bool) -> Contest:
    t = DTYPES[dtype]
    leaves = [
        torch.randn(s).to(t).requires_grad_(train) for s in ((rows, d), (rows, d), (d,), (d,))
    ]
    do = [torch.randn(rows, d).to(t) for _ in range(2)]

    def stock(x: Any, residual: Any, g: Any, b: Any) -> tuple[Tensor, Tensor]:
        s = residual + F.dropout(x, 0.1)
        return F.layer_norm(s, (d,), g, b), s

    def fused(x: Any, residual: Any, g: Any, b: Any) -> tuple[Tensor, Tensor]:
        return fastattn.add_layer_norm(x, residual, g, b, dropout_p=0.1)

    steps = [step(fn, leaves, do, train) for fn in (stock, fused, compiler(stock))]
    return Contest(steps[0], steps[1], compiled=steps[2])


def loss(
    compiler: Compiler, rows: int, d: int, vocabulary: int, ignored: float, dtype: str
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
    compiled = compiler(stock)
    return Contest(
        step(stock, [x, w], one[0], True),
        step(fused, [x, w], one[1], True),
        compiled=step(compiled, [x, w], one[0], True),
    )


def _cases() -> dict[str, Case]:
    cases = []
    for dtype in ("fp32", "bf16"):
        for train in (False, True):
            word = "fwd+bwd" if train else "fwd"
            mode = "train" if train else "fwd"
            for d in (384, 768):
                for rows in (128, 2048):
                    target = {"fp32": (1.15, 1.1), "bf16": (1.3, 1.25)}[dtype][train]
                    cases.append(Case(
                        f"{dtype}_{mode}_d{d}_m{rows}", f"D={d} F={4 * d} M={rows} {dtype} {word}",
                        lambda c, r=rows, d=d, t=dtype, w=train: ffn(c, r, d, 4 * d, t, w),
                        target,
                    ))  # fmt: skip
            cases.append(Case(
                f"{dtype}_{mode}_add_norm", f"dropout + add + norm, 2048 x 768, {dtype} {word}",
                lambda c, t=dtype, w=train: add_norm(c, 2048, 768, t, w), 2.0,
            ))  # fmt: skip
        for d in (384, 768):
            cases.append(Case(
                f"{dtype}_one_row_d{d}", f"D={d} F={4 * d} one row {dtype} fwd",
                lambda c, d=d, t=dtype: ffn(c, 1, d, 4 * d, t, False), 1.2,
            ))  # fmt: skip
    for word, ignored, target in (("dense", 0.0, 1.05), ("sparse", 0.85, 4.0)):
        for dtype in ("fp32", "bf16"):
            cases.append(Case(
                f"{dtype}_train_loss_{word}",
                f"linear + loss, 2048 x 384 x 30522, {ignored:.0%} ignored, {dtype} fwd+bwd",
                lambda c, i=ignored, t=dtype: loss(c, 2048, 384, 30522, i, t), target,
            ))  # fmt: skip
    return {case.name: case for case in cases}


CASES = _cases()


def main(argv: list[str] | None = None) -> None:
    run(CASES, parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    main()
