"""Launcher of the Triton kernels of attention over a KV cache: allocate, split, launch.

q (B, H, Sq, D); caches (entries, Hk, S, D) and (entries, Hk, S, Dv), where an entry is a sequence
or, with a block table, a page; new k (B, Hk, Sn, D), v (B, Hk, Sn, Dv). Any strides. Nothing is
read back from the device: the number of splits follows from shapes and the device alone, and each
sequence's own length is then shared out evenly among them. Memory beside the results, where there
are several: 4 (Dv + 2) bytes a row and split.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels import attention_kv_cache_fwd as fwd
from fastattn.kernels import configs
from fastattn.kernels.contract import empty_as
from fastattn.kernels.launch import device_of, launch

_LOG2E = 1.4426950408889634
_TINY = torch.finfo(torch.float32).tiny
# New rows up to this number are appended by the attention kernel itself: for one tile of them a
# launch of its own (3 us) costs more than what its programs read and rotate again.
_FUSED_ROWS = 16
# More splits than this would cost their merge more than they gain.
MAX_SPLITS = 64
# Programs of the first tier that an SM holds at once, and tiles that make a split worth its merge.
_PROGRAMS_AN_SM, _TILES_A_SPLIT = 2, 2
_MERGED_AT_ONCE = 16


def attention_kv_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """o and lse of ``fastattn::attention_kv_cache_triton``; the caches are written in place.

    Args:
        rest: k, v, new_lens, block_table, cache_index, cos, sin, mask, alibi_slopes, sinks
            (tensors or None), scale, softcap, causal, window_left, window_right, interleaved, as in
            the op's schema; checked (attention_kv_cache_checks.py).

    Returns:
        o (B, H, Sq, Dv) in q's dtype and memory order; lse fp32 (B, H, Sq), natural log.
    """
    o = empty_as(q, (*q.shape[:-1], v_cache.shape[-1]))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    B, H, Sq = q.shape[:3]
    if B == 0:
        return o, lse
    Hk, Dv = k_cache.shape[1], v_cache.shape[-1]
    values = _arguments(q, k_cache, v_cache, cache_lens, rest)
    rows = values["group"] * Sq
    family = configs.family_of(q.device)
    laden = values["mask_ptr"] is not None or not values["PLAIN"]
    config = configs.cache_config(family, q.dtype, q.shape[3], Dv, rows, laden)
    values["PAGED"] = _paging(values, config)
    if H == 0:  # nobody attends, but the new rows are appended
        with device_of(q):
            _append(B * Hk, values)
        return o, lse
    programs = B * Hk * -(-rows // config.BLOCK_M)
    tiles = _tiles(values, config, rows)
    apart = values["Sn"] > _FUSED_ROWS
    splits = splits_for(programs, tiles, _PROGRAMS_AN_SM * configs.multiprocessors(q.device))
    values |= {
        "o_ptr": o, "stride_o": o.stride(), "lse_ptr": lse, "splits": splits, "SPLIT": splits > 1,
        "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "part_ptr": None,
        "sums_ptr": None, "BLOCK_S": _MERGED_AT_ONCE,
    }  # fmt: skip
    if splits > 1:
        shape = (B * Hk, splits, rows)
        values["part_ptr"] = q.new_empty((*shape, Dv), dtype=torch.float32)
        values["sums_ptr"] = q.new_empty((*shape, 2), dtype=torch.float32)
    with device_of(q):
        if apart:
            _append(B * Hk, values)
            values |= {"k_ptr": None, "v_ptr": None}
        _run(fwd.cached_attention_kernel, programs * splits, values, *config[2:])
        if splits > 1:
            _run(fwd.merge_kernel, B * H * Sq, values, num_warps=4, num_stages=1)
    return o, lse


def _append(heads: int, values: dict[str, Any]) -> None:
    programs = heads * -(-values["Sn"] // values["BLOCK_NEW"])
    if programs:
        _run(fwd.append_kernel, programs, values, num_warps=4, num_stages=1)


def splits_for(programs: int, tiles: int, slots: int) -> int:
    """Parts that the keys are split into, as FlashAttention-2 chooses them: the fewest within 85 %
    of the best use of the last wave.

    Args:
        programs: without a split. tiles: of keys, at most, for one of them. slots: programs that
            the device runs at once.
    """
    most = min(MAX_SPLITS, tiles // _TILES_A_SPLIT, slots)
    if most < 2 or programs >= 0.8 * slots:
        return 1

    def use(splits: int) -> float:
        waves = programs * splits / slots
        return waves / -(-programs * splits // slots)

    best = max(map(use, range(1, most + 1)))
    return next(s for s in range(1, most + 1) if use(s) >= 0.85 * best)


def _tiles(values: dict[str, Any], config: configs.Config, rows: int) -> int:
    """The most tiles of keys that a block of rows can see: the cached and the new ones."""
    keys: int = values["capacity"]
    left, right = values["window_left"], values["window_right"]
    right = 0 if values["CAUSAL"] else right
    if left is not None and right is not None:
        queries = -(-min(rows, config.BLOCK_M) // values["group"]) + 1
        keys = min(keys, left + right + queries)
    return -(-keys // config.BLOCK_N)


def _paging(values: dict[str, Any], config: configs.Config) -> int:
    if values["table_ptr"] is None:
        return fwd.CONTIGUOUS.value
    whole = values["page_size"] % config.BLOCK_N == 0
    return (fwd.BY_TILE if whole else fwd.BY_KEY).value


def _arguments(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, rest: tuple[Any, ...]
) -> dict[str, Any]:
    """What the kernels take, by name, but for results, splits and tiles."""
    k, v, new_lens, table, index, cos, sin, mask, alibi, sinks = rest[:10]
    scale, softcap, causal, left, right, interleaved = rest[10:16]
    if cos is not None and cos.shape[0] == 0:  # then no sequence has a key to rotate
        cos = sin = None
    (_, H, Sq, D), (entries, Hk, S, _) = q.shape, k_cache.shape
    Sn = 0 if k is None else k.shape[2]
    # Of no pages none can be read; a table of no columns has none.
    capacity = (S if table is None else S * table.shape[1]) if entries else 0
    plain = scale >= _TINY and not softcap and alibi is None
    scale = ctypes.c_float(scale).value
    unit = scale if plain else 1.0
    furthest = Sq + Sn + capacity
    return {
        "q_ptr": q, "k_cache_ptr": k_cache, "v_cache_ptr": v_cache, "k_ptr": k, "v_ptr": v,
        "cache_lens_ptr": cache_lens.contiguous(), "new_lens_ptr": _flat(new_lens),
        "table_ptr": _flat(table), "index_ptr": _flat(index), "cos_ptr": _flat(cos),
        "sin_ptr": _flat(sin), "mask_ptr": mask, "alibi_ptr": alibi, "sinks_ptr": _flat(sinks),
        "stride_q": q.stride(), "stride_kc": k_cache.stride(), "stride_vc": v_cache.stride(),
        "stride_k": _strides(k), "stride_v": _strides(v),
        "stride_mask": _broadcast_strides(mask),
        "stride_alibi": (0, 0) if alibi is None else (0, *alibi.stride())[-2:],
        "Hk": Hk, "group": H // Hk, "Sq": Sq, "Sn": Sn, "capacity": capacity, "entries": entries,
        "columns": 1 if table is None else table.shape[1], "page_size": max(S, 1),
        "positions": 0 if cos is None else cos.shape[0],
        "scale": scale, "unit": unit, "c": ctypes.c_float(unit * _LOG2E).value,
        "softcap": softcap or None,
        "window_left": None if left < 0 else min(left, furthest),
        "window_right": None if right < 0 else min(right, furthest),
        "D": D, "Dv": v_cache.shape[3], "BLOCK_D": _block(D), "BLOCK_DV": _block(v_cache.shape[3]),
        "R": 0 if cos is None else 2 * cos.shape[1], "INTERLEAVED": interleaved,
        "CAUSAL": 1 if causal else 0, "PLAIN": plain, "PRECISION": "ieee", "BLOCK_NEW": _FUSED_ROWS,
    }  # fmt: skip


def _run(
    kernel: Any, programs: int, values: dict[str, Any], num_warps: int, num_stages: int
) -> None:  # fmt: skip
    # Grids are one-dimensional: y and z end at 65535.
    launch(
        kernel, (programs,), *[values[name] for name in kernel.arg_names], num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


def _block(width: int) -> int:
    """The power of two that holds a head dim; tensor cores want 16."""
    return max(16, 1 << (width - 1).bit_length())


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def _broadcast_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of x as a view of (B, H, Sq, capacity): 0 where it is broadcast."""
    if x is None:
        return (0, 0, 0, 0)
    own = (0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
    return (*(0,) * (4 - x.dim()), *own)
