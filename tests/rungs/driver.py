"""Rung (c): Triton's own JIT behind a driver that has no device.

`standing_in(80)` makes Triton believe that an sm_80 is the current device. `kernel[grid](...)` then
runs as it would there: arguments are specialised (equal to 1, divisible by 16, 32 or 64 bits), each
new key is compiled down to machine code, the binary is "loaded", shared memory and thread limits
are enforced, the grid and every argument are packed as the C launcher would. In place of the launch
the compiled kernel is recorded and, where values are asked for, ttsem executes the same
specialisation on the CPU tensors.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime import driver

from .launches import Launch, specialise, taken, target, unwritten_is_nan
from .semantics import Session, execute

# CUDA programming guide, table of technical specifications: shared memory a block can opt into.
# gfx942: 64 KB of LDS (CDNA 3 ISA).
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
GRID_LIMIT = (2**31 - 1, 65535, 65535)
_INT_BITS = {"i1": 2, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "u64": 65}
_devices = itertools.count(1000)  # Triton caches kernels by device: each stand-in is a new one


class LaunchError(AssertionError):
    """What the real launcher or the driver would have refused."""


@dataclass(frozen=True)
class Launched:
    """A launch that reached the driver."""

    launch: Launch
    compiled: Any  # triton.compiler.CompiledKernel's source and metadata
    metadata: Any
    grid: tuple[int, int, int]

    @property
    def name(self) -> str:
        return self.launch.name

    @property
    def constants(self) -> dict[str, Any]:
        """What the specialisation folded into the code, constexprs included."""
        names = self.compiled.fn.arg_names
        return {
            ".".join([names[path[0]], *map(str, path[1:])]): x
            for path, x in self.compiled.constants.items()
        }


class StandIn:
    """The part of a Triton driver that the JIT uses, for a device of the given architecture."""

    def __init__(self, cc: int, values: bool) -> None:
        self.cc = cc
        self.device = next(_devices)
        self.launches: list[Launched] = []
        self.compiled: Counter[str] = Counter()  # new binaries loaded, by kernel
        self.pending: Launch | None = None
        self.session = Session("ttir", cc, may_hold_nan=False) if values else None
        self.launcher_cls = lambda source, metadata: _Launcher(self, source, metadata)
        self.utils = SimpleNamespace(
            get_device_properties=self._properties,
            load_binary=self._load,
            unload_module=lambda module: None,
        )

    def __call__(self, launch: Launch) -> bool:
        self.pending = launch
        return False  # go on to kernel[grid](...)

    # ---- what triton.runtime asks
    def get_current_target(self) -> Any:
        return target(self.cc)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def _properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_LIMIT[f"sm_{self.cc}"],
            "multiprocessor_count": 108,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        if not binary.startswith(b"\x7fELF"):
            raise LaunchError(f"{name}: not a cubin")
        self.compiled[name] += 1
        registers, spills, threads = 0, 0, 1024
        return object(), object(), registers, spills, threads


class _Launcher:
    """Stands where triton.backends.nvidia.driver.CudaLauncher stands."""

    def __init__(self, driver: StandIn, source: Any, metadata: Any) -> None:
        self.driver, self.source, self.metadata = driver, source, metadata

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, launch_metadata: Any,
        enter_hook: Any, exit_hook: Any, *args: Any,
    ) -> None:  # fmt: skip
        launch = self.driver.pending
        if launch is None or launch.kernel is not self.source.fn:
            raise LaunchError(f"{self.source.name} was not launched through kernels/launch.py")
        self.driver.pending = None
        grid = (x, y, z)
        _check_grid(launch.name, grid)
        _pack(launch.name, self.source, args)
        _same_as_offline(self.source, launch, self.driver.cc)
        self.driver.launches.append(Launched(launch, self.source, self.metadata, grid))
        if self.driver.session is not None and 0 not in grid:
            execute(launch, self.driver.session)


def _check_grid(name: str, grid: tuple[int, int, int]) -> None:
    for axis, (n, limit) in enumerate(zip(grid, GRID_LIMIT, strict=True)):
        if not 0 <= n <= limit:
            raise LaunchError(f"{name}: grid {grid}: axis {axis} is limited to {limit}")


def _pack(name: str, source: Any, args: tuple[Any, ...]) -> None:
    """Each argument must fit the type that the kernel was compiled for, and keep its promises."""
    for i, ((parameter, kind), value) in enumerate(
        zip(source.signature.items(), args, strict=True)
    ):
        _pack_one(f"{name}: {parameter}", kind, value, (i,), source.attrs)


def _pack_one(what: str, kind: Any, value: Any, path: tuple[int, ...], attrs: Any) -> None:
    if isinstance(kind, tuple):  # strides come as one tuple a tensor
        for i, (inner, x) in enumerate(zip(kind, value, strict=True)):
            _pack_one(f"{what}[{i}]", inner, x, (*path, i), attrs)
        return
    if kind == "constexpr":
        return
    if kind.startswith("*"):
        number = value.data_ptr()
    elif kind in _INT_BITS:
        number = int(value)
        if not -(1 << _INT_BITS[kind] - 1) <= number < 1 << _INT_BITS[kind] - 1:
            raise LaunchError(f"{what}={number} does not fit {kind}")
    else:
        float(value)
        return
    if ["tt.divisibility", 16] in attrs.get(path, []) and number % 16:
        raise LaunchError(f"{what}={number} was promised to divide by 16")


def _same_as_offline(source: Any, launch: Launch, cc: int) -> None:
    """The other rungs specialise by themselves: hold them to what the JIT does."""
    ours = specialise(launch, target(cc)).source
    if (ours.signature, ours.constants, ours.attrs) != (
        source.signature,
        source.constants,
        source.attrs,
    ):
        raise LaunchError(f"{launch.name}: rungs.launches.specialise differs from Triton's JIT")


class _NoDevice:
    """What is active after a stand-in where no driver was. Kernels that outlive the stand-in unload
    themselves from the active driver when they are collected, at any time: were that to raise, the
    traceback would be formatted in the middle of whatever runs, and inside ast.parse that is fatal
    (CPython: "AST constructor recursion depth mismatch")."""

    utils = SimpleNamespace(unload_module=lambda module: None)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no GPU driver is active: {name} (a launch outside of standing_in?)")


@contextmanager
def standing_in(cc: int = 80, values: bool = False) -> Iterator[StandIn]:
    """While open, Triton's current device is a stand-in of compute capability `cc`.

    values: execute each launch with ttsem, so that the caller's tensors hold its results.
    """
    stand_in = StandIn(cc, values)
    former = driver._active
    driver.set_active(stand_in)
    try:
        with taken(stand_in), unwritten_is_nan():
            yield stand_in
    finally:
        driver._active = former if former is not None else _NoDevice()
