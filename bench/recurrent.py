"""Rows of LSTM, GRU, RNN and their cells.

    python -m bench.recurrent

prints what autograd keeps for the backward, beyond the arguments; `python -m bench --only
recurrent` measures the rows. The baseline is torch's own module on the same weights; torch.compile
breaks its graph there and calls the same kernels. The bare matrix products: the inputs' of all
steps at once, the hidden ones step by step, as the recurrence forces them. Nothing but the ratio
passes a row. Rows of the forward alone have no verdict where torch takes less than 200 us.

GEMMs of T steps, B sequences, I inputs, H hidden, G gates: 2 T B G H (I + H) FLOPs, the backward
twice that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastattn
from bench.harness import DTYPES, Case, Contest, Setting, Thunk, compiled, step

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FORWARD_RATIO, FORWARD_LEAST = 0.97, 200e-6


def _modules(
    name: str, dtype: str, *args: Any, backend: str = "auto", **kwargs: Any
) -> tuple[Any, Any]:
    """Torch's module, and ours on the very same parameters."""
    stock = getattr(nn, name)(*args, **kwargs).to(DTYPES[dtype])
    fused = getattr(fastattn.nn, name)(*args, **kwargs, backend=backend).to(DTYPES[dtype])
    for key in list(fused._parameters):
        setattr(fused, key, stock._parameters[key])
    return stock, fused


def products(
    G: int, T: int, B: int, inputs: int, H: int, dtype: torch.dtype, train: bool, times: int = 1
) -> Thunk:
    """The bare GEMMs of one layer and direction, ``times`` over."""
    x, h, dg = (torch.randn(T * B, n).to(dtype) for n in (inputs, H, G * H))
    w_ih, w_hh = torch.randn(G * H, inputs).to(dtype), torch.randn(G * H, H).to(dtype)
    gates, dx, dh = torch.empty_like(dg), torch.empty_like(x), torch.empty_like(h[:B])
    one, dw_ih, dw_hh = torch.empty_like(dg[:B]), torch.empty_like(w_ih), torch.empty_like(w_hh)

    def call() -> None:
        for _ in range(times):
            torch.mm(x, w_ih.t(), out=gates)
            for _ in range(T):
                torch.mm(h[:B], w_hh.t(), out=one)
            if train:
                for _ in range(T):
                    torch.mm(dg[:B], w_hh, out=dh)
                torch.mm(dg, w_ih, out=dx)
                torch.mm(dg.t(), x, out=dw_ih)
                torch.mm(dg.t(), h, out=dw_hh)

    return call


def layer(
    setting: Setting, name: str, T: int, B: int, H: int, dtype: str, train: bool, layers: int = 1,
    directions: int = 1,
) -> Contest:  # fmt: skip
    stock, fused = _modules(
        name, dtype, H, H, num_layers=layers, bidirectional=directions == 2,
        backend=setting.backend,
    )  # fmt: skip
    x = torch.randn(T, B, H).to(DTYPES[dtype])
    leaves = [x, *stock.parameters()]
    for leaf in leaves:
        leaf.requires_grad_(train)
    do = [torch.randn(T, B, H * directions).to(x.dtype)]

    def of(module: Any) -> Any:
        return step(lambda x, *_: module(x)[0], leaves, do, train)

    G = GATES[name]
    # Beyond the first layer the inputs are those of both directions: times counts the first's.
    gemm = products(G, T, B, H, H, x.dtype, train, directions)
    if layers > 1:
        first, more = gemm, products(G, T, B, H * directions, H, x.dtype, train,
                                     directions * (layers - 1))  # fmt: skip

        def gemm() -> None:
            first()
            more()

    flops = 2.0 * T * B * G * H * directions * (H + H)
    flops += (layers - 1) * 2.0 * T * B * G * H * directions * (H * directions + H)
    others = {"torch.compile": of(compiled(stock))} if setting.peers else {}
    moved = sum(p.numel() for p in leaves) + do[0].numel()
    return Contest(
        of(stock), of(fused), others, gemm, flops=(3 if train else 1) * flops,
        bytes=float((2 if train else 1) * moved * x.element_size()),
    )  # fmt: skip


