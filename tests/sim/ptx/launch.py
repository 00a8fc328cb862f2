"""The public side: load PTX, give memory, launch."""

from __future__ import annotations

import gc
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import emit_float, emit_integer, emit_memory, emit_move, emit_warp  # noqa: F401 - families
from .emit import Translator
from .emit_memory import Access
from .faults import BadLaunch, Unsupported
from .flow import Flow, build, inlined, local_variables
from .machine import Machine, Report, Schedule
from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_BASE, Memory
from .parser import parse
from .syntax import Function, Program, Variable

MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
SHARED_LIMIT = 163 << 10  # a block on sm_80 (CUDA programming guide, compute capabilities)


@dataclass(frozen=True)
class Param:
    """Of a kernel: its place in the parameter buffer."""

    name: str
    offset: int
    size: int
    align: int


class Kernel:
    def __init__(self, program: Program, function: Function, addresses: dict[str, int]) -> None:
        self.name = function.name
        self.params = [Param(p.name, p.offset, p.size, p.align) for p in function.params]
        self.param_bytes = max((p.offset + p.size for p in self.params), default=0)
        self.maxntid, self.reqntid = function.maxntid, function.reqntid
        self.files = program.files
        self.function = inlined(program, function)
        self.flow: Flow = build(self.function)
        addresses = dict(addresses)
        self.static_shared, self.dynamic_at = _place_shared(program, self.function, addresses)
        self.local_bytes = _place_local(self.function, addresses)
        for p in function.params:
            addresses[p.name] = PARAM_WINDOW + p.offset
        self.translator = Translator(self.flow, addresses)
        self.shifts, self.traits = _survey(self.function, self.translator)

    def pack(self, values: Iterable[Any]) -> bytes:
        """The parameter buffer: integers and floats by the parameter's size, bytes as they are,
        arrays and tensors by their address."""
        values = list(values)
        if len(values) != len(self.params):
            raise BadLaunch(f"{self.name}: {len(values)} values for {len(self.params)} parameters")
        out = bytearray(self.param_bytes)
        for p, value in zip(self.params, values, strict=True):
            raw = _as_bytes(p, value)
            if len(raw) != p.size:
                raise BadLaunch(f"{self.name}: {p.name} has {p.size} bytes, got {len(raw)}")
            out[p.offset : p.offset + p.size] = raw
        return bytes(out)


def _as_bytes(p: Param, value: Any) -> bytes:
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if hasattr(value, "data_ptr"):
        value = value.data_ptr()
    elif isinstance(value, np.ndarray):
        value = value.ctypes.data
    if isinstance(value, float):
        return struct.pack("<f" if p.size == 4 else "<d", value)
    return (int(value) & ((1 << 8 * p.size) - 1)).to_bytes(p.size, "little")


class Module:
    """A PTX file, translated. Its global variables keep their values from launch to launch."""

    def __init__(self, text: str, only: Collection[str] | None = None) -> None:
        program = parse(text, only)
        self.target = program.target
        self.globals: dict[str, np.ndarray] = {}
        self.memory = Memory()
        addresses = self._place_globals(program)
        self.kernels = {
            f.name: Kernel(program, f, addresses) for f in program.functions.values() if f.entry
        }

    def _place_globals(self, program: Program) -> dict[str, int]:
        addresses = {}
        found = dict(program.variables)
        for function in program.functions.values():
            found |= {n: v for n, v in function.variables.items() if v.space == "global"}
        for v in found.values():
            if v.space not in ("global", "const"):
                continue
            room = np.zeros(v.size + 256, np.uint8)
            at = -room.ctypes.data % 256
            data = room[at : at + v.size]
            if v.data is not None:
                data[:] = np.frombuffer(v.data, np.uint8)
            self.globals[v.name] = data
            self.memory.add(data.ctypes.data, v.size, v.space == "global", True, v.name, room)
            addresses[v.name] = data.ctypes.data
        return addresses

    def launch(
        self,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        params: bytes,
        shared: int = 0,
        memory: Memory | None = None,
        schedule: Schedule | None = None,
        cooperative: bool = False,
    ) -> Report:
        """Run a kernel to its end, or raise a Fault.

        grid, block: up to three numbers each. params: the parameter buffer (`Kernel.pack`).
        shared: bytes of dynamic shared memory. memory: what the pointers among params may reach.
        cooperative: all blocks are resident, as a grid-wide barrier needs.
        """
        kernel = self.kernels.get(name)
        if kernel is None:
            raise BadLaunch(f"no kernel {name}; there are {sorted(self.kernels)}")
        grid3, block3 = _three(grid), _three(block)
        _check_launch(kernel, grid3, block3, params, shared)
        everything = (memory or Memory()).copy()
        for region in self.memory.regions:
            everything.regions.append(region)
        everything.regions.sort(key=lambda r: r.start)
        everything._starts = [r.start for r in everything.regions]
        machine = Machine(
            kernel.flow, kernel.translator, kernel.files, grid3, block3, params,
            kernel.static_shared + shared, kernel.local_bytes, everything,
            schedule or Schedule(), cooperative, kernel.shifts, kernel.traits,
        )  # fmt: skip
        machine.dynamic_bytes = shared
        return machine.run()


