"""A GPT-2 or Llama layer as one op, where ``generate`` asks for a few tokens more on the CPU.

All that can forbid it is looked at in every call, and cheaply, as in ``_inference``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fastattn.nn._plain import activation_name, anyone_hooks_all
from fastattn.ops.decoder_layer import DecoderWeights, decoder_layer
from fastattn.ops.encoder_layer import serves
from fastattn.swap._generation import CachedAttention, lengths
from fastattn.swap._inference import untouched

_LINEAR, _DROPOUT = torch.nn.Linear, torch.nn.Dropout


def gpt2_layer(
    block: Any, x: Tensor, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """The block's output, None where it must run in parts."""
    if cache is None or not serves(x, block.backend, "decoder_layer"):
        return None
    parts = block._modules
    attention, mlp = parts["attn"], parts["mlp"]
    layer = _layer(attention, "GPT2Attention", cache, x, mask, kwargs)
    if layer is None or type(mlp).__name__ != "GPT2MLP":
        return None
    inner, outer = attention._modules, mlp._modules
    linears = (inner.get("c_attn"), inner.get("c_proj"), outer.get("c_fc"), outer.get("c_proj"))
    norms = (parts["ln_1"], parts["ln_2"])
    drops = (inner.get("attn_dropout"), inner.get("resid_dropout"), outer.get("dropout"))
    known = (
        all(_is_conv1d(m) for m in linears)
        and all(type(m) is _DROPOUT and not (m.training and m.p) for m in drops)
        and all(isinstance(m, torch.nn.LayerNorm) for m in norms)
        and untouched((attention, mlp, *linears, *norms, *drops))
        and not anyone_hooks_all()
    )
    name = activation_name(outer.get("act")) if known else None
    if name is None:
        return None
    qkv, o, one, two = (m._parameters for m in linears)
    norm1, norm2 = norms
    weights = DecoderWeights(
        qkv["weight"], qkv["bias"], None, None, None, None, o["weight"], o["bias"], norm1.weight,
        norm1.bias, one["weight"], one["bias"], two["weight"], two["bias"], None, None,
        norm2.weight, norm2.bias,
    )  # fmt: skip
    heads = attention.num_heads
    return _run(
        x, mask, layer, weights, (heads, heads, attention.head_dim), scale=attention.scaling,
        activation=name, eps=(norm1.eps, norm2.eps), by_columns=True,
    )  # fmt: skip


def llama_layer(
    block: Any,
    x: Tensor,
    cache: Any,
    mask: Tensor | None,
    position: tuple[Tensor, Tensor] | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The same of Llama's: RMSNorm, rotary positions, grouped heads, SwiGLU."""
    if cache is None or position is None or not serves(x, block.backend, "decoder_layer"):
        return None
    parts = block._modules
    attention, mlp = parts["self_attn"], parts["mlp"]
    layer = _layer(attention, "LlamaAttention", cache, x, mask, kwargs)
    home = type(block).__module__
    if (
        layer is None
        or type(mlp).__name__ != "LlamaMLP"
        or not _rotates_halves(home, position, attention.head_dim)
    ):
        return None
    inner, outer = attention._modules, mlp._modules
    linears = tuple(inner.get(n) for n in ("q_proj", "k_proj", "v_proj", "o_proj"))
    linears += tuple(outer.get(n) for n in ("up_proj", "down_proj", "gate_proj"))
    norms = (parts["input_layernorm"], parts["post_attention_layernorm"])
    known = (
        all(type(m) is _LINEAR for m in linears)
        and all(type(m).__name__ == "LlamaRMSNorm" and m.weight.dtype == x.dtype for m in norms)
        and untouched((attention, mlp, *linears, *norms))
        and not anyone_hooks_all()
    )
    name = activation_name(outer.get("act_fn")) if known else None
    if name is None:
        return None
    q, k, v, o, up, down, gate = (m._parameters for m in linears)
    weights = DecoderWeights(
        q["weight"], q["bias"], k["weight"], k["bias"], v["weight"], v["bias"], o["weight"],
        o["bias"], norms[0].weight, None, up["weight"], up["bias"], down["weight"], down["bias"],
        gate["weight"], gate["bias"], norms[1].weight, None,
    )  # fmt: skip
    d = attention.head_dim
    sizes = (q["weight"].shape[0] // d, k["weight"].shape[0] // d, d)
    return _run(
        x, mask, layer, weights, sizes, scale=attention.scaling, activation=name, norm="rms",
        eps=(norms[0].variance_epsilon, norms[1].variance_epsilon), rotary=position,
    )  # fmt: skip


def _layer(
    attention: Any, name: str, cache: Any, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Any:
    """The layer of a cache that grows in place, which this attention would append to."""
    if not isinstance(attention, CachedAttention) or type(attention).__name__ != name:
        return None
    layer = attention.cached_layer(cache, x, mask, kwargs)
    return layer if type(layer).__name__ == "GrowingLayer" else None


def _run(
    x: Tensor,
    mask: Tensor | None,
    layer: Any,
    weights: DecoderWeights,
    sizes: tuple[int, int, int],
    **options: Any,
) -> Tensor | None:
    """sizes: heads, heads of the cache, head_dim."""
    heads, kv_heads, d = sizes
    matrices = (weights.wq, weights.wk, weights.wv, weights.wo, weights.w1, weights.w2,
                weights.w_gate)  # fmt: skip
    if any(w is not None and w.dtype != x.dtype for w in matrices):
        return None
    batch, rows, _ = x.shape
    room: tuple[Tensor, Tensor] | None = layer.room_of((batch, kv_heads, rows, d), x)
    if room is None:
        return None
    start = layer.get_seq_length()
    if mask is not None:  # which knows no room behind the keys
        room = room[0].narrow(2, 0, start + rows), room[1].narrow(2, 0, start + rows)
    k_cache, v_cache = room
    y = decoder_layer(
        x, k_cache, v_cache, lengths(batch, start, x.device), weights, heads=heads, mask=mask,
        **options,
    )  # fmt: skip
    layer.append(rows)
    return y


def _is_conv1d(module: Any) -> bool:
    cls: type[Any] = type(module)
    return (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _rotates_halves(home: str, position: tuple[Tensor, Tensor], head_dim: int) -> bool:
    """Whether the rotation is transformers' own, whose tables hold every half row twice."""
    rotate: Any = sys.modules[home].apply_rotary_pos_emb
    table: Tensor = position[0]
    return bool(
        rotate.__module__ == home
        and rotate.__name__ == "apply_rotary_pos_emb"
        and table.shape[-1] == head_dim
    )
