"""``attention_with_kv_cache``: the naive formula over keys gathered from the cache.

The keys of every sequence are assembled to one (B, Hk, capacity, D) tensor and go through
``attention`` with a mask. No value is read back from the device: what is out of range is clamped,
as the GPU kernels clamp it (the public function has checked values where they can be read).

Dimensions: ``B`` sequences, ``H`` / ``Hk`` heads of q / of the cache, ``Sq`` rows of q, ``Sn`` rows
of k, ``S`` slots of a contiguous cache, ``D`` / ``Dv`` head dims, ``R`` rotated dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.reference.attention import attention

__all__ = ["attention_with_kv_cache"]

Window = tuple[int | None, int | None]


def _rotate(x: Tensor, positions: Tensor, table: tuple[Tensor, Tensor], pairs: bool) -> Tensor:
    """RoPE (Su et al., 2104.09864) on the first R dims of x (B, H, n, D), rounded once.

    Dim t is rotated with dim t + R / 2, or with its neighbour where ``pairs``; in fp32, fp64 for
    float64.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    at = positions.clamp(0, max(table[0].shape[0] - 1, 0))
    if table[0].shape[0] == 0:
        return x
    cos, sin = (t.to(wide)[at].unsqueeze(1) for t in table)  # (B, 1, n, R / 2)
    R = 2 * cos.shape[-1]
    head, tail = x[..., :R].to(wide), x[..., R:]
    if pairs:
        a, b = head[..., 0::2], head[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = head[..., : R // 2], head[..., R // 2 :]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), tail), dim=-1)


class _Slots:
    """Where the keys of each sequence lie: key j of sequence b in cache[entry, :, slot]."""

    def __init__(self, cache: Tensor, block_table: Tensor | None, cache_index: Tensor | None,
                 batch: int) -> None:  # fmt: skip
        self.entries, self.size = cache.shape[0], cache.shape[2]
        self.paged = block_table is not None
        if block_table is not None:
            table = block_table.long()
        elif cache_index is not None:
            table = cache_index.long()[:, None]
        else:
            table = torch.arange(batch, device=cache.device)[:, None]
        self.table = table.clamp(0, max(self.entries - 1, 0))
        self.capacity = self.size * self.table.shape[1]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Entry and slot of positions (B, n) inside the capacity."""
        return self.table.gather(1, positions // self.size), positions % self.size

    def assemble(self, cache: Tensor) -> Tensor:
        """(B, Hk, capacity, D), with whatever lies beyond the sequences' ends."""
        B, columns = self.table.shape
        shape = (B, cache.shape[1], self.capacity, cache.shape[3])
        if self.entries == 0 or self.capacity == 0:
            return cache.new_zeros(shape)
        found: Tensor = cache[self.table.flatten()].unflatten(0, (B, columns))
        return found.transpose(1, 2).reshape(shape)

    def append(self, cache: Tensor, rows: Tensor, first: Tensor, n: Tensor) -> None:
        """rows[b, :, i] to position first[b] + i, for i < n[b] and as far as the capacity goes."""
        B, Sn = rows.shape[0], rows.shape[2]
        if self.entries == 0 or self.capacity == 0 or B * Sn == 0:
            return
        i = torch.arange(Sn, device=rows.device)
        positions = first[:, None] + i
        kept = ((i < n[:, None]) & (positions < self.capacity)).flatten()
        entry, slot = (x.flatten() for x in self.at(positions.clamp(max=self.capacity - 1)))
        values = rows.transpose(1, 2).flatten(0, 1)  # (B Sn, Hk, D)
        # No index may be left out without reading a value back: rows that are not kept repeat the
        # first kept one, or where there is none write what is there.
        one = kept.int().argmax().view(1)
        some = torch.where(kept[one].view(-1, 1, 1), values[one], cache[entry[one], :, slot[one]])
        entry, slot = torch.where(kept, entry, entry[one]), torch.where(kept, slot, slot[one])
        values = torch.where(kept.view(-1, 1, 1), values, some)
        cache[entry, :, slot] = values


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lens: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    new_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_index: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: Window | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "reference",
) -> Any:
    """Attention of the newest rows over a cache, by the formula; the arguments, shapes and results
    of :func:`fastattn.attention_with_kv_cache`. The rows of k and v are written into the cache in
    place. ``backend`` is accepted for the signature's sake, without effect.

    >>> q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    >>> k_cache, v_cache = (torch.zeros(1, 2, 8, 4, dtype=torch.float64) for _ in range(2))
    >>> o = attention_with_kv_cache(
    ...     q, k_cache, v_cache, cache_lens=torch.tensor([0]), k=k, v=v)
    >>> torch.equal(k_cache[:, :, :3], k), torch.allclose(o, attention(q, k, v, causal=True))
    (True, True)
    """
    B, _, Sq, D = q.shape
    slots = _Slots(k_cache, block_table, cache_index, B)
    capacity = slots.capacity
    first = cache_lens.long().clamp(0, capacity)
    Sn = 0 if k is None else k.shape[2]
    n = torch.full_like(first, Sn) if new_lens is None else new_lens.long().clamp(0, Sn)
    total = (first + n).clamp(max=capacity)
    if k is not None and v is not None:
        if rotary is not None:
            fresh = first[:, None] + torch.arange(Sn, device=q.device)
            k = _rotate(k, fresh, rotary, rotary_interleaved)
        slots.append(k_cache, k, first, n)
        slots.append(v_cache, v, first, n)

    i = torch.arange(Sq, device=q.device)
    position = (total - Sq if new_lens is None else first)[:, None] + i  # (B, Sq)
    is_row = position >= 0
    if new_lens is not None:
        is_row = is_row & (i < n[:, None])
    q = torch.where(is_row[:, None, :, None], q, 0.0)
    if rotary is not None:
        q = _rotate(q, position, rotary, rotary_interleaved)

    at, j = position[:, None, :, None], torch.arange(capacity, device=q.device)
    takes_part = is_row[:, None, :, None] & (j < total.view(-1, 1, 1, 1))
    left, right = window if window is not None else (None, None)
    if causal:
        takes_part = takes_part & (j <= at)
    if left is not None:
        takes_part = takes_part & (j >= at - left)
    if right is not None:
        takes_part = takes_part & (j <= at + right)
    if mask is not None:
        takes_part = takes_part & mask
    bias = None
    if alibi_slopes is not None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        bias = -alibi_slopes.to(wide)[..., None, None] * (at - j).abs().to(wide)
    o, lse = attention(
        q, slots.assemble(k_cache), slots.assemble(v_cache), mask=takes_part, bias=bias,
        k_lens=total, softcap=softcap, sinks=sinks,
        scale=D**-0.5 if scale is None else scale, return_lse=True,
    )  # fmt: skip
    lse = lse.masked_fill(~is_row[:, None], float("-inf"))
    return (o, lse) if return_lse else o
