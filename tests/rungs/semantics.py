"""Rung (b): every launch executed by ttsem's semantics of Triton's IR, on the CPU tensors given.

Faults end the launch with a `Fault` that names the kernel's line: an access outside of the tensors
it was given, two programs of one launch of which one writes what the other touches, a read of
memory that nobody wrote, an operation without a defined result. A masked load without `other` gives
NaN where it is masked off: Triton calls that undefined, and 0 would hide it. Values go on into the
caller's tensors, so whoever launched compares them with the oracle.

Differences to `ttsem.sanitize.session`: tensors are used in place and not copied, so that one of
2^31 elements costs only the pages it touches; they lie 2^44 bytes apart, so that an address that
overflowed hits none of them; a read of unwritten memory is a fault at the line that reads.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton._C.libtriton import ir as triton_ir
from triton.compiler import make_backend
from ttsem import harness, mlir, pidraces, sanitize, values
from ttsem.interp import Interp
from ttsem.memory import Memory, MemoryFault, _live

from .launches import Launch, Specialised, specialise, taken, target, unwritten_is_nan

APART = 1 << 44
PAGE = 4096


class FaultError(AssertionError):
    """What a kernel did wrong, at its own line. `kind`: oob_write, oob_read, race, unwritten,
    undefined, unsupported."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class UnwrittenReadError(Exception):
    pass


@dataclass
class Session:
    """What happened while the semantics ran."""

    stage: str
    cc: int
    may_hold_nan: bool
    launches: int = 0
    programs: int = 0
    unchecked: list[str] = field(default_factory=list)  # kernels not checked for races
    texts: dict[str, str] = field(default_factory=dict)  # IR by kernel name, the last one

    def __call__(self, launch: Launch) -> bool:
        execute(launch, self)
        return True


@contextmanager
def semantics(stage: str = "ttir", cc: int = 90, may_hold_nan: bool = False) -> Iterator[Session]:
    """While open, every launch of fastattn.kernels is executed and checked.

    stage: "ttir", or "ttgir" (after pipelining). may_hold_nan: the inputs hold NaN on purpose, so a
    NaN that is read is not taken for unwritten memory.
    """
    session = Session(stage, cc, may_hold_nan)
    with taken(session), unwritten_is_nan():
        yield session
    if session.unchecked:
        raise FaultError(
            "unchecked",
            f"{len(session.unchecked)} launches were too large to be checked for races: "
            f"{sorted(set(session.unchecked))}; take a smaller case",
        )


def execute(launch: Launch, session: Session) -> None:
    """One launch; its results are in the tensors of `launch.args` afterwards."""
    to = target(session.cc)
    special = specialise(launch, to)
    text, module = _ir(launch.kernel, special, session.stage, session.cc)
    session.texts[launch.name] = text
    record = _record(launch)
    harness.check_launch_grid(record.grid)
    grid = harness._grid3(record.grid)
    session.launches += 1
    session.programs += int(np.prod(grid))

    memory = _memory(record, session.may_hold_nan)
    if int(np.prod(grid)) > 1:
        memory.trace()
    interp = Interp(module, memory, grid)
    entry = launch.name if launch.name in module.funcs else None
    if entry is None:
        (entry,) = harness._entry_candidates(module, launch.name)
    block = module.funcs[entry].regions[0].blocks[0]
    arguments = harness._arg_values(record, _runtime_names(record, special), block, emulated=False)
    assert len(arguments) == len(block.args), "the IR has other arguments than the launch"

    def fault(kind: str, error: BaseException, **more: Any) -> FaultError:
        what = sanitize.Fault(kind, session.launches, launch.name, sanitize._op_of(error), **more)
        what = sanitize._with_source(what, text, launch.kernel.fn.__code__.co_filename)
        return _told(what)

    try:
        interp.run_grid(entry, arguments)
    except MemoryFault as error:
        buffer, past, before = sanitize._locate(record, error)
        kind = "oob_write" if error.kind == "write" else "oob_read"
        raise fault(
            kind, error, buffer=buffer, elements_past_end=past, elements_before_start=before
        ) from None
    except UnwrittenReadError as error:
        raise fault("unwritten", error, detail=str(error)) from None
    except values.Poison as error:
        raise fault("undefined", error, detail=str(error)) from None
    except values.Unsupported as error:
        raise fault("unsupported", error, detail=str(error)) from None
    _check_races(memory, record, launch, session, text)


def _check_races(memory: Memory, record: Any, launch: Launch, session: Session, text: str) -> None:
    if memory.access_overflow and sanitize._spans_may_race(memory.access_spans, []):
        session.unchecked.append(launch.name)
    race = pidraces.find_race(memory.access_log)
    if race is not None:
        file = launch.kernel.fn.__code__.co_filename
        what = sanitize._race_fault(record, race, session.launches, text, file)
        raise _told(sanitize._with_source(what, text, file))


_INLINED = re.compile(r'"([^"]+\.py)":(\d+):\d+')


def _told(what: Any) -> FaultError:
    file, line, source = what.source_file, what.source_line, what.source_text
    inlined = _INLINED.search(what.op)
    if not line and inlined:  # a helper's line: loc(callsite("helper.py":1:2 at ...))
        file, line = inlined[1], int(inlined[2])
        source = sanitize._line_of(file, line)
    where = f"{file}:{line}: {source or what.op[:200]}"
    if what.kind in ("oob_write", "oob_read"):
        side = (
            f"{what.elements_past_end} elements past the end"
            if what.elements_past_end
            else f"{what.elements_before_start} elements before the start"
        )
        detail = f"{side} of {what.buffer}"
    else:
        detail = what.detail
    return FaultError(what.kind, f"{what.kernel}: {where}: {detail}")


