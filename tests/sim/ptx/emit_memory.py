"""Loads, stores, atomics and asynchronous copies (PTX ISA 9.7.9, 9.7.13).

The instruction is described once (`Access`); what happens at run time is in access.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .emit import BITS, Emitter, family
from .parser import BYTES
from .syntax import Addr, Imm, Operand, Reg, Sym

# Strength of an access for the memory model: 0 weak, else the scope within which it is strong.
SCOPES = {"cta": 1, "cluster": 2, "gpu": 2, "sys": 3}
_CACHE = {
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged",
    "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::evict_first", "L2::evict_last",
    "L2::evict_normal", "L2::64B", "L2::128B", "L2::256B",
}  # fmt: skip
_SPACES = ("global", "shared", "shared::cta", "local", "const", "param")


@dataclass
class Access:
    """Of one ld, st, atom, red or cp.async."""

    what: str  # load, store, atomic, copy
    space: str  # global, shared, local, "" for generic
    size: int  # bytes of an element
    count: int = 1
    signed: bool = False
    widths: tuple[int, ...] = ()  # of the destination registers, bits
    strength: int = 0
    acquire: bool = False
    release: bool = False
    nc: bool = False
    op: str = ""  # of an atomic
    kind: str = ""

    @property
    def bytes(self) -> int:
        return self.size * self.count


def _address(e: Emitter, x: Operand, space: str) -> str:
    """As uint64 in the space's own addresses."""
    if not isinstance(x, Addr):
        e.fail("address expected")
    if isinstance(x.base, Reg):
        width = e.t.widths[x.base.index]
        name = f"r{x.base.index}"
        if width == 32:
            # Shared addresses are 32 bits: they wrap before they are widened.
            offset = f" + {e.const(np.uint32(x.offset & 0xFFFFFFFF))}" if x.offset else ""
            return f"({name}{offset}).astype(U64)"
        if width != 64:
            e.fail("address of 16 bits")
        return f"({name} + {e.const(np.uint64(x.offset % (1 << 64)))})" if x.offset else name
    at = x.offset
    if isinstance(x.base, Sym):
        at += e.t.address_of(x.base, e)
    return f"full(n, {e.const(np.uint64(at % (1 << 64)))})"


def _strength(e: Emitter, atomic: bool) -> tuple[int, bool, bool]:
    """strength, acquires, releases"""
    order = e.flag("volatile", "relaxed", "acquire", "release", "acq_rel", "weak")
    scope = e.flag("cta", "cluster", "gpu", "sys")
    if order == "volatile":
        return 3, False, False
    if order in ("", "weak") and not atomic:
        if scope:
            e.fail()
        return 0, False, False
    if not scope and not atomic:
        e.fail("needs a scope")
    strength = SCOPES[scope or "gpu"]
    return strength, order in ("acquire", "acq_rel"), order in ("release", "acq_rel")


def _vector(e: Emitter, kind: str) -> int:
    found = e.flag("v2", "v4")
    count = int(found[1]) if found else 1
    if count * BYTES[kind] > 16:
        e.fail("(more than 16 bytes need sm_100)")
    return count


@family("ld")
def load(e: Emitter, mods: list[str]) -> None:
    kind = mods.pop()
    if kind not in BYTES:
        e.fail()
    space = e.flag(*_SPACES)
    nc = bool(e.flag("nc"))
    strength, acquire, _ = _strength(e, False)
    count = _vector(e, kind)
    hint = e.flag("L2::cache_hint")
    e.flag("param::entry", "func")
    for mod in list(mods):
        if mod in _CACHE:
            mods.remove(mod)
    e.only()
    targets = e.vector(e.ops[0])
    if len(targets) != count or len(e.ops) != (3 if hint else 2):
        e.fail()
    if space == "param" and _entry_parameter(e, targets, kind, count):
        return
    widths = tuple(e.t.widths[x.index] if isinstance(x, Reg) else 64 for x in targets)
    if any(w < 8 * BYTES[kind] for w in widths):
        e.fail("a register narrower than what is loaded")
    e.t.described[e.instr.pc] = Access(
        "load", _plain(space), BYTES[kind], count, kind[0] == "s", widths, strength, acquire,
        nc=nc, kind=kind,
    )  # fmt: skip
    address = _address(e, e.ops[1], space)
    call = f"m.load({e.instr.pc}, g, {address}, {e.guard_or_none()}, {e.olds(targets)})"
    e.multi(targets, call)


def _plain(space: str) -> str:
    """const lies in global memory, param of the kernel in a window of the generic space."""
    return {"shared::cta": "shared", "const": "global", "param": ""}.get(space, space)


def _entry_parameter(e: Emitter, targets: list[Operand | None], kind: str, count: int) -> bool:
    """A kernel parameter at a constant offset is the same number in every lane."""
    address = e.ops[1]
    assert isinstance(address, Addr)
    parameters = {p.name: p for p in e.t.flow.function.params}
    if not isinstance(address.base, Sym) or address.base.name not in parameters:
        return False
    p = parameters[address.base.name]
    size = BYTES[kind]
    if address.offset < 0 or address.offset + size * count > p.size:
        e.fail(f"reads beyond parameter {p.name}")
    for k, x in enumerate(targets):
        if isinstance(x, Reg):
            at = p.offset + address.offset + k * size
            width = e.t.widths[x.index]
            value = f"m.parameter({at}, {size}, {kind[0] == 's'}, {width})"
            e.set(x, value, f"b{width}", scalar=True)
    return True


