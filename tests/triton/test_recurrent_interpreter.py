"""The recurrence (LSTM, GRU, RNN) in Triton's interpreter, both tiers, values and gradients against
fastattn.reference.recurrent in fp64."""

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from recurrence_calls import CELLS, GRU, LSTM, RNN_TANH, backward, call, forward, judge, run
from test_layernorm_interpreter import launches

from fastattn.kernels import recurrent as kernels
from fastattn.ops import recurrent_triton

pytestmark = pytest.mark.sampled(2)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
STEP, STEP_BACK, DH = (
    "recurrent_step_kernel", "recurrent_step_backward_kernel", "hidden_gradient_kernel",
)  # fmt: skip


@pytest.fixture(autouse=True, params=["sequence", "steps"])
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """A projection is the step tier's, whatever is asked for."""

    def whole(cell: int, H: int, projected: bool, *rest: Any) -> bool:
        return request.param == "sequence" and not projected

    with mock.patch.object(kernels, "whole_sequence", whole):
        yield request.param


one_tier = pytest.mark.parametrize("tier", ["steps"], indirect=True)

# Every cell, dtype, layout of rows, direction and mask; each with most of the others.
CASES: dict[str, dict[str, Any]] = {
    "lstm": {"D": 2},
    "gru": {"cell": GRU, "D": 2},
    "rnn_tanh": {"cell": RNN_TANH, "reverse": 1},
    "rnn_relu": {"cell": CELLS["rnn_relu"], "D": 2, "packed": [3, 3, 1]},
    "lstm_bf16_lengths": {"dtype": BF16, "lengths": [3, 0, 1, 2], "B": 4, "T": 3, "D": 2},
    "gru_bf16_packed": {"cell": GRU, "dtype": BF16, "packed": [4, 2, 2, 1], "D": 2},
    "rnn_fp16_lengths": {"cell": RNN_TANH, "dtype": F16, "lengths": [1, 3, 0], "B": 3, "T": 3},
    "lstm_fp16_packed": {"dtype": F16, "packed": [3, 1], "reverse": 1, "mask": True},
    "gru_lengths_mask": {"cell": GRU, "lengths": [2, 3, 0], "B": 3, "T": 3, "D": 2, "mask": True},
    "gru_without_bias": {"cell": GRU, "bias": False, "T": 2},
    "rnn_mask": {"cell": CELLS["rnn_relu"], "mask": True, "dtype": BF16},
    "lstm_several_batch_blocks": {"B": 19, "T": 2, "packed": [2] * 17 + [1] * 2},
    "gru_several_batch_blocks": {"cell": GRU, "B": 18, "T": 2, "lengths": [2, 1] * 9},
    "lstm_int32_offsets": {"packed": [2, 2, 1], "offset_dtype": torch.int32, "H": 16},
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    judge(call(**CASES[name], poison=True))


PROJECTED: dict[str, dict[str, Any]] = {
    "plain": {"P": 7},
    "wide": {"P": 18, "H": 5, "reverse": 1},
    "lengths": {"P": 7, "D": 2, "lengths": [3, 0, 1], "B": 3, "T": 3, "mask": True, "dtype": BF16},
    "packed": {"P": 1, "D": 2, "packed": [3, 1], "dtype": F16},
}


@one_tier
@pytest.mark.parametrize("name", PROJECTED)
def test_projection(name: str) -> None:
    judge(call(**PROJECTED[name], poison=True))


@pytest.mark.parametrize(("cell", "H"), [*itertools.product((LSTM, GRU, RNN_TANH), (1, 16))])
def test_sizes(cell: int, H: int) -> None:
    """One unit; and a whole tile, which needs no mask."""
    judge(call(cell, T=2, B=1, H=H))


@pytest.mark.parametrize("cell", [LSTM, GRU, RNN_TANH])
@pytest.mark.parametrize(("T", "B"), [(0, 3), (2, 0)])
def test_empty(cell: int, T: int, B: int) -> None:
    c = call(cell, T=T, B=B, D=2)
    found = launches(lambda: run(c))
    assert found == []
    got = run(c)
    assert torch.equal(got["h_n"], c.tensors["h0"])
    assert torch.equal(got["dh0"], c.upstreams()["h_n"])
    if cell == LSTM:
        assert torch.equal(got["c_n"], c.tensors["c0"])
        assert torch.equal(got["dc0"], c.upstreams()["c_n"])


@pytest.mark.parametrize("upstream", [("y",), ("h_n",), ("c_n",), ()])
def test_each_upstream_alone(upstream: tuple[str, ...]) -> None:
    judge(call(T=2, H=5, lengths=[1, 2, 0], B=3, upstream=upstream))


def test_results_are_new_tensors() -> None:
    """What is returned is nobody's input, as an op must have it; not of an empty call either."""
    for T in (0, 2):
        c = call(T=T, H=5)
        y, h_n, c_n, gates, cells = forward(c)
        grads = backward(c, (y, gates, cells))
        given = {x.data_ptr() for x in c.tensors.values()}
        assert not given & {x.data_ptr() for x in (h_n, c_n, *grads.values()) if x.numel()}


def test_inference_saves_nothing_and_is_the_same() -> None:
    for cell in (LSTM, GRU):
        c = call(cell, T=2, H=5, dtype=BF16, D=2)
        y, h_n, c_n, gates, cells = forward(c, save=False)
        assert gates.shape == cells.shape == (0,)
        for x, kept in zip((y, h_n, c_n), forward(c), strict=False):
            assert torch.equal(x, kept)


def test_backward_is_repeatable() -> None:
    c = call(GRU, H=17, packed=[3, 2, 2], dtype=BF16)
    first, second = run(c), run(c)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_nan_in_padding_stays_there() -> None:
    """In gx, beside y's (``poison``)."""
    c = call(GRU, H=5, lengths=[1, 3, 0], B=3, T=3, poison=True)
    c.tensors["gx"][:, ~c.there()] = torch.nan
    got = run(c)
    assert all(x.isfinite().all() for x in got.values())


def test_saturated_gates() -> None:
    """Far beyond where sigmoid and tanh are 0 and 1, without inf - inf."""
    for cell in (LSTM, GRU):
        c = call(cell, T=2, H=5)
        c.tensors["gx"].mul_(1e4)
        judge(c)


def test_small_states_keep_their_digits() -> None:
    for cell in (LSTM, GRU, RNN_TANH):
        c = call(cell, T=2, H=5)
        for name in ("gx", "h0", "c0", "b_hn0"):
            if name in c.tensors:
                c.tensors[name].mul_(1e-6)
        judge(c)


@one_tier
def test_launches_of_the_tiers() -> None:
    def of(c: Any, whole: bool) -> list[str]:
        with mock.patch.object(kernels, "whole_sequence", return_value=whole):
            return launches(lambda: run(c))

    c = call(T=3, H=5, D=2)
    assert of(c, True) == ["recurrent_sequence_kernel", "recurrent_sequence_backward_kernel"]
    assert of(c, False) == [*[STEP] * 3, *[STEP_BACK] * 3, DH]
    projected = [*[STEP, "project_kernel"] * 3, *[DH, STEP_BACK] * 3, DH]
    assert of(call(T=3, H=5, P=7), False) == projected


@one_tier
def test_which_tier_is_taken() -> None:
    def whole(H: int, cell: int = LSTM, dtype: Any = BF16, family: str = "sm80") -> bool:
        return TIER(cell, H, False, dtype, family)

    assert whole(128)
    assert not whole(129)
    assert whole(128, GRU)
    assert whole(256, RNN_TANH)
    assert whole(64, dtype=F32)
    assert not whole(65, dtype=F32)
    assert whole(64, RNN_TANH, dtype=F32)
    assert not whole(65, RNN_TANH, dtype=F32)  # its weights would fit
    assert not whole(128, family="sm86")
    assert whole(64, family="sm120")
    assert not whole(128, family="gfx9")
    assert not TIER(LSTM, 16, True, BF16, "sm80")


@one_tier
def test_variants_tell_compiled_kernels_apart() -> None:
    """Calls of one name launch kernels with the same constants; every feature has its own name."""

    def name(c: Any) -> str:
        x = c.tensors
        return recurrent_triton.variant(
            c.of("w_hh", x), c.of("b_hn", x), c.of("w_hr", x), x["h0"], x.get("h_mask"), c.offsets,
            c.lengths, c.cell,
        )  # fmt: skip

    assert (
        name(call(T=2, B=3, H=5)) == name(call(T=7, B=16, H=5)) == "lstm steps H5 D1 float32 B<=16"
    )
    others: list[dict[str, Any]] = [
        {}, {"H": 6}, {"D": 2}, {"B": 17}, {"B": 33}, {"dtype": BF16}, {"cell": GRU},
        {"mask": True}, {"cell": GRU, "bias": False}, {"cell": RNN_TANH},
        {"cell": CELLS["rnn_relu"]}, {"P": 5}, {"P": 6}, {"packed": [2, 1]},
        {"lengths": [1, 2, 3, 4, 4]},
        {"packed": [2, 1], "offset_dtype": torch.int32},
    ]  # fmt: skip
    assert len({name(call(**{"H": 5, "T": 4, **more})) for more in others}) == len(others)


TIER = kernels.whole_sequence  # as it is, before any fixture

WRONG: dict[str, dict[str, Any]] = {
    "h0 must have shape": {"h0": torch.zeros(5, 20)},
    "h0 must have 20 features without w_hr, got 19": {},
    "w_hh must have shape": {"w_hh0": torch.zeros(80, 21)},
    "gx must have shape": {"gx": torch.zeros(1, 20, 79)},
    "c0 must have shape": {"c0": torch.zeros(1, 5, 19)},
    "w_hh must be torch.float32": {"w_hh0": torch.zeros(80, 20, dtype=BF16)},
    "gx must be contiguous": {"gx": torch.zeros(1, 80, 20).transpose(1, 2)},
    "there must be T B = 20 rows": {"gx": torch.zeros(1, 21, 80)},
    "h_mask must have shape": {"h_mask": torch.zeros(1, 5, 19)},
    "b_hn is a GRU's": {"b_hn0": torch.zeros(20)},
}


@one_tier
@pytest.mark.parametrize("words", WRONG)
def test_a_direct_call_stays_inside_its_tensors(words: str) -> None:
    given = WRONG[words]
    c = call()
    if not given:
        given = {"h0": torch.zeros(1, 5, 19), "w_hh0": torch.zeros(80, 19)}
    c.tensors.update(given)
    with pytest.raises(ValueError, match=f"fastattn::recurrence: {words}"):
        forward(c)


@one_tier
def test_wrong_lengths_offsets_and_saved_tensors_are_refused() -> None:
    c = call(lengths=[1, 2, 3, 4, 4])
    y, *_, gates, cells = forward(c)
    for words, saved in (
        ("y must have shape", (y[:, 1:].contiguous(), gates, cells)),
        ("gates must have shape", (y, gates[:, :, 1:].contiguous(), cells)),
        ("cells must have shape", (y, gates, gates)),
    ):
        with pytest.raises(ValueError, match=words):
            backward(c, saved)
    for words, lengths in (
        ("lengths must have shape", torch.ones(4, dtype=torch.int64)),
        ("lengths must be int32 or int64", torch.ones(5)),
    ):
        with pytest.raises(ValueError, match=words):
            forward(type(c)(c.cell, c.T, c.tensors, None, lengths))
    with pytest.raises(ValueError, match="offsets must have shape"):
        forward(type(c)(c.cell, c.T, c.tensors, torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="cell must be 0 to 3"):
        forward(type(c)(4, c.T, c.tensors))
