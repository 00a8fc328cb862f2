"""Calls of lstm, gru, rnn and their cells."""

from typing import Any

import torch
from hypothesis import strategies as st
from recurrent_layers import CELLS, Call, hold, judge, jumps, make, weights_for
from rule import Cast, as_is, one_thread
from tools import DTYPES
from torch import Tensor

import fastattn
from fuzz import spoil
from fuzz.case import Valid, backward_of

_SIZES = st.one_of(st.integers(1, 8), st.integers(9, 40), st.sampled_from([64, 128]))
_BAD_WEIGHTS: spoil.Ways = {
    **spoil.constants("nonsense", [], [1.0], 3),
    "one missing": lambda w: w[:-1],
    "one of another dtype": lambda w: [*w[:-1], w[-1].to(torch.float64)],
    "one too long": lambda w: [*w[:-1], spoil.longer(w[-1])],
    "a tensor": lambda w: w[0],
}
_BAD_LENGTHS: spoil.Ways = {
    **spoil.constants("nonsense", 3, [1.5]),
    "negative": lambda x: torch.full_like(x, -1),
    "too large": lambda x: torch.full_like(x, 10**6),
    "floats": lambda x: x.double(),
    "longer": spoil.longer,
}
_ROLES: dict[str, spoil.Ways] = {
    "x": spoil.FLOAT,
    "state": {
        **spoil.constants("nonsense", 3, [1.0]),
        "one more": lambda s: (*s, s[0]) if isinstance(s, tuple) else (s, s, s),
    },
    "weights": _BAD_WEIGHTS,
    "lengths": _BAD_LENGTHS,
    "dropout_p": spoil.PROBABILITY,
    "recurrent_dropout_p": spoil.PROBABILITY,
    "backend": spoil.BACKEND,
}


@st.composite
def recurrent(draw: Any) -> Valid:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    cell, dtype = draw(st.sampled_from(sorted(CELLS))), draw(st.sampled_from(DTYPES))
    T, B, D = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 2]))
    H = draw(_SIZES)
    more: dict[str, Any] = {"batch_first": draw(st.booleans())}
    form = draw(st.sampled_from(["plain", "plain", "one", "lengths"]))
    if form == "lengths":
        more["lengths"] = torch.randint(0, T + 1, (B,))
    if draw(st.integers(0, 3)) == 0:
        more |= {"recurrent_dropout_p": 0.3, "seed": draw(st.integers(0, 9))}
    proj = draw(st.integers(1, H)) if cell == "lstm" and draw(st.integers(0, 3)) == 0 else 0
    call = make(
        cell, T=T, B=B, inputs=draw(_SIZES), H=H, L=draw(st.sampled_from([1, 1, 2])), D=D,
        bias=draw(st.booleans()), proj=proj if proj != H else 0, dtype=dtype,
        state=draw(st.booleans()), one=form == "one", **more,
    )  # fmt: skip
    return Valid(
        getattr(fastattn, call.op), _args(call), lambda: judge(call, "cpu"), _roles(call),
        lambda: _forward(call),
    )  # fmt: skip


def _args(call: Call) -> dict[str, Any]:
    state: Any = call.state
    if state is not None and call.op != "lstm":
        state = state[0]
    return {"x": call.x, "state": state, "weights": list(call.weights), **call.kwargs}


def _roles(call: Call) -> dict[str, spoil.Ways]:
    roles = dict(_ROLES)
    if call.op == "rnn":
        roles["nonlinearity"] = spoil.CHOICE
    if call.x.dim() == 2 or "lengths" not in call.kwargs:
        del roles["lengths"]
    if call.state is None:
        roles["state"] = spoil.constants("nonsense", 3, [1.0])
    return roles


def _forward(call: Call) -> None:
    leaves = call.leaves()
    backward_of([*call.run(fastattn, leaves).values()])


_CELL_ROLES: dict[str, spoil.Ways] = {
    "x": spoil.FLOAT,
    "w_ih": {**spoil.VECTOR, **spoil.DEEPER},
    "w_hh": {**spoil.VECTOR, **spoil.DEEPER},
    "b_ih": spoil.VECTOR,
    "b_hh": spoil.VECTOR,
    "backend": spoil.BACKEND,
}


@st.composite
def cells(draw: Any) -> Valid:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    cell, dtype = draw(st.sampled_from(sorted(CELLS))), draw(st.sampled_from(DTYPES))
    op, more = CELLS[cell]
    B, inputs, H = draw(st.integers(1, 40)), draw(_SIZES), draw(_SIZES)
    weights = weights_for(op, inputs, H, bias=draw(st.booleans()), dtype=dtype)
    tensors = dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights, strict=False))
    tensors["x"] = torch.randn(B, inputs).to(dtype)
    if draw(st.booleans()):
        tensors |= {n: torch.randn(B, H).to(dtype) for n in ("hc" if op == "lstm" else "h")}
    fn = getattr(fastattn, f"{op}_cell")
    return Valid(
        fn, _cell_args(op, tensors, more), lambda: _judge_cell(op, tensors, more), _CELL_ROLES
    )


def _cell_args(op: str, tensors: dict[str, Tensor], more: dict[str, Any]) -> dict[str, Any]:
    args: dict[str, Any] = {n: x for n, x in tensors.items() if n not in "hc"}
    h = tensors.get("h")
    args["state"] = (h, tensors["c"]) if op == "lstm" and h is not None else h
    return {**args, **more}


def _judge_cell(op: str, tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
    def results(where: Any, cast: Cast) -> dict[str, Tensor]:
        leaves = {n: cast(x.detach()).requires_grad_() for n, x in tensors.items()}
        out = getattr(where, f"{op}_cell")(**_cell_args(op, leaves, more))
        outputs = out if isinstance(out, tuple) else (out,)
        gen = torch.Generator().manual_seed(7)
        up = [
            torch.randn(o.shape, generator=gen).to(tensors["x"].dtype).to(o.dtype) for o in outputs
        ]
        grads = torch.autograd.grad(outputs, [*leaves.values()], up)
        named = {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
        return {f"out{i}": o.detach() for i, o in enumerate(outputs)} | named

    got = results(fastattn, as_is)
    with one_thread():
        right = results(fastattn.reference, Tensor.double)
    hold(
        got, right, lambda cast: results(fastattn.reference, cast),
        jumps(more, tensors["x"].dtype),
    )  # fmt: skip
