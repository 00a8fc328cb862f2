"""What the eager path of every op shares.

``torch.library.register_autograd`` serves the compilers and direct calls of an op. In eager it
costs 0.3 ms a call (it reads the schema back, argument by argument) and does not serve torch.func,
so eager calls go through autograd Functions of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def below_autograd(op: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def make_function(name: str, **methods: Any) -> Any:
    static = {k: staticmethod(f) for k, f in methods.items()}
    return type(name, (torch.autograd.Function,), static)


def functorch_active() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


def transformed() -> bool:
    """Whether a transform runs that an autograd Function of ours has no rule for (torch.func,
    forward-mode AD): plain PyTorch has one."""
    return torch.autograd.forward_ad._current_level >= 0 or functorch_active()


def wants_grad(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in tensors)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's for tensors of that device, None where it is off; torch raises for "meta"."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def eager(x: Tensor) -> bool:
    """Whether no compiler and no mode of torch's looks on."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def differentiable_gradients(
    formula: Callable[..., Any],
    inputs: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    upstream: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients by plain PyTorch, as functions of inputs and upstream gradients: what a
    backward gives under ``create_graph=True``.

    Args:
        formula: takes the inputs, returns a tuple as long as ``upstream``.
        inputs: as ``ctx.saved_tensors`` hands them out, their own history attached.
        needs: which of them need a gradient; the others get None.
    """
    with torch.enable_grad():
        # Stand-ins: an input that is a function of another one must not be seen through.
        leaves = [
            x.view_as(x) if n and x is not None else x for x, n in zip(inputs, needs, strict=True)
        ]
        outputs = formula(*leaves)
        pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if g is not None]
        wanted = [x for x, n in zip(leaves, needs, strict=True) if n and x is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True,
                allow_unused=True,
            )
        )  # fmt: skip
    return tuple(
        next(found) if n and x is not None else None for x, n in zip(inputs, needs, strict=True)
    )


@contextmanager
def recording() -> Iterator[None]:
    """Autograd records again inside the implementation of an op, which runs below it."""
    keys = torch._C.DispatchKey
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield
