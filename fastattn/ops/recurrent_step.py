"""One step of one direction on the CPU, in eager: what the cells' modules call.

The arithmetic is that of recurrent_op.py's layer with T = 1, without its general bookkeeping, which
would cost a small step more than its GEMMs. Of few sequences in fp32 a step is one op forward and
one backward, csrc/bindings/recurrent_step.cpp; of others torch's GEMMs around the recurrence's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops._eager import differentiable_gradients, eager, make_function, wants_grad
from fastattn.ops.layernorm_op import lib
from fastattn.reference import recurrent as reference
from fastattn.reference.recurrent import GRU, LSTM, RNN_RELU, RNN_TANH

_NOTHING = (None,) * 3
_INPUTS = (
    "Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h, Tensor? c, int cell"
)
# gates: for the backward, empty without `save`. need: bit i for the i-th result, others are empty.
lib.define(f"recurrent_step_cpu_fwd({_INPUTS}, bool save) -> (Tensor h, Tensor c, Tensor gates)")
lib.define(
    "recurrent_step_cpu_bwd(Tensor? dh, Tensor? dc, "
    f"{_INPUTS.removesuffix(', int cell')}, Tensor h_new, Tensor c_new, Tensor gates, int cell, "
    "int need) -> (Tensor dx, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, "
    "Tensor dh0, Tensor dc0)"
)
_N = 7  # tensors among the inputs
# Only their backward reads the h after the step. The others save the one before it in its place, so
# that the caller may change the result in place, as that of torch's cells.
_NEEDS_H = (RNN_TANH, RNN_RELU)

MOST = 16  # sequences; with more, torch's GEMMs
_MULTIPLE = 16  # of features: csrc/cpu/recurrent_step.h


def fused(x: Tensor, h: Tensor) -> bool:
    """Whether step() serves them; x (B, I), h (B, H)."""
    B, features = x.shape
    return (
        x.dtype is torch.float32
        and 0 < B <= MOST
        and features % _MULTIPLE == h.shape[1] % _MULTIPLE == 0
        and features > 0
        and eager(x)
    )


def step(*args: Any) -> tuple[Tensor, Tensor]:
    """h and c (LSTM's; else empty) after the step, with autograd. Arguments as _INPUTS has them."""
    if wants_grad(*args[:_N]):
        return _fused_step.apply(*args)  # type: ignore[no-any-return]
    return torch.ops.fastattn.recurrent_step_cpu_fwd(*args, False)[:2]  # type: ignore[no-any-return]


def _step_forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
    h, c, gates = torch.ops.fastattn.recurrent_step_cpu_fwd(*args, True)
    ctx.cell = args[_N]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*args[:_N], h if args[_N] in _NEEDS_H else args[5], c, gates)
    return h, c


def _step_backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> tuple[Any, ...]:
    needs, saved = ctx.needs_input_grad, ctx.saved_tensors
    if dh is None and dc is None:
        return (None,) * (_N + 1)
    if torch.is_grad_enabled():
        return (*_differentiable(needs[:_N], (dh, dc), saved[:_N], ctx.cell), None)
    need = sum(1 << i for i in range(_N) if needs[i])
    grads = torch.ops.fastattn.recurrent_step_cpu_bwd(dh, dc, *saved, ctx.cell, need)
    return (*(g if n else None for g, n in zip(grads, needs, strict=False)), None)


_fused_step = make_function("_RecurrentStep", forward=_step_forward, backward=_step_backward)


def _differentiable(
    needs: tuple[bool, ...], upstream: tuple[Tensor | None, ...], inputs: tuple[Any, ...], cell: int
) -> tuple[Tensor | None, ...]:
    def formula(x: Tensor, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, h: Tensor, c: Any) -> Any:
        c0 = None if c is None else c.unsqueeze(0)
        weights = ((w_ih, w_hh, b_ih, b_hh, None),)
        out = reference.layer(x, weights, h.unsqueeze(0), c0, *_NOTHING, 1, cell, 0)
        return out[0], out[2].squeeze(0)

    return differentiable_gradients(formula, inputs, needs, upstream)


# ---------------------------------------------------------------- with torch's GEMMs, any dtype


def run(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor,
    c0: Tensor | None, cell: int, *, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y, h_n, c_n, gates, cells of the op's forward. x (B, I); h0 and c0 (1, B, H)."""
    gx = torch.mm(x, w_ih.t()).unsqueeze(0)
    gh = torch.mm(h0.squeeze(0), w_hh.t()).unsqueeze(0)
    y, h_n, c_n, gates, cells = torch.ops.fastattn.recurrence_cpu_fwd(
        gx, gh, w_hh, None, b_ih, None, b_hh, None, None, None, h0, c0, *_NOTHING, 1, cell, 0, save
    )
    return y, h_n, c_n, gx if save and cell == LSTM else gates, cells


def gradients(
    needs: tuple[bool, ...], upstream: tuple[Tensor | None, ...], inputs: tuple[Any, ...],
    saved: tuple[Tensor, ...], cell: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Of x, w_ih, w_hh, b_ih, b_hh, h0, c0, as far as they are needed."""
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = inputs
    rows = x.new_empty((1, x.shape[0], w_hh.shape[0]))  # says that the product is made here
    dgx, dghn, dh0, dc0, _ = torch.ops.fastattn.recurrence_cpu_bwd(
        *upstream, *saved, rows, w_hh, *(None,) * 3, h0, c0, *_NOTHING, 1, cell, 0
    )
    h = h0.squeeze(0)
    d = hidden = dgx.squeeze(0)
    if cell == GRU:
        hidden = torch.cat((d[:, : 2 * h0.shape[2]], dghn.squeeze(0)), 1)
    sums = d.sum(0) if needs[3] or (needs[4] and cell != GRU) else None
    db_hh = None
    if needs[4] and b_hh is not None:
        db_hh = hidden.sum(0) if cell == GRU else sums if not needs[3] else sums.clone()  # type: ignore[union-attr]
    return (
        torch.mm(d, w_ih) if needs[0] else None,
        torch.mm(d.t(), x) if needs[1] else None,
        torch.mm(hidden.t(), h) if needs[2] else None,
        sums if needs[3] and b_ih is not None else None,
        db_hh,
        torch.addmm(dh0.squeeze(0), hidden, w_hh).unsqueeze(0) if needs[5] else None,
        dc0 if needs[6] and c0 is not None else None,
    )


def _forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
    y, h_n, c_n, gates, cells = run(*args, save=True)
    ctx.cell = args[-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*args[:-1], y if args[-1] in _NEEDS_H else args[5][0], gates, cells)
    return y, h_n, c_n


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:7]
    inputs, saved = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    if all(g is None for g in upstream):
        return (None,) * 8
    if not torch.is_grad_enabled():
        return (*gradients(needs, upstream, inputs, saved, ctx.cell), None)

    def formula(*given: Any) -> tuple[Tensor, ...]:
        x, w_ih, w_hh, b_ih, b_hh, h0, c0 = given
        weights = ((w_ih, w_hh, b_ih, b_hh, None),)
        return reference.layer(x, weights, h0, c0, None, None, None, 1, ctx.cell, 0)

    return (*differentiable_gradients(formula, inputs, needs, upstream), None)


function = make_function("_RecurrentStep", forward=_forward, backward=_backward)
