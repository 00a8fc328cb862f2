"""The bytes a kernel may touch.

Global memory is the process's own: a `Memory` lists which host addresses belong to it, under which
names, whether they may be written and whether anybody has written them yet. Shared and local memory
are arrays of the machine. Both are read and written through `Bytes`.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Windows of the generic address space, above every host address (2^47 on x86-64, 2^48 on arm64).
SHARED_WINDOW = 1 << 56
LOCAL_WINDOW = 1 << 57
PARAM_WINDOW = 1 << 58
# Shared memory begins here, so that a null address is out of bounds; 1024 keeps swizzles aligned.
SHARED_BASE = 1024
_LINE = 16

Array = NDArray[Any]


def untouched(n: int, dtype: Any) -> Array:
    """Zeros that cost nothing until they are touched, however many: also beyond what there is of
    memory (a tensor of 6 GB of addresses has few pages, and so have its records)."""
    size = n * np.dtype(dtype).itemsize
    if size < 1 << 26:
        return np.zeros(n, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype)


class Bytes:
    """A byte array read and written in aligned pieces of 1, 2, 4, 8 or 16 bytes."""

    def __init__(self, raw: Array) -> None:
        self.raw = raw  # length a multiple of 16
        self._views: dict[int, Array] = {}

    def view(self, size: int) -> Array:
        found = self._views.get(size)
        if found is None:
            found = self.raw.view(np.uint64 if size == 16 else f"u{size}")
            if size == 16:
                found = found.reshape(-1, 2)
            self._views[size] = found
        return found

    def read(self, at: Array, size: int) -> Array:
        """(n,) byte offsets, multiples of size: contiguous (n,) or (n, 2) words."""
        view = self.view(size)
        return view[at // size] if size > 1 else view[at]

    def write(self, at: Array, size: int, words: Array) -> None:
        self.view(size)[at // size] = words


class Region(Bytes):
    """Host bytes [start, end) under a name. `written` marks bytes (0xff) or is None: all are."""

    def __init__(self, start: int, end: int, name: str, writable: bool) -> None:
        self.start, self.end = start, end
        self.name, self.writable = name, writable
        # A 16-byte line never crosses a page, so the rounded range is mapped where the region is.
        self.origin = start // _LINE * _LINE
        size = -(-end // _LINE) * _LINE - self.origin
        super().__init__(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.origin)))
        self.written: Bytes | None = None
        self.keep: Any = None  # whoever owns the memory

    def forget(self) -> None:
        """Nobody has written these bytes."""
        self.written = Bytes(untouched(len(self.raw), np.uint8))

    def mark(self, start: int, end: int) -> None:
        if self.written is not None:
            self.written.raw[start - self.origin : end - self.origin] = 0xFF

    def place(self, address: int) -> str:
        return f"{self.name}+{address - self.start}"


class Memory:
    """What a kernel is given. Regions that overlap become one."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._starts: list[int] = []

    def add(
        self,
        address: int,
        nbytes: int,
        writable: bool = True,
        written: bool = True,
        name: str = "",
        keep: Any = None,
    ) -> None:
        """written=False: a read of these bytes fails until a kernel has stored to them."""
        if nbytes <= 0:
            return
        start, end = address, address + nbytes
        touching = [r for r in self.regions if r.start < end and start < r.end]
        parts = [(start, end, written)]
        for r in touching:
            self.regions.remove(r)
        low = min([start, *(r.start for r in touching)])
        high = max([end, *(r.end for r in touching)])
        names = list(dict.fromkeys([*(r.name for r in touching), name or f"{address:#x}"]))
        region = Region(low, high, "|".join(names), writable or any(r.writable for r in touching))
        region.keep = [keep, *(r.keep for r in touching)]
        if not written or any(r.written is not None for r in touching):
            region.forget()
            for r in touching:
                if r.written is None:
                    region.mark(r.start, r.end)
                else:
                    assert region.written is not None
                    at = r.origin - region.origin
                    region.written.raw[at : at + len(r.raw)] |= r.written.raw
            for a, b, done in parts:
                if done:
                    region.mark(a, b)
        self.regions.append(region)
        self.regions.sort(key=lambda r: r.start)
        self._starts = [r.start for r in self.regions]

    def add_array(self, x: Any, writable: bool = True, written: bool = True, name: str = "") -> int:
        """A numpy array or torch CPU tensor: the bytes from its first to its last element. Returns
        its address."""
        if hasattr(x, "data_ptr"):
            address, size = x.data_ptr(), x.element_size()
            strides = [s * size for s in x.stride()]
        else:
            address, size, strides = x.ctypes.data, x.itemsize, list(x.strides)
        if 0 in x.shape:
            return int(address)
        low = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True) if s < 0)
        high = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True) if s > 0)
        self.add(address + low, high - low + size, writable, written, name, keep=x)
        return int(address)

    def find(self, low: int, high: int) -> Region | None:
        """The region that holds all of [low, high)."""
        i = bisect.bisect_right(self._starts, low) - 1
        if i < 0:
            return None
        region = self.regions[i]
        return region if high <= region.end else None

    def near(self, address: int) -> str:
        """Where an address that hits no region lies, in words."""
        i = bisect.bisect_right(self._starts, address) - 1
        if i >= 0:
            r = self.regions[i]
            return f"{address - r.end} bytes beyond the end of {r.name} ({r.end - r.start} bytes)"
        if self.regions:
            r = self.regions[0]
            return f"{r.start - address} bytes before {r.name}"
        return "no memory was given"

    def starts_and_ends(self) -> tuple[Array, Array]:
        return (
            np.array(self._starts, np.uint64),
            np.array([r.end for r in self.regions], np.uint64),
        )

    def copy(self) -> Memory:
        """The same regions; more can be added without telling the first."""
        out = Memory()
        out.regions, out._starts = list(self.regions), list(self._starts)
        return out
