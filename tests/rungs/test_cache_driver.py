"""Rung (c) on attention over a KV cache: every specialisation compiles, is right, and is needed."""

import pytest
import torch

from rungs import cache_jit

FEW = ("aligned", "misaligned")
LAYOUTS = [pytest.param(n, marks=[] if n in FEW else [pytest.mark.full]) for n in cache_jit.LAYOUTS]


@pytest.mark.parametrize("cc", [80, pytest.param(90, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, cc: int) -> None:
    gpu = cache_jit.runs_everywhere(name, cc)
    assert gpu.launches


# test_mutants.py holds the kernels without a bug to this in every `make verify`.
@pytest.mark.full
def test_growing_compiles_nothing_new() -> None:
    compiled = cache_jit.compiles_while_growing(80)
    assert set(compiled.values()) == {1}, compiled


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shipped_tiles_fit(arch: str, head_dim: int, rows: int, dtype: torch.dtype) -> None:
    assert cache_jit.fits(arch, head_dim, dtype, rows).launches
