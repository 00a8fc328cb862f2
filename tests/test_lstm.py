"""lstm and lstm_cell: what the other recurrent ops have not, wrong calls, random combinations."""

import os
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrent_layers import CELLS, Call, judge, make, weights_for
from tools import DTYPES, assert_within
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastattn
from fastattn import reference

FUZZ = int(os.environ.get("FASTATTN_FUZZ", "0"))
BOUNDED = settings(
    max_examples=FUZZ or 60,
    derandomize=not FUZZ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# ------------------------------------------------------------------------------- projection


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "more",
    [{}, {"L": 2, "D": 2}, {"bias": False, "B": 4, "lengths": [2, 5, 0, 1], "D": 2, "L": 2},
     {"L": 2, "recurrent_dropout_p": 0.3, "dropout_p": 0.3, "seed": 3}, {"one": True}],
    ids=["plain", "all", "lengths", "dropout", "one"],
)  # fmt: skip
@pytest.mark.parametrize("proj", [1, 3])
def test_projection(proj: int, more: dict[str, Any], dtype: torch.dtype, kernel: str) -> None:
    judge(make("lstm", proj=proj, dtype=dtype, **more), kernel)


def test_forms_of_weights(backend: str) -> None:
    """torch's flat list, tuples of five, and what each leaves out."""
    x = torch.randn(4, 2, 5)
    for bias in (True, False):
        for proj in (0, 3):
            flat = weights_for("lstm", 5, 6, L=2, D=2, bias=bias, proj=proj)
            n = len(flat) // 4
            entries = [tuple(flat[i : i + n]) for i in range(0, len(flat), n)]
            full = [
                (e[0], e[1], *(e[2:4] if bias else (None, None)), e[-1] if proj else None)
                for e in entries
            ]
            ys = [
                fastattn.lstm(x, None, w, bidirectional=True, backend=backend)[0]
                for w in (flat, tuple(flat), entries, full, [list(e) for e in entries])
            ]
            assert all(torch.equal(y, ys[0]) for y in ys)


# ---------------------------------------------------------------------------------- cells


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "bias"), [((3,), True), ((3,), False), ((), True), ((0,), True)])
@pytest.mark.parametrize("cell", CELLS)
def test_cells(
    cell: str, shape: tuple[int, ...], bias: bool, dtype: torch.dtype, kernel: str
) -> None:
    op, chosen = CELLS[cell]
    weights = weights_for(op, 5, 6, bias=bias, dtype=dtype)
    x, *states = (torch.randn(*shape, n).to(dtype) for n in (5, 6, 6))
    states = states[: 2 if op == "lstm" else 1]

    def run(where: Any, cast: Any, **more: Any) -> dict[str, Tensor]:
        leaves = [cast(t.detach()).requires_grad_() for t in (x, *states, *weights)]
        h = leaves[1 : 1 + len(states)]
        state = tuple(h) if op == "lstm" else h[0]
        out = getattr(where, f"{op}_cell")(
            leaves[0], state, *leaves[1 + len(states) :], **chosen, **more
        )
        out = out if isinstance(out, tuple) else (out,)
        gen = torch.Generator().manual_seed(1)
        upstream = [torch.randn(o.shape, generator=gen).to(dtype).to(o.dtype) for o in out]
        grads = torch.autograd.grad(out, leaves, upstream)
        return dict(enumerate((*out, *grads)))  # type: ignore[arg-type]

    got = run(fastattn, torch.clone, backend=kernel)
    right, plain = run(reference, Tensor.double), run(reference, torch.clone)
    for name, value in right.items():
        assert_within(str(name), got[name], value, [plain[name]])
    # Without a state: zeros.
    nothing = getattr(fastattn, f"{op}_cell")(x, None, *weights, **chosen, backend=kernel)
    zeros = tuple(map(torch.zeros_like, states))
    zeroed = getattr(fastattn, f"{op}_cell")(
        x, zeros if op == "lstm" else zeros[0], *weights, **chosen, backend=kernel
    )
    torch.testing.assert_close(nothing, zeroed)


# --------------------------------------------------------------------------------- errors

W = weights_for("lstm", 4, 6)
X = torch.randn(5, 3, 4)
H = torch.randn(1, 3, 6)
PACKED = pack_padded_sequence(X, torch.tensor([5, 4, 2]))


