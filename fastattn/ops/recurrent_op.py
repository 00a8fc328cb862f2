"""The torch.library ops beneath LSTM, GRU and RNN, one layer each: schema, fake, autograd.

A layer is the product of its inputs (torch's GEMM, on a CPU in parts), the recurrence (a backend's
kernels), and in the backward the weights' gradients (torch's GEMMs again, over all steps at once).
The recurrence is reference/recurrent.py's; its kernels on the CPU are csrc/bindings/recurrent.cpp,
on Triton recurrent_triton.py, in CUDA C++ recurrent_cuda.py.

Saved for the backward besides the inputs: y, the gates after their nonlinearities (4 H a row; none
for the RNN) and LSTM's cell states (H a row), in x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import recurrent_step
from fastattn.ops._eager import (
    below_autograd,
    differentiable_gradients,
    eager,
    make_function,
    recording,
    transformed,
    wants_grad,
)
from fastattn.ops._fakes import register_fake
from fastattn.ops.layernorm_op import lib
from fastattn.ops.products import addmm_, mm
from fastattn.reference import recurrent as reference
from fastattn.reference.recurrent import GATES, GRU, LSTM

_WEIGHTS = (
    "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? w_ih_reverse, "
    "Tensor? w_hh_reverse, Tensor? b_ih_reverse, Tensor? b_hh_reverse, Tensor? w_hr_reverse"
)
_TENSORS = f"Tensor x, {_WEIGHTS}, Tensor h0, Tensor? c0"
_MASKS = "Tensor? h_mask, Tensor? offsets, Tensor? lengths"
_STEPS = f"{_MASKS}, SymInt T, int cell, int reverse"
_SAVED = "Tensor y, Tensor gates, Tensor cells"
_NAMES = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "w_ih_reverse", "w_hh_reverse",
          "b_ih_reverse", "b_hh_reverse", "w_hr_reverse", "h0", "c0")  # fmt: skip
_N_TENSORS = len(_NAMES)
_N_STEPS = 6
_SUFFIXES = {"cpu": "", "triton": "_triton", "cuda": "_cuda"}
for _suffix in _SUFFIXES.values():
    lib.define(
        f"recurrent_layer{_suffix}_fwd({_TENSORS}, {_STEPS}, bool save) -> (Tensor y, Tensor h_n, "
        "Tensor c_n, Tensor gates, Tensor cells)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    lib.define(
        f"recurrent_layer{_suffix}_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {_TENSORS}, "
        f"{_SAVED}, {_STEPS}, int need) -> ("
        + ", ".join(f"Tensor d{name}" for name in _NAMES)
        + ")",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
# What the CPU's layer is made of; not for callers. gx is overwritten by LSTM's gates.
_PAIRS = "Tensor? w_hh, Tensor? w_hh_reverse, "
_BIASES = "Tensor? b_ih, Tensor? b_ih_reverse, Tensor? b_hh, Tensor? b_hh_reverse, "
_NUMBERS = "int T, int cell, int reverse"
_REST = f"Tensor? w_hr, Tensor? w_hr_reverse, Tensor h0, Tensor? c0, {_MASKS}, {_NUMBERS}"
_RESULTS = "(Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
lib.define(
    "recurrence_cpu_layer(Tensor x, Tensor w_ih, Tensor? w_ih_reverse, Tensor? gh, "
    f"{_PAIRS}{_BIASES}{_REST}, bool save) -> {_RESULTS}"
)
lib.define(
    f"recurrence_cpu_fwd(Tensor(a!) gx, Tensor? gh, {_PAIRS}{_BIASES}{_REST}, bool save) -> "
    f"{_RESULTS}"
)
lib.define(
    f"recurrence_cpu_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {_SAVED}, Tensor? gh, "
    f"{_PAIRS}{_REST}) -> (Tensor dgx, Tensor dghn, Tensor dh0, Tensor dc0, Tensor dh)"
)

Weights = reference.Weights


class Steps(NamedTuple):
    """In the schema's order: see reference/recurrent.py."""

    h_mask: Tensor | None
    offsets: Tensor | None
    lengths: Tensor | None
    T: int
    cell: int
    reverse: int


