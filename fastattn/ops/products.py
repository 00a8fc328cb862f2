"""Matrix products of the CPU's layers: csrc/bindings/products.cpp says in which dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.layernorm_op import lib

lib.define("product_cpu(Tensor a, Tensor b) -> Tensor")
lib.define("product_cpu_out(Tensor a, Tensor b, Tensor(a!) out, bool accumulate) -> ()")


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


def _ours(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"
