"""Rung (c) on the kernels of layernorm_ffn and its parts: every specialisation compiles, is right,
and is needed."""

import pytest
import torch
from ffn_tools import run

from rungs import row_jit
from rungs.driver import standing_in

LAYOUTS = tuple(row_jit.layouts())


@pytest.mark.parametrize("cc", [80, pytest.param(90, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, cc: int) -> None:
    gpu = row_jit.runs_everywhere(name, cc)
    assert {x.name for x in gpu.launches} & {"norm_backward_kernel", "act_backward_kernel"}


def test_layouts_are_different_specialisations() -> None:
    """Else the cases above would be one and the same."""
    seen = set()
    for name in ("aligned", "misaligned", "odd_rows"):
        with standing_in(80) as gpu:
            run(row_jit.layouts()[name], "triton")
        source = gpu.launches[0].compiled
        seen.add(str((source.constants, source.attrs)))
    assert len(seen) == 3


def test_rows_and_numbers_compile_nothing_new() -> None:
    compiled = row_jit.compiles_while_growing(80)
    assert compiled.pop("sum_parts_kernel") == 2  # two results of the norm, one of the act pass
    # A threshold of 2^31 and more is another integer type; none is here.
    assert set(compiled.values()) == {1}, compiled


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("n", [64, 1024, 8192, 65536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shipped_tiles_fit(arch: str, n: int, dtype: torch.dtype) -> None:
    row_jit.fits(arch, n, dtype)


def test_shipped_tiles_fit_the_smallest() -> None:
    row_jit.fits("sm_86", 768, torch.bfloat16)