class _Layer(NamedTuple):
    """A layer's arguments by what they are."""

    x: Tensor
    weights: tuple[Weights, ...]
    h0: Tensor
    c0: Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> _Layer:
        x, *weights, h0, c0 = tensors
        D = 1 if weights[5] is None else 2
        return cls(x, tuple(tuple(weights[5 * d : 5 * d + 5]) for d in range(D)), h0, c0)

    def part(self, i: int) -> list[Any]:
        """w_ih, w_hh, b_ih, b_hh or w_hr of every direction, as far as they are given."""
        return [w[i] for w in self.weights if w[i] is not None]

    def both(self, i: int) -> tuple[Any, Any]:
        return self.weights[0][i], self.weights[1][i] if len(self.weights) > 1 else None


# A backend's recurrence: (layer, gx, steps, save) -> y, h_n, c_n, gates, cells, and
# (dy, dh_n, dc_n, y, gates, cells, layer, steps) -> dgx, dghn, dh0, dc0, dh.
Backward = Callable[..., tuple[Tensor, ...]]


# ------------------------------------------------------------------------------------------- CPU


def _cpu_fwd(*args: Any) -> tuple[Tensor, ...]:
    layer, steps, save = _Layer.of(args[:_N_TENSORS]), Steps(*args[_N_TENSORS:-1]), args[-1]
    return torch.ops.fastattn.recurrence_cpu_layer(  # type: ignore[no-any-return]
        layer.x, *layer.both(0), _one_step(layer, steps), *layer.both(1), *layer.both(2),
        *layer.both(3), *layer.both(4), layer.h0, layer.c0, *steps, save,
    )  # fmt: skip


def _one_step(layer: _Layer, steps: Steps) -> Tensor | None:
    """W_hh h0 where there is one step alone: packing W_hh would cost more than its product."""
    if not _is_one_step(layer, steps):
        return None
    h = layer.h0 if steps.h_mask is None else layer.h0 * steps.h_mask
    gh = h.new_empty((*h.shape[:2], layer.weights[0][1].shape[0]))
    for d, w in enumerate(layer.weights):
        torch.mm(h[d], w[1].t(), out=gh[d])
    return gh


def _is_one_step(layer: _Layer, steps: Steps) -> bool:
    """One step of every sequence, without a projection."""
    B = layer.h0.shape[1]
    return steps.T == 1 and layer.weights[0][4] is None and layer.x.shape[0] == B


def _cpu_recurrence_bwd(
    upstream: tuple[Tensor | None, ...], saved: tuple[Tensor, ...], layer: _Layer, steps: Steps
) -> tuple[Tensor, ...]:
    one = _is_one_step(layer, steps)
    G, H = GATES[steps.cell], layer.weights[0][1].shape[0] // GATES[steps.cell]
    gh = layer.h0.new_empty((*layer.h0.shape[:2], G * H)) if one else None
    dgx, dghn, dh0, dc0, dh = torch.ops.fastattn.recurrence_cpu_bwd(
        *upstream, *saved, gh, *layer.both(1), *layer.both(4), layer.h0, layer.c0, *steps
    )
    if one:
        for d, w in enumerate(layer.weights):
            back = _through(w[1], dgx[d], dghn[d] if steps.cell == GRU else None)
            dh0[d] += back if steps.h_mask is None else back * steps.h_mask[d]
    return dgx, dghn, dh0, dc0, dh


def _through(w_hh: Tensor, dgx: Tensor, dghn: Tensor | None) -> Tensor:
    """dgates W_hh, of the hidden side's gradients."""
    if dghn is None:
        return dgx @ w_hh
    H = dghn.shape[-1]
    return torch.addmm(dgx[:, : 2 * H] @ w_hh[: 2 * H], dghn, w_hh[2 * H :])


# ------------------------------------------------------------------ the weights' gradients, shared


