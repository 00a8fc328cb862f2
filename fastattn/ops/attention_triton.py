"""The Triton implementations of the attention ops, under the CUDA key, and under the CPU key for
tests (Triton's interpreter, or a hook that takes the launches over).

Schema, fake and autograd are in attention_op.py. Triton is imported at the first call:
`import fastattn` needs none. A kernel that its first-use check found wrong gives way to the
reference (attention_guard.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import select
from fastattn.ops import attention_guard as guard
from fastattn.ops.attention_op import Shared


def _fwd(q: Tensor, k: Tensor, v: Tensor, *shared: Any) -> tuple[Tensor, ...]:
    from fastattn.kernels.attention import attention_forward

    def check() -> tuple[str, Callable[[], str | None]]:
        from fastattn.ops.attention_first_use import check_forward

        return "forward", partial(check_forward, attention_forward, q, k, v, Shared(*shared))

    if not guard.may_run("triton", (q, k, v), shared, check):
        return guard.forward_by_reference(q, k, v, Shared(*shared))
    results: tuple[Tensor, ...] = attention_forward(q, k, v, *shared[:-1])
    return results


def backward(*args: Any) -> tuple[Tensor, ...]:
    """The arguments of ``attention_triton_bwd``; also what attention_cuda_bwd is made of."""
    from fastattn.kernels.attention import attention_backward, attention_forward

    *tensors_and_numbers, deterministic, need = args
    (q, k, v), shared = args[3:6], args[9:-1]
    upstream = tuple(x is not None for x in args[:3])

    def check() -> tuple[str, Callable[[], str | None]]:
        from fastattn.ops.attention_first_use import check_backward

        given = "+".join(n for n, x in zip(("do", "dlse", "dweights"), upstream, strict=True) if x)
        how = f"backward {need} of {given}{'' if deterministic else ' atomic'}"
        return how, partial(
            check_backward, attention_forward, attention_backward, upstream, q, k, v,
            Shared(*shared), need, deterministic,
        )  # fmt: skip

    if not guard.may_run("triton", (q, k, v), shared, check, (need, upstream)):
        return guard.backward_by_reference(args[:3], q, k, v, Shared(*shared), need)
    grads: tuple[Tensor, ...] = attention_backward(
        *tensors_and_numbers, need=need, deterministic=deterministic
    )
    return grads


def _fwd_cpu(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    select("attention", "triton", "cpu", q.dtype)  # raises where nothing would run it
    return _fwd(q, *rest)


def _bwd_cpu(*args: Any) -> tuple[Tensor, ...]:
    select("attention", "triton", "cpu", args[3].dtype)
    return backward(*args)


_lib = torch.library.Library("fastattn", "IMPL")
_lib.impl("attention_triton_fwd", _fwd, "CUDA")
_lib.impl("attention_triton_bwd", backward, "CUDA")
_lib.impl("attention_triton_fwd", _fwd_cpu, "CPU")
_lib.impl("attention_triton_bwd", _bwd_cpu, "CPU")
