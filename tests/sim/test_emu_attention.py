"""The CUDA attention forward, compiled for the host, under the sanitizers."""

from typing import Any

import pytest
import torch

from sim.emu import agreeing, run
from sim.emu_attention import PROGRAM, forward

pytestmark = pytest.mark.sampled(3)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Tails of rows, keys and columns; grouped heads; nothing visible; element-wise copies.
CASES: dict[str, dict[str, Any]] = {
    "tails": {"B": 2, "H": 2, "Hk": 1, "Sq": 67, "Sk": 131, "D": 40},
    "causal": {"Sq": 130, "Sk": 70, "D": 64, "causal": 2},
    "mask": {"Sq": 33, "Sk": 65, "D": 64, "mask": True},
    "one": {"Sq": 1, "Sk": 1, "D": 1},
    "misaligned": {"Sq": 20, "Sk": 40, "D": 64, "lead": 4},
    "wide": {"Sq": 65, "Sk": 33, "D": 256},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_bounds_and_values(name: str, dtype: torch.dtype) -> None:
    f = forward(dtype, **CASES[name])
    f.check(agreeing(PROGRAM, f.case, "asan", schedules=("forward", "reverse")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"Sq": 70, "Sk": 200, "D": 64},
        {"Sq": 40, "Sk": 70, "D": 32, "mask": True},
        {"Sq": 200, "Sk": 20, "D": 64, "causal": 2},  # a block that sees no key
    ],
)
def test_no_races(shape: dict[str, Any], dtype: torch.dtype) -> None:
    f = forward(dtype, **shape)
    for schedule in ("forward", "reverse"):
        f.check(run(PROGRAM, f.case, "tsan", schedule=schedule))


def test_no_races_between_blocks() -> None:
    f = forward(torch.bfloat16, H=2, Sq=129, Sk=64, D=32)
    f.check(run(PROGRAM, f.case, "tsan", schedule="random:7", resident=4))
