"""``attention`` and ``attention_varlen``: the naive formula; the whole ``(Sq, Sk)`` matrix exists.

For float16 / bfloat16 the logits and the softmax are float32 and the product with ``v`` takes the
probabilities in the inputs' dtype, as plain PyTorch code does.

Dimensions: ``B`` batch, ``H`` query heads, ``Hk`` key/value heads, ``Sq`` / ``Sk`` rows of q and k,
``D`` / ``Dv`` head dims of q, k and of v, ``Tq`` / ``Tk`` tokens of a packed batch.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from fastattn.reference.dropout import draw_seed, dropout_keep

__all__ = ["attention", "attention_varlen"]

Causal = bool | Literal["bottom_right"]
Window = tuple[int | None, int | None]


def _participates(
    q: Tensor,
    k: Tensor,
    q_len: Tensor | int,
    k_len: Tensor | int,
    mask: Tensor | None,
    causal: Causal,
    window: Window | None,
) -> Tensor | None:
    """Which (row, key) pairs take part, bool broadcastable to (B, H, Sq, Sk); None = all."""
    i = torch.arange(q.shape[2], device=q.device).view(-1, 1)
    j = torch.arange(k.shape[2], device=q.device).view(1, -1)
    diagonal = i + k_len - q_len if causal == "bottom_right" else i
    left, right = window if window is not None else (None, None)

    parts = [] if mask is None else [mask]
    if isinstance(q_len, Tensor):
        parts.append(i < q_len)
    if isinstance(k_len, Tensor):
        parts.append(j < k_len)
    if causal:
        parts.append(j <= diagonal)
    if left is not None:
        parts.append(j >= diagonal - left)
    if right is not None:
        parts.append(j <= diagonal + right)
    if not parts:
        return None
    taking_part = parts[0]
    for part in parts[1:]:
        taking_part = taking_part & part
    return taking_part


def _alibi(
    q: Tensor, k: Tensor, q_len: Tensor | int, k_len: Tensor | int, slopes: Tensor
) -> Tensor:
    """-slope * |i + Sk - Sq - j|, broadcastable to (B, H, Sq, Sk); Press et al., 2108.12409."""
    i = torch.arange(q.shape[2], device=q.device).view(-1, 1)
    j = torch.arange(k.shape[2], device=q.device).view(1, -1)
    return -slopes[..., None, None] * (i + k_len - q_len - j).abs().to(slopes.dtype)


def _softmax_with_sink(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities (B, H, Sq, Sk), with the sink in the sum, and logsumexp (B, H, Sq, 1).

    The sink (or -inf) is one more column, so that rows and matrices without any key need no case
    of their own: their sum is empty, their probabilities are 0 and their lse is the column's.
    """
    column = logits.new_full((), float("-inf")) if sinks is None else sinks.view(1, -1, 1, 1)
    extended = torch.cat([logits, column.expand(*logits.shape[:-1], 1)], dim=-1)
    # The value does not depend on m, so m is a constant to autograd.
    m = extended.detach().amax(dim=-1, keepdim=True)
    m = m.masked_fill(m == float("-inf"), 0.0)
    e = torch.exp(extended - m)
    total = e.sum(dim=-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (m + total.log()).masked_fill(empty, float("-inf"))
    return (e / total)[..., :-1], lse


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
    backend: str = "reference",
) -> Tensor | tuple[Tensor, ...]:
    """Scaled dot-product attention by the formula; the arguments of :func:`fastattn.attention`.

    Logits go through scale, softcap, ALiBi, bias and the masks in this order, the sink joins the
    sum, then softmax, dropout and the product with v.  A row in which no key takes part gives
    o = 0, lse = -inf (or the sink's logit) and no gradient; a row beyond ``q_lens`` o = 0 and
    lse = -inf.  What is stored beyond a length is never used, NaN included.

    Args:
        q: ``(B, H, Sq, D)``, any float dtype.
        k: ``(B, Hk, Sk, D)`` of q's dtype; query head h reads key head ``h // (H // Hk)``.
        v: ``(B, Hk, Sk, Dv)`` of q's dtype.
        mask: bool, broadcastable to ``(B, H, Sq, Sk)``, True = takes part.
        bias: float, broadcastable to ``(B, H, Sq, Sk)``, added to the logits.  A row of it that
            is -inf everywhere is a row without keys.
        causal: False, True (key j <= row i) or "bottom_right" (j <= i + Sk - Sq).
        window: ``(left, right)`` keys around the diagonal, None on a side = unlimited; the
            diagonal is top-left unless ``causal="bottom_right"``.
        q_lens, k_lens: int ``(B,)``, valid rows and keys; they stand for Sq and Sk of their entry.
        alibi_slopes: float ``(H,)`` or ``(B, H)``, adds ``-slope * |i + Sk - Sq - j|``.
        softcap: c of ``c * tanh(logits / c)``.
        sinks: float ``(H,)``, a logit that joins the softmax's sum and has no value.
        scale: multiplies the logits, default ``D ** -0.5``.
        dropout_p: probability of dropping a weight; the kept are scaled by ``1 / (1 - p)``.
        seed: int or int64 tensor of one element; None draws one from torch's generator.
        return_lse: also return lse ``(B, H, Sq)``, natural log, float32 (float64 for float64).
        return_weights: also return the weights after dropout, ``(B, H, Sq, Sk)`` in q's dtype, or
            with "mean" their mean over the heads, ``(B, Sq, Sk)``.
        deterministic, backend: accepted for the signature's sake, without effect.

    Returns:
        o ``(B, H, Sq, Dv)``, or the tuple of o and what was asked for: ``(o, lse, weights)``.

    Raises:
        ValueError: ``causal`` is none of its three values.

    The formula is that of Vaswani et al., "Attention is all you need", 1706.03762.

    >>> q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    >>> o, lse = attention(q, k, v, causal=True, return_lse=True)
    >>> torch.equal(o[:, :, 0], v[:, :, 0]), lse.shape  # row 0 sees key 0 alone
    (True, torch.Size([1, 2, 3]))
    """
    if causal not in (False, True, "bottom_right"):
        raise ValueError(f'attention: causal must be False, True or "bottom_right", got {causal!r}')
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, rows, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    q_len = rows if q_lens is None else q_lens.view(-1, 1, 1, 1)
    k_len = keys if k_lens is None else k_lens.view(-1, 1, 1, 1)
    row_valid = None
    if isinstance(q_len, Tensor):
        row_valid = torch.arange(rows, device=q.device).view(-1, 1) < q_len
        q = torch.where(row_valid, q, 0.0)
    if isinstance(k_len, Tensor):
        key_valid = torch.arange(keys, device=q.device).view(-1, 1) < k_len
        k, v = torch.where(key_valid, k, 0.0), torch.where(key_valid, v, 0.0)
    if kv_heads != heads:
        k = k.repeat_interleave(heads // kv_heads, dim=1)
        v = v.repeat_interleave(heads // kv_heads, dim=1)

    logits = (
        q.to(wide) @ k.to(wide).transpose(-2, -1) * (head_dim**-0.5 if scale is None else scale)
    )
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if alibi_slopes is not None:
        logits = logits + _alibi(q, k, q_len, k_len, alibi_slopes.to(wide))
    if bias is not None:
        logits = logits + bias.to(wide)
    taking_part = _participates(q, k, q_len, k_len, mask, causal, window)
    if taking_part is not None:
        logits = logits.masked_fill(~taking_part, float("-inf"))
    row_alive = (logits != float("-inf")).any(dim=-1, keepdim=True)

    weights, lse = _softmax_with_sink(logits, None if sinks is None else sinks.to(wide))
    if dropout_p > 0:
        seed = draw_seed(q.device) if seed is None else seed
        keep = dropout_keep(seed, dropout_p, batch, heads, rows, keys, device=q.device)
        weights = torch.where(keep, weights / (1 - dropout_p), 0.0)
    # The zeros are there already; what these fills stop is a NaN in an upstream gradient.
    if taking_part is not None:
        weights = weights.masked_fill(~taking_part, 0.0)
    weights = weights.masked_fill(~row_alive, 0.0)
    if row_valid is not None:
        lse = lse.masked_fill(~row_valid, float("-inf"))
    o = (weights.to(q.dtype) @ v).masked_fill(~row_alive, 0.0)

    results = [o]
    if return_lse:
        results.append(lse.squeeze(-1))
    if return_weights:
        returned = weights.mean(dim=1) if return_weights == "mean" else weights
        results.append(returned.to(q.dtype))
    return o if len(results) == 1 else tuple(results)


def _longest(lens: Tensor, total: int) -> int:
    """The longest sequence; where values cannot be read (tracing), its bound ``total``."""
    if torch.compiler.is_compiling() or isinstance(lens, torch._subclasses.FakeTensor):
        return total
    return int(lens.max()) if lens.numel() else 0


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
    backend: str = "reference",
) -> Tensor | tuple[Tensor, ...]:
    """Attention over a packed batch by padding it; arguments of :func:`fastattn.attention_varlen`.

    Sequence b is rows ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]`` of q and the like of k and v.
    Tokens of no sequence get o = 0, lse = -inf and no gradient, and their contents are not used.

    Args:
        q: ``(Tq, H, D)``, any float dtype.
        k, v: ``(Tk, Hk, D)`` and ``(Tk, Hk, Dv)`` of q's dtype.
        cu_seqlens_q, cu_seqlens_k: int ``(B + 1,)``, not decreasing.
        max_seqlen_q, max_seqlen_k: the longest sequence or more; None reads it from cu_seqlens
            (the one device read of this module), or takes Tq, Tk where values cannot be read.
        mask, bias: broadcastable to ``(B, H, max_seqlen_q, max_seqlen_k)``, with coordinates
            local to the sequence.

    The other arguments are those of :func:`attention`.

    Returns:
        o ``(Tq, H, Dv)``, or the tuple of o and what was asked for: lse ``(H, Tq)``, weights
        ``(B, H, max_seqlen_q, max_seqlen_k)`` (zero outside the sequences) or, with "mean",
        ``(B, max_seqlen_q, max_seqlen_k)``.

    >>> q, k, v = (torch.randn(5, 2, 4, dtype=torch.float64) for _ in range(3))
    >>> cu = torch.tensor([0, 3, 5])
    >>> o = attention_varlen(q, k, v, cu, cu)
    >>> alone = [x[:3].transpose(0, 1)[None] for x in (q, k, v)]
    >>> torch.allclose(o[:3].transpose(0, 1)[None], attention(*alone))
    True
    """
    q_lens, k_lens = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    max_q = _longest(q_lens, q.shape[0]) if max_seqlen_q is None else max_seqlen_q
    max_k = _longest(k_lens, k.shape[0]) if max_seqlen_k is None else max_seqlen_k

    def pad(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """(T, H, D) -> (B, H, longest, D); slots of no token read a row of zeros put at T."""
        row = torch.arange(longest, device=x.device)
        token = cu_seqlens[:-1, None] + row
        token = torch.where(row < cu_seqlens.diff()[:, None], token, x.shape[0])
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        return x[token].transpose(1, 2)

    results = attention(
        pad(q, cu_seqlens_q, max_q),
        pad(k, cu_seqlens_k, max_k),
        pad(v, cu_seqlens_k, max_k),
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        q_lens=q_lens,
        k_lens=k_lens,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        return_lse=True,
        return_weights=return_weights,
    )
    o, lse, *weights = cast(tuple[Tensor, ...], results)

    token = torch.arange(q.shape[0], device=q.device, dtype=cu_seqlens_q.dtype)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
    start = torch.cat([cu_seqlens_q, cu_seqlens_q.new_zeros(1)])[sequence]
    in_sequence = (sequence < q_lens.shape[0]) & (token >= start)
    slot = torch.where(in_sequence, sequence * max_q + token - start, q_lens.shape[0] * max_q)

    def unpad(x: Tensor, fill: float) -> Tensor:
        """(B, H, max_q, ...) -> (Tq, H, ...); tokens of no sequence read a row of ``fill``."""
        x = x.transpose(1, 2).flatten(0, 1)
        return torch.cat([x, x.new_full((1, *x.shape[1:]), fill)])[slot]

    packed = [unpad(o, 0.0)]
    if return_lse:
        packed.append(unpad(lse, float("-inf")).transpose(0, 1))
    packed += weights
    return packed[0] if len(packed) == 1 else tuple(packed)
