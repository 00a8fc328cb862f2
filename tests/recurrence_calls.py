"""Calls of the recurrence itself on the GPU kernels (Triton's, or CUDA C++'s), judged against
fastattn.reference.recurrent in fp64: error <= 2 x that of the same reference in the call's dtype
(plain PyTorch) + floor, as rule.py has it. Whole layers are recurrent_layers.py's.

Gradients of weights are GEMMs of others over what the kernels return: here they are formed in fp64
from it, so that dghn and dh, which no output shows otherwise, are judged too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from rule import Draws, assert_within, one_thread
from tools import Result
from torch import Tensor

from fastattn.ops import recurrent_cuda, recurrent_triton
from fastattn.reference import recurrent as reference

LSTM, GRU, RNN_TANH, RNN_RELU = (
    reference.LSTM,
    reference.GRU,
    reference.RNN_TANH,
    reference.RNN_RELU,
)
CELLS = {"lstm": LSTM, "gru": GRU, "rnn_tanh": RNN_TANH, "rnn_relu": RNN_RELU}


def cuda(tier: int) -> SimpleNamespace:
    """The CUDA C++ kernels, from that tier on."""
    of = recurrent_cuda
    return SimpleNamespace(
        forward=partial(of.forward, tier=tier), backward=partial(of.backward, tier=tier)
    )


@dataclass(frozen=True)
class Call:
    """One call. tensors: gx, h0, and by direction w_hh0, w_hh1, b_hn0, w_hr0 ..; c0 and h_mask
    where there are some."""

    cell: int
    T: int
    tensors: dict[str, Tensor]
    offsets: Tensor | None = None
    lengths: Tensor | None = None
    reverse: int = 0
    upstream: tuple[str, ...] = ("y", "h_n", "c_n")
    poison: bool = field(default=False)  # dy is NaN at rows that do not exist

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        D, B, P = self.tensors["h0"].shape
        return D, B, self.tensors["w_hh0"].shape[0] // reference.GATES[self.cell], P

    def of(self, name: str, tensors: dict[str, Tensor]) -> list[Tensor]:
        return [tensors[f"{name}{d}"] for d in range(2) if f"{name}{d}" in tensors]

    def arguments(self, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """As the oracle and the kernels' forward take them, in their order; with these tensors."""
        x = self.tensors if tensors is None else tensors
        lists = {n: self.of(n, x) for n in ("w_hh", "b_hn", "w_hr")}
        states = {n: x.get(n) for n in ("h0", "c0", "h_mask")}
        rows = {"offsets": self.offsets, "lengths": self.lengths, "T": self.T}
        return {"gx": x["gx"], **lists, **states, **rows, "cell": self.cell,
                "reverse": self.reverse}  # fmt: skip

    def rows(self, t: int) -> tuple[Tensor, Tensor]:
        """Rows of gx and y at time t, and the sequences that have them."""
        B = self.sizes[1]
        first, n = t * B, B
        if self.offsets is not None:
            first, n = int(self.offsets[t]), int(self.offsets[t + 1] - self.offsets[t])
        b = torch.arange(n)
        if self.lengths is not None:
            b = b[self.lengths[:n] > t]
        return first + b, b

    def there(self) -> Tensor:
        """(N,) bool: the rows that exist."""
        found = torch.zeros(self.tensors["gx"].shape[1], dtype=torch.bool)
        for t in range(self.T):
            found[self.rows(t)[0]] = True
        return found

    def upstreams(self) -> dict[str, Tensor]:
        D, B, H, P = self.sizes
        gen = torch.Generator().manual_seed(7)
        shapes = {"y": (self.tensors["gx"].shape[1], D * P), "h_n": (D, B, P), "c_n": (D, B, H)}
        made = {n: torch.randn(s, generator=gen) for n, s in shapes.items()}
        if self.cell != LSTM:
            del made["c_n"]
        dtype = self.tensors["gx"].dtype
        made = {n: x.to(dtype) for n, x in made.items() if n in self.upstream}
        if self.poison and "y" in made:
            made["y"][~self.there()] = torch.nan
        return made


