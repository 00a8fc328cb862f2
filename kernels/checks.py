"""What the Triton kernels want of a call's shapes: csrc/bindings/attention_args.h in Python, in its
words. The public functions check before they get here; a direct call of the op does not, and must
not leave its tensors either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Tiles reach beyond a sequence's end: their indices stay below 2**31.
LONGEST = 2**31 - 2**16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(right: bool, *words: object) -> None:
    if not right:
        raise ValueError(f"fastattn::attention: {''.join(map(str, words))}")


def check_call(
    q: Tensor, k: Tensor, v: Tensor, shared: Sequence[Any], sizes: tuple[int, ...]
) -> None:
    """sizes: B, H, Sq, Sk, as the kernels will take them."""
    mask, bias, q_lens, k_lens, cu_q, cu_k, alibi, sinks, seed = shared[:9]
    causal, dropout_p, weights = shared[10], shared[14], shared[15]
    B, H = sizes[:2]
    _check(q.dtype in _DTYPES, "q must be float32, bfloat16 or float16")
    _check(q.dtype == k.dtype == v.dtype, "q, k and v must have one dtype")
    heads = k.shape[1]
    _check(k.shape[-1] == q.shape[-1], "k must have head_dim ", q.shape[-1], " to match q, got ",
           k.shape[-1])  # fmt: skip
    _check(v.shape[1] == heads, "v must have k's ", heads, " heads, got ", v.shape[1])
    _check(heads == H or (heads > 0 and H % heads == 0), "q's heads must be a multiple of k's, ",
           "got ", H, " and ", heads)  # fmt: skip
    _check(q.shape[-1] > 0 and v.shape[-1] > 0, "head_dim must be at least 1")
    if cu_q is not None:
        _check(v.shape[0] == k.shape[0], "v must have k's ", k.shape[0], " tokens, got ",
               v.shape[0])  # fmt: skip
        _integers(cu_q, B + 1, "cu_seqlens_q"), _integers(cu_k, B + 1, "cu_seqlens_k")
    else:
        _check(k.shape[0] == B == v.shape[0], "q, k and v must have one batch size")
        _check(v.shape[2] == k.shape[2], "v must have k's length ", k.shape[2], ", got ",
               v.shape[2])  # fmt: skip
        _integers(q_lens, B, "q_lens"), _integers(k_lens, B, "k_lens")
    if mask is not None:
        _check(mask.dtype == torch.bool, "mask must be bool")
        _broadcast(mask, sizes, "mask")
    if bias is not None:
        _check(bias.dtype in _DTYPES, "bias must be float32, bfloat16 or float16")
        _broadcast(bias, sizes, "bias")
    if alibi is not None:
        _check(tuple(alibi.shape) in ((H,), (B, H)), "alibi_slopes must have shape (H,) or (B, H)")
    if sinks is not None:
        _check(tuple(sinks.shape) == (H,), "sinks must have shape (H,)")
    _check(causal in (0, 1, 2), "causal must be 0, 1 or 2, got ", causal)
    _check(weights in (0, 1, 2), "weights must be 0, 1 or 2")
    _check(0.0 <= dropout_p < 1.0, "dropout_p must be in [0, 1), got ", dropout_p)
    if dropout_p > 0.0:
        whole = seed is not None and seed.dtype == torch.int64 and seed.numel() == 1
        _check(whole, "dropout needs seed, a 1-element int64 tensor")


def check_dims(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, longest: Any
) -> None:
    """Before anything is read of a shape."""
    dims = 4 if cu_q is None else 3
    for x in (q, k, v):
        _check(x.dim() == dims, "q, k and v must have ", dims, " dimensions, got ", x.dim())
    if cu_q is not None:
        _check(cu_k is not None, "cu_seqlens_k must come with cu_seqlens_q")
        _check(cu_q.dim() == 1 and len(cu_q) > 0, "cu_seqlens_q must have shape (B + 1,)")
        _check(min(longest) >= 0, "max_seqlen_q and max_seqlen_k must not be negative, got ",
               longest[0], " and ", longest[1])  # fmt: skip
        lengths = {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
    else:
        lengths = {"q's length": q.shape[2], "k's length": k.shape[2]}
    for name, n in lengths.items():
        _check(n <= LONGEST, name, " must be at most ", LONGEST, " for the kernels, got ", n)


def check_saved(
    upstream: Sequence[Tensor | None],
    o: Tensor | None,
    lse: Tensor,
    lse_lo: Tensor,
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    needs_o: bool,
) -> None:
    """What a backward is given beside the forward's arguments; shapes: of o, lse and weights."""
    do, dlse, dweights = upstream
    for name, x in (("lse", lse), ("lse_lo", lse_lo)):
        same = x.dtype == torch.float32 and tuple(x.shape) == shapes[1]
        _check(same, name, " must be the forward's, fp32 ", shapes[1])
    for name, x in (("do", do), ("o", o)):
        same = x is None or (x.dtype == dtype and tuple(x.shape) == shapes[0])
        _check(same, name, " must have the shape and dtype of the forward's output")
    _check(do is None or o is not None or not needs_o, "o must be given with do")
    _check(dlse is None or tuple(dlse.shape) == shapes[1], "dlse must have lse's shape")
    if dweights is not None:
        same = dweights.dtype == dtype and tuple(dweights.shape) == shapes[2]
        _check(same, "dweights must have the weights' shape and dtype")


def _integers(x: Tensor | None, n: int, name: str) -> None:
    if x is not None:
        _check(x.dim() == 1 and x.shape[0] == n, name, " must have shape (", n, ",)")
        _check(x.dtype in (torch.int32, torch.int64), name, " must be int32 or int64")


def _broadcast(x: Tensor, limits: tuple[int, ...], name: str) -> None:
    _check(x.dim() <= 4, name, " must have at most 4 dimensions, got ", x.dim())
    for d, (n, limit) in enumerate(zip(x.shape, limits[4 - x.dim() :], strict=True)):
        _check(n == 1 or n >= limit, name, " dimension ", d, " must be 1 or ", limit, ", got ", n)
