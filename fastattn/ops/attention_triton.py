"""The Triton implementations of the attention ops, under the CUDA key, and under the CPU key for
tests (Triton's interpreter, or a hook that takes the launches over).

Schema, fake and autograd are in attention_op.py. Triton is imported at the first call:
`import fastattn` needs none. A kernel that its first-use check found wrong gives way to the
reference here, below the compilers, so that a compiled graph stays right too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import first_use, reference
from fastattn.backends import select
from fastattn.kernels.layout import empty_as
from fastattn.ops.attention_op import Shared, recording


def _fwd(q: Tensor, k: Tensor, v: Tensor, *shared: Any) -> tuple[Tensor, ...]:
    from fastattn.kernels.attention import attention_forward

    if first_use.architecture(q.device) is not None:
        from fastattn.ops.attention_triton_check import check_forward

        args = Shared(*shared)
        check = partial(check_forward, attention_forward, q, k, v, args)
        if not _trusted(q, k, v, args, "forward", check):
            return _fwd_by_reference(q, k, v, args)
    results: tuple[Tensor, ...] = attention_forward(q, k, v, *shared[:-1])
    return results


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    from fastattn.kernels.attention import attention_backward, attention_forward

    *tensors_and_numbers, deterministic, need = args
    q, k, v = args[3:6]
    if first_use.architecture(q.device) is not None:
        from fastattn.ops.attention_triton_check import check_backward

        shared = Shared(*args[9:-1])
        upstream = tuple(x is not None for x in args[:3])
        check = partial(
            check_backward, attention_forward, attention_backward, upstream, q, k, v, shared, need,
            deterministic,
        )  # fmt: skip
        how = f"backward {need}{'' if deterministic else ' atomic'}"
        if not _trusted(q, k, v, shared, how, check):
            return _bwd_by_reference(args[:3], q, k, v, shared, need)
    grads: tuple[Tensor, ...] = attention_backward(
        *tensors_and_numbers, need=need, deterministic=deterministic
    )
    return grads


def _trusted(q: Tensor, k: Tensor, v: Tensor, shared: Shared, how: str, check: Any) -> bool:
    from fastattn.ops.attention_triton_check import variant

    arch = first_use.architecture(q.device)
    if arch is None:
        return True
    name = variant(q, v, q.shape[1] // max(k.shape[1], 1), shared, how)
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if first_use.trusted("attention", arch, name, check, may_check=not capturing):
        return True
    if first_use.is_explicit():
        raise ValueError(
            f"fastattn::attention: backend='triton' is disabled for {name} on {arch}: its "
            "first-use check found it wrong (`fastattn doctor` says how); use backend='auto' or "
            "'reference'"
        )
    return False


def _by_reference(leaves: list[Tensor], shared: Shared) -> Any:
    kwargs = shared.reference_kwargs()
    if shared.cu_seqlens_q is not None and shared.cu_seqlens_k is not None:
        q, k, v = leaves
        return reference.attention_varlen(
            q, k, v, shared.cu_seqlens_q, shared.cu_seqlens_k, **kwargs
        )
    return reference.attention(*leaves, **kwargs)


def _fwd_by_reference(q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> tuple[Tensor, ...]:
    o, lse, *w = _by_reference([q, k, v], shared)
    out = empty_as(q, tuple(o.shape)).copy_(o)
    lse = lse.float().contiguous()
    return out, lse, torch.zeros_like(lse), w[0].contiguous() if w else q.new_empty((0,))


def _bwd_by_reference(
    upstream: Any, q: Tensor, k: Tensor, v: Tensor, shared: Shared, need: int
) -> tuple[Tensor, ...]:
    with recording():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        for name in ("bias", "sinks"):
            x = getattr(shared, name)
            if x is not None:
                setattr(shared, name, x.detach().requires_grad_())
        outputs = _by_reference(leaves, shared)
        pairs = [(o, g) for o, g in zip(outputs, upstream, strict=False) if g is not None]
        inputs = [*leaves, shared.bias, shared.sinks]
        wanted = [x for i, x in enumerate(inputs) if need >> i & 1 and x is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g.to(o.dtype) for o, g in pairs], allow_unused=True
            )
        )
    results = []
    for i, x in enumerate(inputs):
        if x is None or not need >> i & 1:
            results.append(q.new_empty((0,)))
            continue
        grad = next(found)
        like = empty_as(x, tuple(x.shape)) if i < 3 else x.new_empty(x.shape)
        results.append(like.copy_(grad) if grad is not None else like.zero_())
    return tuple(results)


def _fwd_cpu(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    select("attention", "triton", "cpu", q.dtype)  # raises where nothing would run it
    return _fwd(q, *rest)


def _bwd_cpu(*args: Any) -> tuple[Tensor, ...]:
    select("attention", "triton", "cpu", args[3].dtype)
    return _bwd(*args)


_lib = torch.library.Library("fastattn", "IMPL")
_lib.impl("attention_triton_fwd", _fwd, "CUDA")
_lib.impl("attention_triton_bwd", _bwd, "CUDA")
_lib.impl("attention_triton_fwd", _fwd_cpu, "CPU")
_lib.impl("attention_triton_bwd", _bwd_cpu, "CPU")