@family("st")
def store(e: Emitter, mods: list[str]) -> None:
    kind = mods.pop()
    if kind not in BYTES:
        e.fail()
    space = e.flag(*_SPACES)
    strength, _, release = _strength(e, False)
    count = _vector(e, kind)
    hint = e.flag("L2::cache_hint")
    for mod in list(mods):
        if mod in _CACHE:
            mods.remove(mod)
    e.only()
    if space == "const" or len(e.ops) != (3 if hint else 2):
        e.fail()
    size = BYTES[kind]
    e.t.described[e.instr.pc] = Access(
        "store", _plain(space), size, count, strength=strength, release=release, kind=kind
    )
    values = []
    for x in e.vector(e.ops[1]):
        value = e.use(Imm(x.bits, "int") if isinstance(x, Imm) and x.kind != "f64" else x,
                      _bits_of(e, x, kind))  # fmt: skip
        values.append(f"full(n, {value})" if e.uniform(x) else value)
    if len(values) != count:
        e.fail()
    address = _address(e, e.ops[0], space)
    e.lines.append(
        f"m.store({e.instr.pc}, g, {address}, ({', '.join(values)},), {e.guard_or_none()})"
    )


def _bits_of(e: Emitter, x: Operand | None, kind: str) -> str:
    return kind if isinstance(x, Imm) and x.kind == "f64" else f"b{BYTES[kind] * 8}"


# ------------------------------------------------------------------------------------- atomics

_ATOMIC = {
    "add": {"u32", "s32", "u64", "s64", "f32", "f64", "f16x2", "bf16x2", "f16", "bf16"},
    "min": {"u32", "s32", "u64", "s64"}, "max": {"u32", "s32", "u64", "s64"},
    "inc": {"u32"}, "dec": {"u32"},
    "and": {"b32", "b64"}, "or": {"b32", "b64"}, "xor": {"b32", "b64"},
    "exch": {"b32", "b64"}, "cas": {"b16", "b32", "b64"},
}  # fmt: skip


@family("atom", "red")
def atomic(e: Emitter, mods: list[str]) -> None:
    kind = mods.pop()
    op = e.flag(*_ATOMIC)
    e.flag("noftz")
    space = e.flag("global", "shared", "shared::cta")
    strength, acquire, release = _strength(e, True)
    hint = e.flag("L2::cache_hint")
    e.only()
    if not op or kind not in _ATOMIC[op]:
        e.fail()
    result = e.instr.parts[0] == "atom"
    operands = list(e.ops)
    if hint:
        operands.pop()
    target = operands.pop(0) if result else None
    address, *values = operands
    if len(values) != (2 if op == "cas" else 1):
        e.fail()
    raw = f"b{BITS[kind]}"
    arrays = []
    for x in values:
        value = e.use(Imm(x.bits, "int") if isinstance(x, Imm) and x.kind != "f64" else x, raw)
        arrays.append(f"full(n, {value})" if e.uniform(x) else value)
    e.t.described[e.instr.pc] = Access(
        "atomic", _plain(space), BITS[kind] // 8, strength=strength, acquire=acquire,
        release=release, op=op, kind=kind,
        widths=(e.t.widths[target.index],) if isinstance(target, Reg) else (BITS[kind],),
    )  # fmt: skip
    olds = e.olds([target]) if isinstance(target, Reg) else "None"
    call = (
        f"m.atomic({e.instr.pc}, g, {_address(e, address, space)}, ({', '.join(arrays)},), "
        f"{e.guard_or_none()}, {olds})"
    )
    if isinstance(target, Reg):
        e.multi([target], call)
    else:
        e.lines.append(call)


# ---------------------------------------------------------------------------------- cp.async


@family("cp")
def copy(e: Emitter, mods: list[str]) -> None:
    if not e.flag("async"):
        e.fail()
    guard = e.guard_or_none()
    if e.flag("commit_group"):
        e.only()
        e.lines.append(f"m.commit_group(g, {guard})")
        return
    if e.flag("wait_group"):
        e.only()
        (count,) = e.ops
        e.lines.append(f"m.wait_group({e.instr.pc}, g, {guard}, {count.bits})")
        return
    if e.flag("wait_all"):
        e.only()
        e.lines.append(f"m.wait_group({e.instr.pc}, g, {guard}, -1)")
        return
    cache = e.flag("ca", "cg")
    shared, source = e.flag("shared", "shared::cta"), e.flag("global")
    hint = e.flag("L2::cache_hint")
    e.flag("L2::64B", "L2::128B", "L2::256B")
    e.only()
    if not cache or not shared or not source:
        e.fail()
    operands = list(e.ops)
    if hint:
        operands.pop()
    to, at, size, *more = operands
    n = size.bits
    if n not in ((16,) if cache == "cg" else (4, 8, 16)) or len(more) > 1:
        e.fail("size")
    e.t.described[e.instr.pc] = Access("copy", "shared", n)
    given = "None"
    if more:
        kind = e.t.widths[more[0].index] if isinstance(more[0], Reg) else 32
        if kind == 1:  # ignore-src
            given = f"where(r{more[0].index}, {e.const(np.uint32(0))}, {e.const(np.uint32(n))})"
        else:
            given = e.use(more[0], "u32")
            given = f"full(n, {given})" if e.uniform(more[0]) else given
    e.lines.append(
        f"m.copy_async({e.instr.pc}, g, {_address(e, to, 'shared')}, "
        f"{_address(e, at, 'global')}, {given}, {guard})"
    )
