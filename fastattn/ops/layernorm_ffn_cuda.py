"""The CUDA C++ implementations of ``layernorm_ffn``, under the CUDA key, and under the CPU key for
tests (tests/sim: the same binding and kernels, linked with a stand-in for the CUDA runtime).

Schema, fake and autograd are in layernorm_ffn_op.py; ``layernorm_ffn_cuda_kernel_fwd`` and
``_bwd`` are the binding (csrc/bindings/layernorm_ffn_cuda.cpp). A kernel that its first-use check
found wrong gives way to the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import select
from fastattn.ops import _guard
from fastattn.ops import layernorm_ffn_first_use as first
from fastattn.ops import layernorm_ffn_op as op

_OP = "layernorm_ffn"
# The forward's arguments: x and the parameters, seed, numbers, save.
_INPUTS, _SEED, _NUMBERS = slice(0, 9), 9, slice(10, 17)


def kernel_fwd(*args: Any) -> tuple[Tensor, ...]:
    """The arguments of ``layernorm_ffn_cuda_fwd``."""
    results: tuple[Tensor, ...] = torch.ops.fastattn.layernorm_ffn_cuda_kernel_fwd.default(*args)
    return results


def kernel_bwd(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The arguments of ``layernorm_ffn_cuda_bwd``."""
    inputs, need = args[_INPUTS], args[-1]
    mean, rstd = (x.contiguous() for x in args[11:13])
    every = (dy, *args[:11], mean, rstd, *args[16:])
    found = torch.ops.fastattn.layernorm_ffn_cuda_kernel_bwd.default(*every)
    # Parameters beside the weights have any float dtype; their gradients are summed in fp32.
    return tuple(
        g if x is None or not need >> i & 1 else g.view(x.shape).to(x.dtype)
        for i, (g, x) in enumerate(zip(found, inputs, strict=True))
    )


def _fwd(*args: Any) -> tuple[Tensor, ...]:
    inputs, seed, numbers = args[_INPUTS], args[_SEED], op.Numbers(*args[_NUMBERS])

    def check() -> tuple[str, Callable[[], str | None]]:
        name = first.variant(inputs, numbers, "forward")
        return name, partial(first.check_forward, kernel_fwd, inputs, numbers)

    if not _guard.may_run(_OP, "cuda", inputs[0].device, (_key(inputs, numbers), 0), check):
        return op.forward_by_reference(inputs, seed, numbers, args[-1])
    return kernel_fwd(*args)


def _bwd(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, seed, need = args[_INPUTS], args[_SEED], args[-1]
    numbers = op.Numbers(*args[16:23])

    def check() -> tuple[str, Callable[[], str | None]]:
        name = first.variant(inputs, numbers, f"backward {need}")
        return name, partial(first.check_backward, kernel_fwd, kernel_bwd, inputs, numbers, need)

    if not _guard.may_run(_OP, "cuda", inputs[0].device, (_key(inputs, numbers), need), check):
        return op.backward_by_reference(dy, inputs, seed, numbers, need)
    return kernel_bwd(dy, *args)


def _key(inputs: tuple[Any, ...], n: op.Numbers) -> tuple[Any, ...]:
    """At least as fine as the variant's name."""
    x, w1, w2 = inputs[0], inputs[1], inputs[3]
    return (
        x.dtype, w1.dtype, *w1.shape, w2.shape[0],
        tuple(None if p is None else p.dtype for p in inputs), n.norm, n.act, n.pre_norm,
        n.residual, n.dropout_p > 0, n.hidden_dropout_p > 0,
    )  # fmt: skip


def _fwd_cpu(*args: Any) -> tuple[Tensor, ...]:
    select(_OP, "cuda", "cpu", args[0].dtype)  # raises where nothing would run it
    return _fwd(*args)


def _bwd_cpu(*args: Any) -> tuple[Tensor, ...]:
    select(_OP, "cuda", "cpu", args[0].dtype)
    return _bwd(*args)


_lib = torch.library.Library("fastattn", "IMPL")
_lib.impl("layernorm_ffn_cuda_fwd", _fwd, "CUDA")
_lib.impl("layernorm_ffn_cuda_bwd", _bwd, "CUDA")
_lib.impl("layernorm_ffn_cuda_fwd", _fwd_cpu, "CPU")
_lib.impl("layernorm_ffn_cuda_bwd", _bwd_cpu, "CPU")
