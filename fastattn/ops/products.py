"""Matrix products of the CPU's layers: csrc/bindings/products.cpp says in which dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops._eager import below_autograd, eager, transformed, wants_grad
from fastattn.ops.layernorm_op import lib

lib.define("product_cpu(Tensor a, Tensor b) -> Tensor")
lib.define("product_cpu_out(Tensor a, Tensor b, Tensor(a!) out, bool accumulate) -> ()")
lib.define("linear_cpu(Tensor x, Tensor w, Tensor? bias) -> Tensor")


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.mm``; large bf16 matrices on a CPU that multiplies them more slowly than fp32 are
    widened."""
    if not _ours(a):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        return torch.ops.fastattn.product_cpu(a, b)  # type: ignore[no-any-return]
    torch.ops.fastattn.product_cpu_out(a, b, out, False)
    return out


def addmm_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out.addmm_(a, b)``, likewise."""
    if not _ours(a):
        return out.addmm_(a, b)
    torch.ops.fastattn.product_cpu_out(a, b, out, True)
    return out


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, likewise, where nothing records it."""
    if not _ours(x) or wants_grad(x, w, bias) or transformed() or not eager(x):
        return F.linear(x, w, bias)
    return below_autograd(torch.ops.fastattn.linear_cpu, (x, w, bias))  # type: ignore[no-any-return]


def _ours(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"
