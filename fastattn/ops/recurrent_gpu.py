"""The layers of recurrent_op.py on GPU backends: torch's GEMM for the inputs, then the recurrence
of Triton (recurrent_triton.py) or CUDA C++ (recurrent_cuda.py), behind its first-use verdict.

Registered under the CUDA key, and under the CPU key for tests (Triton's interpreter; tests/sim).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import select
from fastattn.ops import _guard, recurrent_cuda, recurrent_triton
from fastattn.ops import recurrent_op as op
from fastattn.ops._eager import recording
from fastattn.ops.layernorm_first_use import short, wrong
from fastattn.reference import recurrent as reference
from fastattn.reference.recurrent import GATES, GRU, LSTM

_CELLS = ("lstm", "gru", "rnn", "rnn")
_BACKENDS: dict[str, ModuleType] = {"triton": recurrent_triton, "cuda": recurrent_cuda}
_CHECKED_STEPS, _CHECKED_SEQUENCES = 3, 256


def _biases(layer: op._Layer, cell: int) -> tuple[list[Tensor | None], list[Tensor]]:
    """What the GEMM adds, a direction, and GRU's b_hn, which it may not."""
    added: list[Tensor | None] = []
    b_hn = []
    for _, w_hh, b_ih, b_hh, _ in layer.weights:
        if cell == GRU and any(w[3] is not None for w in layer.weights):
            H = w_hh.shape[0] // 3
            b_hh = w_hh.new_zeros(3 * H) if b_hh is None else b_hh
            b_hn.append(b_hh[2 * H :].contiguous())
            b_hh = torch.cat((b_hh[: 2 * H], b_hh.new_zeros(H)))
        added.append(b_hh if b_ih is None else b_ih if b_hh is None else b_ih + b_hh)
    return added, b_hn


def _forward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    """``recurrent_layer_{triton,cuda}_fwd``."""
    n = op._N_TENSORS
    layer, steps, save = op._Layer.of(args[:n]), op.Steps(*args[n:-1]), args[-1]
    x, D = layer.x, len(layer.weights)
    added, b_hn = _biases(layer, steps.cell)
    gx = x.new_empty((D, x.shape[0], layer.weights[0][0].shape[0]))
    for d, w in enumerate(layer.weights):
        bias = added[d]
        if bias is None:
            torch.mm(x, w[0].t(), out=gx[d])
        else:
            torch.addmm(bias, x, w[0].t(), out=gx[d])
    h0, c0 = layer.h0.contiguous(), None if layer.c0 is None else layer.c0.contiguous()
    given = (_dense(layer.part(1)), b_hn, _dense(layer.part(4)), h0, c0, *_dense_steps(steps))
    if not _may_run(backend, given):
        y, h_n, c_n = reference.recurrence(gx, *given)
        return _as_saved(gx, given, y, h_n, c_n, save)
    found: tuple[Tensor, ...] = _BACKENDS[backend].forward(gx, *given, save)
    return found


def _as_saved(
    gx: Tensor, given: tuple[Any, ...], y: Tensor, h_n: Tensor, c_n: Tensor, save: bool
) -> tuple[Tensor, ...]:
    """The forward's results where plain PyTorch made them: its backward makes everything again."""
    w_hh, cell = given[0], given[-2]
    D, N, H = gx.shape[0], gx.shape[1], w_hh[0].shape[0] // GATES[cell]
    gated = save and cell in (LSTM, GRU)
    gates = gx.new_zeros((D, N, 4 * H) if gated else (0,))
    cells = gx.new_zeros((D, N, H) if save and cell == LSTM else (0,))
    return y.contiguous(), h_n.contiguous(), c_n.contiguous(), gates, cells


