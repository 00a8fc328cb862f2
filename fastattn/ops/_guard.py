"""What stands between a GPU op and its kernels: the first-use verdict of fastattn.first_use.

It works in the implementation of the op, below the compilers, so a compiled graph stays right too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastattn import first_use

_NOTHING = nullcontext()

# Calls that need no further look: naming the variant of each would cost a small call 20 us.
_seen: set[tuple[Any, ...]] = set()


def may_run(
    op: str,
    backend: str,
    device: torch.device,
    key: tuple[Any, ...],
    check: Callable[[], tuple[str, Callable[[], str | None]]],
) -> bool:
    """Whether the backend's kernels may serve this call; False = take plain PyTorch.

    Args:
        key: at least as fine as the variant's name, hashable.
        check: asked for where the key was not seen before: the variant's name, and what runs its
            kernels on a small input and says what is wrong.

    Raises:
        ValueError: the verdict is no, and the caller named this backend.
    """
    arch = first_use.architecture(device)
    if arch is None:
        return True
    key = (op, backend, device, first_use.generation, *key)
    if key in _seen:
        return True
    variant, run = check()
    name = f"{backend} {variant}"
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if first_use.trusted(op, arch, name, run, may_check=not capturing):
        if first_use.enabled() and not capturing and not first_use.is_checking():
            _seen.add(key)
        return True
    if first_use.is_explicit():
        raise ValueError(
            f"fastattn::{op}: backend={backend!r} is disabled for {name} on {arch}: its first-use "
            "check found it wrong (`fastattn doctor` says how); use backend='auto' or 'reference'"
        )
    return False


def as_named(backend: str, chosen: str) -> AbstractContextManager[None]:
    """Around a call: a disabled kernel raises where the caller named its backend."""
    if backend == chosen and chosen in ("triton", "cuda"):
        return first_use.explicit()
    return _NOTHING
