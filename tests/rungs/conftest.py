"""Compiled kernels are kept under build/, by the hash of their source: the second run is quick."""

import os
from pathlib import Path

# Before torch is imported: tensors are small, and threads of a busy machine wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault(
    "TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[2] / "build" / "triton")
)
