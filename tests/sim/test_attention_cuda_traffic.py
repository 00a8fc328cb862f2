"""How the CUDA kernels touch memory, as their PTX does it: vectors, and no bank twice at once."""

from typing import Any

import pytest
import torch
from tools import padded

import fastattn
from sim import ptx
from sim.cudart import Device


def launched(gpu: Device, dtype: torch.dtype, d: int) -> ptx.Report:
    """One forward whose rows can all be read 16 bytes at a time."""
    gpu.schedule = ptx.Schedule(traffic=True)
    problem = padded(b=1, h=2, sq=256, sk=256, d=d, dtype=dtype)
    fastattn.attention(problem.q, problem.k, problem.v, backend="cuda")
    gpu.schedule = None
    (launch,) = gpu.launches
    return launch.report


def of_global_memory(report: ptx.Report) -> list[Any]:
    """Parameters lie in constant memory."""
    return [t for t in report.traffic if t.space == "global" and "ld.param" not in t.site]


@pytest.mark.parametrize("d", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_bank_conflicts(dtype: torch.dtype, d: int, gpu: Device) -> None:
    """ldmatrix of q, k and v, and the word reads of an fp32 v."""
    found = [t for t in launched(gpu, dtype, d).traffic if t.space == "shared"]
    reads = [t for t in found if "ldmatrix" in t.site or "ld.shared" in t.site]
    assert reads
    assert [(t.site, t.ratio) for t in reads if t.ratio > 1] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_global_accesses_are_vectors(dtype: torch.dtype, gpu: Device) -> None:
    """At least 95 % of the sectors of global memory move 16 bytes a lane; lse and lse_lo do not."""
    found = of_global_memory(launched(gpu, dtype, 64))
    wide = [t for t in found if "cp.async.cg" in t.site or ".v4" in t.site]
    assert len(found) > len(wide) > 0
    assert sum(t.moved for t in wide) >= 0.95 * sum(t.moved for t in found)


def test_rows_are_whole_sectors(gpu: Device) -> None:
    found = of_global_memory(launched(gpu, torch.bfloat16, 64))
    moved, ideal = sum(t.moved for t in found), sum(t.ideal for t in found)
    assert moved <= 1.05 * ideal
