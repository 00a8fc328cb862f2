"""The one place from which a Triton kernel is launched.

``hook`` lets a caller see every launch, or take it over: tests run kernels in Triton's interpreter,
compile them ahead of time, or check them with a sanitizer, all from the launchers that ship.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]
Hook = Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], bool]

# Called before every launch with (kernel, grid, args, meta); True = it has run the kernel itself.
hook: Hook | None = None


def launch(kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
    """``kernel[grid](*args, **meta)``, unless the hook handles it."""
    if hook is not None and hook(kernel, grid, args, meta):
        return
    kernel[grid](*args, **meta)


@contextlib.contextmanager
def device_of(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensors'."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            yield
    else:
        yield