class _Before:
    """h before each step, as the rows of products with dgates: pairs (rows of dgates, h), whose
    products add up to the gradient of W_hh."""

    def __init__(self, layer: _Layer, y: Tensor, steps: Steps) -> None:
        self.layer, self.steps = layer, steps
        self.y = y.view(y.shape[0], len(layer.weights), layer.h0.shape[2])
        self.index: Tensor | None = None

    def pairs(self, d: int) -> list[tuple[Any, Tensor]]:
        """(which rows of dgates, h there)."""
        steps, h0 = self.steps, self.layer.h0[d]
        mask = None if steps.h_mask is None else steps.h_mask[d]
        if steps.offsets is not None:
            return [(slice(None), self._packed(d, h0, mask))]
        y, B, N = self.y[:, d], h0.shape[0], self.y.shape[0]
        if N == 0:
            return [(slice(None), y)]
        backwards = bool(steps.reverse >> d & 1)
        h = y[B:] if backwards else y[: N - B]
        if mask is not None:
            h, h0 = (h.reshape(-1, *mask.shape) * mask).view(h.shape), h0 * mask
        inner = (slice(0, N - B) if backwards else slice(B, N), h)
        if not backwards:
            return [inner, (slice(0, B), h0)]
        if steps.lengths is None:
            return [inner, (slice(N - B, N), h0)]
        # A reversed sequence begins at its last step; one without steps takes row 0, which is zero.
        last = (steps.lengths.long() - 1).clamp(min=0) * B + torch.arange(B, device=h0.device)
        return [inner, (last, h0)]

    def _packed(self, d: int, h0: Tensor, mask: Tensor | None) -> Tensor:
        offsets = self.steps.offsets
        assert offsets is not None
        N, device = self.y.shape[0], h0.device
        counts = offsets.long().diff()
        rows = torch.arange(N, device=device)
        step = torch.bucketize(rows, offsets.long()[1:], right=True)
        slot = rows - offsets.long()[step]
        if self.steps.reverse >> d & 1:
            after = torch.cat((counts[1:], counts.new_zeros(1)))
            from_y, row = slot < after[step], rows + counts[step]
        else:
            from_y, row = step > 0, rows - counts[(step - 1).clamp(min=0)]
        index = torch.where(from_y, row, N + slot)
        h = torch.cat((self.y[:, d], h0)).index_select(0, index)
        return h if mask is None else h * mask[slot]


