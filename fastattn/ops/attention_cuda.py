"""The CUDA C++ implementations of the attention ops, under the CUDA key, and under the CPU key for
tests (tests/sim: the same binding and kernels, linked with a stand-in for the CUDA runtime).

Schema, fake and autograd are in attention_op.py; ``attention_cuda_kernel_fwd`` is the binding
(csrc/bindings/attention_cuda.cpp). A kernel that its first-use check found wrong gives way to the
reference (attention_guard.py).

There is no backward in CUDA C++ yet: gradients come from the Triton kernels, which recompute P from
the same q, k, v, lse and lse_lo, or, where Triton cannot serve the call, from the reference formula
(memory Sq x Sk).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import PerformanceWarning, can_serve, select
from fastattn.ops import attention_guard as guard
from fastattn.ops import attention_triton
from fastattn.ops.attention_op import Shared


def _kernel_fwd(q: Tensor, k: Tensor, v: Tensor, *shared: Any) -> tuple[Tensor, ...]:
    op = torch.ops.fastattn.attention_cuda_kernel_fwd.default
    results: tuple[Tensor, ...] = op(q, k, v, *shared[:-1])  # a forward is always deterministic
    return results


def _fwd(q: Tensor, k: Tensor, v: Tensor, *shared: Any) -> tuple[Tensor, ...]:
    def check() -> tuple[str, Callable[[], str | None]]:
        from fastattn.ops.attention_first_use import check_forward

        return "forward", partial(check_forward, _kernel_fwd, q, k, v, Shared(*shared))

    if not guard.may_run("cuda", (q, k, v), shared, check):
        return guard.forward_by_reference(q, k, v, Shared(*shared))
    return _kernel_fwd(q, k, v, *shared)


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    q, k, v = args[3:6]
    head_dim = max(q.shape[-1], v.shape[-1])
    if can_serve("attention", "triton", q.device.type, q.dtype, head_dim):
        return attention_triton.backward(*args)
    if q.is_cuda:
        warnings.warn(
            "fastattn::attention: backend='cuda' has no backward of its own yet and Triton cannot "
            "serve this call; gradients come from the plain PyTorch reference (memory Sq x Sk)",
            PerformanceWarning,
            stacklevel=2,
        )
    return guard.backward_by_reference(args[:3], q, k, v, Shared(*args[9:-1]), args[-1])


def _fwd_cpu(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    select("attention", "cuda", "cpu", q.dtype)  # raises where nothing would run it
    return _fwd(q, *rest)


def _bwd_cpu(*args: Any) -> tuple[Tensor, ...]:
    select("attention", "cuda", "cpu", args[3].dtype)
    return _bwd(*args)


_lib = torch.library.Library("fastattn", "IMPL")
_lib.impl("attention_cuda_fwd", _fwd, "CUDA")
_lib.impl("attention_cuda_bwd", _bwd, "CUDA")
_lib.impl("attention_cuda_fwd", _fwd_cpu, "CPU")
_lib.impl("attention_cuda_bwd", _bwd_cpu, "CPU")
