"""``TransformerEncoderLayer``, ``...DecoderLayer``, ``TransformerEncoder``, ``...Decoder`` and
``Transformer``: torch's modules on the fused ops.

A layer is attention, then one pass of dropout + residual + norm, then the feed-forward block as one
op. What that block is made of stays a module each (``linear1``, ``dropout``, ``linear2``, ...), as
torch names them; where one of them was replaced, has hooks or an unknown activation, the block runs
module by module, as torch's does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn._nested import pack, unpack
from fastattn.nn._plain import (
    activation_name,
    anyone_hooks_all,
    drop_probability,
    norm_is_plain,
    plain,
)
from fastattn.nn.layer_norm import LayerNorm
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.ops.encoder_layer import Weights, encoder_layer, serves
from fastattn.ops.layernorm import add_layer_norm, norm_backend
from fastattn.ops.layernorm_ffn import ffn_backend, layernorm_ffn


class _Layer(torch.nn.Module):
    """What encoder and decoder layer share."""

    backend: str = "auto"
    norm_first: bool

    def _adopt(self, backend: str) -> None:
        """Torch has made and initialised the submodules; only their classes change."""
        self.backend = backend
        for module in self.children():
            if type(module) is torch.nn.MultiheadAttention:
                module.__class__ = MultiheadAttention
                module.backend = backend  # type: ignore[assignment]
            elif type(module) is torch.nn.LayerNorm:
                module.__class__ = LayerNorm
                module.backend = norm_backend(backend)  # type: ignore[assignment]
        # Torch's shortcut for inference bypasses the submodules.
        self.activation_relu_or_gelu = 0

    def _add(self, x: Tensor, o: Tensor, dropout: Any, norm: Any) -> Tensor:
        """``x + dropout(o)``, behind it the norm where norms come last."""
        if x.is_nested and o.is_nested:  # every row by itself: the packed tokens
            packed = pack(x, "src")
            return unpack(self._add(packed.values, pack(o, "src").values, dropout, norm), packed)
        fused = plain(dropout, torch.nn.Dropout) and _one_dtype(o, x)
        p, backend = drop_probability(dropout), norm_backend(self.backend)
        if self.norm_first:
            if fused and p:
                return add_layer_norm(o, x, norm=None, dropout_p=p, backend=backend)[1]
            return x + dropout(o)  # type: ignore[no-any-return]
        if fused and norm_is_plain(norm):
            return add_layer_norm(
                o, x, norm.weight, norm.bias, eps=norm.eps, dropout_p=p, backend=backend
            )[0]
        return norm(x + dropout(o))  # type: ignore[no-any-return]

    def _feed_forward(self, x: Tensor, stock: Any, norm: Any, dropout: Any) -> Tensor:
        """The last sublayer: from x to x + block(norm(x)), or to norm(x + block(x))."""
        if x.is_nested:
            packed = pack(x, "src")
            return unpack(self._feed_forward(packed.values, stock, norm, dropout), packed)
        name = activation_name(self.activation)
        linear1: Any = self.linear1
        linear2: Any = self.linear2
        block: Any = self._ff_block
        fused = (
            name is not None
            and type(self)._ff_block is stock  # type: ignore[attr-defined]
            and all(plain(m, torch.nn.Linear) for m in (linear1, linear2))
            and all(plain(m, torch.nn.Dropout) for m in (self.dropout, dropout))
            and norm_is_plain(norm)
        )
        if not fused:
            return x + block(norm(x)) if self.norm_first else norm(x + block(x))  # type: ignore[no-any-return]
        assert name is not None
        return layernorm_ffn(
            x, linear1.weight, linear1.bias, linear2.weight, linear2.bias,
            norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, activation=name,
            pre_norm=self.norm_first, dropout_p=drop_probability(dropout),
            hidden_dropout_p=drop_probability(self.dropout),
            backend=ffn_backend(self.backend, x.shape[-1]),
        )  # fmt: skip


def _one_dtype(o: Tensor, x: Tensor) -> bool:
    return x.dtype == o.dtype or (x.dtype == torch.float32 and o.dtype != torch.float64)


class TransformerEncoderLayer(_Layer, torch.nn.TransformerEncoderLayer):
    """Self-attention and feed-forward, with the interface of
    :class:`torch.nn.TransformerEncoderLayer`.

    Signature, initialisation (the same seed gives the same parameters), ``state_dict`` and defaults
    are torch's; weights load in both directions. In inference on the CPU, batch first, a layer is
    one op of the same kernels (fastattn/ops/encoder_layer.py).

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: as in torch. The feed-forward block is one op for
            relu, gelu (erf or tanh) and silu, by name, function or module; another callable runs
            as it is.
        backend: keyword only; of all ops of the layer; its norms take "auto" where that one has no
            kernel of them ("cuda"). Default "auto".

    Difference from torch: a row whose keys are all masked gets attention output 0, not NaN.

    "Attention is all you need", Vaswani et al., 1706.03762.

    >>> import torch, fastattn
    >>> layer = fastattn.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
    >>> layer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        torch.nn.TransformerEncoderLayer.__init__(
            self, d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        self._adopt(backend)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Arguments and result are torch's; masks True = ignore, or float, added to the logits."""
        if type(self)._sa_block is not _ENCODER_SA:  # a subclass with an attention of its own
            return torch.nn.TransformerEncoderLayer.forward(
                self, src, src_mask, src_key_padding_mask, is_causal
            )
        masked = src_mask is not None or is_causal
        y = None if masked else self._in_inference(src, src_key_padding_mask)
        if y is not None:
            return y
        x = src
        inner = self.norm1(x) if self.norm_first else x
        o = self.self_attn(
            inner, inner, inner, attn_mask=src_mask, key_padding_mask=src_key_padding_mask,
            need_weights=False, is_causal=is_causal,
        )[0]  # fmt: skip
        x = self._add(x, o, self.dropout1, self.norm1)
        return self._feed_forward(x, _ENCODER_FF, self.norm2, self.dropout2)

    def _in_inference(self, x: Tensor, padding: Tensor | None) -> Tensor | None:
        """The whole layer as one op where it can be: see ops/encoder_layer.py."""
        if not serves(x, self.backend):
            return None
        if padding is not None and (padding.dtype != torch.bool or padding.shape != x.shape[:2]):
            return None  # the parts take another dtype, and name a wrong shape
        attention: Any = self.self_attn
        name = activation_name(self.activation)
        linear1, linear2, o = self.linear1, self.linear2, attention.out_proj
        dropouts: Any = (self.dropout, self.dropout1, self.dropout2)
        plainly = (
            name is not None
            and type(self)._ff_block is _ENCODER_FF
            and plain(attention, MultiheadAttention)
            and attention.batch_first
            and attention.in_proj_weight is not None
            and attention.bias_k is None
            and not attention.add_zero_attn
            and attention.backend == self.backend
            and plain(o, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)
            and all(plain(m, torch.nn.Linear) for m in (linear1, linear2))
            and all(plain(m, torch.nn.Dropout) and not drop_probability(m) for m in dropouts)
            and not (attention.training and attention.dropout)
            and all(norm_is_plain(m) for m in (self.norm1, self.norm2))
            and not anyone_hooks_all()
        )
        if not plainly:
            return None
        weights = Weights(
            attention.in_proj_weight, attention.in_proj_bias, None, None, None, None, o.weight,
            o.bias, self.norm1.weight, self.norm1.bias, linear1.weight, linear1.bias,
            linear2.weight, linear2.bias, self.norm2.weight, self.norm2.bias,
        )  # fmt: skip
        if any(w.dtype != x.dtype for w in (weights.wq, weights.wo, weights.w1, weights.w2)):
            return None
        assert name is not None
        return encoder_layer(
            x, None if padding is None else ~padding[:, None, None, :], weights,
            heads=attention.num_heads, scale=attention.head_dim**-0.5, activation=name,
            eps=(self.norm1.eps, self.norm2.eps), pre_norm=self.norm_first, backend=self.backend,
        )  # fmt: skip


_ENCODER_SA = torch.nn.TransformerEncoderLayer._sa_block
_ENCODER_FF = torch.nn.TransformerEncoderLayer._ff_block


class TransformerDecoderLayer(_Layer, torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to ``memory`` and feed-forward, with the interface of
    :class:`torch.nn.TransformerDecoderLayer`.

    Args, initialisation and differences: as :class:`TransformerEncoderLayer`.

    >>> import torch, fastattn
    >>> layer = fastattn.nn.TransformerDecoderLayer(64, 4, 128, batch_first=True)
    >>> layer(torch.randn(2, 10, 64), torch.randn(2, 7, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        torch.nn.TransformerDecoderLayer.__init__(
            self, d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        self._adopt(backend)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Arguments and result are torch's; masks True = ignore, or float, added to the logits."""
        if (type(self)._sa_block, type(self)._mha_block) != _DECODER_ATTENTION:
            return torch.nn.TransformerDecoderLayer.forward(
                self, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
                memory_key_padding_mask, tgt_is_causal, memory_is_causal,
            )  # fmt: skip
        x = tgt
        inner = self.norm1(x) if self.norm_first else x
        o = self.self_attn(
            inner, inner, inner, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask,
            need_weights=False, is_causal=tgt_is_causal,
        )[0]  # fmt: skip
        x = self._add(x, o, self.dropout1, self.norm1)
        inner = self.norm2(x) if self.norm_first else x
        o = self.multihead_attn(
            inner, memory, memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask,
            need_weights=False, is_causal=memory_is_causal,
        )[0]  # fmt: skip
        x = self._add(x, o, self.dropout2, self.norm2)
        return self._feed_forward(x, _DECODER_FF, self.norm3, self.dropout3)


_DECODER_ATTENTION = (
    torch.nn.TransformerDecoderLayer._sa_block,
    torch.nn.TransformerDecoderLayer._mha_block,
)
_DECODER_FF = torch.nn.TransformerDecoderLayer._ff_block


def _describes_causal(mask: Tensor | None, hint: bool | None) -> bool:
    """Whether the mask is the causal one: as the caller says, else looked at, as torch does (not
    while compiling: a graph cannot branch on values)."""
    if mask is None:
        return False
    if hint is not None:
        return bool(hint)
    if torch.compiler.is_compiling() or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    above = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype != torch.bool:
        if mask.requires_grad:
            return False
        above = torch.zeros_like(mask).masked_fill(above, float("-inf"))
    return torch.equal(mask, above)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """A stack of encoder layers with the interface of :class:`torch.nn.TransformerEncoder`.

    Args:
        encoder_layer: cloned ``num_layers`` times. norm: behind the last. Default None.
        enable_nested_tensor, mask_check: accepted and without effect: padding is skipped by the
            attention itself, and the output has values at padded positions (torch's shortcut for
            inference returns 0 there; torch in training returns values as well).

    >>> import torch, fastattn
    >>> layer = fastattn.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    >>> fastattn.nn.TransformerEncoder(layer, 2)(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Arguments and result are torch's."""
        causal = _describes_causal(mask, is_causal)
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """A stack of decoder layers with the interface of :class:`torch.nn.TransformerDecoder`.

    >>> import torch, fastattn
    >>> layer = fastattn.nn.TransformerDecoderLayer(64, 4, 128, batch_first=True)
    >>> decoder = fastattn.nn.TransformerDecoder(layer, 2)
    >>> decoder(torch.randn(2, 10, 64), torch.randn(2, 7, 64)).shape
    torch.Size([2, 10, 64])
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Arguments and result are torch's."""
        causal = _describes_causal(tgt_mask, tgt_is_causal)
        x = tgt
        for layer in self.layers:
            x = layer(
                x, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
            )  # fmt: skip
        return x if self.norm is None else self.norm(x)


class Transformer(torch.nn.Transformer):
    """Encoder and decoder with the interface of :class:`torch.nn.Transformer`.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout,
            activation, custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype: as in torch; the same seed gives the same parameters.
        backend: keyword only; of all ops. Default "auto".

    >>> import torch, fastattn
    >>> model = fastattn.nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
    >>> model(torch.randn(2, 9, 32), torch.randn(2, 5, 32)).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        layer = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
                 norm_first, bias, device, dtype)  # fmt: skip

        def norm() -> LayerNorm:
            return LayerNorm(
                d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype,
                backend=norm_backend(backend),
            )  # fmt: skip

        if custom_encoder is None:
            one = TransformerEncoderLayer(*layer, backend=backend)
            custom_encoder = TransformerEncoder(one, num_encoder_layers, norm())
        if custom_decoder is None:
            other = TransformerDecoderLayer(*layer, backend=backend)
            custom_decoder = TransformerDecoder(other, num_decoder_layers, norm())
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout,
            activation, custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype,
        )  # fmt: skip


__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
