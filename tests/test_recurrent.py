"""lstm, gru and rnn, every cell: values and gradients against the fp64 oracle,
lengths, packed sequences, masks, empty inputs, torch's machinery."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from recurrent_layers import CELLS, Call, judge, make, weights_for
from tools import DTYPES, KINDS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastattn
from fastattn import reference

LENGTHS = [2, 5, 0, 1]
cells = pytest.mark.parametrize("cell", CELLS)

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_state": {"state": False},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "bidirectional": {"D": 2},
    "layers": {"L": 3},
    "layers_bidirectional": {"L": 2, "D": 2, "state": False},
    "one_sequence": {"one": True, "L": 2, "D": 2},
    "lengths": {"B": 4, "lengths": LENGTHS},
    "lengths_all": {"B": 4, "lengths": LENGTHS, "batch_first": True, "L": 2, "D": 2},
    "packed": {"B": 4, "packed": (2, 5, 1, 4), "L": 2, "D": 2},
    "packed_equal": {"packed": (5, 5, 5)},
    "recurrent_dropout": {"L": 2, "D": 2, "recurrent_dropout_p": 0.4, "seed": 3},
    "dropout": {"L": 3, "dropout_p": 0.4, "seed": 2**63 + 5},
    "dropout_all": {
        "B": 4, "lengths": LENGTHS, "L": 2, "D": 2, "dropout_p": 0.3, "recurrent_dropout_p": 0.2,
        "seed": 11,
    },
    "dropout_packed": {
        "B": 4, "packed": (2, 5, 1, 4), "L": 2, "dropout_p": 0.3, "recurrent_dropout_p": 0.2,
        "seed": -1,
    },
    "dropout_of_everything": {"L": 2, "dropout_p": 1.0, "seed": 1},
    "one_step": {"T": 1, "L": 2},
    "one_feature": {"H": 1, "inputs": 1, "D": 2},
    "wide": {"T": 3, "H": 40, "inputs": 33, "B": 9},
}  # fmt: skip


@cells
@pytest.mark.parametrize("feature", FEATURES)
def test_values_and_gradients(feature: str, cell: str, kernel: str) -> None:
    judge(make(cell, **FEATURES[feature]), kernel)


@pytest.mark.parametrize("feature", FEATURES)
def test_reference_by_name(feature: str) -> None:
    """backend="reference" is the oracle, whatever the layout."""
    call = make("lstm", **FEATURES[feature])
    right = call.results(reference)
    for name, x in call.results(fastattn, backend="reference").items():
        assert torch.equal(x, right[name]), name


@cells
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", ["plain", "lengths_all", "wide"])
def test_16_bits(feature: str, dtype: torch.dtype, cell: str, kernel: str) -> None:
    judge(make(cell, dtype=dtype, **FEATURES[feature]), kernel)


@cells
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_values(kind: str, cell: str, kernel: str) -> None:
    if kind in ("huge", "outliers") and cell == "rnn_relu":
        kind = "tiny"  # it grows without bound
    judge(make(cell, kind=kind, B=4, lengths=LENGTHS), kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_steps(dtype: torch.dtype, kernel: str) -> None:
    """Where an error of each step would add up."""
    for cell in ("lstm", "gru"):
        judge(make(cell, T=60, B=2, H=16, dtype=dtype), kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_gate_of_almost_one_carries_for_thousands_of_steps(
    cell: str, dtype: torch.dtype, kernel: str
) -> None:
    """Of a state 0.991 is left; a gate 3e-5 off would take or add a tenth."""
    T, H = 4096, 20
    call = make(cell, T=T, B=1, inputs=1, H=H, dtype=dtype)
    bias = torch.full((len(call.weights[0]) // H, H), -100.0)  # LSTM: i = 0, so nothing is added
    bias[1] = 13.0  # LSTM's f, GRU's z
    weights = [torch.zeros_like(w) for w in call.weights]
    weights[2] = bias.flatten().to(dtype)
    assert call.state is not None
    if cell == "gru":  # n = 0, for h' = z h
        weights[2][2 * H :] = 0.0
    call = replace(call, weights=weights)
    outputs = call.run(fastattn, call.leaves(), backend=kernel)
    name, state = ("c_n", call.state[1]) if cell == "lstm" else ("h_n", call.state[0])
    right = state.double() * torch.tensor(13.0).double().sigmoid() ** T
    torch.testing.assert_close(
        outputs[name].double(), right, rtol=2e-3 if dtype == torch.float32 else 2e-2, atol=0
    )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_long_sums_round_no_more_than_the_librarys(cell: str, kernel: str) -> None:
    judge(make(cell, T=2, B=5, inputs=8, H=1536), kernel)


# ------------------------------------------------------------------------ sequences of lengths


@cells
@pytest.mark.parametrize("D", [1, 2])
def test_a_sequence_is_what_it_is_alone(cell: str, D: int, backend: str) -> None:
    call = make(cell, B=4, L=2, D=D, lengths=LENGTHS)
    batch = call.run(fastattn, call.leaves(), backend=backend)
    for b, n in enumerate(LENGTHS):
        states = tuple(s[:, b] for s in call.state or ())
        kwargs = {k: v for k, v in call.kwargs.items() if k != "lengths"}
        alone = Call(call.op, call.x[:n, b], call.weights, states, kwargs)
        for name, x in alone.run(fastattn, alone.leaves(), backend=backend).items():
            got = batch[name][:n, b] if name == "y" else batch[name][:, b]
            torch.testing.assert_close(got, x)
        assert not batch["y"][n:, b].any()


@cells
@pytest.mark.parametrize("D", [1, 2])
def test_what_lies_beyond_never_leaks(cell: str, D: int, backend: str) -> None:
    """NaN in x and in the output's gradient beyond the lengths, by rows and by padding."""
    call = make(cell, B=4, L=2, D=D, lengths=LENGTHS)
    clean = call.results(fastattn, backend=backend)
    beyond = torch.arange(5)[:, None] >= torch.tensor(LENGTHS)
    leaves = call.leaves(lambda t: t.masked_fill(beyond[..., None], torch.nan)
                         if t.shape == call.x.shape else t.clone())  # fmt: skip
    out = call.run(fastattn, leaves, backend=backend)
    gen = torch.Generator().manual_seed(7)
    upstream = {n: torch.randn(x.shape, generator=gen) for n, x in out.items()}
    upstream["y"][beyond] = torch.nan
    grads = torch.autograd.grad([*out.values()], [*leaves.values()], [*upstream.values()])
    got = dict(zip([f"d{n}" for n in leaves], grads, strict=True)) | out
    for name, x in clean.items():
        assert torch.equal(got[name], x), name
    assert not got["dx"][beyond].any()


