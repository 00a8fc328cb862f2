"""What stands between the attention ops and their GPU kernels: the first-use verdict (_guard.py),
and plain PyTorch where it says no. The same for every backend that checks itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.kernels.contract import empty_as
from fastattn.ops import _guard
from fastattn.ops._eager import recording
from fastattn.ops.attention_op import Shared


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

    def named() -> tuple[str, Callable[[], str | None]]:
        from fastattn.ops.attention_first_use import variant

        how, run = check()
        return variant(q, v, q.shape[1] // max(k.shape[1], 1), Shared(*shared), how), run

    key = (*_key(q, k, v, shared), more)
    return _guard.may_run("attention", backend, q.device, key, named)


def _key(q: Tensor, k: Tensor, v: Tensor, shared: Any) -> tuple[Any, ...]:
    """At least as fine as the variant's name."""
    bias = shared[1]
    tensors = tuple([x is None or x.dim() for x in shared[:9]])
    numbers = tuple([x > 0 for x in shared[12:15]])  # window's right side, softcap, dropout
    return (
        q.dtype, q.shape[-1], v.shape[-1],
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
