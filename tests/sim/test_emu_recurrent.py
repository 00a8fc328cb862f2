"""The recurrence in CUDA C++, compiled for the host, under the sanitizers: races between blocks
that meet at the grid barrier, overruns, dead-lock where not all blocks are resident."""

from typing import Any

import pytest
import torch
from recurrence_calls import GRU, LSTM, RNN_RELU, RNN_TANH

from sim.emu import LaunchError, agreeing, run
from sim.emu_recurrent import BLOCK, FEW_HELD, GRID, PROGRAMS, STEP, Pass, passes

BF16, FP32 = torch.bfloat16, torch.float32
TOO_LARGE, NOT_SUPPORTED = 720, 801  # cudaError_t
full = pytest.mark.full
TWO = [BF16, pytest.param(FP32, marks=full)]
# Tails of units and columns, several groups of sequences, both directions, states of sequences that
# end early, begin late or have no step at all.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"H": 40, "B": 5},
    "groups": {"H": 20, "B": 19, "T": 3},
    "both": {"H": 24, "D": 2, "reverse": 2, "lengths": [4, 1, 0, 3, 2]},
    "packed": {"H": 24, "packed": [3] * 9 + [1] * 10},
    "packed_both": {"H": 20, "D": 2, "reverse": 2, "packed": [4, 4, 2, 1, 1], "mask": True},
    "gru": {"H": 40, "cell": GRU, "mask": True},
    "rnn": {"H": 20, "cell": RNN_TANH, "reverse": 1},
    "tiles": {"H": 100, "B": 40, "T": 2},
    "one": {"H": 1, "B": 1, "T": 1},
}  # fmt: skip
ALONE: dict[str, dict[str, Any]] = {
    "lstm": {"H": 40, "B": 11, "D": 2, "reverse": 2, "lengths": [4, 1, 0, 3, 2] * 2 + [4]},
    "gru": {"H": 100, "cell": GRU, "packed": [2, 2, 2, 1, 1]},
    "rnn": {"H": 7, "cell": RNN_RELU},
}


def few(name: str, usual: tuple[str, ...]) -> Any:
    """A case, in `make verify` where it is one of those: TSan takes seconds for each."""
    return name if name in usual else pytest.param(name, marks=full)


def of(dtype: torch.dtype, tier: int, options: dict[str, Any]) -> tuple[Pass, Pass]:
    return passes(dtype, tier=tier, **options)


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize("name", [few(n, ("plain", "packed_both", "tiles")) for n in CASES])
def test_no_races_between_blocks(name: str, dtype: torch.dtype) -> None:
    for one in of(dtype, GRID, CASES[name]):
        one.check(run(PROGRAMS[dtype], one.case, "tsan", schedule="reverse"))


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize("name", [few(n, ("lstm",)) for n in ALONE])
def test_no_races_in_a_block(name: str, dtype: torch.dtype) -> None:
    for one in of(dtype, BLOCK, ALONE[name]):
        one.check(run(PROGRAMS[dtype], one.case, "tsan", schedule="reverse"))


def bounds() -> list[Any]:
    """Every case; in `make verify` the one of fp32 that has the most of everything."""
    usual = (GRID, "packed_both", FP32)
    cases = [*((GRID, n) for n in CASES), *((BLOCK, n) for n in ALONE)]
    every = [(tier, name, dtype) for tier, name in cases for dtype in (BF16, FP32)]
    return [x if x == usual else pytest.param(*x, marks=full) for x in every]


@pytest.mark.parametrize(("tier", "name", "dtype"), bounds())
def test_bounds_and_values(tier: int, name: str, dtype: torch.dtype) -> None:
    options = CASES[name] if tier == GRID else ALONE[name]
    for one in of(dtype, tier, options):
        one.check(agreeing(PROGRAMS[dtype], one.case, "asan"))


@full
def test_weights_beyond_the_registers() -> None:
    """As at H > 768 of a bf16 LSTM: what a warp does not hold lies in shared memory."""
    for one in passes(BF16, tier=GRID, H=250, T=2, B=2):
        one.check(run(FEW_HELD, one.case, "tsan"))
        one.check(run(FEW_HELD, one.case, "asan", schedule="reverse"))


def test_more_blocks_than_are_resident_are_refused() -> None:
    """16 multiprocessors, one block each. A plan for more is refused by the launch; asked honestly,
    the same call is planned for a GEMM a step."""
    for one in passes(BF16, H=260, T=2, B=1, multiprocessors=32):
        with pytest.raises(LaunchError) as caught:
            run(PROGRAMS[BF16], one.case)
        assert caught.value.code == TOO_LARGE
    for one in passes(BF16, H=260, T=2, B=1):
        with pytest.raises(LaunchError) as caught:  # the plan is another tier's
            run(PROGRAMS[BF16], one.case)
        assert caught.value.code == NOT_SUPPORTED
    (one, _) = passes(BF16, H=260, T=2, B=1, tier=STEP)
    with pytest.raises(LaunchError) as caught:  # which recurrent_forward does not serve
        run(PROGRAMS[BF16], one.case)
    assert caught.value.code == 1


def test_directions_of_two_launches() -> None:
    """9 slices a direction, 16 blocks: one direction after the other."""
    for one in passes(BF16, H=140, T=2, B=2, D=2, reverse=2, cell=LSTM):
        one.check(run(PROGRAMS[BF16], one.case, "plain"))