def _weight_gradients(
    wants: Callable[[int], bool], layer: _Layer, steps: Steps, saved: tuple[Tensor, ...],
    dgx: Tensor, dghn: Tensor, dh: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    y, gates, cells = saved
    found: list[Tensor | None] = []
    before = _Before(layer, y, steps)
    for d, (_, w_hh, b_ih, b_hh, w_hr) in enumerate(layer.weights):
        first = 1 + 5 * d
        d_n = dghn[d] if steps.cell == GRU else None
        found.append(mm(dgx[d].t(), layer.x) if wants(first) else None)
        found.append(
            _hidden_gradient(before.pairs(d), w_hh, dgx[d], d_n) if wants(first + 1) else None
        )
        sums = dgx[d].sum(0) if wants(first + 2) or wants(first + 3) else None
        found.append(sums if b_ih is not None and wants(first + 2) else None)
        of_h = None
        if sums is not None and b_hh is not None and wants(first + 3):
            # LSTM's and RNN's two biases have one gradient, in two tensors.
            of_h = (
                sums.clone() if d_n is None else torch.cat((sums[: 2 * d_n.shape[1]], d_n.sum(0)))
            )
        found.append(of_h)
        if w_hr is not None and wants(first + 4):
            found.append(mm(dh[d].t(), _projected(gates[d], cells[d], steps)))
        else:
            found.append(None)
    return found + [None] * (10 - len(found))


def _projected(gates: Tensor, cells: Tensor, steps: Steps) -> Tensor:
    """What W_hr was given: o tanh(c), 0 at rows that no sequence has (nobody wrote them)."""
    H = cells.shape[-1]
    m = gates[:, 3 * H :] * cells.tanh()
    if steps.lengths is None:
        return m
    here = torch.arange(steps.T, device=m.device)[:, None] < steps.lengths
    return torch.where(here.view(-1, 1), m, 0.0)


def _hidden_gradient(
    pairs: list[tuple[Any, Tensor]], w_hh: Tensor, dgx: Tensor, dghn: Tensor | None
) -> Tensor:
    out = torch.empty_like(w_hh)
    H = 0 if dghn is None else dghn.shape[1]
    parts = (
        [(out, dgx)] if dghn is None else [(out[: 2 * H], dgx[:, : 2 * H]), (out[2 * H :], dghn)]
    )
    for to, gradient in parts:
        rows, h = pairs[0]
        mm(gradient[rows].t(), h, out=to)
        for rows, h in pairs[1:]:
            addmm_(to, gradient[rows].t(), h)
    return out


def _bwd_impl(recurrence: Backward, *args: Any) -> tuple[Tensor, ...]:
    upstream, args = args[:3], args[3:]
    layer, saved = _Layer.of(args[:_N_TENSORS]), args[_N_TENSORS : _N_TENSORS + 3]
    steps, need = Steps(*args[_N_TENSORS + 3 : -1]), args[-1]
    upstream = tuple(None if g is None else g.contiguous() for g in upstream)
    dgx, dghn, dh0, dc0, dh = recurrence(upstream, saved, layer, steps)

    def wants(i: int) -> bool:
        return bool(need >> i & 1)

    grads: list[Tensor | None] = [None] * _N_TENSORS
    if layer.x.shape[0] == 0:  # no step, nothing saved
        grads = [None if t is None else torch.zeros_like(t) for t in args[:11]] + [dh0, dc0]
        return _every(grads, layer, need)
    if wants(0):
        dx = mm(dgx[0], layer.weights[0][0])
        grads[0] = dx if len(layer.weights) == 1 else addmm_(dx, dgx[1], layer.weights[1][0])
    grads[1:11] = _weight_gradients(wants, layer, steps, saved, dgx, dghn, dh)
    grads[11] = dh0 if wants(11) else None
    grads[12] = dc0 if wants(12) and layer.c0 is not None else None
    return _every(grads, layer, need)


def _every(grads: list[Tensor | None], layer: _Layer, need: int) -> tuple[Tensor, ...]:
    """All gradients; those that nobody wants are empty."""
    return tuple(
        layer.x.new_empty((0,)) if g is None or not need >> i & 1 else g
        for i, g in enumerate(grads)
    )


# ---------------------------------------------------------------------------- schema and autograd


def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    layer, steps, save = _Layer.of(args[:_N_TENSORS]), Steps(*args[_N_TENSORS:-1]), args[-1]
    x, h0, D = layer.x, layer.h0, len(layer.weights)
    N, lstm = x.shape[0], steps.cell == LSTM
    H = layer.weights[0][1].shape[0] // GATES[steps.cell]
    gated = save and steps.cell in (LSTM, GRU)
    return (
        x.new_empty((N, D * h0.shape[2])),
        x.new_empty(h0.shape),
        x.new_empty((D, h0.shape[1], H) if lstm else (0,)),
        x.new_empty((D, N, 4 * H) if gated else (0,)),
        x.new_empty((D, N, H) if save and lstm else (0,)),
    )


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors, need = args[3 : 3 + _N_TENSORS], args[-1]
    nothing = tensors[0].new_empty((0,))
    return tuple(
        t.new_empty(t.shape) if t is not None and need >> i & 1 else torch.empty_like(nothing)
        for i, t in enumerate(tensors)
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, _, _, gates, cells = output
    tensors, steps = inputs[:_N_TENSORS], Steps(*inputs[_N_TENSORS : _N_TENSORS + _N_STEPS])
    ctx.set_materialize_grads(False)
    ctx.numbers = steps[3:]
    ctx.save_for_backward(*tensors, y, gates, cells, *steps[:3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[3:])
    ctx.need = _need(ctx.needs_input_grad[:_N_TENSORS])
    _remember(ctx, inputs, output)


def _need(needs: Any) -> int:
    return sum(bool(n) << i for i, n in enumerate(needs))


class _Ops:
    """One backend's pair of ops: fake, autograd for the compilers, autograd for eager."""

    def __init__(self, suffix: str) -> None:
        self.fwd, self.bwd = (
            getattr(torch.ops.fastattn, f"recurrent_layer{suffix}_{way}").default
            for way in ("fwd", "bwd")
        )
        self.function = make_function(
            "_RecurrentLayer", forward=self._eager_forward, backward=self._eager_backward
        )
        name = f"fastattn::recurrent_layer{suffix}"
        register_fake(f"{name}_fwd", _fwd_fake, lib=lib)
        register_fake(f"{name}_bwd", _bwd_fake, lib=lib)
        torch.library.register_autograd(
            f"{name}_fwd", self._backward, setup_context=_setup, lib=lib
        )

    def _gradients(self, ctx: Any, upstream: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        if all(g is None for g in upstream):
            return (None,) * _N_TENSORS
        need = ctx.need
        grads = self.bwd(*upstream, *ctx.saved_tensors, *ctx.numbers, need)
        return tuple(g if need >> i & 1 else None for i, g in enumerate(grads))

    def _backward(self, ctx: Any, dy: Any, dh_n: Any, dc_n: Any, *_: Any) -> tuple[Any, ...]:
        return (*self._gradients(ctx, (dy, dh_n, dc_n)), *(None,) * (_N_STEPS + 1))

    def _eager_forward(self, ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, steps = args
        ctx.need = _need(ctx.needs_input_grad[:_N_TENSORS])
        inputs = (*tensors, *steps, True)
        output = below_autograd(self.fwd, inputs)
        _remember(ctx, inputs, output)
        return output[:3]  # type: ignore[no-any-return]

    def _eager_backward(self, ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled() or all(g is None for g in upstream):
            return (*self._gradients(ctx, upstream), None)
        tensors, steps = ctx.saved_tensors[:_N_TENSORS], ctx.saved_tensors[_N_TENSORS + 3 :]
        needs = tuple(bool(ctx.need >> i & 1) for i in range(_N_TENSORS))

        def formula(*given: Tensor | None) -> tuple[Tensor, ...]:
            return _by_reference(given, Steps(*steps, *ctx.numbers))

        return (*differentiable_gradients(formula, tensors, needs, upstream), None)


def _by_reference(tensors: Sequence[Any], steps: Steps) -> tuple[Tensor, ...]:
    x, weights, h0, c0 = _Layer.of(tensors)
    return reference.layer(x, weights, h0, c0, *steps)


def backward_by_reference(*args: Any) -> tuple[Tensor, ...]:
    """The results of ``recurrent_layer_bwd``, by plain PyTorch."""
    upstream, tensors, steps, need = (
        args[:3], args[3 : 3 + _N_TENSORS], Steps(*args[_N_TENSORS + 6 : -1]), args[-1],
    )  # fmt: skip
    needs = tuple(bool(need >> i & 1) for i in range(_N_TENSORS))
    with recording():
        leaves = tuple(
            t.detach().requires_grad_() if n and t is not None else t
            for t, n in zip(tensors, needs, strict=True)
        )
        pairs = [
            (o, g)
            for o, g in zip(_by_reference(leaves, steps), upstream, strict=True)
            if g is not None
        ]
        wanted = [t for t, n in zip(leaves, needs, strict=True) if n and t is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
            )
        )
    out = []
    for t, n in zip(leaves, needs, strict=True):
        if not n or t is None:
            out.append(tensors[0].new_empty((0,)))
            continue
        g = next(found)
        out.append(torch.zeros_like(t) if g is None else g.contiguous())
    return tuple(out)


_OPS = {backend: _Ops(suffix) for backend, suffix in _SUFFIXES.items()}

lib.impl("recurrent_layer_fwd", _cpu_fwd, "CPU")
lib.impl("recurrent_layer_bwd", lambda *args: _bwd_impl(_cpu_recurrence_bwd, *args), "CPU")


def _may_step(x: Tensor, weights: Sequence[Weights], steps: Steps, backend: str) -> bool:
    """Whether recurrent_step.py serves a call of one step; no compiler or fake mode looks on."""
    return (
        backend == "cpu"
        and len(weights) == 1
        and weights[0][4] is None
        and steps[:3] == (None, None, None)
        and x.shape[0] > 0
        and eager(x)
    )


def layer(
    x: Tensor,
    weights: Sequence[Weights],
    h0: Tensor,
    c0: Tensor | None,
    h_mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    T: int,
    cell: int,
    reverse: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer by a backend's kernels, with autograd: y (rows, D P), h_n and c_n (LSTM's; else
    empty). See reference/recurrent.py; weights a direction: w_ih, w_hh, b_ih, b_hh, w_hr."""
    steps = Steps(h_mask, offsets, lengths, T, cell, reverse)
    if backend == "reference" or transformed():
        return reference.layer(x, weights, h0, c0, *steps)
    if T == 1 and _may_step(x, weights, steps, backend):
        inputs = (x, *weights[0][:4], h0, c0)
        if wants_grad(*inputs):
            return recurrent_step.function.apply(*inputs, cell)  # type: ignore[no-any-return]
        return recurrent_step.run(*inputs, cell, save=False)[:3]  # type: ignore[return-value]
    second = weights[1] if len(weights) > 1 else (None,) * 5
    tensors = (x, *weights[0], *second, h0, c0)
    ops = _OPS[backend]
    if torch.compiler.is_compiling():
        return ops.fwd(*tensors, *steps, wants_grad(*tensors))[:3]  # type: ignore[no-any-return]
    if wants_grad(*tensors):
        return ops.function.apply(*tensors, steps)  # type: ignore[no-any-return]
    return below_autograd(ops.fwd, (*tensors, *steps, False))[:3]  # type: ignore[no-any-return]
