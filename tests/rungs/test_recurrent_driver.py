"""Rung (c) on the kernels of LSTM, GRU and RNN: every specialisation compiles, is right, and is
needed."""

import pytest
import torch
from recurrence_calls import GRU, LSTM, RNN_TANH, run

from rungs import recurrent_jit
from rungs.driver import standing_in
from rungs.recurrent_cases import tier_of

BF16, F32 = torch.bfloat16, torch.float32
FEW = ("misaligned_steps", "aligned_sequence")
LAYOUTS = [
    pytest.param(n, marks=[] if n in FEW else [pytest.mark.full]) for n in recurrent_jit.layouts()
]


@pytest.mark.parametrize("cc", [80, pytest.param(90, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, cc: int) -> None:
    gpu = recurrent_jit.runs_everywhere(name, cc)
    assert gpu.launches


def test_layouts_are_different_specialisations() -> None:
    """Else the cases above would be one and the same."""
    seen = set()
    for name in ("aligned_steps", "misaligned_steps", "one_steps"):
        with standing_in(80) as gpu, tier_of(name):
            run(recurrent_jit.layouts()[name])
        source = gpu.launches[0].compiled
        seen.add(str((source.constants, source.attrs)))
    assert len(seen) == 3


# test_mutants.py holds the kernels without a bug to what is marked here in every `make verify`.
NAMED = [pytest.mark.full]


@pytest.mark.parametrize("tier", ["steps", pytest.param("sequence", marks=NAMED)])
def test_growing_compiles_nothing_new(tier: str) -> None:
    compiled = recurrent_jit.compiles_while_growing(f"_{tier}", 80)
    assert set(compiled.values()) == {1}, compiled


@pytest.mark.parametrize("cell", [LSTM, GRU, pytest.param(RNN_TANH, marks=NAMED)])
def test_weights_are_read_before_the_loop(cell: int) -> None:
    assert recurrent_jit.weights_in_the_loop(cell) == []


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize(("cell", "H"), [(LSTM, 128), (GRU, 64), (RNN_TANH, 256), (LSTM, 1024)])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_shipped_tiles_fit(arch: str, cell: int, H: int, dtype: torch.dtype) -> None:
    recurrent_jit.fits(arch, cell, H, 64, dtype)


@pytest.mark.full
def test_shipped_tiles_fit_the_smallest() -> None:
    recurrent_jit.fits("sm_86", LSTM, 128, 64, BF16)
