"""Tile sizes of the Triton attention kernels (over a cache too): one table, and what reads it.

A row is (BLOCK_M, BLOCK_N, num_warps, num_stages). Nothing here was timed on hardware: the 16-bit
forward starts from PyTorch's flex_attention defaults, the rest from FlashAttention-2's tiles, and
tiles were made smaller where an ahead-of-time compile spilled registers. What was compiled, and
what it takes, is in tests/rungs/budgets.json; what is not there is not known to be free of spills.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

FAMILIES = ("sm80", "sm86", "sm90", "sm100", "sm120", "gfx9", "cpu")
BUCKETS = (16, 32, 64, 128, 256)
# The forward; the backward's pass by rows (and what goes with it); its pass by keys; and that pass
# where it makes dq too.
WORKS = ("fwd", "rows", "keys", "fused")


class Config(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of the software pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


_Tiles = dict[tuple[str, str], dict[int, tuple[int, int, int, int]]]
_16_BIT = {
    "fwd": {32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    "rows": {32: (64, 64, 4, 2), 64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    "keys": {32: (64, 64, 4, 2), 64: (64, 32, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
    "fused": {32: (64, 64, 8, 2), 64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
}
# Where an architecture has less shared memory or another compiler than the rest.
_SPECIAL = {
    ("sm86", "fwd"): {128: (64, 64, 8, 2)},
    ("sm120", "fwd"): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2)},
    ("sm86", "rows"): {256: (32, 32, 4, 1)},
    ("sm90", "rows"): {128: (128, 64, 8, 2), 256: (64, 32, 8, 1)},
    ("sm100", "rows"): {256: (64, 32, 8, 1)},
    ("sm86", "keys"): {32: (32, 64, 4, 2)},
    ("sm90", "keys"): {64: (64, 128, 8, 1)},
    ("sm100", "keys"): {32: (32, 64, 4, 2)},
    ("sm120", "keys"): {32: (32, 64, 4, 2)},
    ("gfx9", "fwd"): {32: (64, 64, 4, 1), 64: (64, 64, 4, 1), 128: (64, 64, 4, 1)},
    ("gfx9", "rows"): {128: (32, 32, 4, 1), 256: (32, 32, 4, 1)},
    ("gfx9", "keys"): dict.fromkeys((32, 64, 128, 256), (16, 32, 4, 1)),
    ("gfx9", "fused"): dict.fromkeys((32, 64, 128, 256), (16, 32, 4, 1)),
}
# A mask, bias, softcap, ALiBi or dropout: their tiles of indices and values live in registers too.
_LADEN = {
    "fwd": {32: (64, 64, 4, 2), 64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    "rows": {32: (64, 32, 4, 2), 64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    "keys": {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    "fused": {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 32, 8, 1)},
}
_LADEN_SPECIAL = {("gfx9", "rows"): {64: (32, 32, 8, 1)}}
# fp32 runs on the FMA units (input_precision="ieee"): operands live in registers, tiles are small.
_FP32 = {
    "fwd": {32: (64, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    "rows": {32: (32, 32, 4, 1), 64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (32, 16, 8, 1)},
    "keys": {32: (32, 32, 4, 1), 64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 32, 8, 1)},
    "fused": {32: (32, 32, 4, 1), 64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
_FP32_SPECIAL = {
    ("sm100", "fwd"): {32: (32, 32, 4, 2)},
    ("sm86", "rows"): {128: (16, 16, 8, 1)},
    ("sm120", "rows"): {256: (16, 16, 8, 1)},
    ("sm86", "keys"): {256: (16, 16, 8, 1)},
    ("gfx9", "fwd"): {128: (16, 32, 8, 1)},
    ("gfx9", "keys"): {64: (16, 32, 8, 1), 128: (16, 16, 8, 1)},
}
# Attention over a cache, for up to 16 packed rows and for more: the first tier is bound by memory,
# so its tiles are long and its products half empty; FlashDecoding's have 64 rows for that.
_CACHE = {
    "few": {32: (16, 128, 4, 3), 64: (16, 128, 4, 3), 128: (16, 64, 4, 3), 256: (16, 32, 4, 3)},
    "many": {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
}
_CACHE_SPECIAL = {
    # Two programs an SM: a tile in flight each, where a second does not fit.
    ("sm86", "few"): {64: (16, 128, 4, 2), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)},
    ("sm120", "few"): {64: (16, 128, 4, 2), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)},
    ("gfx9", "few"): dict.fromkeys((32, 64, 128, 256), (16, 32, 4, 1)),
    ("gfx9", "many"): dict.fromkeys((32, 64, 128, 256), (32, 32, 4, 1)),
}
# The same with a mask, softcap or ALiBi, where the tile above spilled.
_CACHE_LADEN: _Tiles = {
    ("sm80", "many"): {128: (64, 32, 4, 2)},
    ("sm86", "many"): {128: (64, 32, 4, 2)},
    ("sm120", "few"): {64: (16, 64, 4, 2)},
    ("sm120", "many"): {64: (64, 32, 4, 2), 128: (64, 32, 4, 2)},
}
_CACHE_FP32 = {
    "few": {32: (16, 64, 4, 2), 64: (16, 32, 4, 2), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    "many": {32: (32, 32, 4, 2), 64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
}
_CACHE_FP32_SPECIAL: _Tiles = {
    ("sm90", "many"): {64: (32, 16, 8, 1), 256: (16, 16, 16, 1)},
    ("sm100", "few"): {64: (16, 32, 8, 2), 256: (16, 16, 16, 1)},
    ("sm100", "many"): {256: (16, 32, 8, 1)},
    ("sm120", "few"): {256: (16, 16, 16, 1)},
}
_CACHE_FP32_LADEN: _Tiles = {
    ("sm86", "few"): {256: (16, 16, 4, 1)},
    ("sm86", "many"): {256: (16, 16, 4, 1)},
    ("sm90", "few"): {32: (16, 64, 8, 2), 256: (16, 16, 4, 1)},
    ("sm90", "many"): {256: (16, 16, 4, 1)},
    ("sm100", "few"): {256: (16, 16, 4, 1)},
    ("sm100", "many"): {256: (16, 16, 4, 1)},
    ("sm120", "many"): {32: (32, 32, 8, 2)},
}
# Triton's interpreter: small tiles, not square, so that a short sequence has several of them.
_CPU = {
    "fwd": (32, 16, 1, 1),
    "rows": (16, 32, 1, 1),
    "keys": (16, 32, 1, 1),
    "fused": (16, 32, 1, 1),
}


def bucket(head_dim: int, head_dim_v: int) -> int:
    """The smallest of BUCKETS that holds both head dims."""
    widest = max(head_dim, head_dim_v)
    for b in BUCKETS:
        if widest <= b:
            return b
    raise ValueError(f"head_dim must be at most {BUCKETS[-1]}, got {widest}")


@lru_cache
def config(
    family: str, dtype: torch.dtype, head_dim: int, head_dim_v: int, work: str, laden: bool = False
) -> Config:
    """The tile of a kernel.

    Args:
        family: one of FAMILIES, see :func:`family_of`.
        dtype: of q, k and v.
        head_dim, head_dim_v: D and Dv, 1 to 256.
        work: one of WORKS.
        laden: a mask, bias, softcap, ALiBi, dropout or weights take registers as well.
    """
    size = max(32, bucket(head_dim, head_dim_v))  # 16 needs no row of its own
    if family == "cpu":
        return Config(*_CPU[work])
    if dtype == torch.float32:
        return Config(*_FP32_SPECIAL.get((family, work), {}).get(size, _FP32[work][size]))
    plain = Config(*_SPECIAL.get((family, work), {}).get(size, _16_BIT[work][size]))
    if not laden:
        return plain
    small = Config(*_LADEN_SPECIAL.get((family, work), {}).get(size, _LADEN[work][size]))
    return small if small.BLOCK_M * small.BLOCK_N <= plain.BLOCK_M * plain.BLOCK_N else plain


@lru_cache
def cache_config(
    family: str, dtype: torch.dtype, head_dim: int, head_dim_v: int, rows: int, laden: bool
) -> Config:
    """The tile of attention over a cache; rows: of q for a kv head, those of its group packed.
    laden: there is a mask, softcap or ALiBi."""
    size = max(32, bucket(head_dim, head_dim_v))
    work = "few" if rows <= 16 else "many"
    if family == "cpu":
        return Config(16 if work == "few" else 32, 16, 1, 1)
    table, special, more = _CACHE, _CACHE_SPECIAL, _CACHE_LADEN
    if dtype == torch.float32:
        table, special, more = _CACHE_FP32, _CACHE_FP32_SPECIAL, _CACHE_FP32_LADEN
    plain = special.get((family, work), {}).get(size, table[work][size])
    return Config(*(more.get((family, work), {}).get(size, plain) if laden else plain))


def multiprocessors(device: torch.device) -> int:
    """How many the device has; 8 for the interpreter, so that a short sequence is split."""
    if device.type != "cuda":
        return 8
    return _multiprocessors(
        device.index if device.index is not None else torch.cuda.current_device()
    )


@lru_cache
def _multiprocessors(index: int) -> int:
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


def family_of(device: torch.device) -> str:
    """The row of the table for a device; of architectures that are not in it, the nearest below."""
    if device.type == "cpu":
        return "cpu"
    return _family(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _family(index: int) -> str:
    if torch.version.hip:
        return "gfx9"
    major, minor = torch.cuda.get_device_capability(index)
    if major >= 12:
        return "sm120"
    if major >= 10:
        return "sm100"
    if major == 9:
        return "sm90"
    return "sm86" if (major, minor) > (8, 0) else "sm80"