FORMS: list[Any] = [
    list, torch.tensor, lambda n: torch.tensor(n).int(), np.array, lambda n: [*np.array(n)],
    lambda n: np.array(n, np.int32),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_lengths(form: Any, backend: str) -> None:
    call = make("gru", B=4, batch_first=True)
    results = [
        call.with_(lengths=n).run(fastattn, call.leaves(), backend=backend)["y"]
        for n in (torch.tensor(LENGTHS), form(LENGTHS))
    ]
    assert torch.equal(*results)


@cells
def test_all_lengths_whole_is_no_lengths(cell: str, backend: str) -> None:
    call = make(cell, L=2)
    right = call.results(fastattn, backend=backend)
    got = call.with_(lengths=[5, 5, 5]).results(fastattn, backend=backend)
    for name, x in right.items():
        torch.testing.assert_close(got[name], x)


@cells
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_is_padded_with_lengths(cell: str, enforce_sorted: bool, backend: str) -> None:
    lengths = torch.tensor([5, 3, 3, 1] if enforce_sorted else [3, 1, 5, 3])
    call = make(cell, B=4, L=2, D=2)
    right = call.with_(lengths=lengths).run(fastattn, call.leaves(), backend=backend)
    packed = pack_padded_sequence(call.x, lengths, enforce_sorted=enforce_sorted)
    state: Any = call.state if call.op == "lstm" else (call.state or (None,))[0]
    y, last = getattr(fastattn, call.op)(
        packed, state, call.weights, **call.kwargs, backend=backend
    )
    assert isinstance(y, PackedSequence)
    assert torch.equal(y.batch_sizes, packed.batch_sizes)
    torch.testing.assert_close(pad_packed_sequence(y)[0], right["y"])
    for got, name in zip(last if call.op == "lstm" else (last,), ("h_n", "c_n"), strict=False):
        torch.testing.assert_close(got, right[name])


# --------------------------------------------------------------------------------- dropout


def test_recurrent_mask_is_one_for_all_steps(backend: str) -> None:
    """relu(x + W (h * m)) with W = 1 and x = 0 from h = 1: after T steps the kept features are
    (1 / (1 - p))^T, the dropped ones 0; one mask for two calls of a seed, another for the next."""
    H, T, p = 64, 3, 0.25
    weights = [torch.zeros(H, 1), torch.eye(H)]
    h0 = torch.ones(1, 2, H)

    def run(seed: int | None) -> Tensor:
        return fastattn.rnn(
            torch.zeros(T, 2, 1), h0, weights, nonlinearity="relu", recurrent_dropout_p=p,
            seed=seed, backend=backend,
        )[0]  # fmt: skip

    y = run(5)
    kept = y[0] != 0
    assert 0.6 < kept.float().mean() < 0.9
    assert not torch.equal(kept[0], kept[1])
    for t in range(T):
        torch.testing.assert_close(y[t], kept * (1 / (1 - p)) ** (t + 1))
    assert torch.equal(run(5), y)
    assert not torch.equal(run(6), y)
    assert not torch.equal(run(None), run(None))
    torch.manual_seed(1)
    first = run(None)
    torch.manual_seed(1)
    assert torch.equal(run(None), first)


def test_masks_of_layers_and_places_differ() -> None:
    """The mask of h and the one behind a layer, of every layer: no two alike."""
    keys = [reference.recurrent.layer_seed(9, i) for i in range(8)]
    masks = [reference.recurrent.scaled_mask((4, 16), 0.5, k, torch.ones(())) for k in keys]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
    wrapped = reference.recurrent.layer_seed(torch.tensor([9]), 5)
    assert torch.equal(reference.recurrent.scaled_mask((4, 16), 0.5, wrapped, torch.ones(())),
                       masks[5])  # fmt: skip


def test_padded_packed_and_short_batches_have_one_mask(backend: str) -> None:
    options = {"dropout_p": 0.4, "recurrent_dropout_p": 0.3, "seed": 17, "backend": backend}
    lengths = torch.tensor([3, 5, 1])
    call = make("lstm", L=2, D=2)
    whole = call.run(fastattn, call.leaves(), **options)["y"]
    for x in (
        call.with_(lengths=lengths).run(fastattn, call.leaves(), **options)["y"],
        pad_packed_sequence(fastattn.lstm(
            pack_padded_sequence(call.x, lengths, enforce_sorted=False), call.state, call.weights,
            bidirectional=True, **options,
        )[0])[0],
    ):  # fmt: skip
        # Of the first direction the steps that exist, but for layer 1, which sees the second one.
        zeros = whole[:, 1] == 0
        assert torch.equal(x[:, 1] == 0, zeros)
        torch.testing.assert_close(x[:, 1], whole[:, 1])  # the sequence that is whole


# ------------------------------------------------------------------------------- edges, errors


@cells
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)], ids=str)
def test_empty(shape: tuple[int, int], cell: str, backend: str) -> None:
    T, B = shape
    call = make(cell, T=T, B=B, L=2, D=2)
    got = call.results(fastattn, backend=backend)
    assert got["y"].shape == (T, B, 14)
    if not T:
        for name, state in zip(("h_n", "c_n"), call.state or (), strict=False):
            assert torch.equal(got[name], state)
    for name, leaf in call.leaves().items():
        assert got[f"d{name}"].shape == leaf.shape
    assert not any(got[f"dw{i}"].any() for i in range(len(call.weights)))
    lengths = call.with_(lengths=torch.zeros(B, dtype=torch.long))
    assert torch.equal(lengths.run(fastattn, call.leaves(), backend=backend)["y"], got["y"])


