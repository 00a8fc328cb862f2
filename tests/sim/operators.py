"""`backend="cuda"` on CPU tensors: the binding that ships, its kernels in the PTX simulator."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from sim import build
from sim.cudart import Device

# The module; fastattn.backends is the function of that name.
_BACKENDS = importlib.import_module("fastattn.backends")


@functools.cache
def device() -> Device:
    """Loads the library once a process: its ops are then registered under the CPU key for good, but
    only reached while `on_cpu` is open."""
    return Device(build.operators())


@contextmanager
def on_cpu(arch: str = "sm_80") -> Iterator[Device]:
    """While open, the CUDA backend serves CPU tensors; what it launched is in `launches`.

    arch: whose limits the runtime enforces; the code that runs is the sm_80 PTX.
    """
    gpu = device()
    with mock.patch.object(_BACKENDS, "cuda_stand_in", True), gpu.playing(arch):
        gpu.launches.clear()
        gpu.faults.clear()
        yield gpu
    assert gpu.idle(), "a call left its memory behind"
