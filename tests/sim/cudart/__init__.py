"""The Python side of the stand-in for the CUDA runtime: launches, memory, failures on demand.

A library that sim.build linked with cudart.cpp launches its kernels into a `Device`: a launch that
CUDA would refuse is refused with CUDA's error; any other finds its PTX in the library's own fatbin
and runs in the PTX simulator, on this process's memory, within the regions that the binding named.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim import ptx

from . import fatbin

SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION, NO_KERNEL_IMAGE = 0, 1, 9, 209
OUT_OF_RESOURCES, LAUNCH_FAILURE = 701, 719

Dim = tuple[int, int, int]


@dataclass(frozen=True)
class Architecture:
    """CUDA C++ programming guide, "Technical Specifications per Compute Capability"."""

    major: int
    minor: int
    multiprocessors: int
    shared_block: int  # what a block can opt into
    shared_multiprocessor: int


ARCHITECTURES = {
    "sm_75": Architecture(7, 5, 40, 64 << 10, 64 << 10),
    "sm_80": Architecture(8, 0, 108, 163 << 10, 164 << 10),
    "sm_86": Architecture(8, 6, 84, 99 << 10, 100 << 10),
    "sm_90": Architecture(9, 0, 132, 227 << 10, 228 << 10),
    "sm_120": Architecture(12, 0, 170, 99 << 10, 100 << 10),
}


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: Dim
    block: Dim
    shared: int
    stream: int
    cooperative: bool
    device: int
    report: Any  # ptx.Report


# What a call does with a tensor, as csrc/bindings/stand_in.h numbers it.
READ, RESULT, FILLED_RESULT = 0, 1, 2


class _Launched(ctypes.Structure):
    _fields_ = [
        ("fatbin", ctypes.c_void_p),
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("args", ctypes.POINTER(ctypes.c_void_p)),
        ("shared", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
        ("cooperative", ctypes.c_int32),
        ("device", ctypes.c_int32),
    ]


_ON_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launched))
_ON_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p)
_ON_FORGET = ctypes.CFUNCTYPE(None)


class Device:
    """What one library's kernels run on. `launches` are those that ran, in order."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.launches: list[Launch] = []
        self.faults: list[Exception] = []
        self.arch = "sm_80"
        self.schedule: Any = None  # a ptx.Schedule, None = the simulator's own
        self._memory = ptx.Memory()
        # ctypes keeps no reference to a callback that C holds.
        self._callbacks = (
            _ON_LAUNCH(self._on_launch), _ON_REGION(self._on_region), _ON_FORGET(self._forget),
        )  # fmt: skip
        self._library.stand_in_listen(*self._callbacks)
        self.play("sm_80")

    def play(self, arch: str) -> None:
        """Limits of that architecture from now on; functions forget their attributes."""
        a = ARCHITECTURES[arch]
        self.arch = arch
        self._library.stand_in_play(
            a.major, a.minor, a.multiprocessors, a.shared_block, a.shared_multiprocessor
        )

    @contextmanager
    def playing(self, arch: str) -> Iterator[None]:
        former = self.arch
        self.play(arch)
        try:
            yield
        finally:
            self.play(former)

    @contextmanager
    def failing(self, call: str, error: int) -> Iterator[None]:
        """The next `call` ("cudaLaunchKernel", "cudaFuncSetAttribute") returns `error`; it is an
        error of the test where none is made."""
        self._library.stand_in_fail(call.encode(), error)
        yield
        assert self._library.stand_in_unused_failures() == 0, f"{call} was not called"

    @contextmanager
    def placed(self, device: int, stream: int = 0) -> Iterator[int]:
        """Tensors are said to lie on that device; yields its current stream's handle."""
        handle = device << 32 | stream if stream else 0
        self._library.stand_in_place(device, ctypes.c_void_p(handle))
        try:
            yield handle
        finally:
            self._library.stand_in_place(0, None)

    def guarded(self) -> int:
        """The device that torch's guard holds now, -1 = none."""
        return int(self._library.stand_in_guarded())

    def registered(self) -> list[str]:
        """Mangled names of every kernel of the library."""
        n = self._library.stand_in_registered(None, 0)
        names = (ctypes.c_char_p * n)()
        self._library.stand_in_registered(names, n)
        return sorted(name.decode() for name in names)

    def add(self, address: int, nbytes: int, access: int, name: str) -> None:
        """Memory that kernels may touch until `forget` (bindings say it by themselves)."""
        self._memory.add(
            address, nbytes, writable=access != READ, written=access != RESULT, name=name
        )

    def idle(self) -> bool:
        """Whether no memory is known."""
        return not self._memory.regions

    def forget(self) -> None:
        self._memory = ptx.Memory()

    # ---- what the library calls. An exception cannot pass through C: it becomes an error of the
    # launch whose text is the fault.

    def _on_region(self, address: int | None, nbytes: int, access: int, name: bytes) -> None:
        if nbytes > 0:
            self.add(address or 0, nbytes, access, name.decode())

    def _forget(self) -> None:
        self.forget()

    def _on_launch(self, launched: Any) -> int:
        try:
            return self._launch(launched.contents)
        except Exception as fault:
            self.faults.append(fault)
            self._library.stand_in_explain(f"{type(fault).__name__}: {fault}".encode())
            return LAUNCH_FAILURE

    def _launch(self, made: _Launched) -> int:
        text, a = _text(made.fatbin), ARCHITECTURES[self.arch]
        if text.arch > 10 * a.major + a.minor:
            return NO_KERNEL_IMAGE
        name = made.kernel.decode()
        module = _module(made.fatbin, name)
        kernel = module.kernels[name]
        grid, block = tuple(made.grid), tuple(made.block)
        if made.shared + kernel.static_shared > a.shared_block:
            return INVALID_VALUE
        limit = kernel.maxntid
        if limit is not None and _product(block) > _product(limit):
            return INVALID_VALUE
        more = {} if self.schedule is None else {"schedule": self.schedule}
        report = module.launch(
            name, grid=grid, block=block, params=_pack(kernel, made.args), shared=made.shared,
            memory=self._memory, cooperative=bool(made.cooperative), **more,
        )  # fmt: skip
        stream = made.stream or 0
        self.launches.append(
            Launch(
                name, grid, block, made.shared, stream, bool(made.cooperative), made.device, report
            )
        )  # fmt: skip
        return SUCCESS


def _pack(kernel: Any, args: Any) -> bytes:
    """cudaLaunchKernel's array of pointers to arguments, as the buffer that PTX declares."""
    params = list(kernel.params)
    size = max((p.offset + p.size for p in params), default=0)
    buffer = bytearray(size)
    for i, p in enumerate(params):
        buffer[p.offset : p.offset + p.size] = ctypes.string_at(args[i], p.size)
    return bytes(buffer)


@functools.cache
def _text(address: int) -> fatbin.Text:
    """The PTX of a fatbin, which stays where it is as long as the process."""
    found = fatbin.texts(address)
    if len(found) != 1:
        raise fatbin.FatbinError(f"{len(found)} PTX texts: compile for one architecture")
    return found[0]


@functools.cache
def _module(address: int, kernel: str) -> Any:
    """The simulator's module with one kernel: a file may hold dozens, megabytes of text."""
    return ptx.load(fatbin.with_one_kernel(_text(address).ptx, kernel))


def _product(dims: Any) -> int:
    x, y, z = dims
    return x * y * z
