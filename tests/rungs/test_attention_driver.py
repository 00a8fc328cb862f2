"""Rung (c) on the attention kernels: every specialisation compiles, is right, and is needed."""

import pytest
import torch
from tools import featured, packed

from rungs import jit
from rungs.calls import attend, check
from rungs.driver import standing_in

pytestmark = pytest.mark.sampled(2)

LAYOUTS = tuple(jit.layouts())


@pytest.mark.parametrize("cc", [80, pytest.param(90, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, cc: int) -> None:
    gpu = jit.runs_everywhere(name, cc)
    assert {x.name for x in gpu.launches} >= {"forward_kernel", "by_keys_kernel", "by_rows_kernel"}


def test_layouts_are_different_specialisations() -> None:
    """Else the cases above would be one and the same."""
    seen = {}
    for name in ("aligned", "misaligned", "odd_rows", "spread_columns"):
        with standing_in(80) as gpu:
            attend(jit.layouts()[name], backward=False)
        source = gpu.launches[0].compiled
        seen[name] = (source.constants, source.attrs)
    assert len({str(x) for x in seen.values()}) == len(seen)


def test_the_same_call_compiles_once() -> None:
    with standing_in(80) as gpu:
        for _ in range(2):
            attend(jit.layouts()["aligned"])
    assert set(gpu.compiled.values()) == {1}
    assert len(gpu.launches) == 2 * len(gpu.compiled)


def test_a_growing_sequence_compiles_nothing_new() -> None:
    assert set(jit.compiles_while_growing(80).values()) == {1}


def test_settings_compile_nothing_new() -> None:
    """Strides of size-1 dimensions are the caller's; two binaries at most."""
    assert max(jit.compiles_over_settings(80).values()) <= 2


@pytest.mark.parametrize("feature", ["all", "dropout", "softcap", "window_causal"])
def test_features_compile(feature: str) -> None:
    with standing_in(80):
        attend(featured(feature, b=1, h=2, hk=1, sq=37, sk=45, d=24))


def test_packed() -> None:
    with standing_in(80, values=True):
        check(packed([21, 0, 40], h=2, d=16, causal=True))


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shipped_tiles_fit(arch: str, head_dim: int, dtype: torch.dtype) -> None:
    jit.fits(arch, head_dim, dtype)


def test_shipped_tiles_fit_the_smallest() -> None:
    jit.fits("sm_86", 128, torch.bfloat16)
