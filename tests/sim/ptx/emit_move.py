"""Moves, conversions, comparisons, selections and control (PTX ISA 9.7.6, 9.7.9, 9.7.12)."""

from __future__ import annotations

import numpy as np

from . import memory
from .emit import BITS, Emitter, family, numpy_name
from .syntax import Imm, Operand, Pair, Vec

_INTS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_UNORDERED = {"equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"}


# ----------------------------------------------------------------------------------------- mov


@family("mov")
def mov(e: Emitter, mods: list[str]) -> None:
    kind = mods.pop()
    e.only()
    d, a = e.ops
    if isinstance(d, Vec):
        _unpack(e, d, a, kind)
    elif isinstance(a, Vec):
        _pack(e, d, a, kind)
    else:
        e.set(d, e.use(a, kind), kind, e.uniform(a))


def _pack(e: Emitter, d: Operand, a: Vec, kind: str) -> None:
    parts = list(a.parts)
    bits = BITS[kind] // len(parts)
    if bits not in (8, 16, 32):
        e.fail()
    wide = f"U{BITS[kind]}"
    terms = []
    for k, part in enumerate(parts):
        value = f"{e.use(part, f'u{bits}')}.astype({wide})"
        terms.append(f"({value} << {e.const(np.dtype(f'u{BITS[kind] // 8}').type(k * bits))})")
    e.set(d, " | ".join(terms), f"b{BITS[kind]}", e.uniform(*parts))


def _unpack(e: Emitter, d: Vec, a: Operand, kind: str) -> None:
    bits = BITS[kind] // len(d.parts)
    whole = e.use(a, f"b{BITS[kind]}")
    if e.uniform(a):
        whole = f"full(n, {whole})"
    e.lines.append(f"_w = {whole}")
    for k, part in enumerate(d.parts):
        if part is not None:
            by = e.const(np.dtype(f"u{BITS[kind] // 8}").type(k * bits))
            e.set(part, f"(_w >> {by}).astype(U{bits})", f"b{bits}")


@family("cvta")
def cvta(e: Emitter, mods: list[str]) -> None:
    """Global and const addresses are generic ones; the other spaces lie in windows."""
    kind = mods.pop()
    to = bool(e.flag("to"))
    space = e.flag("global", "shared", "shared::cta", "local", "const", "param")
    e.only()
    d, a = e.ops
    base = {"shared": memory.SHARED_WINDOW, "shared::cta": memory.SHARED_WINDOW,
            "local": memory.LOCAL_WINDOW, "param": memory.PARAM_WINDOW}.get(space, 0)  # fmt: skip
    if not space or kind != "u64":
        e.fail()
    sign = "-" if to else "+"
    value = e.use(a, "u64")
    e.set(d, f"{value} {sign} {e.const(np.uint64(base))}", "u64", e.uniform(a))


@family("isspacep")
def isspacep(e: Emitter, mods: list[str]) -> None:
    space = e.flag("global", "shared", "shared::cta", "local")
    e.only()
    d, a = e.ops
    low, high = {
        "global": (0, memory.SHARED_WINDOW),
        "local": (memory.LOCAL_WINDOW, memory.PARAM_WINDOW),
    }.get(space, (memory.SHARED_WINDOW, memory.LOCAL_WINDOW))
    x = e.use(a, "u64")
    e.set(d, f"({x} >= {e.const(np.uint64(low))}) & ({x} < {e.const(np.uint64(high))})", "pred")


# ----------------------------------------------------------------------------------------- cvt


