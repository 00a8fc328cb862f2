"""A whole BERT or DistilBERT layer as one op, in inference on the CPU.

All that can forbid it is looked at in every call, and cheaply: with 16 tokens a layer takes as long
as twenty calls of ``nn.Module.__getattr__``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.nn._plain import activation_name, anyone_hooks_all
from fastattn.ops.encoder_layer import Weights, encoder_layer, serves
from fastattn.swap._transformers import OFF, idle_hooks, takes_part

_LINEAR, _DROPOUT = torch.nn.Linear, torch.nn.Dropout


def bert_layer_in_inference(
    layer: Any, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """The layer's output, None where it must run in parts."""
    if not serves(x, layer.backend) or layer.is_decoder or not _bool_mask(mask):
        return None
    parts = layer._modules
    attention = parts["attention"]
    inner, after = attention._modules.get("self"), attention._modules.get("output")
    middle, last = parts["intermediate"], parts["output"]
    if inner is None or not hasattr(after, "PARTS") or not takes_part(inner, kwargs):
        return None
    q, k, v = (inner._modules.get(name) for name in ("query", "key", "value"))
    o, drop1, norm1 = (after._modules.get(name) for name in ("dense", "dropout", "LayerNorm"))
    linear1, act = middle._modules.get("dense"), middle._modules.get("intermediate_act_fn")
    linear2, drop2, norm2 = (last._modules.get(name) for name in ("dense", "dropout", "LayerNorm"))
    if not untouched((attention, inner, after, middle, last)):
        return None
    family = type(layer).__name__.removesuffix("Layer")
    names = ("Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output")
    if [type(m).__name__ for m in (attention, inner, after, middle, last)] != [
        family + name for name in names
    ]:
        return None
    return _run(
        x, mask, (q, k, v, o, linear1, linear2), (norm1, norm2), (drop1, drop2), act,
        inner.num_attention_heads, inner.scaling, layer.backend,
    )  # fmt: skip


def distilbert_layer_in_inference(
    layer: Any, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """The same of a DistilBERT layer, which has no dropout behind its attention."""
    if not serves(x, layer.backend) or not _bool_mask(mask):
        return None
    parts = layer._modules
    inner, ffn = parts["attention"], parts["ffn"]
    if not takes_part(inner, kwargs) or not untouched((inner, ffn)):
        return None
    if (type(inner).__name__, type(ffn).__name__) != ("DistilBertSelfAttention", "FFN"):
        return None
    linears = [inner._modules.get(name) for name in ("q_lin", "k_lin", "v_lin", "out_lin")]
    linears += [ffn._modules.get(name) for name in ("lin1", "lin2")]
    norms = (parts["sa_layer_norm"], parts["output_layer_norm"])
    return _run(
        x, mask, tuple(linears), norms, (ffn._modules.get("dropout"),),
        ffn._modules.get("activation"), inner.n_heads, inner.scaling, layer.backend,
    )  # fmt: skip


def _run(
    x: Tensor,
    mask: Tensor | None,
    linears: tuple[Any, ...],
    norms: tuple[Any, Any],
    drops: tuple[Any, ...],
    act: Any,
    heads: int,
    scale: float,
    backend: str,
) -> Tensor | None:
    known = (
        all(type(m) is _LINEAR for m in linears)
        and all(type(m) is _DROPOUT and not (m.training and m.p) for m in drops)
        and all(isinstance(m, torch.nn.LayerNorm) for m in norms)
        and untouched((*linears, *norms, *drops))
        and not anyone_hooks_all()
    )
    name = activation_name(act) if known else None
    if name is None:
        return None
    q, k, v, o, one, two = (m._parameters for m in linears)
    norm1, norm2 = norms
    weights = Weights(
        q["weight"], q["bias"], k["weight"], k["bias"], v["weight"], v["bias"], o["weight"],
        o["bias"], norm1.weight, norm1.bias, one["weight"], one["bias"], two["weight"],
        two["bias"], norm2.weight, norm2.bias,
    )  # fmt: skip
    if any(w.dtype != x.dtype for w in (weights.wq, weights.wo, weights.w1, weights.w2)):
        return None
    return encoder_layer(
        x, mask, weights, heads=heads, scale=scale, activation=name, eps=(norm1.eps, norm2.eps),
        backend=backend,
    )  # fmt: skip


def _bool_mask(mask: Tensor | None) -> bool:
    return mask is None or (mask.dtype == torch.bool and mask.dim() == 4)


def untouched(modules: tuple[Any, ...]) -> bool:
    """No hooks, no forward of their own."""
    for module in modules:
        d = module.__dict__
        if (
            (d["_forward_hooks"] and not idle_hooks(d["_forward_hooks"]))
            or d["_forward_pre_hooks"]
            or d["_backward_hooks"]
            or d["_backward_pre_hooks"]
            or "forward" in d
            or OFF in d
        ):
            return False
    return True
