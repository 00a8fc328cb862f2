"""Blocks that an SM holds at once: the arithmetic of the CUDA occupancy calculator."""

from __future__ import annotations

from dataclasses import dataclass

from bench.model.archs import Arch

_REGISTER_UNIT = 256  # registers are given to a warp in this many
_SHARED_UNIT = 128  # bytes
_RESERVED = 1024  # bytes of shared memory that the system keeps a block, sm_80 and newer
_SCHEDULERS = 4  # a warp's registers come from the quarter of the file that is its scheduler's


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # resident on an SM
    warps: int
    share: float  # of the warps an SM could hold
    limit: str  # what allows no more: "registers", "shared memory", "warps", "blocks"


def occupancy(arch: Arch, registers: int, shared: int, threads: int) -> Occupancy:
    """registers: a thread; shared: bytes a block, static and dynamic; threads: a block."""
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    of_a_block = -(-(shared + _RESERVED) // _SHARED_UNIT) * _SHARED_UNIT
    warps_by_registers = arch.registers // _SCHEDULERS // of_a_warp * _SCHEDULERS
    allowed = {
        "warps": arch.warps // warps,
        "blocks": arch.blocks,
        "registers": warps_by_registers // warps,
        "shared memory": arch.shared // of_a_block if shared <= arch.shared_block else 0,
    }
    limit = min(allowed, key=lambda name: allowed[name])
    blocks = allowed[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / arch.warps, limit)
