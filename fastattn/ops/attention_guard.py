"""What stands between a GPU op and its kernels: the first-use verdict, and plain PyTorch where it
says no. The same for every backend that checks itself (Triton, CUDA C++).

It works in the implementation of the op, below the compilers, so a compiled graph stays right too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import first_use, reference
from fastattn.kernels.contract import empty_as
from fastattn.ops.attention_op import Shared, recording

# Calls that need no further look: naming the variant of each would cost a small call 20 us.
_seen: set[tuple[Any, ...]] = set()


def may_run(
    backend: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    shared: tuple[Any, ...],
    check: Callable[[], tuple[str, Callable[[], str | None]]],
    more: tuple[Any, ...] = (),
) -> bool:
    """Whether the backend's kernels may serve this call; False = take :func:`forward_by_reference`
    or :func:`backward_by_reference`.

    Args:
        shared: the op's arguments behind q, k, v, ``deterministic`` included.
        check: asked for where the call was not seen before: which kernels ("forward", "backward 7
            of do"), and what runs them on a small input.
        more: what else tells variants apart, hashable.

    Raises:
        ValueError: the verdict is no, and the caller named this backend.
    """
    q, k, v = qkv
    arch = first_use.architecture(q.device)
    if arch is None:
        return True
    key = (backend, *_key(q, k, v, shared), more)
    if key in _seen:
        return True
    from fastattn.ops.attention_first_use import variant

    how, run = check()
    name = f"{backend} {variant(q, v, q.shape[1] // max(k.shape[1], 1), Shared(*shared), how)}"
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if first_use.trusted("attention", arch, name, run, may_check=not capturing):
        if first_use.enabled() and not capturing and not first_use.is_checking():
            _seen.add(key)
        return True
    if first_use.is_explicit():
        raise ValueError(
            f"fastattn::attention: backend={backend!r} is disabled for {name} on {arch}: its "
            "first-use check found it wrong (`fastattn doctor` says how); use backend='auto' or "
            "'reference'"
        )
    return False


def _key(q: Tensor, k: Tensor, v: Tensor, shared: Any) -> tuple[Any, ...]:
    """At least as fine as the variant's name."""
    bias = shared[1]
    tensors = tuple([x is None or x.dim() for x in shared[:9]])
    numbers = tuple([x > 0 for x in shared[12:15]])  # window's right side, softcap, dropout
    return (
        first_use.generation, q.device, q.dtype, q.shape[-1], v.shape[-1],
        q.shape[1] == k.shape[1], tensors, None if bias is None else (bias.dtype, *_ones(bias)),
        shared[10], shared[11] >= 0, shared[12] >= 0, numbers, shared[15], shared[-1],
    )  # fmt: skip


def _ones(x: Tensor) -> list[bool]:
    return [n == 1 for n in x.shape]


def _by_reference(leaves: list[Tensor], shared: Shared) -> Any:
    kwargs = shared.reference_kwargs()
    if shared.cu_seqlens_q is not None and shared.cu_seqlens_k is not None:
        q, k, v = leaves
        return reference.attention_varlen(
            q, k, v, shared.cu_seqlens_q, shared.cu_seqlens_k, **kwargs
        )
    return reference.attention(*leaves, **kwargs)


def forward_by_reference(q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> tuple[Tensor, ...]:
    """o, lse, lse_lo (0: a backward that recomputes needs none) and weights, by plain PyTorch."""
    o, lse, *w = _by_reference([q, k, v], shared)
    out = empty_as(q, tuple(o.shape)).copy_(o)
    lse = lse.float().contiguous()
    return out, lse, torch.zeros_like(lse), w[0].contiguous() if w else q.new_empty((0,))


def backward_by_reference(
    upstream: Any, q: Tensor, k: Tensor, v: Tensor, shared: Shared, need: int
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias, dsinks for the gradients of o, lse and weights, by plain PyTorch."""
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