def by_reference(call: Call, cast: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
    """Outputs and gradients by plain autograd."""
    x = {n: cast(t.detach()).requires_grad_(n != "h_mask") for n, t in call.tensors.items()}
    outs = reference.recurrence(**call.arguments(x))
    outputs = dict(zip(("y", "h_n", "c_n"), outs, strict=True))
    up = replace(call, poison=False).upstreams()
    wanted = {n: t for n, t in x.items() if t.requires_grad}
    kept = [n for n in up if outputs[n].requires_grad]
    grads = torch.autograd.grad(
        [outputs[n] for n in kept], list(wanted.values()), [cast(up[n]) for n in kept],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    if call.cell != LSTM:
        del outputs["c_n"]
    named = {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}
    return {n: t.detach() for n, t in {**outputs, **named}.items()}


def forward(call: Call, save: bool = True, kernels: Any = recurrent_triton) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = kernels.forward(**call.arguments(), save=save)
    return found


def backward(
    call: Call, saved: Sequence[Tensor], kernels: Any = recurrent_triton
) -> dict[str, Tensor]:
    """saved: y, gates, cells. The results by name."""
    up, given = call.upstreams(), call.arguments()
    del given["gx"], given["b_hn"]
    found = kernels.backward(up.get("y"), up.get("h_n"), up.get("c_n"), *saved, **given)
    return dict(zip(("dgx", "dghn", "dh0", "dc0", "dh"), found, strict=True))


def run(call: Call, kernels: Any = recurrent_triton) -> dict[str, Tensor]:
    """By the kernels, under the names of ``by_reference``."""
    y, h_n, c_n, gates, cells = forward(call, kernels=kernels)
    grads = backward(call, (y, gates, cells), kernels)
    _shapes(call, y, h_n, c_n, grads)
    made = {"y": y, "h_n": h_n, "c_n": c_n, **{n: grads[n] for n in ("dgx", "dh0", "dc0")}}
    if call.cell != LSTM:
        del made["c_n"], made["dc0"]
    return {**made, **_of_weights(call, y, gates, cells, grads)}


def _shapes(call: Call, y: Tensor, h_n: Tensor, c_n: Tensor, grads: dict[str, Tensor]) -> None:
    D, B, H, P = call.sizes
    N = call.tensors["gx"].shape[1]
    lstm, gru = call.cell == LSTM, call.cell == GRU
    right = {
        "y": (N, D * P), "h_n": (D, B, P), "c_n": (D, B, H) if lstm else (0,),
        "dgx": tuple(call.tensors["gx"].shape), "dghn": (D, N, H) if gru else (0,),
        "dh0": (D, B, P), "dc0": (D, B, H) if lstm else (0,),
        "dh": (D, N, P) if "w_hr0" in call.tensors else (0,),
    }  # fmt: skip
    got = {"y": y, "h_n": h_n, "c_n": c_n, **grads}
    assert {n: tuple(x.shape) for n, x in got.items()} == right
    assert {x.dtype for x in got.values()} == {call.tensors["gx"].dtype}
    missing = ~call.there()
    for name in ("dgx", "dghn", "dh"):
        assert not grads[name].numel() or not grads[name][:, missing].any(), name
    assert not y[missing].any()


def _of_weights(
    call: Call, y: Tensor, gates: Tensor, cells: Tensor, grads: dict[str, Tensor]
) -> dict[str, Tensor]:
    """dw_hh, db_hn and dw_hr of each direction: sums in fp64, then in the call's dtype."""
    D, _, H, P = call.sizes
    made = {}
    mask = call.tensors.get("h_mask")
    for d in range(D):
        dg = grads["dgx"][d].double()
        if call.cell == GRU:
            dg = torch.cat((dg[:, : 2 * H], grads["dghn"][d].double()), -1)
        h = call.tensors["h0"][d].double()
        dw = torch.zeros(dg.shape[1], P, dtype=torch.float64)
        for t in reversed(range(call.T)) if call.reverse >> d & 1 else range(call.T):
            rows, b = call.rows(t)
            dw += dg[rows].T @ (h if mask is None else h * mask[d].double())[b]
            h = h.index_copy(0, b, y[rows, d * P : (d + 1) * P].double())
        made[f"dw_hh{d}"] = dw
        if f"b_hn{d}" in call.tensors:
            made[f"db_hn{d}"] = grads["dghn"][d].double().sum(0)
        if f"w_hr{d}" in call.tensors:
            rows = call.there()
            m = gates[d, rows, 3 * H :].double() * torch.tanh(cells[d, rows].double())
            made[f"dw_hr{d}"] = grads["dh"][d, rows].double().T @ m
    return {n: x.to(y.dtype) for n, x in made.items()}


def judge(call: Call, kernels: Any = recurrent_triton) -> Result:
    """Run the call; hold outputs and gradients to the rule."""
    got = run(call, kernels)
    with one_thread():
        right = by_reference(call, lambda x: x.double())
    assert set(got) == set(right)
    plain = Draws(lambda cast: by_reference(call, cast))
    for name, x in right.items():
        assert_within(name, got[name], x, plain[name])
    return Result({n: got[n] for n in ("y", "h_n")}, {n: x for n, x in got.items() if n[0] == "d"})


def call(
    cell: int = LSTM,
    T: int = 4,
    B: int = 5,
    H: int = 20,
    D: int = 1,
    P: int | None = None,
    dtype: torch.dtype = torch.float32,
    reverse: int | None = None,
    lengths: Sequence[int] | None = None,
    packed: Sequence[int] | None = None,
    mask: bool = False,
    bias: bool = True,
    offset_dtype: torch.dtype = torch.int64,
    **more: object,
) -> Call:
    """packed: the lengths of the B sequences, longest first; they set T and B."""
    offsets = None
    if packed is not None:
        T, B = max(packed), len(packed)
        steps = [sum(n > t for n in packed) for t in range(T)]
        offsets = torch.tensor([0, *steps]).cumsum(0).to(offset_dtype)
    N = T * B if offsets is None else int(offsets[-1])
    gates, features = reference.GATES[cell], H if P is None else P

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape)).to(dtype)

    tensors = {"gx": normal(D, N, gates * H), "h0": normal(D, B, features)}
    for d in range(D):
        tensors[f"w_hh{d}"] = normal(gates * H, features, scale=features**-0.5)
        if cell == GRU and bias:
            tensors[f"b_hn{d}"] = normal(H)
        if P is not None:
            tensors[f"w_hr{d}"] = normal(P, H, scale=H**-0.5)
    if cell == LSTM:
        tensors["c0"] = normal(D, B, H)
    if mask:
        tensors["h_mask"] = ((torch.rand(D, B, features) > 0.3) / 0.7).to(dtype)
    return Call(
        cell, T, tensors, offsets, None if lengths is None else torch.tensor(lengths),
        (D - 1) * 2 if reverse is None else reverse, **more,
    )  # fmt: skip
