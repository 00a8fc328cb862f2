"""The ahead-of-time rung reads machine code right: planted spills, idle tensor cores, limits."""

import pytest
import torch

from rungs import aot, toys
from rungs.aot import ARCHS, CompileError, Figures, figures
from rungs.driver import SHARED_LIMIT
from rungs.launches import Launch, recorded


def matmul(m: int, n: int, k: int, dot: bool = True, **options: int) -> Launch:
    a = torch.empty(256, 256, dtype=torch.float16)
    with recorded() as launches:
        toys.matmul(a, a, m, n, k, dot, **options)
    return launches[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_good_kernel(arch: str) -> None:
    found = figures(matmul(64, 64, 32, num_stages=2, num_warps=8), arch)
    assert found.mma > 0
    assert found.spills == 0
    assert 16 <= found.registers <= 255
    assert 0 < found.shared <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_spills_are_seen(arch: str) -> None:
    """A 128 x 128 fp32 tile in one warp is 512 registers a thread; AMD's waves have twice that."""
    m = 256 if arch == "gfx942" else 128
    assert figures(matmul(m, 128, 16, num_warps=1, num_stages=1), arch).spills > 0


def test_idle_tensor_cores_are_seen() -> None:
    assert figures(matmul(16, 16, 16, dot=False, num_stages=1), "sm_80").mma == 0


def test_shared_memory_over_the_limit_is_seen() -> None:
    launch = matmul(128, 128, 64, num_stages=5)
    assert figures(launch, "sm_86").shared > SHARED_LIMIT["sm_86"]
    assert figures(launch, "sm_80").shared < SHARED_LIMIT["sm_80"]


def test_what_does_not_compile_is_red() -> None:
    with pytest.raises(CompileError, match="matmul_kernel for sm_80"):
        figures(matmul(48, 64, 32), "sm_80")  # a tile that is no power of two


def test_worse_and_better() -> None:
    budget = Figures(registers=100, spills=0, shared=1024, mma=8)
    assert Figures(100, 0, 1024, 8).worse_than(budget) == []
    assert Figures(64, 0, 512, 16).worse_than(budget) == []
    worse = Figures(101, 1, 1025, 7).worse_than(budget)
    assert worse == ["registers 101 > 100", "spills 1 > 0", "shared 1025 > 1024", "mma 7 < 8"]


def test_only_loops_count() -> None:
    sass = ["HMMA", ".L_x_1:", "HMMA", "@P0 BRA `(.L_x_1) ;", "HMMA", "BRA `(.L_x_2)", ".L_x_2:"]
    assert aot._in_loops("\n".join(sass), aot._BRANCH, aot._MMA) == 1