# ------------------------------------------------------------------------------------------- IR


@functools.cache
def _generic_printing() -> None:
    """ttsem reads MLIR's generic form; the switch of the wheel's printer is process-wide."""
    mlir.enable_generic_printing()


_irs: dict[tuple[str, str, int], tuple[str, Any]] = {}


def _ir(kernel: Any, special: Specialised, stage: str, cc: int) -> tuple[str, Any]:
    """The module of the launch after `stage`, as text and parsed; nothing below is compiled."""
    at = (special.key, stage, cc)
    if at not in _irs:
        _generic_printing()
        text = stage_text(special, stage, cc)
        _irs[at] = text, mlir.parse(text)
    return _irs[at]


def stage_text(special: Specialised, stage: str, cc: int) -> str:
    """What triton.compile holds after `stage`, printed in generic form."""
    _generic_printing()
    to, source = target(cc), special.source
    backend = make_backend(to)
    options = backend.parse_options({**special.options.__dict__, **source.parse_options()})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    codegen = backend.get_codegen_implementation(options)
    module = source.make_ir(to, options, codegen, backend.get_module_map(), context)
    metadata: dict[str, Any] = {"target": to, **options.__dict__}
    for name, step in stages.items():
        module = step(module, metadata)
        if name == stage:
            return mlir.to_generic(str(module), None)
    raise ValueError(f"no stage {stage!r}; there are {list(stages)}")


# --------------------------------------------------------------------------------------- memory


def _runtime_names(record: Any, special: Specialised) -> list[str]:
    """The parameters that are arguments of the compiled function, in its order."""
    return [
        leaf
        for name, kind in special.source.signature.items()
        for leaf, _, leaf_kind in harness._flat_typed(name, record.bound.get(name), kind)
        if leaf_kind != "constexpr"
    ]


def _record(launch: Launch) -> Any:
    """ttsem's record of the launch, its storages in place and far from each other."""
    bound = launch.bound
    leaves = [x for name, value in bound.items() for x in harness._flat_args(name, value)]
    tensors = {name: x for name, x in leaves if isinstance(x, torch.Tensor)}
    regions: dict[int, int] = {}
    pre, ptrs, bases = {}, {}, {}
    for name, x in tensors.items():
        storage = x.untyped_storage()
        # An empty storage has address 0: it is nobody else's.
        real = storage.data_ptr() or -id(storage)
        region = regions.setdefault(real, (len(regions) + 1) * APART)
        base = region + storage.data_ptr() % PAGE
        raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        pre[name] = raw.view(f"u{x.element_size()}") if raw.size else raw
        bases[name] = base
        ptrs[name] = base + (x.data_ptr() - storage.data_ptr() if raw.size else 0)
    return harness.LaunchRecord(
        launch_id=0,
        fn=launch.kernel,
        fn_name=launch.name,
        fn_file=launch.kernel.fn.__code__.co_filename,
        grid=tuple(launch.grid),
        args=launch.args,
        kwargs=dict(launch.meta),
        bound=bound,
        pre=pre,
        post={},
        ptrs=ptrs,
        bases=bases,
        elems={name: str(x.dtype) for name, x in tensors.items()},
    )


def _memory(record: Any, may_hold_nan: bool) -> Memory:
    memory = Memory()
    seen: set[int] = set()
    for name, base in record.bases.items():
        if base not in seen:
            memory.register(base, record.pre[name])
            seen.add(base)
    load, atomic = memory.load, memory.atomic

    def checked_load(addrs: Any, mask: Any, other: Any, dtype: Any) -> Any:
        out = load(addrs, mask, other, dtype)
        live = _live(mask, np.shape(addrs))
        if not may_hold_nan:
            _written(out[live])
        if other is None and mask is not None:  # what is masked off is undefined, not 0
            nan = {"f": np.nan, "u": 0x7FC0}.get(out.dtype.kind)
            if nan is not None and out.dtype.itemsize > 1:
                out[~live] = nan
        return out

    def checked_atomic(kind: str, addrs: Any, given: Any, mask: Any, **more: Any) -> Any:
        old = atomic(kind, addrs, given, mask, **more)
        if not may_hold_nan:
            _written(old[_live(mask, np.shape(addrs))])
        return old

    memory.load, memory.atomic = checked_load, checked_atomic  # type: ignore[method-assign]
    return memory


def _written(loaded: Any) -> None:
    """The pattern of `unwritten_is_nan`; bf16 travels as uint16."""
    loaded = np.asarray(loaded)
    kind = loaded.dtype
    if kind == np.uint16:
        bad = (loaded & 0x7FFF) > 0x7F80
    elif kind.kind == "f":
        bad = np.isnan(loaded)
    elif kind in (np.int32, np.int64):
        bad = loaded == np.iinfo(kind).max
    else:
        return
    if bad.any():
        raise UnwrittenReadError(
            f"reads {int(bad.sum())} of {loaded.size} elements that nobody wrote (or that hold NaN)"
        )
