"""The norm pass and the act pass in plain PyTorch and fp64, with the kernels' arguments: what a
kernel is checked against at its first use, and what runs where that check found it wrong. Slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops._eager import recording
from fastattn.ops.layernorm_op import ACTIVATION_NAMES
from fastattn.reference.layernorm_ffn import HIDDEN_SITE, OUTPUT_SITE, activate, dropout

_F64, _F32 = torch.float64, torch.float32


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(_F64)


def norm_forward(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, seed: Tensor | None, *, norm: int, eps: float, dropout_p: float,
    y_dtype: torch.dtype, want_sum: bool, want_stats: bool, sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As :func:`fastattn.kernels.layernorm.norm_forward`."""
    sum_dtype = sum_dtype or (x if residual is None else residual).dtype
    s = x.to(_F64)
    if x_bias is not None:
        s = s + x_bias.to(_F64)
    s = dropout(s, dropout_p, seed, OUTPUT_SITE)
    if residual is not None:
        s = s + residual.to(_F64)
    stored = s.to(sum_dtype).contiguous()
    y = s = stored.to(_F64)
    mean = rstd = None
    if norm:
        mean = s.mean(-1) if norm == 1 else torch.zeros_like(s[:, 0])
        rstd = ((s - mean[:, None]).square().mean(-1) + eps).rsqrt()
        y = (s - mean[:, None]) * rstd[:, None]
    if weight is not None:
        y = y * weight.to(_F64)
    if bias is not None:
        y = y + bias.to(_F64)
    kept = [
        v.to(_F32) if v is not None and want_stats and wanted else None
        for v, wanted in ((mean, norm == 1), (rstd, norm != 0))
    ]
    # Results share no memory, as those of the kernels.
    return y.to(y_dtype, copy=True), stored.clone() if want_sum else None, kept[0], kept[1]


def norm_backward(
    dy: Tensor | None, ds: Tensor | None, s: Tensor, mean: Tensor | None, rstd: Tensor | None,
    weight: Tensor | None, seed: Tensor | None, *, norm: int, dropout_p: float,
    dx_dtype: torch.dtype | None, dresidual_dtype: torch.dtype | None,
    sums: tuple[torch.dtype | None, ...],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """As :func:`fastattn.kernels.layernorm.norm_backward`."""
    grad = torch.zeros(s.shape, dtype=_F64, device=s.device)
    dweight = dbias = grad.sum(0)
    if dy is not None:
        grad = dy.to(_F64)
        if norm and rstd is not None:
            y_hat = s.to(_F64) if mean is None else s.to(_F64) - mean.to(_F64)[:, None]
            y_hat = y_hat * rstd.to(_F64)[:, None]
            dweight, dbias = (grad * y_hat).sum(0), grad.sum(0)
            h = grad if weight is None else grad * weight.to(_F64)
            grad = h - y_hat * (h * y_hat).mean(-1, keepdim=True)
            if norm == 1:
                grad = grad - h.mean(-1, keepdim=True)
            grad = grad * rstd.to(_F64)[:, None]
    if ds is not None:
        grad = grad + ds.to(_F64)
    dropped = dropout(grad, dropout_p, seed, OUTPUT_SITE)
    found = (dweight, dbias, dropped.sum(0))
    return (
        None if dx_dtype is None else dropped.to(dx_dtype, copy=True),
        None if dresidual_dtype is None else grad.to(dresidual_dtype, copy=True),
        [None if t is None else x.to(t) for x, t in zip(found, sums, strict=True)],
    )


def _act(
    x: Tensor, g: Tensor | None, bias: Tensor | None, gate_bias: Tensor | None,
    seed: Tensor | None, act: int, dropout_p: float,
) -> Tensor:  # fmt: skip
    up = x if bias is None else x + bias
    if g is None:
        a = activate(up, ACTIVATION_NAMES[act])
    else:
        a = activate(g if gate_bias is None else g + gate_bias, ACTIVATION_NAMES[act]) * up
    return dropout(a, dropout_p, seed, HIDDEN_SITE)


def act_forward(
    x: Tensor, g: Tensor | None, bias: Tensor | None, gate_bias: Tensor | None,
    seed: Tensor | None, *, act: int, dropout_p: float, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As :func:`fastattn.kernels.bias_act.act_forward`."""
    a = _act(x.to(_F64), _wide(g), _wide(bias), _wide(gate_bias), seed, act, dropout_p)
    return a.to(x.dtype) if out is None else out.copy_(a)


def act_backward(
    da: Tensor, x: Tensor, g: Tensor | None, bias: Tensor | None, gate_bias: Tensor | None,
    seed: Tensor | None, *, act: int, dropout_p: float, want_dx: bool, want_dg: bool, want_a: bool,
    sums: tuple[torch.dtype | None, ...], over_da: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """As :func:`fastattn.kernels.bias_act.act_backward`."""
    with recording():
        up, gate = x.detach().to(_F64).requires_grad_(), _wide(g)
        gate = None if gate is None else gate.detach().requires_grad_()
        a = _act(up, gate, _wide(bias), _wide(gate_bias), seed, act, dropout_p)
        leaves = [v for v in (up, gate) if v is not None]
        dx, *rest = torch.autograd.grad(a, leaves, da.to(_F64))
    dg = rest[0] if rest else None
    grads = (dx, dx if dg is None else dg)
    totals = [None if t is None else v.sum(0).to(t) for v, t in zip(grads, sums, strict=True)]
    written = da.copy_(dx) if over_da and want_dx else dx.to(x.dtype)
    return (
        written if want_dx else None,
        None if dg is None or not want_dg else dg.to(x.dtype),
        a.detach().to(x.dtype) if want_a else None,
        totals,
    )
