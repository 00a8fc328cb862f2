"""How every op registers its fake."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_fake(name: str, fake: Callable[..., Any], lib: torch.library.Library) -> None:
    """``torch.library.register_fake``, of a fake that refuses tensors of several devices.

    A meta tensor among others brings the dispatcher to the fake: what that returns, memory that
    nobody wrote, must not pass for a result.
    """

    @functools.wraps(fake)
    def on_one_device(*args: Any) -> Any:
        seen: Tensor | None = None
        for arg in args:
            for x in arg if isinstance(arg, (list, tuple)) else (arg,):
                if not isinstance(x, Tensor):
                    continue
                if seen is not None and x.device != seen.device:
                    raise RuntimeError(
                        f"{name}: tensors on {seen.device} and {x.device} in one call"
                    )
                seen = x
        return fake(*args)

    torch.library.register_fake(name, on_one_device, lib=lib)