@cells
def test_no_sequence_has_a_step(cell: str, backend: str) -> None:
    call = make(cell, L=2, D=2, lengths=[0, 0, 0])
    got = call.results(fastattn, backend=backend)
    assert not got["y"].any()
    assert torch.equal(got["h_n"], (call.state or ())[0])
    assert not got["dx"].any()


@cells
def test_strides(cell: str, kernel: str) -> None:
    """Views, and an upstream gradient without strides."""
    call = make(cell, L=2)
    wide = torch.randn(5, 3, 9)
    views = Call(
        call.op, wide[..., 1:5], [w.t().contiguous().t() for w in call.weights],
        tuple(s.transpose(0, 1).contiguous().transpose(0, 1) for s in call.state or ()),
        call.kwargs,
    )  # fmt: skip
    judge(views, kernel)
    leaves = views.leaves()
    views.run(fastattn, leaves, backend=kernel)["y"].sum().backward()
    right = views.leaves(Tensor.double)
    views.run(reference, right)["y"].sum().backward()
    for name, x in leaves.items():
        torch.testing.assert_close(x.grad.double(), right[name].grad, atol=1e-4, rtol=1e-4)


@cells
@pytest.mark.parametrize("trained", ["x", "w1", "w3", "h"])
def test_one_leaf_needs_a_gradient(cell: str, trained: str, backend: str) -> None:
    call = make(cell, L=2)
    whole = call.results(fastattn, backend=backend)
    frozen = tuple(n for n in call.leaves() if n != trained)
    part = Call(call.op, call.x, call.weights, call.state, call.kwargs, frozen=frozen)
    got = part.results(fastattn, backend=backend)
    torch.testing.assert_close(got[f"d{trained}"], whole[f"d{trained}"])


