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
from fastattn.kernels.contract import empty_as
from fastattn.ops.attention_op import Shared, recording


def _fwd(q: Tensor, k: Tensor, v: Tensor, *shared: Any) -> tuple[Tensor, ...]:
    from fastattn.kernels.attention import attention_forward

    if not _passed(q, k, v, shared):
        from fastattn.ops.attention_triton_check import check_forward

        args = Shared(*shared)
        check = partial(check_forward, attention_forward, q, k, v, args)
        if not _trusted(q, k, v, args, "forward", check, _key(q, k, v, shared)):
            return _fwd_by_reference(q, k, v, args)
    results: tuple[Tensor, ...] = attention_forward(q, k, v, *shared[:-1])
    return results


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    from fastattn.kernels.attention import attention_backward, attention_forward

    *tensors_and_numbers, deterministic, need = args
    q, k, v = args[3:6]
    upstream = tuple(x is not None for x in args[:3])
    if not _passed(q, k, v, args[9:-1], need, upstream):
        from fastattn.ops.attention_triton_check import check_backward

        shared = Shared(*args[9:-1])
        check = partial(
            check_backward, attention_forward, attention_backward, upstream, q, k, v, shared, need,
            deterministic,
        )  # fmt: skip
        given = "+".join(n for n, x in zip(("do", "dlse", "dweights"), upstream, strict=True) if x)
        how = f"backward {need} of {given}{'' if deterministic else ' atomic'}"
        key = _key(q, k, v, args[9:-1], need, upstream)
        if not _trusted(q, k, v, shared, how, check, key):
            return _bwd_by_reference(args[:3], q, k, v, shared, need)
    grads: tuple[Tensor, ...] = attention_backward(
        *tensors_and_numbers, need=need, deterministic=deterministic
    )
    return grads


# Calls that need no further look: naming the variant of each would cost a small call 20 us.
_seen: set[tuple[Any, ...]] = set()


def _key(q: Tensor, k: Tensor, v: Tensor, shared: Any, *more: Any) -> tuple[Any, ...]:
    """At least as fine as the variant's name."""
    bias = shared[1]
    tensors = tuple([x is None or x.dim() for x in shared[:9]])
    numbers = tuple([x > 0 for x in shared[12:15]])  # window's right side, softcap, dropout
    return (
        first_use.generation, q.device, q.dtype, q.shape[-1], v.shape[-1],
        q.shape[1] == k.shape[1], tensors, None if bias is None else (bias.dtype, *_ones(bias)),
        shared[10], shared[11] >= 0, shared[12] >= 0, numbers, shared[15], shared[-1], more,
    )  # fmt: skip


def _ones(x: Tensor) -> list[bool]:
    return [n == 1 for n in x.shape]


def _passed(q: Tensor, k: Tensor, v: Tensor, shared: Any, *more: Any) -> bool:
    if first_use.architecture(q.device) is None:
        return True
    return _key(q, k, v, shared, *more) in _seen


def _trusted(
    q: Tensor, k: Tensor, v: Tensor, shared: Shared, how: str, check: Any, key: tuple[Any, ...]
) -> bool:
    from fastattn.ops.attention_triton_check import variant

    arch = first_use.architecture(q.device)
    if arch is None:
        return True
    name = variant(q, v, q.shape[1] // max(k.shape[1], 1), shared, how)
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if first_use.trusted("attention", arch, name, check, may_check=not capturing):
        if first_use.enabled() and not capturing and not first_use.is_checking():
            _seen.add(key)
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