@family("cvt")
def cvt(e: Emitter, mods: list[str]) -> None:
    source, to = mods.pop(), mods.pop()
    if to not in BITS or source not in BITS:
        e.fail()
    flush, sat, relu = (bool(e.flag(x)) for x in ("ftz", "sat", "relu"))
    mode = e.flag("rn", "rna", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")
    e.only()
    if to in ("f16x2", "bf16x2"):
        _cvt_packed(e, to, source, mode, relu, sat)
        return
    d, a = e.ops
    scalar = e.uniform(a)
    x = e.use(a, source if source != "bf16" else "u16")
    x = f"full(n, {x})" if scalar else x
    if source in _INTS and to in _INTS:
        if flush or relu or mode:
            e.fail()
        e.set(d, _int_to_int(x, source, to, sat), to)
    elif source in _INTS:
        e.set(d, _int_to_float(e, x, source, to, mode), _raw(to))
    elif to in _INTS:
        x = _value(x, source, flush)
        signed, bits = to[0] == "s", BITS[to]
        if mode not in ("rni", "rzi", "rmi", "rpi"):
            e.fail("needs .rni, .rzi, .rmi or .rpi")
        wide = source == "f64" or bits == 64
        e.set(d, f"fl.to_int({x}, {mode!r}, {bits}, {signed}, {wide})", to)
    else:
        expr = _float_to_float(e, _value(x, source, flush), source, to, mode, sat, relu)
        if flush and to == "f32":
            expr = f"fl.ftz(cat({expr}).view(F32))"
        e.set(d, f"cat({expr}).view({_unsigned(to)})", _raw(to))


def _raw(kind: str) -> str:
    return f"b{BITS[kind]}"


def _unsigned(kind: str) -> str:
    return f"U{BITS[kind]}"


def _value(x: str, source: str, flush: bool) -> str:
    """As float32 or float64 values."""
    if source == "f16":
        return f"{x}.astype(F32)"
    if source == "bf16":
        return f"fl.bf16_to_f32({x})"
    return f"fl.ftz({x})" if flush and source == "f32" else x


def _int_to_int(x: str, source: str, to: str, sat: bool) -> str:
    if not sat:
        return f"{x}.astype({numpy_name(to)})"
    low = max(np.iinfo(_np(to)).min, np.iinfo(_np(source)).min)
    high = min(np.iinfo(_np(to)).max, np.iinfo(_np(source)).max)
    return f"np.clip({x}, {low}, {high}).astype({numpy_name(to)})"


def _np(kind: str) -> np.dtype:
    return np.dtype(("i" if kind[0] == "s" else "u") + str(BITS[kind] // 8))


def _int_to_float(e: Emitter, x: str, source: str, to: str, mode: str) -> str:
    if mode not in ("rn", "rz", "rm", "rp"):
        e.fail("needs a rounding mode")
    if BITS[source] < 32:
        x = f"{x}.astype({'I' if source[0] == 's' else 'U'}32)"
    if to == "f32":
        return f"fl.int_to_f32({x}, {mode!r}).view(U32)"
    if mode != "rn":
        e.fail()
    if to == "f64":
        return f"{x}.astype(F64).view(U64)"
    if BITS[source] > 32 or to not in ("f16", "bf16"):
        e.fail()  # int64 to float64 rounds: a second rounding would be one too many
    return f"fl.to_{to}({x}.astype(F64))"


def _float_to_float(
    e: Emitter, x: str, source: str, to: str, mode: str, sat: bool, relu: bool
) -> str:
    if mode in ("rni", "rzi", "rmi", "rpi"):
        x = f"fl.round_to_int({x}, {mode!r})"
        if source != to:
            e.fail()
        mode = "rn" if to != "f32" else ""
    wide = {"f64": 3, "f32": 2, "tf32": 1, "f16": 1, "bf16": 1}
    narrows = wide[to] < wide[source] or (to != source and wide[to] == wide[source])
    if narrows and not mode:
        e.fail("needs a rounding mode")
    if sat:
        x = f"fl.saturate({x})"
    if to == "f64":
        out = f"{x}.astype(F64)"
    elif to == "f32":
        out = f"fl.f64_to_f32({x}, {mode!r})" if source == "f64" else x
    elif to == "tf32":
        out = f"fl.to_tf32({x}, {mode!r})"
    else:
        if source == "f64" and to == "bf16" and mode == "rn":
            e.fail()
        out = f"fl.to_{to}({x}, {mode or 'rn'!r})"
        if relu:
            out = f"fl.relu_bits({out})"
        return out
    if relu:
        e.fail()
    return out


def _cvt_packed(e: Emitter, to: str, source: str, mode: str, relu: bool, sat: bool) -> None:
    """d = {b, a}: the first source goes to the upper half."""
    if source != "f32" or mode not in ("rn", "rz") or len(e.ops) != 3 or sat:
        e.fail()
    form = to.removesuffix("x2")
    d, a, b = e.ops
    parts = []
    for x in (a, b):
        value = e.use(x, "f32")
        value = f"full(n, {value})" if e.uniform(x) else value
        half = f"fl.to_{form}({value}, {mode!r})"
        parts.append(f"fl.relu_bits({half})" if relu else half)
    expr = f"({parts[0]}.astype(U32) << {e.const(np.uint32(16))}) | {parts[1]}.astype(U32)"
    e.set(d, expr, "u32")


# ------------------------------------------------------------------------ comparing, selecting


def _comparison(e: Emitter, how: str, kind: str, a: Operand, b: Operand, flush: bool) -> str:
    if kind in ("f32", "f64", "f16", "bf16"):

        def value(x: Operand) -> str:
            y = e.use(x, "u16" if kind == "bf16" else kind)
            y = f"full(n, {y})" if e.uniform(x) else y
            y = f"fl.bf16_to_f32({y})" if kind == "bf16" else y
            return f"fl.ftz({y})" if flush else y

        if how not in _UNORDERED and how not in ("eq", "ne", "lt", "le", "gt", "ge"):
            e.fail()
        if how in ("eq", "lt", "le", "gt", "ge"):
            return f"({value(a)} {_COMPARE[how]} {value(b)})"
        return f"fl.compare({how!r}, {value(a)}, {value(b)})"
    if how not in _COMPARE or how in _UNORDERED:
        e.fail()
    if how in ("lo", "ls", "hi", "hs"):
        kind = "u" + kind[1:]
    return f"({e.use(a, kind)} {_COMPARE[how]} {e.use(b, kind)})"


@family("setp")
def setp(e: Emitter, mods: list[str]) -> None:
    kind = mods.pop()
    how = mods.pop(0)
    flush = bool(e.flag("ftz"))
    join = e.flag("and", "or", "xor")
    e.only()
    d, a, b, *c = e.ops
    if kind not in BITS or kind == "pred" or bool(join) != bool(c):
        e.fail()
    e.lines.append(f"_t = {_comparison(e, how, kind, a, b, flush)}")
    if e.uniform(a, b):
        e.lines.append("_t = full(n, _t)")
    sign = {"and": "&", "or": "|", "xor": "^"}.get(join, "")
    other = f" {sign} {e.use(c[0], 'pred')}" if c else ""
    if not isinstance(d, Pair):
        e.set(d, f"_t{other}", "pred")
        return
    e.lines.append(f"_q = ~_t{other}")
    if d.first is not None:
        e.set(d.first, f"_t{other}", "pred")
    if d.second is not None:
        e.set(d.second, "_q", "pred")


@family("set")
def set_value(e: Emitter, mods: list[str]) -> None:
    """1.0 for a float result, all ones for an integer one."""
    source, to = mods.pop(), mods.pop()
    how = mods.pop(0)
    flush = bool(e.flag("ftz"))
    e.only()
    d, a, b = e.ops
    test = _comparison(e, how, source, a, b, flush)
    ones = {
        "f32": np.uint32(0x3F800000), "f16": np.uint16(0x3C00), "bf16": np.uint16(0x3F80),
        "u32": np.uint32(0xFFFFFFFF), "s32": np.uint32(0xFFFFFFFF),
        "u16": np.uint16(0xFFFF), "s16": np.uint16(0xFFFF),
    }.get(to)  # fmt: skip
    if ones is None:
        e.fail()
    e.set(d, f"where({test}, {e.const(ones)}, {e.const(type(ones)(0))})", _raw(to), e.uniform(a, b))


@family("selp")
def selp(e: Emitter, mods: list[str]) -> None:
    kind = mods.pop()
    e.only()
    d, a, b, p = e.ops
    raw = _raw(kind)
    a, b = (_as_raw(x) for x in (a, b))
    e.set(d, f"where({e.use(p, 'pred')}, {e.use(a, raw)}, {e.use(b, raw)})", raw)


def _as_raw(x: Operand) -> Operand:
    return Imm(x.bits, "int") if isinstance(x, Imm) else x


@family("slct")
def slct(e: Emitter, mods: list[str]) -> None:
    """a where c >= 0 (NaN: b)."""
    test, kind = mods.pop(), mods.pop()
    flush = bool(e.flag("ftz"))
    e.only()
    d, a, b, c = e.ops
    if test not in ("s32", "f32") or flush:
        e.fail()
    raw = _raw(kind)
    e.set(
        d, f"where({e.use(c, test)} >= 0, {e.use(_as_raw(a), raw)}, {e.use(_as_raw(b), raw)})", raw
    )


# ------------------------------------------------------------------------------------- control


@family("bra", "exit", "ret")
def control(e: Emitter, mods: list[str]) -> None:
    """The machine reads target and kind from the segment; who goes is the guard."""
    e.only("uni")
    if e.instr.guard is not None:
        e.lines.append(f"return {e.guard()}")


@family("trap", "brkpt")
def trap(e: Emitter, mods: list[str]) -> None:
    e.lines.append(f"m.trap({e.instr.pc}, g, {e.guard_or_none()})")


@family("nanosleep", "prefetch")
def nothing(e: Emitter, mods: list[str]) -> None:
    """Hints."""


@family("createpolicy")
def createpolicy(e: Emitter, mods: list[str]) -> None:
    e.set(e.ops[0], "np.zeros(n, U64)", "u64")