def _dense(tensors: list[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _dense_steps(steps: op.Steps) -> tuple[Any, ...]:
    mask, offsets, lengths, *numbers = steps
    return (
        None if mask is None else mask.contiguous(),
        None if offsets is None else offsets.long().contiguous(),
        None if lengths is None else lengths.contiguous(),
        *numbers,
    )


def _backward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    """``recurrent_layer_{triton,cuda}_bwd``."""
    n = op._N_TENSORS
    layer, steps = op._Layer.of(args[3 : 3 + n]), op.Steps(*args[n + 6 : -1])
    _, b_hn = _biases(layer, steps.cell)
    h0, c0 = layer.h0.contiguous(), None if layer.c0 is None else layer.c0.contiguous()
    w_hh, w_hr = _dense(layer.part(1)), _dense(layer.part(4))
    rest = (h0, c0, *_dense_steps(steps))
    if not _may_run(backend, (w_hh, b_hn, w_hr, *rest)):
        return op.backward_by_reference(*args)

    def recurrence(
        upstream: tuple[Any, ...], saved: tuple[Any, ...], _: op._Layer, __: op.Steps
    ) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = _BACKENDS[backend].backward(
            *upstream, *saved, w_hh, w_hr, *rest
        )
        return found

    return op._bwd_impl(recurrence, *args)


# ------------------------------------------------------------------------------------- first use


def _may_run(backend: str, given: tuple[Any, ...]) -> bool:
    """given: the recurrence's arguments after gx."""
    w_hh, b_hn, w_hr, h0, _, mask, offsets, lengths, _, cell, reverse = given
    H, (D, B, P) = w_hh[0].shape[0] // GATES[cell], h0.shape
    kinds = (mask is not None, offsets is not None, None if lengths is None else lengths.dtype)
    key = (H, P, D, B, h0.dtype, cell, reverse, bool(b_hn), bool(w_hr), kinds)

    def check() -> tuple[str, Callable[[], str | None]]:
        words = [("lstm", "gru", "rnn tanh", "rnn relu")[cell], f"B{B} H{H} D{D}", short(h0.dtype)]
        words += [f"P{P}"] if w_hr else []
        names = ("b_hn", "mask", "packed", "lengths", f"reverse={reverse}")
        there = (bool(b_hn), kinds[0], kinds[1], lengths is not None, reverse)
        words += [name for name, on in zip(names, there, strict=True) if on]
        return " ".join(words), partial(_check, backend, given)

    return _guard.may_run(_CELLS[cell], backend, h0.device, key, check)


def _check(backend: str, given: tuple[Any, ...]) -> str | None:
    """Both directions on a small call like the given one, against plain PyTorch in fp64: what is
    wrong, or None."""
    w_hh, b_hn, w_hr, h0, c0, mask, offsets, lengths, _, cell, reverse = given
    (D, B, P), T = h0.shape, _CHECKED_STEPS
    B = min(B, _CHECKED_SEQUENCES)
    gen = torch.Generator().manual_seed(1)

    def like(x: Tensor, *shape: int) -> Tensor:
        scale = x.shape[-1] ** -0.5 if x.dim() == 2 else 1.0
        return (torch.randn(shape or x.shape, generator=gen) * scale).to(x.device, x.dtype)

    device, H = h0.device, w_hh[0].shape[0] // GATES[cell]
    n = torch.randint(1, T + 1, (B,), generator=gen).sort(descending=True)[0]
    if B:
        n[0] = T
    counts = (n > torch.arange(T)[:, None]).sum(1)
    N = int(counts.sum()) if offsets is not None else T * B
    offsets = None if offsets is None else torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    inputs = [like(h0, D, N, GATES[cell] * H), *(like(w) for w in (*w_hh, *b_hn, *w_hr))]
    inputs += [like(h0, D, B, P)] + ([] if c0 is None else [like(c0, D, B, H)])
    rest = (
        None if mask is None else like(mask, D, B, P),
        None if offsets is None else offsets.to(device),
        None if lengths is None else n.to(device, lengths.dtype),
        T, cell, reverse,
    )  # fmt: skip

    def arguments(tensors: list[Tensor]) -> tuple[Any, ...]:
        gx, *more = tensors
        hh, hn, hr = more[:D], more[D : D + len(b_hn)], more[D + len(b_hn) : len(more)]
        states = hr[len(w_hr) :]
        c = states[1] if c0 is not None else None
        wide = None if rest[0] is None else rest[0].to(gx.dtype)
        return gx, hh, hn, hr[: len(w_hr)], states[0], c, wide, *rest[1:]

    with recording():
        leaves = [x.double().requires_grad_() for x in inputs]
        right = [t for t in reference.recurrence(*arguments(leaves)) if t.numel()]
        ups = [like(h0, *t.shape) for t in right]
        states = [leaves[0], *leaves[1 + D + len(b_hn) + len(w_hr) :]]
        right += torch.autograd.grad(right, states, [u.double() for u in ups])
    module = _BACKENDS[backend]
    _, hh, _, hr, h, c, *steps = arguments(inputs)
    y, h_n, c_n, gates, cells = module.forward(*arguments(inputs), True)
    up = (*ups, None)[:3]
    dgx, _, dh0, dc0, _ = module.backward(*up, y, gates, cells, hh, hr, h, c, *steps)
    found = [t for t in (y, h_n, c_n) if t.numel()] + [dgx, dh0] + ([dc0] if c0 is not None else [])
    names = [*("y", "h_n", "c_n")[: len(ups)], "dgx", "dh0", "dc0"]
    more = 16 * torch.finfo(h0.dtype).eps
    complaints: list[str] = []
    for name, got, r in zip(names, found, right, strict=False):
        complaints += wrong(name, got, r.detach(), more)
    return "; ".join(complaints) or None


def _on_cpu(backend: str, function: Any, of: int) -> Any:
    def run(*args: Any) -> Any:
        cell = args[of + op._N_TENSORS + (0 if of == 0 else 3) + 4]
        select(_CELLS[cell], backend, "cpu", args[of].dtype)  # raises where nothing would run it
        return function(*args)

    return run


_lib = torch.library.Library("fastattn", "IMPL")
for _backend in _BACKENDS:
    for _way, _function, _x in (("fwd", _forward, 0), ("bwd", _backward, 3)):
        _made = partial(_function, _backend)
        _lib.impl(f"recurrent_layer_{_backend}_{_way}", _made, "CUDA")
        _lib.impl(f"recurrent_layer_{_backend}_{_way}", _on_cpu(_backend, _made, _x), "CPU")
