"""``fastattn.attention`` and ``attention_varlen``: check, choose a backend, launch, return."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from fastattn import choices, first_use, reference
from fastattn.backends import select
from fastattn.ops import attention_checks as check
from fastattn.ops import attention_cuda, attention_triton  # noqa: F401  register implementations
from fastattn.ops import attention_op as op
from fastattn.ops._eager import autocast_dtype, wants_grad
from fastattn.ops.stock import attention as stock_attention

Causal = bool | Literal["bottom_right"]
Window = tuple[int | None, int | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: Causal = False,
    window: Window | None = None,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool | Literal["mean"] = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> Any:
    """Scaled dot-product attention, ``softmax(scale q k^T + ...) v``, without the (Sq, Sk) matrix.

    Tiled online softmax (Dao et al., "FlashAttention", arXiv:2205.14135). The logits are built in
    this order: scale, softcap, ALiBi, bias, masks (``mask``, ``causal``, ``window``, lengths); the
    sink joins the sum; then softmax, then dropout. A row in which no key takes part gives output 0,
    lse -inf (or the sink's logit) and gradients 0.

    Args:
        q: (B, H, Sq, D), float32, bfloat16, float16 or float64; any strides.
        k: (B, Hk, Sk, D), q's dtype and device; H % Hk == 0, query head h reads h // (H // Hk).
        v: (B, Hk, Sk, Dv).
        mask: bool, broadcastable to (B, H, Sq, Sk), True = takes part.
        bias: float, broadcastable to (B, H, Sq, Sk), added to the logits; its gradient comes in its
            own shape.
        causal: False; True (top-left: key j <= row i) or "bottom_right" (j <= i + Sk - Sq).
        window: (left, right) keys around the diagonal, None on a side = unlimited; aligned top-left
            unless ``causal="bottom_right"``.
        q_lens, k_lens: (B,) int32 or int64, valid rows / keys of a padded batch; they stand for
            Sq / Sk in bottom_right, window and ALiBi. What lies beyond them is never read.
        alibi_slopes: (H,) or (B, H); adds -slope * abs(i + Sk - Sq - j). Not differentiable.
        softcap: c > 0; logits become c * tanh(logits / c) before bias and masks.
        sinks: (H,), a logit a head that joins the softmax's sum and no value; differentiable.
        scale: multiplies the logits; default D ** -0.5.
        dropout_p: probability in [0, 1) with which a weight is dropped (exact to 2**-32).
        seed: int or 1-element int64 tensor that fixes the dropout mask on every backend; None draws
            one from torch's generator.
        return_lse: also return lse (B, H, Sq), natural log, float32 (float64 for float64).
        return_weights: also return the weights (B, H, Sq, Sk) after dropout in q's dtype, or with
            "mean" their average over heads (B, Sq, Sk). Differentiable.
        deterministic: True: the backward is bitwise repeatable. False allows atomics, which save
            two of seven products (on GPUs; no CPU kernel uses any).
        backend: "auto", "cpu", "triton", "cuda", "reference" or "torch", which is SDPA and refuses
            what means something else there.

    Returns:
        o (B, H, Sq, Dv) in q's dtype, or a tuple (o, lse), (o, weights) or (o, lse, weights).
        Memory is laid out as (B, Sq, H, Dv) where q is not contiguous.

    Saved for the backward: q, k, v, o, lse and 4 bytes a row of what fp32 lse rounds away.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value. Each names the
            argument, what it got and what is right.

    >>> import torch, fastattn
    >>> q = torch.randn(2, 8, 100, 64, requires_grad=True)
    >>> k = v = torch.randn(2, 2, 120, 64)
    >>> o, lse = fastattn.attention(q, k, v, causal="bottom_right", return_lse=True)
    >>> o.sum().backward()
    >>> o.shape, lse.shape, q.grad.shape
    (torch.Size([2, 8, 100, 64]), torch.Size([2, 8, 100]), torch.Size([2, 8, 100, 64]))
    """
    name = "attention"
    q, k, v = _autocast(q, k, v)
    check.check_qkv(name, q, k, v, 4, "(B, H, S, D)")
    batch, heads, sq = q.shape[:3]
    sk = k.shape[2]
    target = (batch, heads, sq, sk)
    if q_lens is not None:
        check.check_lengths(name, "q_lens", q_lens, q, batch, sq)
    if k_lens is not None:
        check.check_lengths(name, "k_lens", k_lens, q, batch, sk)
    return _run(
        name,
        (q, k, v),
        target,
        {"q_lens": q_lens, "k_lens": k_lens},
        (mask, bias, causal, window, alibi_slopes, softcap, sinks, scale, dropout_p, seed),
        (return_lse, return_weights, deterministic, backend),
    )


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: Causal = False,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool | Literal["mean"] = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> Any:
    """:func:`attention` over sequences packed one behind the other, no padding.

    Sequence b owns the query tokens cu_seqlens_q[b]:cu_seqlens_q[b + 1] and the key tokens
    cu_seqlens_k[b]:cu_seqlens_k[b + 1]. Every argument means what it means in :func:`attention`, in
    the sequence's own coordinates; a packed and a padded call agree, dropout included.

    Args:
        q: (Tq, H, D). k: (Tk, Hk, D). v: (Tk, Hk, Dv).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 or int64, from 0, not decreasing. Tokens beyond
            the last value get output 0, lse -inf and gradients 0.
        max_seqlen_q, max_seqlen_k: ints; needed only for mask, bias and weights where the lengths
            cannot be read (another device than the CPU, or while compiling).
        mask, bias: broadcastable to (B, H, max_seqlen_q, max_seqlen_k).
        (the rest): as in :func:`attention`.

    Returns:
        o (Tq, H, Dv); lse is (H, Tq); weights are padded, (B, H, max_seqlen_q, max_seqlen_k) or,
        for "mean", (B, max_seqlen_q, max_seqlen_k), zero outside the sequences.

    Raises:
        TypeError, ValueError: as :func:`attention`.

    >>> import torch, fastattn
    >>> q = k = v = torch.randn(7, 2, 16)
    >>> cu = torch.tensor([0, 3, 7])
    >>> fastattn.attention_varlen(q, k, v, cu, cu, causal=True).shape
    torch.Size([7, 2, 16])
    """
    name = "attention_varlen"
    q, k, v = _autocast(q, k, v)
    check.check_qkv(name, q, k, v, 3, "(T, H, D)")
    longest_q = check.check_cu_seqlens(name, "cu_seqlens_q", cu_seqlens_q, q, q.shape[0])
    longest_k = check.check_cu_seqlens(name, "cu_seqlens_k", cu_seqlens_k, q, k.shape[0])
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        check.fail(
            name,
            "cu_seqlens_q and cu_seqlens_k must have one shape (B + 1,), got "
            f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}",
        )
    check.check_max_seqlen(name, "max_seqlen_q", max_seqlen_q, longest_q)
    check.check_max_seqlen(name, "max_seqlen_k", max_seqlen_k, longest_k)
    max_q = longest_q if max_seqlen_q is None else max_seqlen_q
    max_k = longest_k if max_seqlen_k is None else max_seqlen_k
    if None in (max_q, max_k) and (mask is not None or bias is not None or return_weights):
        check.fail(
            name,
            "max_seqlen_q and max_seqlen_k must be given with mask, bias or return_weights where "
            "the lengths cannot be read without a synchronisation",
        )
    # Unread lengths are bounded by the token counts.
    max_q = q.shape[0] if max_q is None else max_q
    max_k = k.shape[0] if max_k is None else max_k
    return _run(
        name,
        (q, k, v),
        (cu_seqlens_q.shape[0] - 1, q.shape[1], max_q, max_k),
        {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k},
        (mask, bias, causal, window, alibi_slopes, softcap, sinks, scale, dropout_p, seed),
        (return_lse, return_weights, deterministic, backend),
    )


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k, v take its dtype (float64 stays); bias and sinks keep theirs."""
    dtype = autocast_dtype(q.device) if isinstance(q, Tensor) else None
    if dtype is None:
        return q, k, v
    q, k, v = (
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in (q, k, v)
    )  # fmt: skip
    return q, k, v


_NO_EXTRAS = (-1, -1, False, False, 0, True)


def _call(
    qkv: tuple[Tensor, Tensor, Tensor], target: tuple[int, int, int, int], key: tuple[Any, ...]
) -> choices.Call:
    """What a call is like for fastattn.tune."""
    q, k, v = qkv
    batch, heads, max_q, max_k = target
    training, causality, extras, given, deterministic = key[-5:]
    device, has_mask = q.device.type, given[0]
    # SDPA takes a mask or causal, not both; on CUDA what it does with a row without keys, and
    # whether its backward repeats, depends on which of its kernels it takes.
    plain = (
        extras == _NO_EXTRAS and causality < 2 and not any(given[1:]) and max_q > 0 and max_k > 0
        and not (has_mask and (causality or device != "cpu"))
        and not (training and deterministic and device != "cpu")
    )  # fmt: skip
    fixed = (heads, k.shape[1], q.shape[-1], v.shape[-1], causality, given, extras)
    width = max(q.shape[-1], v.shape[-1])
    return choices.Call(device, q.dtype, training, plain, (batch, max_q, max_k), fixed, width)


def _run(
    name: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    target: tuple[Any, ...],
    lengths: dict[str, Any],  # by name: those that the public function has, Tensor or None
    features: tuple[Any, ...],
    returns: tuple[Any, ...],
) -> Any:
    q, k, v = qkv
    mask, bias, causal, window, alibi_slopes, softcap, sinks, scale, dropout_p, seed = features
    return_lse, return_weights, deterministic, backend = returns
    batch, heads, max_q, max_k = target
    if mask is not None:
        check.check_broadcast(name, "mask", mask, q, target, wants_bool=True)
    if bias is not None:
        check.check_broadcast(name, "bias", bias, q, target, wants_bool=False)
    if alibi_slopes is not None:
        check.check_alibi(name, alibi_slopes, q, batch, heads)
    if sinks is not None:
        check.check_sinks(name, sinks, q, heads)
    # Defaults need no check, and a small call takes as long as its checks.
    if scale is not None or softcap is not None or dropout_p != 0.0:
        check.check_numbers(name, scale, softcap, dropout_p)
    check.check_bool(name, "deterministic", deterministic)
    check.check_bool(name, "return_lse", return_lse)
    left, right = (-1, -1) if window is None else check.window_limits(name, window)
    causality = 0 if causal is False else check.causal_code(name, causal)
    weights = 0 if return_weights is False else check.weights_code(name, return_weights)
    if seed is not None or dropout_p:
        seed = check.seed_tensor(name, seed, dropout_p, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    width = max(q.shape[-1], v.shape[-1])
    chosen = None
    if choices.wanted(name, backend):
        extras = (left, right, bool(dropout_p), return_lse, weights, softcap is None)
        others = (mask, bias, alibi_slopes, sinks, *lengths.values())
        training = torch.is_grad_enabled() and wants_grad(q, k, v, bias, sinks)
        given = tuple([x is not None for x in others])
        key = (q.shape, k.shape, v.shape, q.dtype, q.is_cuda, training, causality, extras, given,
               deterministic)  # fmt: skip
        chosen = choices.pick(name, backend, key, lambda: _call(qkv, target, key))
    chosen = chosen or select(name, backend, q.device.type, q.dtype, width)
    if chosen == "torch":
        return stock_attention(q, k, v, mask, causality == 1, scale)
    if chosen != "reference" and bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    shared = (
        mask, bias, lengths.get("q_lens"), lengths.get("k_lens"), lengths.get("cu_seqlens_q"),
        lengths.get("cu_seqlens_k"), alibi_slopes, sinks, seed, scale, causality, left, right,
        softcap or 0.0, dropout_p, weights, max_q, max_k,
    )  # fmt: skip
    if chosen == "reference":
        kwargs = op.Shared(*shared).reference_kwargs()
        kwargs["return_weights"] = return_weights
        if name == "attention_varlen":
            found = reference.attention_varlen(
                q, k, v, lengths["cu_seqlens_q"], lengths["cu_seqlens_k"], **kwargs
            )
        else:
            found = reference.attention(q, k, v, **kwargs)
        o, lse, *rest = found
        w = rest[0] if rest else None
    elif chosen in ("triton", "cuda"):
        forward = op.forward_triton if chosen == "triton" else op.forward_cuda
        named = first_use.explicit() if backend == chosen else nullcontext()
        with named:
            o, lse, w = forward(q, k, v, *shared, deterministic)
    else:
        o, lse, w = op.forward(q, k, v, *shared)
    if return_lse:
        return (o, lse, w) if weights else (o, lse)
    return (o, w) if weights else o
