"""Triton's launches in the PTX simulator: what Triton emits for sm_80, on CPU tensors.

`running()` takes every launch over, specialises and compiles it as Triton's JIT would on an sm_80,
packs the arguments as its launcher does and runs the PTX. Kernels may touch the storages of the
tensors they are given and nothing else; what `torch.empty` gave and nobody wrote may not be read.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import triton
from rungs.driver import SHARED_LIMIT
from rungs.launches import Launch, Specialised, specialise, taken, target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sim import ptx

_FORMATS = {
    "i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u64": "<Q", "fp32": "<f",
    "fp64": "<d",
}  # fmt: skip
_EMPTY = ("aten::empty", "aten::new_empty")  # beginnings: empty_like, new_empty_strided, ...
# Pointers to scratch behind the kernel's own arguments: global and profiler's, unused here.
_SCRATCH = [0, 0]


class LaunchError(AssertionError):
    """A launch that Triton's launcher or the driver would have refused."""


@dataclass
class Ran:
    name: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    report: Any  # ptx.Report


@dataclass
class Simulated:
    """The state of `running`: what ran, and what is known of memory."""

    schedule: Any
    launches: list[Ran] = field(default_factory=list)
    memory: Any = field(default_factory=ptx.Memory)
    unwritten: set[int] = field(default_factory=set)  # storages, by address
    known: dict[int, int] = field(default_factory=dict)  # storages in `memory`: address -> end
    # A freed storage's address could come back as another tensor's.
    kept: list[Tensor] = field(default_factory=list)

    def __call__(self, launch: Launch) -> bool:
        if 0 not in launch.grid:
            self._run(launch)
        return True

    def _run(self, launch: Launch) -> None:
        special = specialise(launch, target(80))
        compiled, module = _compiled(_Key(special))
        shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
        if shared > SHARED_LIMIT["sm_80"]:
            raise LaunchError(f"{launch.name}: {shared} bytes of shared memory")
        ((name, kernel),) = module.kernels.items()
        values = [*self._values(special, launch), *_SCRATCH]
        if len(values) != len(kernel.params):
            raise LaunchError(f"{name}: {len(values)} arguments, {len(kernel.params)} parameters")
        grid = (*launch.grid, 1, 1)[:3]
        report = module.launch(
            name, grid=grid, block=(32 * warps, 1, 1), params=kernel.pack(values),
            shared=shared, memory=self.memory, schedule=self.schedule,
        )  # fmt: skip
        self.launches.append(Ran(name, grid, 32 * warps, shared, report))

    def _values(self, special: Specialised, launch: Launch) -> Iterator[Any]:
        """The arguments that the compiled kernel takes, each as bytes or an address."""
        names = list(special.source.signature)
        bound = launch.bound
        for name in names:
            yield from self._flat(name, special.source.signature[name], bound[name])

    def _flat(self, name: str, kind: Any, value: Any) -> Iterator[Any]:
        if isinstance(kind, tuple):
            for i, (inner, x) in enumerate(zip(kind, value, strict=True)):
                yield from self._flat(f"{name}[{i}]", inner, x)
        elif kind == "constexpr":
            return
        elif kind.startswith("*"):
            self._give(value, name)
            yield value.data_ptr()
        elif kind in _FORMATS:
            yield struct.pack(_FORMATS[kind], value)
        else:
            raise LaunchError(f"{name}: an argument of type {kind}")

    def _give(self, x: Tensor, name: str) -> None:
        storage = x.untyped_storage()
        at, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if self.known.get(at) == end:
            return
        written = at not in self.unwritten
        self.memory.add(at, end - at, writable=True, written=written, name=name.split("_ptr")[0])
        self.known[at] = end

    # ---- what torch does to memory between launches

    def made(self, x: Tensor) -> None:
        self.unwritten.add(x.untyped_storage().data_ptr())
        self.kept.append(x)

    def wrote(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        at = storage.data_ptr()
        self.unwritten.discard(at)
        if at in self.known:
            region = self.memory.find(at, at + storage.nbytes())
            region.mark(at, at + storage.nbytes())


class _Watch(TorchDispatchMode):
    """Tells what torch allocates without writing, and what it writes."""

    def __init__(self, state: Simulated) -> None:
        super().__init__()
        self.state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.startswith(_EMPTY):
            self.state.made(result)
        elif func._schema.is_mutable:
            for argument, x in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.state.wrote(x)
        return result


class _Key:
    """A specialisation as a dictionary's key, by what Triton's own cache tells apart."""

    def __init__(self, special: Specialised) -> None:
        self.special = special

    def __hash__(self) -> int:
        return hash(self.special.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.special.key == other.special.key


@functools.cache
def _compiled(key: _Key) -> tuple[Any, Any]:
    special = key.special
    compiled = triton.compile(special.source, target=target(80), options=special.options.__dict__)
    return compiled, ptx.load(compiled.asm["ptx"])


def forget() -> None:
    """Compile anew what is launched next."""
    _compiled.cache_clear()


@contextmanager
def running(**schedule: Any) -> Iterator[Simulated]:
    """While open, Triton kernels that are launched on CPU tensors run in the PTX simulator.

    The launchers of fastattn.kernels are to be called directly (rungs.calls): below a torch op the
    allocations would not be seen.

    schedule: of ptx.Schedule. Lanes that hold copies of a row's sum store it to the same place, and
    where the first addition was contracted into an FMA the copies differ in the last bit.
    """
    state = Simulated(ptx.Schedule(**{"redundant_stores": "near"} | schedule))
    with taken(state), _Watch(state):
        yield state