def test_each_output_alone_is_differentiable(backend: str) -> None:
    call = make("lstm", L=2, D=2)
    for name in ("y", "h_n", "c_n"):
        sums = {}
        for where, cast in ((fastattn, torch.clone), (reference, Tensor.double)):
            leaves = call.leaves(cast)
            more = {"backend": backend} if where is fastattn else {}
            call.run(where, leaves, **more)[name].square().sum().backward()
            sums[where] = {n: x.grad for n, x in leaves.items()}
        for n, right in sums[reference].items():
            torch.testing.assert_close(
                sums[fastattn][n].double(), right, atol=1e-4, rtol=1e-4, msg=f"d{name}/d{n}"
            )


# ------------------------------------------------------------------------------ torch's machinery


@cells
@pytest.mark.parametrize("more", [{}, {"lengths": [2, 0, 3], "D": 2, "L": 2}], ids=["dense", "all"])
def test_double_backward(cell: str, more: dict[str, Any]) -> None:
    call = make(cell, T=3, B=3, inputs=2, H=2, dtype=torch.float64, **more)
    leaves = call.leaves()
    assert torch.autograd.gradgradcheck(
        lambda *args: tuple(
            call.run(fastattn, dict(zip(leaves, args, strict=True)), backend="reference").values()
        ),
        [*leaves.values()],
        fast_mode=True,
    )


@cells
def test_double_backward_of_kernels(cell: str, kernel: str) -> None:
    """The gradient of a gradient's norm, by rows that are packed and scattered again."""
    found = []
    call = make(cell, B=4, L=2, lengths=LENGTHS)
    for where, cast in ((fastattn, torch.clone), (reference, Tensor.double)):
        leaves = call.leaves(cast)
        more = {"backend": kernel} if where is fastattn else {}
        y = call.run(where, leaves, **more)["y"]
        first = torch.autograd.grad(y.square().sum(), [*leaves.values()], create_graph=True)
        norm = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(norm, [*leaves.values()]))
    for got, right in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), right, atol=1e-3, rtol=1e-3)


@cells
def test_backward_is_repeatable(cell: str, kernel: str) -> None:
    call = make(cell, T=9, B=6, inputs=16, H=24, L=2, D=2, lengths=[9, 3, 0, 7, 7, 1])
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(call.results(fastattn, backend=kernel))
    assert results[1].keys() == results[2].keys()
    for name, x in results[1].items():
        assert torch.equal(results[2][name], x), name


