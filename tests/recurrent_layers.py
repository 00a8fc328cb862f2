"""What the tests of the recurrent ops share: calls of lstm, gru and rnn, and the oracle's verdict.

A `Call` is one call of a public function with its tensors. `judge` holds outputs and gradients of a
backend to the fp64 oracle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rule import Cast, Draws, assert_within, one_thread
from tools import values
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastattn
from fastattn import reference

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
# Every kind of cell: the function, and arguments that choose it.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("lstm", {}),
    "gru": ("gru", {}),
    "rnn_tanh": ("rnn", {}),
    "rnn_relu": ("rnn", {"nonlinearity": "relu"}),
}


def weights_for(
    op: str, inputs: int, H: int, *, L: int = 1, D: int = 1, bias: bool = True, proj: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """torch's flat list, initialised as torch's modules do."""
    P, G, flat = proj or H, GATES[op], []
    for layer in range(L):
        for _ in range(D):
            shapes: list[tuple[int, ...]] = [(G * H, P * D if layer else inputs), (G * H, P)]
            shapes += [(G * H,), (G * H,)] if bias else []
            shapes += [(P, H)] if proj else []
            flat += [((torch.rand(s) * 2 - 1) * H**-0.5).to(dtype) for s in shapes]
    return flat


@dataclass(frozen=True)
class Call:
    op: str
    x: Tensor
    weights: list[Tensor]
    state: tuple[Tensor, ...] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    packed: tuple[int, ...] | None = None  # lengths: x is packed before the call
    frozen: tuple[str, ...] = ()

    def with_(self, **kwargs: Any) -> "Call":
        return replace(self, kwargs={**self.kwargs, **kwargs})

    def leaves(self, cast: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
        tensors = {"x": self.x, **{f"w{i}": w for i, w in enumerate(self.weights)}}
        tensors |= dict(zip("hc", self.state or (), strict=False))
        return {
            n: cast(x.detach()).requires_grad_(n not in self.frozen) for n, x in tensors.items()
        }

    def run(self, where: Any, leaves: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
        """The outputs by name; where: fastattn or fastattn.reference."""
        x: Any = leaves["x"]
        if self.packed is not None:
            x = pack_padded_sequence(x, torch.tensor(self.packed), enforce_sorted=False)
        state: Any = None if self.state is None else leaves["h"]
        if self.op == "lstm" and self.state is not None:
            state = (leaves["h"], leaves["c"])
        weights = [leaves[f"w{i}"] for i in range(len(self.weights))]
        y, last = getattr(where, self.op)(x, state, weights, **self.kwargs, **more)
        y = y.data if isinstance(y, PackedSequence) else y
        h_n, c_n = last if self.op == "lstm" else (last, None)
        return {"y": y, "h_n": h_n} | ({} if c_n is None else {"c_n": c_n})

    def results(
        self, where: Any, cast: Callable[[Tensor], Tensor] = lambda x: x, **more: Any
    ) -> dict[str, Tensor]:
        """Outputs and gradients of all leaves under a fixed upstream gradient."""
        leaves = self.leaves(cast)
        outputs = self.run(where, leaves, **more)
        gen = torch.Generator(self.x.device).manual_seed(7)
        upstream = [
            torch.randn(x.shape, generator=gen).to(self.x.dtype).to(x.dtype)
            for x in outputs.values()
        ]
        wanted = {n: x for n, x in leaves.items() if x.requires_grad}
        # Without steps the last states are constants, where none were given.
        pairs = [(o, g) for o, g in zip(outputs.values(), upstream, strict=True) if o.requires_grad]
        grads = torch.autograd.grad(
            [o for o, _ in pairs], [*wanted.values()], [g for _, g in pairs], allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        named = {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}
        return {n: x.detach() for n, x in outputs.items()} | named


def make(
    cell: str = "lstm", *, T: int = 5, B: int = 3, inputs: int = 4, H: int = 7, L: int = 1,
    D: int = 1, bias: bool = True, proj: int = 0, dtype: torch.dtype = torch.float32,
    kind: str = "normal", state: bool = True, one: bool = False,
    packed: Sequence[int] | None = None, **kwargs: Any,
) -> Call:  # fmt: skip
    """A call on random tensors; D = 2 is bidirectional."""
    op, chosen = CELLS[cell]
    kwargs = {**chosen, **kwargs}
    if D == 2:
        kwargs["bidirectional"] = True
    weights = weights_for(op, inputs, H, L=L, D=D, bias=bias, proj=proj, dtype=dtype)
    shape = (B, T, inputs) if kwargs.get("batch_first") else (T, B, inputs)
    x = values((T, inputs) if one else shape, dtype, kind)
    shapes = [(L * D, *(() if one else (B,)), n) for n in (proj or H, H)]
    states = tuple(torch.randn(s).to(dtype) for s in shapes[: 2 if op == "lstm" else 1])
    return Call(op, x, weights, states if state else None, kwargs, packed and tuple(packed))


def judge(call: Call, backend: str, **more: Any) -> dict[str, Tensor]:
    """Hold outputs and gradients of a backend to the rule."""
    got = call.results(fastattn, backend=backend, **more)
    with one_thread():
        right = call.results(reference, Tensor.double)
    assert got.keys() == right.keys()
    hold(got, right, lambda cast: call.results(reference, cast), jumps(call.kwargs, call.x.dtype))
    for name, x in got.items():
        assert x.dtype == call.x.dtype, name
    return got


def jumps(kwargs: dict[str, Any], dtype: torch.dtype) -> bool:
    """The derivative of relu jumps at 0, where 16 bits decide by chance."""
    return kwargs.get("nonlinearity") == "relu" and dtype != torch.float32


def hold(
    got: dict[str, Tensor],
    right: dict[str, Tensor],
    plain: Callable[[Cast], dict[str, Tensor]],
    outputs_alone: bool,
) -> None:
    draws = Draws(plain)
    for name, x in right.items():
        if not (outputs_alone and name.startswith("d")):
            assert_within(name, got[name], x, draws[name])
