"""What accesses cost in shared-memory wavefronts and global sectors: counted, never timed.

Shared memory has 32 banks of 4 bytes. A warp's access of 4 bytes a lane goes in one wavefront if no
bank has to give two different words; 8 bytes a lane go as two half warps, 16 (and the rows of
ldmatrix) as four quarters. Global memory moves in sectors of 32 bytes (CUDA programming guide).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SECTOR = 32


@dataclass
class Traffic:
    """Of one instruction over a launch."""

    space: str
    site: str
    moved: int = 0  # wavefronts or sectors
    ideal: int = 0  # without conflicts, with every byte of a sector used

    @property
    def ratio(self) -> float:
        return self.moved / max(self.ideal, 1)


def wavefronts(addr: Array, lanes: Array, size: int) -> tuple[int, int]:
    """(needed, without conflicts) of shared accesses of `size` bytes a lane."""
    lanes_a_phase = 32 if size <= 4 else 128 // size
    phase = (lanes // 32) * (32 // lanes_a_phase) + (lanes % 32) // lanes_a_phase
    words = addr.astype(np.int64)[:, None] // 4 + np.arange(max(1, size // 4))
    distinct = np.unique((phase[:, None].astype(np.int64) << 32) | words)
    banks, counts = np.unique((distinct >> 32 << 5) | distinct & 31, return_counts=True)
    first = np.r_[True, (banks[1:] >> 5) != (banks[:-1] >> 5)]
    needed = np.maximum.reduceat(counts, np.flatnonzero(first))
    return int(needed.sum()), len(needed)


def sectors(addr: Array, lanes: Array, size: int) -> tuple[int, int]:
    """(touched, as few as the bytes fit into) by the warps of one instruction."""
    warp = lanes.astype(np.int64) >> 5 << 48
    touched = np.unique(warp | (addr // np.uint64(SECTOR)).astype(np.int64))
    distinct = np.unique(warp | (addr // np.uint64(size)).astype(np.int64))
    _, pieces = np.unique(distinct >> 48, return_counts=True)
    return len(touched), int((-(-pieces * size // SECTOR)).sum())