@cells
def test_autocast(cell: str, kernel: str) -> None:
    call = make(cell, L=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call.results(fastattn, backend=kernel)
    low = Call(call.op, call.x.bfloat16(), [w.bfloat16() for w in call.weights],
               tuple(s.bfloat16() for s in call.state or ()), call.kwargs)  # fmt: skip
    right = low.results(fastattn, backend=kernel)
    # torch has no rule for a GRU on a CPU, and carries its state as it was given.
    wide = cell == "gru" and call.x.device.type == "cpu"
    assert got["y"].dtype == (torch.float32 if wide else torch.bfloat16)
    assert got["dw0"].dtype == torch.float32
    for name, x in right.items():
        torch.testing.assert_close(got[name].bfloat16(), x)


def test_float64_goes_to_the_reference(kernel: str) -> None:
    call = make("gru", dtype=torch.float64)
    got = call.run(fastattn, call.leaves())
    right = call.run(reference, call.leaves())
    assert torch.equal(got["y"], right["y"])
    with pytest.raises(ValueError, match=f"backend='{kernel}' cannot serve"):
        call.run(fastattn, call.leaves(), backend=kernel)


@cells
def test_function_transforms(cell: str) -> None:
    """torch.func and forward mode run on plain PyTorch."""
    call = make(cell, L=2)
    leaves = call.leaves()

    def loss(x: Tensor) -> Tensor:
        return call.run(fastattn, {**leaves, "x": x})["y"].square().sum()

    right = torch.autograd.grad(loss(leaves["x"]), leaves["x"])[0]
    torch.testing.assert_close(torch.func.grad(loss)(call.x), right)
    tangent = torch.randn_like(call.x)
    _, derivative = torch.func.jvp(loss, (call.x,), (tangent,))
    torch.testing.assert_close(derivative, (right * tangent).sum(), rtol=1e-4, atol=1e-4)


def test_compile_for_any_number_of_steps() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weights = weights_for("gru", 4, 6)
    fast = torch.compile(lambda x: fastattn.gru(x, None, weights)[0], fullgraph=True,
                         dynamic=True, backend=counter)  # fmt: skip
    counts = []
    for T in (9, 7, 5):  # none the size of something else, which would be its guard
        x = torch.randn(T, 2, 4)
        torch.testing.assert_close(fast(x), fastattn.gru(x, None, weights)[0])
        counts.append(counter.frame_count)
    assert counts[0] == counts[2]


def test_compile_packed() -> None:
    torch._dynamo.reset()
    weights = weights_for("lstm", 4, 6)
    fast = torch.compile(fastattn.lstm, fullgraph=True, backend="aot_eager")
    for sort in (True, False):
        packed = pack_padded_sequence(torch.randn(3, 3, 4), torch.tensor([3, 2, 1] if sort else
                                      [1, 3, 2]), enforce_sorted=sort)  # fmt: skip
        got, right = fast(packed, None, weights), fastattn.lstm(packed, None, weights)
        torch.testing.assert_close(got[0].data, right[0].data)
        torch.testing.assert_close(got[1], right[1])


@pytest.mark.parametrize(("cell", "lengths"), [("lstm", True), ("gru", False)])
def test_compile(cell: str, lengths: bool) -> None:
    """One graph; with lengths, whose values it must not know."""
    torch._dynamo.reset()
    call = make(cell, T=3, L=2, D=2)

    def run(*args: Any) -> tuple[Tensor, ...]:
        *tensors, n = args
        c = call if n is None else call.with_(lengths=n)
        names = [*call.leaves()]
        return tuple(c.run(fastattn, dict(zip(names, tensors, strict=True))).values())

    fast = torch.compile(run, fullgraph=True, backend="aot_eager")
    for n in ([3, 0, 2], [1, 3, 3]) if lengths else (None,):
        given = None if n is None else torch.tensor(n)
        results = []
        for fn in (run, fast):
            leaves = [*call.leaves().values()]
            out = fn(*leaves, given)
            results.append((*out, *torch.autograd.grad([o.square().sum() for o in out], leaves)))
        for got, right in zip(*results, strict=True):
            torch.testing.assert_close(got, right)
