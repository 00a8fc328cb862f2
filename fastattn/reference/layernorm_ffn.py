"""``layernorm_ffn`` and its parts on their own: norms, bias + activation.

Dimensions: ``D`` features, ``F`` hidden features.  Rounding is that of plain PyTorch code: every
step gives the inputs' dtype; norms of float16 / bfloat16 are computed in float32 inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.reference.dropout import draw_seed, dropout_keep

__all__ = ["add_layer_norm", "bias_act", "layer_norm", "layernorm_ffn", "rms_norm"]

# Which dropout of the op: the fourth word of the counter. 0 is attention's.
HIDDEN_SITE, OUTPUT_SITE = 1, 2


def dropout(x: Tensor, p: float, seed: int | Tensor | None, site: int) -> Tensor:
    """Element (row, column) of x is dropped iff its Philox word is below ``round(p * 2**32)``."""
    if not p:
        return x
    if seed is None:
        seed = draw_seed(x.device)
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    keep = dropout_keep(seed, p, 1, 1, rows, columns, device=x.device, site=site)
    return torch.where(keep.view(x.shape), x / (1.0 - p), torch.zeros_like(x))


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``; see :func:`fastattn.layer_norm`."""
    shape = list(normalized_shape)
    others = [p.dtype for p in (weight, bias) if p is not None]
    if all(dtype == x.dtype for dtype in others):
        return F.layer_norm(x, shape, weight, bias, eps)
    wide = torch.promote_types(torch.float32, x.dtype)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(x.to(wide), shape, weight, bias, eps).to(x.dtype)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight``; see :func:`fastattn.rms_norm`."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    wide = torch.promote_types(torch.float32, x.dtype)
    dims = tuple(range(-len(normalized_shape), 0))
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide)
    return y.to(x.dtype)


def _norm(
    x: Tensor, norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if norm == "layer":
        return layer_norm(x, x.shape[-1:], weight, bias, eps)
    if norm == "rms":
        y = rms_norm(x, x.shape[-1:], weight, eps)
        return y if bias is None else (y + bias).to(x.dtype)
    return x


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str | None = "layer",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = residual + dropout(x)``, ``norm(s), s``; see :func:`fastattn.add_layer_norm`."""
    s = dropout(x, dropout_p, seed, OUTPUT_SITE)
    if residual is not None:
        s = residual + s
    return _norm(s, norm, weight, bias, eps), s


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    if activation == "relu2":
        return F.relu(x).square()
    if activation == "silu":
        return F.silu(x)
    if activation == "identity":
        return x
    raise ValueError(f"unknown activation {activation!r}")


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``dropout(act(x + bias))``, gated ``dropout(act(gate + gate_bias) * (x + bias))``."""
    up = x if bias is None else (x + bias).to(x.dtype)
    if gate is None:
        y = activate(up, activation)
    else:
        gated = gate if gate_bias is None else (gate + gate_bias).to(gate.dtype)
        y = activate(gated, activation) * up
    return dropout(y, dropout_p, seed, HIDDEN_SITE)


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(x, w, None if b is None else b.to(w.dtype))


def layernorm_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    norm: str | None = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    pre_norm: bool = True,
    residual: bool = True,
    dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``x + dropout(W2 hidden_dropout(act(W1 norm(x) + b1)) + b2)``, or with ``pre_norm=False``
    ``norm(x + dropout(W2 hidden_dropout(act(W1 x + b1)) + b2))``; see
    :func:`fastattn.layernorm_ffn`.

    >>> import torch
    >>> x, w1, w2 = torch.randn(3, 8), torch.randn(16, 8), torch.randn(8, 16)
    >>> layernorm_ffn(x, w1, None, w2, None, activation="relu").shape
    torch.Size([3, 8])
    """
    if seed is None and (dropout_p or hidden_dropout_p):
        seed = draw_seed(x.device)
    inner = _norm(x, norm, norm_weight, norm_bias, eps) if pre_norm else x
    inner = inner.to(w1.dtype)
    u = _linear(inner, w1, b1)
    gate = None if w_gate is None else _linear(inner, w_gate, b_gate)
    a = bias_act(u, activation=activation, gate=gate, dropout_p=hidden_dropout_p, seed=seed)
    z = dropout(_linear(a, w2, b2).to(x.dtype), dropout_p, seed, OUTPUT_SITE)
    y = x + z if residual else z
    return y if pre_norm else _norm(y, norm, norm_weight, norm_bias, eps)