def packed(sizes: list[Any], B: int | None = None) -> PackedSequence:
    """Five rows, made by hand."""
    order = None if B is None else torch.arange(B)
    dtype = torch.float32 if sizes and isinstance(sizes[0], float) else torch.int64
    return PackedSequence(X[:, 0], torch.tensor(sizes, dtype=dtype), order, order)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x_list": ({"x": [[1.0]]}, TypeError, "x must be a Tensor, got list"),
    "x_int": ({"x": torch.ones(5, 3, 4, dtype=torch.long)}, TypeError, "x must be float32"),
    "x_dims": ({"x": torch.randn(4)}, ValueError, r"x must have shape \(T, B, I\).*got \(4,\)"),
    "x_features": (
        {"x": X[..., :3]}, ValueError, r"x must have 4 features, got 3 \(x has shape \(5, 3, 3\), "
        r"w_ih \(24, 4\)\)",
    ),
    "dtype": ({"x": X.bfloat16()}, TypeError, "x must have the weights' dtype torch.float32, got "
              "torch.bfloat16"),
    "device": ({"x": X.to("meta")}, ValueError, "x must be on the weights' device cpu, got meta"),
    "dtype_of_one": ({"weights": [W[0].double(), *W[1:]]}, TypeError, "w_ih must have x's dtype"),
    "state_one": ({"state": H}, TypeError, r"state must be a pair \(h, c\) or None, got Tensor"),
    "state_three": ({"state": (H, H, H)}, TypeError, "got tuple of 3"),
    "state_half": ({"state": (H, None)}, TypeError, r"state\[1\] must be a Tensor, got NoneType"),
    "state_batch": (
        {"state": (H[:, :2], H)}, ValueError, r"state\[0\] must have shape \(1, 3, 6\) \(layers "
        r"\* directions, batch, features\), got \(1, 2, 6\)",
    ),
    "state_hidden": ({"state": (H, H[..., :5])}, ValueError, r"state\[1\] must have shape"),
    "state_layers": ({"state": (H.repeat(2, 1, 1),) * 2}, ValueError, r"got \(2, 3, 6\)"),
    "state_one_sequence": ({"x": X[:, 0], "state": (H, H)}, ValueError, r"shape \(1, 6\)"),
    "state_dtype": ({"state": (H, H.double())}, TypeError, r"state\[1\] must have x's dtype"),
    "weights_none": ({"weights": None}, TypeError, "weights must be a sequence"),
    "weights_empty": ({"weights": []}, TypeError, "weights must be a sequence"),
    "weights_tensor": ({"weights": W[0]}, TypeError, "weights must be a sequence"),
    "weights_missing": ({"weights": [W[0], W[1], W[0]]}, ValueError, "must have 2 tensors a layer"),
    "weights_mixed": ({"weights": [W[0], None]}, TypeError, "at least two tensors"),
    "weights_short": ({"weights": [(W[0],)]}, TypeError, r"weights\[0\] must be w_ih, w_hh"),
    "weights_hidden": (
        {"weights": [W[0], W[1][:, :5], *W[2:]]}, ValueError, "without a projection w_hr, got 5",
    ),
    "weights_gates": ({"weights": [W[0][:23], W[1][:23]]}, ValueError, "4 H rows, got 23"),
    "weights_bias": ({"weights": [*W[:3], W[3][:9]]}, ValueError, r"b_hh must have shape \(24,\)"),
    "weights_odd": ({"bidirectional": True}, ValueError, "2 entries a layer"),
    "weights_layer": (
        {"weights": [*W, *W]}, ValueError, r"weights\[1\]: w_ih must have shape \(24, 6\)",
    ),
    "lengths_negative": ({"lengths": [5, -1, 2]}, ValueError, r"must be in \[0, 5\], got -1"),
    "lengths_long": ({"lengths": [5, 6, 2]}, ValueError, r"must be in \[0, 5\], got 6"),
    "lengths_shape": ({"lengths": [5, 2]}, ValueError, r"shape \(3,\), one a sequence, got \(2,\)"),
    "lengths_float": ({"lengths": torch.ones(3)}, TypeError, "int32 or int64, got torch.float32"),
    "lengths_int": ({"lengths": 3}, TypeError, "a sequence of ints, got int"),
    "lengths_floats": ({"lengths": [1.0, 2, 3]}, TypeError, "lengths must be ints, got 1.0"),
    "lengths_bools": ({"lengths": [True, 2, 3]}, TypeError, "lengths must be ints, got True"),
    "lengths_numpy": ({"lengths": np.ones(3)}, TypeError, "lengths must be ints, got 1.0"),
    "lengths_numpy_one": ({"lengths": np.int64(3)}, TypeError, "a sequence of ints, got int"),
    "packed_rise": ({"x": packed([2, 3])}, ValueError, r"fall from the number of sequences, 2, "
                    r"got \[2, 3\]"),
    "packed_rows": ({"x": packed([3, 3])}, ValueError, "add up to x.data's 5 rows, got 6"),
    "packed_negative": ({"x": packed([6, -1])}, ValueError, r"got \[6, -1\]"),
    "packed_few": ({"x": packed([3, 2], 4)}, ValueError, "number of sequences, 4, got"),
    "packed_none": ({"x": packed([])}, ValueError, "add up to x.data's 5 rows, got 0"),
    "packed_floats": ({"x": packed([3.0, 2.0])}, TypeError, "int64, got a Tensor of shape"),
    "lengths_packed": ({"x": PACKED, "lengths": [5, 4, 2]}, ValueError, "x is a PackedSequence"),
    "lengths_one": ({"x": X[:, 0], "lengths": [5]}, ValueError, "x is one sequence"),
    "dropout": ({"dropout_p": 1.1}, ValueError, r"dropout_p must be in \[0, 1\], got 1.1"),
    "recurrent_dropout": ({"recurrent_dropout_p": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
    "dropout_bool": ({"dropout_p": True}, TypeError, "dropout_p must be a float, got True"),
    "seed": ({"seed": 1.5}, TypeError, "seed must be an int"),
    "backend": ({"backend": "fpga"}, ValueError, "backend must be one of .*'torch'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    given_, kind, message = WRONG[name]
    kwargs = {"x": X, "state": None, "weights": W, **given_}
    with pytest.raises(kind, match="^fastattn::lstm: ") as caught:
        fastattn.lstm(kwargs.pop("x"), kwargs.pop("state"), kwargs.pop("weights"), **kwargs)
    assert re.search(message, str(caught.value)), caught.value


CELL_WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x": ({"x": None}, TypeError, "x must be a Tensor"),
    "dims": ({"x": X}, ValueError, r"x must have shape \(B, I\)"),
    "features": ({"x": torch.randn(3, 5)}, ValueError, r"x must have 4 features, got 5"),
    "x_dtype": ({"x": X[0].double()}, TypeError, "x must have the weights' dtype torch.float32"),
    "h": ({"state": (H[0, :2], H[0])}, ValueError, r"h must have shape \(3, 6\)"),
    "c": ({"state": (H[0], H[0, :, :5])}, ValueError, r"c must have shape \(3, 6\)"),
    "c_none": ({"state": (H[0], None)}, TypeError, "c must be a Tensor"),
    "w_hh": ({"w_hh": W[1][:, :5]}, ValueError, "w_hh must have 4 H rows and H columns"),
    "bias": ({"b_hh": W[3][:5]}, ValueError, r"b_hh must have shape \(24,\)"),
    "dtype": ({"w_ih": W[0].double()}, TypeError, "w_ih must have x's dtype"),
}


@pytest.mark.parametrize("name", CELL_WRONG)
def test_wrong_calls_of_the_cell(name: str) -> None:
    given_, kind, message = CELL_WRONG[name]
    names = ("x", "state", "w_ih", "w_hh", "b_ih", "b_hh")
    kwargs = dict(zip(names, (torch.randn(3, 4), None, *W), strict=True)) | given_
    with pytest.raises(kind, match=f"fastattn::lstm_cell: {message}"):
        fastattn.lstm_cell(*(kwargs[n] for n in names))


# ------------------------------------------------------------------------ random combinations


@st.composite
def calls(draw: Any) -> Call:
    torch.manual_seed(draw(st.integers(0, 2**32)))
    cell = draw(st.sampled_from([*CELLS]))
    T, B = draw(st.integers(0, 6)), draw(st.integers(0, 5))
    H = draw(st.sampled_from([1, 2, 5, 8, 17, 33]))
    sizes: dict[str, Any] = {
        "T": T, "B": B, "H": H, "inputs": draw(st.sampled_from([1, 3, 16])),
        "L": draw(st.integers(1, 3)), "D": draw(st.integers(1, 2)), "bias": draw(st.booleans()),
        "state": draw(st.booleans()), "dtype": draw(st.sampled_from(DTYPES)),
        "proj": draw(st.integers(0, H - 1)) if cell == "lstm" else 0,
    }  # fmt: skip
    form = draw(st.sampled_from(["dense", "lengths", "packed", "one"]))
    if form == "one":
        sizes["one"] = True
    elif form == "lengths":
        sizes["lengths"] = [draw(st.integers(0, T)) for _ in range(B)]
    elif form == "packed" and T and B:
        lengths = [draw(st.integers(1, T)) for _ in range(B)]
        sizes["packed"] = (*lengths[1:], T)
    if form in ("dense", "lengths"):
        sizes["batch_first"] = draw(st.booleans())
    if draw(st.booleans()):
        sizes |= {
            "seed": draw(st.integers(-(2**63), 2**64 - 1)),
            "dropout_p": draw(st.sampled_from([0.0, 0.5, 1.0])),
            "recurrent_dropout_p": draw(st.sampled_from([0.0, 0.3])),
        }
    return make(cell, **sizes)


@BOUNDED
@given(calls())
def test_random_calls(call: Call) -> None:
    judge(call, "auto")
