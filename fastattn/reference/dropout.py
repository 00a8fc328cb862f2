"""Philox-4x32-10, and the dropout masks that every backend of every op makes from it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed", "dropout_keep", "philox_4x32", "philox_uniform_u32"]

_U32 = 0xFFFFFFFF
# Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC11), philox4x32.
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``x * m``, both < 2**32, in int64 without overflow."""
    m_hi, m_lo = m >> 16, m & 0xFFFF
    upper, lower = x * m_hi, x * m_lo  # each < 2**48
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _U32


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of Salmon et al. (SC11) on int64 tensors that hold 32-bit words.

    Args:
        counter: four int64 tensors of mutually broadcastable shapes, values in [0, 2**32).
        key: two words, ints or int64 tensors that broadcast with the counter.

    Returns:
        The four output words, int64 in [0, 2**32).

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [f"{int(w):08x}" for w in philox_4x32((zero, zero, zero, zero), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, _PHILOX_M0)
        hi1, lo1 = _mul_hi_lo(c2, _PHILOX_M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W0) & _U32, (k1 + _PHILOX_W1) & _U32
    return c0, c1, c2, c3


def _key_words(seed: int | Tensor) -> tuple[Tensor | int, Tensor | int]:
    """Low and high word of the 64-bit seed; a negative seed is its two's complement."""
    if isinstance(seed, Tensor):
        seed = seed.reshape(()).to(torch.int64)
    return seed & _U32, (seed >> 32) & _U32


def philox_uniform_u32(
    seed: int | Tensor, bh: Tensor, i: Tensor, j: Tensor, site: int = 0
) -> Tensor:
    """The 32 random bits that decide on element (i, j) of head ``bh = b * H + h``.

    Key = the 64-bit seed (low word first), counter = ``(j >> 2, i, bh, site)``, output word
    ``j & 3``.  Coordinates are local to the sequence, so padded and packed calls agree.

    Args:
        seed: int, or an int64 tensor of one element.
        bh, i, j: int64 tensors of mutually broadcastable shapes.
        site: which dropout of an op with several; attention's is 0.

    Returns:
        int64 in [0, 2**32), of the broadcast shape.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [f"{int(x):08x}" for x in philox_uniform_u32(0, zero, zero, torch.arange(4))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    words = philox_4x32((j >> 2, i, bh, torch.full_like(bh, site)), _key_words(seed))
    u32 = torch.stack(words, dim=-1)
    return u32.gather(-1, (j & 3).expand(u32.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def dropout_keep(
    seed: int | Tensor,
    p: float,
    batch: int,
    heads: int,
    rows: int,
    cols: int,
    *,
    device: torch.device | str | None = None,
    site: int = 0,
) -> Tensor:
    """The mask of attention's dropout: False where ``u32 < round(p * 2**32)``.

    Returns:
        bool ``(batch, heads, rows, cols)`` on ``device`` (default: the CPU), True = kept.

    >>> dropout_keep(7, 0.25, 1, 2, 64, 64).float().mean().sub(0.75).abs().item() < 0.02
    True
    """

    def index(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.int64, device=device)

    groups = index((cols + 3) // 4).view(1, 1, -1)  # one Philox call makes four columns
    i, bh = index(rows).view(1, -1, 1), index(batch * heads).view(-1, 1, 1)
    words = philox_4x32((groups, i, bh, torch.full_like(bh, site)), _key_words(seed))
    u32 = torch.stack(words, dim=-1).flatten(-2)[..., :cols]
    return u32.view(batch, heads, rows, cols) >= round(p * 2**32)


def draw_seed(device: torch.device | str) -> Tensor:
    """A fresh seed, int64 ``(1,)`` on ``device``, from torch's default generator there."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