def ragged(setting: Setting, name: str, T: int, B: int, H: int, dtype: str) -> Contest:
    """Lengths uniform in 1 ... T: pack, run, pad again, against ``lengths``."""
    stock, fused = _modules(name, dtype, H, H, backend=setting.backend)
    lengths = torch.randint(1, T + 1, (B,))
    lengths[0] = T
    x = torch.randn(T, B, H).to(DTYPES[dtype])
    leaves = [x, *stock.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    do = [torch.randn(T, B, H).to(x.dtype)]

    def packed(x: Tensor, *_: Tensor) -> Tensor:
        rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(stock(rows)[0])[0]

    def padded(x: Tensor, *_: Tensor) -> Tensor:
        return fused(x, None, lengths)[0]  # type: ignore[no-any-return]

    return Contest(step(packed, leaves, do, True), step(padded, leaves, do, True))


def cell(setting: Setting, name: str, B: int, H: int, dtype: str, train: bool) -> Contest:
    stock, fused = _modules(f"{name}Cell", dtype, H, H, backend=setting.backend)
    x, h, c, dh, dc = (torch.randn(B, H).to(DTYPES[dtype]) for _ in range(5))
    lstm = name == "LSTM"
    leaves = [x, h, *((c,) if lstm else ()), *stock.parameters()]
    for leaf in leaves:
        leaf.requires_grad_(train)

    def of(module: Any) -> Any:
        if lstm:
            return step(lambda x, h, c, *_: module(x, (h, c)), leaves, [dh, dc], train)
        return step(lambda x, h, *_: module(x, h), leaves, [dh], train)

    G = GATES[name]
    others = {"torch.compile": of(compiled(stock))} if setting.peers else {}
    return Contest(
        of(stock), of(fused), others, products(G, 1, B, H, H, x.dtype, train),
        flops=(3 if train else 1) * 2.0 * B * G * H * 2 * H,
        bytes=float((2 if train else 1) * sum(p.numel() for p in leaves) * x.element_size()),
    )  # fmt: skip


# name, dtype, T, B, H, layers, directions, target of fwd + bwd
SHAPES: tuple[tuple[str, str, int, int, int, int, int, float], ...] = (
    ("GRU", "fp32", 128, 32, 512, 1, 1, 1.3),
    ("GRU", "fp32", 256, 1, 128, 1, 1, 4.0),
    ("GRU", "bf16", 64, 8, 256, 1, 1, 4.0),
    ("GRU", "bf16", 80, 8, 320, 2, 2, 3.5),
    ("LSTM", "fp32", 256, 1, 128, 1, 1, 2.0),
    ("LSTM", "bf16", 128, 32, 512, 1, 1, 2.0),
    ("LSTM", "fp32", 128, 32, 512, 1, 1, 1.1),
)


def _short(name: str, dtype: str, T: int, B: int, H: int, L: int, D: int) -> str:
    return f"{name.lower()}_{dtype}_t{T}_b{B}_h{H}" + (f"_{L}x{D}" if L * D > 1 else "")


def _cases() -> dict[str, Case]:
    cases = []
    for name, dtype, T, B, H, L, D, target in SHAPES:
        short = _short(name, dtype, T, B, H, L, D)
        what = f"{name} T={T} B={B} H={H} {dtype}" + (
            f", {L} layers, bidirectional" if D > 1 else ""
        )

        def make(train: bool, shape: Any = (name, T, B, H, dtype, L, D)) -> Callable[..., Contest]:
            name, T, B, H, dtype, L, D = shape
            return lambda c: layer(c, name, T, B, H, dtype, train, L, D)

        cases.append(Case(short, f"{what}, fwd+bwd", dtype, make(True), target))
        cases.append(Case(f"{short}_fwd", f"{what}, fwd", dtype, make(False), FORWARD_RATIO,
                          least=FORWARD_LEAST))  # fmt: skip
    for name in ("LSTM", "GRU"):
        cases.append(Case(
            f"{name.lower()}_fp32_lengths",
            f"{name} T=128 B=32 H=512 fp32, lengths 1 ... T against pack, run, pad, fwd+bwd",
            "fp32", partial(ragged, name=name, T=128, B=32, H=512, dtype="fp32"), 2.0,
        ))  # fmt: skip
    what = "LSTMCell B=8 H=256 fp32"
    cell_of = partial(cell, B=8, H=256, dtype="fp32")
    cases.append(Case("cell_fp32", f"{what}, fwd+bwd", "fp32",
                      partial(cell_of, name="LSTM", train=True), 1.5))  # fmt: skip
    cases.append(Case("cell_fp32_fwd", f"{what}, fwd", "fp32", partial(
        cell_of, name="LSTM", train=False), FORWARD_RATIO, least=FORWARD_LEAST))  # fmt: skip
    cases.append(Case("gru_cell_fp32", "GRUCell B=8 H=256 fp32, fwd+bwd", "fp32",
                      partial(cell_of, name="GRU", train=True), tag="beside"))  # fmt: skip
    cases.append(Case("rnn_fp32", "RNN T=128 B=32 H=512 fp32, fwd+bwd", "fp32", partial(
        layer, name="RNN", T=128, B=32, H=512, dtype="fp32", train=True), tag="beside",
    ))  # fmt: skip
    return {case.name: case for case in cases}


CASES = _cases()


def saved_bytes(fn: Callable[[], Any], arguments: list[Tensor]) -> int:
    """What autograd keeps of a forward, each storage once, arguments apart."""
    kept: dict[int, int] = {}
    given = {x.untyped_storage().data_ptr() for x in arguments}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = fn()  # alive until the sum: its storages must not be reused
    total = sum(kept.values())
    del result
    return total


def memory() -> None:
    print(f"{'case':26} {'stock':>11} {'fused':>11} {'output':>11}")
    for name, dtype, T, B, H, L, D, _ in SHAPES:
        torch.manual_seed(0)
        modules = _modules(name, dtype, H, H, num_layers=L, bidirectional=D == 2)
        x = torch.randn(T, B, H).to(DTYPES[dtype]).requires_grad_()
        figures = [saved_bytes(partial(m, x), [x, *m.parameters()]) for m in modules]
        figures.append(T * B * H * D * x.element_size())
        short = _short(name, dtype, T, B, H, L, D)
        print(f"{short:26} " + " ".join(f"{n / 2**20:7.2f} MiB" for n in figures), flush=True)


if __name__ == "__main__":
    memory()
