"""Fixtures of the simulators. Libraries and Triton's kernels are kept under build/, by the hash of
their sources: the second run is quick."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: tensors are small, and threads of a busy machine wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[2] / "build" / "triton")
)

import pytest

from sim import operators
from sim.cudart import Device


@pytest.fixture
def gpu() -> Iterator[Device]:
    """backend="cuda" serves CPU tensors: the binding that ships, its kernels in the simulator."""
    with operators.on_cpu() as device:
        yield device
