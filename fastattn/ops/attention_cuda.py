"""The CUDA C++ implementations of the attention ops, under the CUDA key, and under the CPU key for
tests (tests/sim: the same binding and kernels, linked with a stand-in for the CUDA runtime).

Schema, fake and autograd are in attention_op.py; ``attention_cuda_kernel_fwd`` and ``_bwd`` are the
binding (csrc/bindings/attention_cuda.cpp). A kernel that its first-use check found wrong gives way
to the reference (attention_guard.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import select
from fastattn.kernels.contract import NEED_DBIAS, NEED_DSINKS
from fastattn.ops import attention_guard as guard
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


def _kernel_bwd(*args: Any, need: int, deterministic: bool) -> tuple[Tensor, ...]:
    """The arguments of ``attention_backward`` of the Triton kernels."""
    op = torch.ops.fastattn.attention_cuda_kernel_bwd.default
    do, dlse, dweights = args[:3]
    lse, lse_lo = (x.contiguous() for x in args[7:9])
    dlse = None if dlse is None else dlse.float()
    args = (do, dlse, dweights, *args[3:7], lse, lse_lo, *args[9:27])
    dq, dk, dv, dbias, dsinks = op(*args, deterministic, need)
    shared = Shared(*args[9:])
    if shared.bias is not None and need & NEED_DBIAS:
        bias = shared.bias
        shape = (*(1,) * (4 - bias.dim()), *bias.shape)
        # What is left to sum of a broadcast bias; nothing of an empty call.
        total = dbias.sum_to_size(shape) if dbias.numel() else dbias.new_zeros(shape)
        dbias = total.reshape(bias.shape).to(bias.dtype)
    if shared.sinks is not None and need & NEED_DSINKS:
        dsinks = dsinks.to(shared.sinks.dtype)
    return dq, dk, dv, dbias, dsinks


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    *tensors_and_numbers, deterministic, need = args
    (q, k, v), shared = args[3:6], args[9:-1]
    upstream = tuple(x is not None for x in args[:3])

    def check() -> tuple[str, Callable[[], str | None]]:
        from fastattn.ops.attention_first_use import check_backward

        given = "+".join(n for n, x in zip(("do", "dlse", "dweights"), upstream, strict=True) if x)
        how = f"backward {need} of {given}{'' if deterministic else ' atomic'}"
        return how, partial(
            check_backward, _kernel_fwd, _kernel_bwd, upstream, q, k, v, Shared(*shared), need,
            deterministic,
        )  # fmt: skip

    if not guard.may_run("cuda", (q, k, v), shared, check, (need, upstream)):
        return guard.backward_by_reference(args[:3], q, k, v, Shared(*shared), need)
    return _kernel_bwd(*tensors_and_numbers, need=need, deterministic=deterministic)


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
