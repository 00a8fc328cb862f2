"""Matrix products of the CPU's layers: csrc/bindings/products.cpp says in which dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops._eager import (
    below_autograd,
    differentiable_gradients,
    eager,
    make_function,
    transformed,
    wants_grad,
)
from fastattn.ops.layernorm_op import lib

lib.define("product_cpu(Tensor a, Tensor b) -> Tensor")
lib.define("product_cpu_out(Tensor a, Tensor b, Tensor(a!) out) -> ()")
lib.define("product_cpu_add(Tensor a, Tensor b, Tensor(a!) out) -> bool")
lib.define("product_cpu_bias(Tensor a, Tensor b, Tensor bias, Tensor(a!) out) -> bool")
lib.define("linear_cpu(Tensor x, Tensor w, Tensor? bias) -> Tensor")


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.mm``; large bf16 matrices on a CPU that multiplies them more slowly than fp32 are
    widened."""
    if not _ours(a):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        return torch.ops.fastattn.product_cpu(a, b)  # type: ignore[no-any-return]
    torch.ops.fastattn.product_cpu_out(a, b, out)
    return out


def addmm_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out.addmm_(a, b)``, likewise."""
    if _ours(a) and torch.ops.fastattn.product_cpu_add(a, b, out):
        return out
    return out.addmm_(a, b)


def mm_bias(a: Tensor, b: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``torch.addmm(bias, a, b, out=out)``, likewise."""
    if _ours(a) and torch.ops.fastattn.product_cpu_bias(a, b, bias, out):
        return out
    return torch.addmm(bias, a, b, out=out)


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, likewise, with its gradients."""
    one_dtype = x.dtype == w.dtype and (bias is None or bias.dtype == x.dtype)
    if not (_ours(x) and one_dtype and x.dim() and eager(x)) or transformed():
        return F.linear(x, w, bias)
    if wants_grad(x, w, bias):
        return _function.apply(x, w, bias)  # type: ignore[no-any-return]
    return _below(x, w, bias)


def _below(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return below_autograd(torch.ops.fastattn.linear_cpu, (x, w, bias))  # type: ignore[no-any-return]


def _forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    ctx.save_for_backward(x, w, bias)
    return _below(x, w, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, bias = inputs = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        return differentiable_gradients(lambda *t: (F.linear(*t),), inputs, needs, (dy,))
    rows = dy.reshape(-1, dy.shape[-1])
    return (
        mm(rows, w).view(x.shape) if needs[0] else None,
        mm(rows.t(), x.reshape(-1, x.shape[-1])) if needs[1] else None,
        rows.sum(0) if bias is not None and needs[2] else None,
    )


_function = make_function("_Linear", forward=_forward, backward=_backward)


def _ours(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"
