"""What the Triton kernels of attention over a cache want of a call's shapes. The public function
checks before they get here; a direct call of the op does not, and must not leave its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.checks import LONGEST

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(right: bool, *words: object) -> None:
    if not right:
        raise ValueError(f"fastattn::attention_with_kv_cache: {''.join(map(str, words))}")


def check_call(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, *rest: Any) -> None:
    k, v, new_lens, table, index, cos, sin, mask, alibi, sinks = rest[:10]
    _check(q.dtype in _DTYPES, "q must be float32, bfloat16 or float16, got ", q.dtype)
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if x is not None:
            _check(x.dim() == 4, name, " must have 4 dimensions, got ", x.dim())
            _check(x.dtype == q.dtype, name, " must have q's dtype ", q.dtype, ", got ", x.dtype)
    (B, H, Sq, D), (entries, Hk, S, _), Dv = q.shape, k_cache.shape, v_cache.shape[3]
    _check(Sq > 0, "q must have at least one row a sequence")
    _check(D > 0 and Dv > 0, "head_dim must be at least 1")
    _check(k_cache.shape[3] == D, "k_cache must have head_dim ", D, " to match q, got ",
           k_cache.shape[3])  # fmt: skip
    _check(v_cache.shape[:3] == k_cache.shape[:3], "v_cache must have k_cache's first dimensions ",
           tuple(k_cache.shape[:3]), ", got ", tuple(v_cache.shape[:3]))  # fmt: skip
    _check(Hk > 0 and H % Hk == 0, "q's heads must be a multiple of the cache's, got ", H, " and ",
           Hk)  # fmt: skip
    _check((k is None) == (v is None), "k and v must be given together, or neither")
    _check(new_lens is None or k is not None, "new_lens needs k and v")
    if k is not None:
        Sn = k.shape[2]
        _check(tuple(k.shape) == (B, Hk, Sn, D), "k must have shape ", (B, Hk, Sn, D), ", got ",
               tuple(k.shape))  # fmt: skip
        _check(tuple(v.shape) == (B, Hk, Sn, Dv), "v must have shape ", (B, Hk, Sn, Dv), ", got ",
               tuple(v.shape))  # fmt: skip
        _check(new_lens is None or Sq == Sn, "new_lens needs as many rows of q as of k, got ", Sq,
               " and ", Sn)  # fmt: skip
    _integers(cache_lens, B, "cache_lens"), _integers(new_lens, B, "new_lens")
    columns = 1
    if table is not None:
        _check(index is None, "cache_index is for a contiguous cache")
        _check(table.dim() == 2 and table.shape[0] == B, "block_table must have shape (", B, ", *)")
        _check(table.dtype in (torch.int32, torch.int64), "block_table must be int32 or int64")
        columns = table.shape[1]
    elif index is not None:
        _integers(index, B, "cache_index")
    else:
        _check(entries == B, "k_cache must have ", B, " entries, got ", entries)
    _check(S * columns <= LONGEST, "a sequence has at most ", LONGEST, " keys, got ",
           S * columns)  # fmt: skip
    _rotary(cos, sin, D)
    if mask is not None:
        _check(mask.dtype == torch.bool, "mask must be bool")
        _check(mask.dim() <= 4, "mask must have at most 4 dimensions, got ", mask.dim())
        sizes = (B, H, Sq, S * columns)[4 - mask.dim() :]
        for d, (n, size) in enumerate(zip(mask.shape, sizes, strict=True)):
            _check(n in (1, size), "mask dimension ", d, " must be 1 or ", size, ", got ", n)
    if alibi is not None:
        _check(tuple(alibi.shape) in ((H,), (B, H)), "alibi_slopes must have shape (H,) or (B, H)")
    _check(sinks is None or tuple(sinks.shape) == (H,), "sinks must have shape (H,)")


def _rotary(cos: Tensor | None, sin: Tensor | None, D: int) -> None:
    _check((cos is None) == (sin is None), "cos and sin must be given together, or neither")
    if cos is None or sin is None:
        return
    same = cos.dim() == 2 and cos.shape == sin.shape and 0 < 2 * cos.shape[1] <= D
    _check(same, "cos and sin must have one shape (positions, R / 2), R at most ", D)
    _check(cos.dtype == sin.dtype == torch.float32, "cos and sin must be float32")


def _integers(x: Tensor | None, n: int, name: str) -> None:
    if x is not None:
        _check(x.dim() == 1 and x.shape[0] == n, name, " must have shape (", n, ",)")
        _check(x.dtype in (torch.int32, torch.int64), name, " must be int32 or int64")
