"""``fastattn.nn.MultiheadAttention``: torch's module on the fused op.

Dimensions: ``N`` batch, ``L`` / ``S`` rows of query and of key, ``E`` embedding, ``H`` heads,
``D = E / H``.  The in-projection writes one buffer; q, k and v reach the op as strided
``(N, H, ., D)`` views of it, and with ``batch_first`` the op's output is a view for the
out-projection too, so nothing is copied between the two GEMMs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn._nested import pack, unpack
from fastattn.nn.kv_cache import KVLayer
from fastattn.ops.attention import attention, attention_varlen
from fastattn.ops.products import linear

Masks = tuple[Tensor | None, Tensor | None, bool]  # mask, bias, causal of the op

_NEG_INF = float("-inf")


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention with the interface of :class:`torch.nn.MultiheadAttention`.

    Signature, initialisation, ``state_dict`` and defaults are torch's; weights load in both
    directions.  The attention itself is :func:`fastattn.attention`: no score matrix exists unless
    weights are asked for, blocks that a mask or causality excludes are skipped, and there is no
    second code path for inference (``torch.backends.mha`` has no effect).

    Args:
        embed_dim: E, total width; must be divisible by ``num_heads``.
        num_heads: H.
        dropout: probability of dropping an attention weight, in training only. Default 0.
        bias: biases of the in- and out-projection. Default True.
        add_bias_kv: append one learned key and value to every sequence. Default False.
        add_zero_attn: append one key and value of zeros to every sequence. Default False.
        kdim, vdim: widths of key and value. Default ``embed_dim``.
        batch_first: inputs are ``(N, L, E)`` instead of ``(L, N, E)``. Default False.
        device, dtype: of the parameters.
        backend: keyword only; the backend of :func:`fastattn.attention`. Default "auto".

    Differences from torch, all where torch's result is NaN, inconsistent or an error:

    * A row whose keys are all masked gives attention output 0 (so ``out_proj.bias``) and weights
      0, where torch gives NaN.
    * ``is_causal=True`` is trusted as the description of ``attn_mask`` whenever no weights are
      asked for, also beside a ``key_padding_mask`` (torch then falls back to the mask).
    * Nested inputs work in training and as cross attention, in both layouts; torch's module takes
      the strided one, in inference, as self attention.

    "Attention is all you need", Vaswani et al., 1706.03762.

    >>> import torch, fastattn
    >>> mha = fastattn.nn.MultiheadAttention(64, 4, batch_first=True)
    >>> x = torch.randn(2, 10, 64)
    >>> o, weights = mha(x, x, x)
    >>> o.shape, weights.shape
    (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
    """

    # On the class: a module whose class fastattn.swap changed has no such attribute of its own.
    backend: str = "auto"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        kv_cache: KVLayer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``; arguments and results are torch's.

        Args:
            query: ``(L, N, E)``, or ``(N, L, E)`` with ``batch_first``, ``(L, E)`` unbatched, or
                a nested tensor ``(N, *, E)`` of either layout.
            key, value: the like with ``S`` rows and ``kdim`` / ``vdim`` columns.
            key_padding_mask: ``(N, S)`` or ``(S,)``. Bool: True = ignore the key (torch's
                convention for this module, the opposite of :func:`fastattn.attention`'s). Float:
                added to the logits.
            need_weights: also return the weights. Default True; False is faster and needs no
                ``(L, S)`` memory.
            attn_mask: ``(L, S)`` or ``(N * H, L, S)``. Bool: True = ignore. Float: added to the
                logits, and it gets its gradient if it requires one.
            average_attn_weights: return the weights' mean over the heads. Default True.
            is_causal: ``attn_mask`` (required with it) is the causal mask, so the op may compute
                it from the positions instead of reading it.
            kv_cache: ``step[layer]`` of a :class:`fastattn.nn.KVCache`, in self attention without
                weights: what was generated before. The keys of this call are appended to it, and
                every row attends to itself and to all before it; no mask is given.

        Returns:
            The output, of query's layout, and the weights after dropout, ``(N, L, S)``, or
            ``(N, H, L, S)`` per head, or None.

        Raises:
            ValueError: an argument of the wrong shape or dtype.
            RuntimeError: ``is_causal`` without ``attn_mask``.

        >>> import torch, fastattn
        >>> mha = fastattn.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 10, 64)
        >>> padding = torch.arange(10) >= torch.tensor([[10], [7]])
        >>> mha(x, x, x, key_padding_mask=padding, need_weights=False)[0].shape
        torch.Size([2, 10, 64])
        """
        if kv_cache is not None:
            masked = key_padding_mask is not None or attn_mask is not None
            same = query is key and key is value
            return self._forward_cached(query, same, need_weights, masked, kv_cache), None
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"MultiheadAttention: {name} must be a Tensor, got {type(x).__name__}"
                )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "MultiheadAttention: is_causal=True describes attn_mask, which is None; pass the "
                "causal mask too (torch.nn.Transformer.generate_square_subsequent_mask makes one)"
            )
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None:
                raise ValueError(
                    "MultiheadAttention: nested input takes no key_padding_mask and no attn_mask; "
                    "its lengths are its mask"
                )
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)

        batched = query.dim() == 3
        self._check_inputs(query, key, value, batched)
        batch_first = self.batch_first or not batched
        if not batched:
            if query is key and key is value:
                query = key = value = query.unsqueeze(0)
            else:
                query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)

        q, k, v = self._project(query, key, value)
        if self.bias_k is not None or self.add_zero_attn:
            k, v = self._append_keys(k, v, batch_first)
        if batch_first:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        else:
            q, k, v = q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)

        mask: Tensor | None = None
        bias: Tensor | None = None
        causal = False
        if attn_mask is not None or key_padding_mask is not None:
            mask, bias, causal = self._masks(
                q, k, key_padding_mask, attn_mask, is_causal and not need_weights
            )
        wanted: bool | Literal["mean"] = need_weights
        if need_weights and average_attn_weights:
            wanted = "mean"
        results = attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=wanted,
            backend=self.backend,
        )
        o, weights = results if isinstance(results, tuple) else (results, None)
        # (N, H, L, D) lies in memory as (N, L, H, D): a view with batch_first, else one copy.
        o = (o.transpose(1, 2) if batch_first else o.permute(2, 0, 1, 3)).flatten(2)
        o = linear(o, self.out_proj.weight, self.out_proj.bias)
        if batched:
            return o, weights
        return o.squeeze(0), None if weights is None else weights.squeeze(0)

    def _forward_cached(
        self, x: Tensor, same: bool, need_weights: bool, masked: bool, kv_cache: KVLayer
    ) -> Tensor:
        """Self attention behind what a cache holds."""
        wrong = (
            (
                not same or x.is_nested or x.dim() != 3,
                "batched self attention: query is key is value",
            ),
            (need_weights, "need_weights=False: weights over a cache are not computed"),
            (masked, "no attn_mask and no key_padding_mask: rows see all before them"),
            (self.training and self.dropout > 0, "eval(), or no dropout"),
            (self.bias_k is not None or self.add_zero_attn, "no add_bias_kv and no add_zero_attn"),
        )
        for is_so, wanted in wrong:
            if is_so:
                raise ValueError(f"MultiheadAttention: kv_cache wants {wanted}")
        self._check_inputs(x, x, x, True)
        q, k, v = self._project(x, x, x)
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        o: Tensor = kv_cache.attend(
            q.permute(order), k.permute(order), v.permute(order), backend=self.backend
        )
        o = (o.transpose(1, 2) if self.batch_first else o.permute(2, 0, 1, 3)).flatten(2)
        return linear(o, self.out_proj.weight, self.out_proj.bias)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> None:
        if query.dim() not in (2, 3):
            raise ValueError(
                "MultiheadAttention: query must be (L, E) or batched 3-D, got shape "
                f"{tuple(query.shape)}"
            )
        if key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                f"MultiheadAttention: key and value must be {query.dim()}-D like query, got shapes "
                f"{tuple(key.shape)} and {tuple(value.shape)}"
            )
        widths = query.shape[-1], key.shape[-1], value.shape[-1]
        if widths != (self.embed_dim, self.kdim, self.vdim):
            raise ValueError(
                "MultiheadAttention: query, key and value must have "
                f"{(self.embed_dim, self.kdim, self.vdim)} features, got {widths}"
            )
        if key is not value and key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                "MultiheadAttention: key and value must have the same sequences, got shapes "
                f"{tuple(key.shape)} and {tuple(value.shape)}"
            )
        if batched and query is not key:
            n = 0 if self.batch_first else 1
            if query.shape[n] != key.shape[n]:
                raise ValueError(
                    f"MultiheadAttention: key must have query's batch size {query.shape[n]}, got "
                    f"{key.shape[n]} (batch_first={self.batch_first})"
                )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (..., H, D) views; one GEMM for self attention, two if key is value."""
        e, heads, d = self.embed_dim, self.num_heads, self.head_dim
        b = self.in_proj_bias
        if self._qkv_same_embed_dim:
            w = self.in_proj_weight
            if key is value:
                if query is key:
                    packed = linear(query, w, b)
                    q, k, v = packed.view(*packed.shape[:-1], 3, heads, d).unbind(-3)
                    return q, k, v
                w_q, w_kv = w.split((e, 2 * e))
                b_q, b_kv = (None, None) if b is None else b.split((e, 2 * e))
                q, packed = linear(query, w_q, b_q), linear(key, w_kv, b_kv)
                k, v = packed.view(*packed.shape[:-1], 2, heads, d).unbind(-3)
                return q.view(*q.shape[:-1], heads, d), k, v
            w_q, w_k, w_v = w.split(e)
        else:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        b_q, b_k, b_v = (None, None, None) if b is None else b.split(e)
        q, k, v = linear(query, w_q, b_q), linear(key, w_k, b_k), linear(value, w_v, b_v)
        return (
            q.view(*q.shape[:-1], heads, d),
            k.view(*k.shape[:-1], heads, d),
            v.view(*v.shape[:-1], heads, d),
        )

    def _append_keys(self, k: Tensor, v: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """k and v with bias_k / bias_v and the zero key, as torch orders them, at the end."""
        n = k.shape[0] if batch_first else k.shape[1]
        heads, d = self.num_heads, self.head_dim
        shape = (n, 1, heads, d) if batch_first else (1, n, heads, d)
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.to(k.dtype).view(1, 1, heads, d).expand(shape))
            values.append(self.bias_v.to(v.dtype).view(1, 1, heads, d).expand(shape))
        if self.add_zero_attn:
            keys.append(k.new_zeros(shape))
            values.append(v.new_zeros(shape))
        dim = 1 if batch_first else 0
        return torch.cat(keys, dim), torch.cat(values, dim)

    def _masks(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        hint: bool,
    ) -> Masks:
        """Torch's two masks as the op's ``mask`` (True = takes part), ``bias`` and ``causal``.

        Bool masks stay bool and broadcast; a float one becomes the bias.  No value is read, but
        where a float mask of one row or one matrix holds -inf the op is told so by a bool mask
        too, since that is what lets it skip blocks (torch's encoder turns every bool mask into
        such a float one).
        """
        (n, heads, rows, _), keys = q.shape, k.shape[2]
        extra = (self.bias_k is not None) + self.add_zero_attn
        padding = _as_4d(key_padding_mask, "key_padding_mask", n, heads, rows, keys - extra)
        pairs = _as_4d(attn_mask, "attn_mask", n, heads, rows, keys - extra)
        if extra:  # the appended keys are never masked
            padding = None if padding is None else F.pad(padding, (0, extra))
            pairs = None if pairs is None else F.pad(pairs, (0, extra))
        # Beside appended keys torch honours the hint only without a key_padding_mask; causality
        # then hides those keys, and the mask does not.  Trained weights rely on either.
        causal = hint and not (extra and padding is not None)
        if causal:
            pairs = None

        mask: Tensor | None = None
        bias: Tensor | None = None
        for part in (pairs, padding):
            if part is None:
                continue
            if part.dtype == torch.bool:
                mask = part if mask is None else mask | part
            else:
                bias = part if bias is None else bias + part
                small = part.shape[0] * part.shape[1] == 1 or part.shape[2] == 1
                if small and not part.requires_grad:
                    part = part == _NEG_INF
                    mask = part if mask is None else mask | part
        return None if mask is None else ~mask, bias, causal

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The same on packed sequences; weights are padded, (N, [H,] max L, max S), as torch's."""
        if not (query.is_nested and key.is_nested and value.is_nested):
            raise ValueError("MultiheadAttention: query, key and value must all be nested, or none")
        if not self.batch_first:
            raise ValueError("MultiheadAttention: nested input is (N, *, E); set batch_first=True")
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError(
                "MultiheadAttention: nested input cannot take add_bias_kv or add_zero_attn"
            )
        packed_q = pack(query, "query")
        packed_k = packed_q if key is query else pack(key, "key")
        packed_v = packed_k if value is key else pack(value, "value")
        for name, packed in (("key", packed_k), ("value", packed_v)):
            if packed.cu_seqlens.shape != packed_q.cu_seqlens.shape:
                raise ValueError(
                    f"MultiheadAttention: {name} must have query's batch size "
                    f"{packed_q.cu_seqlens.shape[0] - 1}, got {packed.cu_seqlens.shape[0] - 1}"
                )
        self._check_inputs(packed_q.values, packed_k.values, packed_v.values, False)
        q, k, v = self._project(packed_q.values, packed_k.values, packed_v.values)
        max_q, max_k = packed_q.max_len, packed_k.max_len
        if need_weights:  # their shape needs the lengths, so a device may be read for them
            max_q = _longest(packed_q.cu_seqlens) if max_q is None else max_q
            max_k = _longest(packed_k.cu_seqlens) if max_k is None else max_k
        wanted: bool | Literal["mean"] = need_weights
        if need_weights and average_attn_weights:
            wanted = "mean"
        results: Any = attention_varlen(
            q,
            k,
            v,
            packed_q.cu_seqlens,
            packed_k.cu_seqlens,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=wanted,
            backend=self.backend,
        )
        o, weights = results if isinstance(results, tuple) else (results, None)
        o = linear(o.flatten(1), self.out_proj.weight, self.out_proj.bias)
        return unpack(o, packed_q), weights


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def _as_4d(
    mask: Tensor | None, name: str, n: int, heads: int, rows: int, keys: int
) -> Tensor | None:
    """A mask of torch's module as a view that broadcasts to (N, H, L, S), checked."""
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"MultiheadAttention: {name} must be bool or float, got {mask.dtype}")
    shape = tuple(mask.shape)
    if name == "key_padding_mask":
        if shape != (n, keys):
            raise ValueError(f"MultiheadAttention: {name} must be {(n, keys)}, got {shape}")
        return mask.view(n, 1, 1, keys)
    if shape == (rows, keys):
        return mask.view(1, 1, rows, keys)
    if shape == (n * heads, rows, keys):
        return mask.view(n, heads, rows, keys)
    raise ValueError(
        f"MultiheadAttention: {name} must be {(rows, keys)} or {(n * heads, rows, keys)}, "
        f"got {shape}"
    )


__all__ = ["MultiheadAttention"]
