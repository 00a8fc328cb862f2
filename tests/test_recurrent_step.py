"""The cells' one op a step, fp32: every instruction set, threads, gradients, wrong calls."""

from typing import Any

import pytest
import torch
from recurrent_layers import CELLS, weights_for
from tools import assert_within, one_thread
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.backends import cpu_isas, force_cpu_isa
from fastattn.ops import recurrent_step
from fastattn.reference.recurrent import GRU, LSTM

# B, I, H: 13 is 8 + 4 + 1 of AVX-512; tiles of columns and of rows that do not come out even.
SIZES = ((1, 32, 48), (5, 16, 80), (13, 80, 112), (16, 208, 16))


def tensors(cell: str, B: int, inputs: int, H: int, bias: bool = True) -> list[Tensor]:
    """x, h, c (LSTM's), then the weights."""
    op, _ = CELLS[cell]
    weights = weights_for(op, inputs, H, bias=bias)
    states = [torch.randn(B, H) for _ in range(2 if op == "lstm" else 1)]
    return [torch.randn(B, inputs), *states, *weights]


def step(
    where: Any, cell: str, given: list[Tensor], wanted: tuple[int, ...] | None = None, **more: Any
) -> dict[str, Tensor]:
    """The new states and the gradients of `wanted`, by position; None: of all."""
    op, chosen = CELLS[cell]
    wanted = tuple(range(len(given))) if wanted is None else wanted
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(given)]
    count = 2 if op == "lstm" else 1
    state = tuple(leaves[1:3]) if op == "lstm" else leaves[1]
    out = getattr(where, f"{op}_cell")(leaves[0], state, *leaves[1 + count :], **chosen, **more)
    out = out if isinstance(out, tuple) else (out,)
    make = torch.Generator().manual_seed(3)
    upstream = [torch.randn(o.shape, generator=make).to(o.dtype) for o in out]
    grads = torch.autograd.grad(out, [leaves[i] for i in wanted], upstream)
    named = {f"d{i}": g for i, g in zip(wanted, grads, strict=True)}
    return {n: t.detach() for n, t in {**dict(zip("hc", out, strict=False)), **named}.items()}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", cpu_isas())
def test_instruction_sets(isa: str, cell: str, size: tuple[int, int, int]) -> None:
    given = tensors(cell, *size, bias=size[0] != 5)
    assert recurrent_step.fused(given[0], given[1])
    with force_cpu_isa(isa):
        got = step(fastattn, cell, given, backend="cpu")
    with one_thread():
        right = step(reference, cell, [t.double() for t in given])
        plain = step(reference, cell, given)
    assert got.keys() == right.keys()
    for name, value in right.items():
        assert_within(name, got[name], value, [plain[name]])


def test_what_it_leaves_to_the_library() -> None:
    """More sequences, other features, other dtypes, none."""
    x, h = torch.randn(16, 32), torch.randn(16, 16)
    assert recurrent_step.fused(x, h)
    for other, state in (
        (torch.randn(17, 32), torch.randn(17, 16)), (x[:, :24], h), (x, torch.randn(16, 24)),
        (x[:0], h[:0]), (x.bfloat16(), h.bfloat16()), (x.double(), h.double()),
    ):  # fmt: skip
        assert not recurrent_step.fused(other, state)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_thread_count_cannot_be_seen(cell: str) -> None:
    given = tensors(cell, 8, 256, 192)
    shared = step(fastattn, cell, given)
    with one_thread():
        alone = step(fastattn, cell, given)
    again = step(fastattn, cell, given)
    for name, value in shared.items():
        assert torch.equal(alone[name], value), name
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3, 5), (4, 6), (5, 6)], ids=str)
def test_gradients_of_a_few(wanted: tuple[int, ...]) -> None:
    """What nobody asks for is not made; what is, is the same."""
    given = tensors("lstm", 4, 32, 16)
    every, few = step(fastattn, "lstm", given), step(fastattn, "lstm", given, wanted)
    assert few.keys() == {"h", "c", *(f"d{i}" for i in wanted)}
    for name, value in few.items():
        assert torch.equal(every[name], value), name


