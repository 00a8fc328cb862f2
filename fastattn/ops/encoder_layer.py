"""A transformer encoder layer in inference as one op of the CPU.

At few tokens the framework's time between the parts of a layer is as long as the parts; see
csrc/bindings/encoder_layer.cpp. There is no backward: modules call it where nothing records one,
and the parts themselves everywhere else. It computes what ``attention``, ``add_layer_norm`` and
``layernorm_ffn`` compute, by the same kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import choices
from fastattn.backends import select
from fastattn.ops._eager import below_autograd, transformed
from fastattn.ops._fakes import register_fake
from fastattn.ops.layernorm_op import ACTIVATIONS, lib
from fastattn.ops.stock import encoder_layer as stock_encoder_layer

lib.define(
    "encoder_layer(Tensor x, Tensor? mask, Tensor wq, Tensor? bq, Tensor? wk, Tensor? bk, "
    "Tensor? wv, Tensor? bv, Tensor wo, Tensor? bo, Tensor? norm1_weight, Tensor? norm1_bias, "
    "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? norm2_weight, Tensor? norm2_bias, "
    "int heads, float scale, bool causal, float eps1, float eps2, int act, bool pre_norm)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_op = torch.ops.fastattn.encoder_layer.default


class Weights(NamedTuple):
    """In the schema's order. D features, F hidden ones; all as nn.Linear stores them.

    Attributes:
        wq, wk, wv: (D, D); or wq (3 D, D), all three, and the others None. Biases likewise.
        wo: (D, D).
        w1: (F, D). w2: (D, F).
    """

    wq: Tensor
    bq: Tensor | None
    wk: Tensor | None
    bk: Tensor | None
    wv: Tensor | None
    bv: Tensor | None
    wo: Tensor
    bo: Tensor | None
    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None


def serves(x: Tensor, backend: str, op: str = "encoder_layer") -> bool:
    """Whether this call can be the one op of a layer: on the CPU, in inference, in a dtype of its
    kernels, and not under a compiler, a tracer, autocast or a transform, which want to see the
    parts."""
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and not x.is_nested
        and x.device.type == "cpu"
        and x.dim() == 3
        and backend in ("auto", "cpu")
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_tracing_state() is None
        and not transformed()
        and not torch._C._len_torch_dispatch_stack()
        and select(op, backend, "cpu", x.dtype) == "cpu"
    )


def encoder_layer(
    x: Tensor,
    mask: Tensor | None,
    weights: Weights,
    *,
    heads: int,
    scale: float,
    activation: str,
    eps: tuple[float, float],
    causal: bool = False,
    pre_norm: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One layer, without dropout; only where :func:`serves` says so.

    Args:
        x: (B, S, D), of the weights' dtype.
        mask: bool, broadcastable to (B, heads, S, S), True = takes part.
        eps: of the two norms. pre_norm: norms in front of attention and feed-forward block.
        backend: what the caller told :func:`serves`, or "torch".
    """
    if choices.wanted("encoder_layer", backend):
        B, S, D = x.shape
        fixed = (D, heads, weights.w1.shape[0], activation, mask is not None, causal, pre_norm)
        plain = not (causal and mask is not None) and x.numel() > 0
        call = ("cpu", x.dtype, False, plain, (B, S), fixed, 0)
        chosen = choices.pick("encoder_layer", backend, call, lambda: choices.Call(*call))
        if chosen == "torch":
            return stock_encoder_layer(
                x, mask, weights, heads=heads, scale=scale, activation=activation, eps=eps,
                causal=causal, pre_norm=pre_norm,
            )  # fmt: skip
    args: tuple[Any, ...] = (
        x, mask, *weights, heads, scale, causal, *eps, ACTIVATIONS[activation], pre_norm,
    )  # fmt: skip
    return below_autograd(_op, args)  # type: ignore[no-any-return]


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


register_fake("fastattn::encoder_layer", _fake, lib=lib)
