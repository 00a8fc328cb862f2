"""layernorm_ffn in CUDA C++, compiled for the host, under the sanitizers."""

from typing import Any

import pytest
import torch

from sim.emu import agreeing, run
from sim.emu_layernorm_ffn import PROGRAM, passes

DTYPES = (torch.bfloat16, torch.float32)
BF16 = torch.bfloat16
# Tails of rows, hidden units and columns; element-wise copies; parts and chunks, one of them empty.
CASES: dict[str, dict[str, Any]] = {
    "tails": {"M": 70, "D": 40, "F": 72, "gated": True, "dropout": 0.2},
    "behind": {"M": 33, "D": 64, "F": 33, "pre_norm": False, "activation": "silu"},
    "one": {"M": 1, "D": 1, "F": 1, "norm": None},
    "misaligned": {"M": 20, "D": 48, "F": 64, "lead": 4, "norm": "rms"},
    "parts": {"M": 9, "D": 24, "F": 200, "splits": 4, "chunks": 2, "pre_norm": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bounds_and_values(name: str, dtype: torch.dtype) -> None:
    for one in passes(dtype, **CASES[name]):
        one.check(agreeing(PROGRAM, one.case, "asan", schedules=("forward", "reverse")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"M": 70, "D": 64, "F": 72, "gated": True},
        {"M": 130, "D": 40, "F": 40, "chunks": 2, "pre_norm": False},
        {"M": 9, "D": 24, "F": 200, "splits": 3, "dropout": 0.1},
    ],
)
def test_no_races(shape: dict[str, Any], dtype: torch.dtype) -> None:
    for one in passes(dtype, **shape):
        for schedule in ("forward", "reverse"):
            one.check(run(PROGRAM, one.case, "tsan", schedule=schedule))


def test_no_races_between_blocks() -> None:
    for one in passes(BF16, M=140, D=64, F=200, gated=True, splits=2, chunks=3):
        one.check(run(PROGRAM, one.case, "tsan", schedule="random:7", resident=4))