def test_of_one_state_alone() -> None:
    """A loss of h, or of c: the other upstream gradient is absent, not zero."""
    given = [t.requires_grad_() for t in tensors("lstm", 4, 32, 16)]
    for i in range(2):
        got = torch.autograd.grad(
            fastattn.lstm_cell(given[0], (given[1], given[2]), *given[3:])[i].sum(), given,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        right = torch.autograd.grad(
            torch.ops.aten.lstm_cell(given[0], given[1:3], *given[3:])[i].sum(), given,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        for a, b in zip(got, right, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_strides_and_expanded_gradients(cell: str) -> None:
    given = tensors(cell, 6, 32, 48)
    right = step(fastattn, cell, given)
    turned = [t.t().contiguous().t() if t.dim() == 2 else t.repeat(2)[: len(t)] for t in given]
    got = step(fastattn, cell, turned)
    for name, value in right.items():
        assert torch.equal(got[name], value), name
    leaf = given[0].clone().requires_grad_()
    state = (given[1], given[2]) if cell == "lstm" else given[1]
    out = getattr(fastattn, f"{cell}_cell")(leaf, state, *given[3 if cell == "lstm" else 2 :])
    (out[0] if cell == "lstm" else out).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_double_backward(cell: str) -> None:
    given = [t.requires_grad_() for t in tensors(cell, 3, 16, 32)]
    found = []
    for backend in ("cpu", "reference"):
        state = (given[1], given[2]) if cell == "lstm" else given[1]
        op = getattr(fastattn, f"{cell}_cell")
        out = op(given[0], state, *given[3 if cell == "lstm" else 2 :], backend=backend)
        h = out[0] if cell == "lstm" else out
        (dx,) = torch.autograd.grad(h.pow(2).sum(), given[0], create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), given))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def op_arguments() -> dict[str, Any]:
    x, h, c, w_ih, w_hh, b_ih, b_hh = tensors("lstm", 3, 16, 32)
    return {"x": x, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh, "h": h, "c": c,
            "cell": LSTM}  # fmt: skip


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "cell": ({"cell": 4}, "cell must be 0 to 3"),
    "x": ({"x": torch.randn(3, 2, 16)}, r"x must have shape \(B, I\)"),
    "no_sequence": ({"x": torch.randn(0, 16), "h": torch.randn(0, 32)}, "must be a sequence"),
    "features": ({"x": torch.randn(3, 8)}, "I and H must be multiples of 16"),
    "h": ({"h": torch.randn(2, 32)}, r"h must have shape \(B, H\), got \(2, 32\)"),
    "w_ih": ({"w_ih": torch.randn(128, 32)}, r"w_ih must have shape \(G H, I\), got"),
    "w_hh": ({"w_hh": torch.randn(96, 32)}, r"w_hh must have shape \(G H, H\), got"),
    "b_ih": ({"b_ih": torch.randn(96)}, "b_ih must have shape"),
    "b_hh": ({"b_hh": torch.randn(128, 1)}, "b_hh must have shape"),
    "no_c": ({"c": None}, "c must be given"),
    "c": ({"c": torch.randn(3, 16)}, "c must have shape"),
    "dtype": ({"h": torch.randn(3, 32).double()}, "all operands must be float32"),
    "gru": ({"cell": GRU}, "w_ih must have shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_of_the_op(name: str) -> None:
    """What a direct call could read or write beyond a tensor."""
    change, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastattn.recurrent_step_cpu_fwd(*{**op_arguments(), **change}.values(), True)


@pytest.mark.parametrize(
    ("position", "shape"), [(0, (3, 16)), (1, (2, 32)), (2, (3, 16)), (3, (3, 16)), (4, (3, 96))]
)
def test_wrong_calls_of_the_backward(position: int, shape: tuple[int, ...]) -> None:
    """dh, dc, and what the forward saved."""
    given = list(op_arguments().values())
    others = [torch.randn(3, 32), torch.randn(3, 32)]
    others += torch.ops.fastattn.recurrent_step_cpu_fwd(*given, True)
    others[position] = torch.randn(shape)
    with pytest.raises(RuntimeError, match="fastattn::recurrent_step: .* must"):
        torch.ops.fastattn.recurrent_step_cpu_bwd(*others[:2], *given[:7], *others[2:], LSTM, 127)