def _three(x: Iterable[int]) -> tuple[int, int, int]:
    a, b, c = (*x, 1, 1, 1)[:3]
    return int(a), int(b), int(c)


def _check_launch(
    kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], params: bytes, shared: int
) -> None:
    threads = block[0] * block[1] * block[2]
    if min(grid) < 1 or any(g > m for g, m in zip(grid, MAX_GRID, strict=True)):
        raise BadLaunch(f"{kernel.name}: grid {grid} (1 to {MAX_GRID})")
    if min(block) < 1 or threads > MAX_THREADS or block[2] > 64:
        raise BadLaunch(f"{kernel.name}: block {block} (1 to {MAX_THREADS} threads)")
    limit = kernel.maxntid
    if limit is not None and threads > limit[0] * limit[1] * limit[2]:
        raise BadLaunch(f"{kernel.name}: {threads} threads, compiled for at most {limit}")
    if kernel.reqntid is not None and block != kernel.reqntid:
        raise BadLaunch(f"{kernel.name}: block {block}, compiled for {kernel.reqntid}")
    if len(params) != kernel.param_bytes:
        raise BadLaunch(f"{kernel.name}: {len(params)} bytes of {kernel.param_bytes} of parameters")
    if kernel.static_shared + shared > SHARED_LIMIT:
        raise BadLaunch(
            f"{kernel.name}: {kernel.static_shared} + {shared} bytes of shared memory, of "
            f"{SHARED_LIMIT}"
        )


# -------------------------------------------------------------------------------------- layout


def _place_shared(
    program: Program, function: Function, addresses: dict[str, int]
) -> tuple[int, int]:
    """Static variables first, then dynamic memory; bytes of the static part and where it ends."""
    everything = {**program.variables, **function.variables}
    at = SHARED_BASE
    shared = [v for v in everything.values() if v.space == "shared"]
    for v in shared:
        if not v.dynamic:
            at = _aligned(at, v)
            addresses[v.name] = at
            at += v.size
    dynamic = [v for v in shared if v.dynamic]
    if dynamic:
        at = -(-at // max(16, *(v.align for v in dynamic))) * max(16, *(v.align for v in dynamic))
    for v in dynamic:
        addresses[v.name] = at
    return at - SHARED_BASE, at


def _place_local(function: Function, addresses: dict[str, int]) -> int:
    """Local arrays by their own addresses; parameters of calls through the generic window."""
    at = SHARED_BASE
    for v in local_variables(function):
        at = _aligned(at, v)
        addresses[v.name] = at + (LOCAL_WINDOW if v.space == "param" else 0)
        at += v.size
    return at - SHARED_BASE


def _aligned(at: int, v: Variable) -> int:
    return -(-at // v.align) * v.align


def _survey(
    function: Function, translator: Translator
) -> tuple[tuple[int, int], tuple[bool, bool]]:
    """The finest access to shared and to global memory (log2 of bytes), whether anything but
    barriers orders, and whether global memory is written."""
    finest = {"shared": 16, "global": 16}
    stores = False
    for d in translator.described.values():
        if isinstance(d, Access):
            for space in ("shared", "global") if d.space == "" else (d.space,):
                if space in finest:
                    finest[space] = min(finest[space], d.bytes)
            stores = stores or (d.what in ("store", "atomic") and d.space in ("", "global"))
            if d.what == "copy":
                finest["global"] = min(finest["global"], d.bytes)
    synchronises = any(
        {"fence", "membar"} & {i.parts[0]} or {"acquire", "release", "acq_rel"} & set(i.parts)
        for i in function.body
    )
    shifts = tuple(finest[s].bit_length() - 1 for s in ("shared", "global"))
    return (shifts[0], shifts[1]), (synchronises, stores)


def load(text: str, only: Collection[str] | None = None) -> Module:
    """Parse and translate every kernel (0.1 ms an instruction), or `only` those named.
    Unsupported names the line of what is not known."""
    collects = gc.isenabled()
    gc.disable()  # half a million small objects, none of them garbage: a fifth of the time
    try:
        module = Module(text, only)
    finally:
        if collects:
            gc.enable()
    if not module.kernels or (only is not None and set(only) - set(module.kernels)):
        raise Unsupported(f"no kernel {sorted(only) if only else ''} in this PTX")
    return module
