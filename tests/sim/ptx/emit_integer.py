"""Integer, logic and bit instructions (PTX ISA 9.7.1, 9.7.8)."""

from __future__ import annotations

import numpy as np

from .emit import Emitter, family, numpy_name
from .emit_float import emit_float
from .syntax import Imm, Pair, Reg

_FLOATS = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f64"}
_INFIX = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}


def _kind(e: Emitter, *allowed: str) -> str:
    kind = e.mods.pop()
    if kind not in allowed:
        e.fail()
    return kind


_WORDS = ("u16", "s16", "u32", "s32", "u64", "s64")


@family("add", "sub")
def add_sub(e: Emitter, mods: list[str]) -> None:
    name = e.instr.parts[0]
    if mods[-1] in _FLOATS:
        emit_float(e)
        return
    if e.flag("sat"):
        _kind(e, "s32")
        e.only()
        d, a, b = e.ops
        left, right = e.use(a, "s32"), e.use(b, "s32")
        e.set(d, f"it.sat_add({left}, {right}, {name == 'sub'})", "s32", e.uniform(a, b))
        return
    kind = _kind(e, *_WORDS)
    e.only()  # .cc is refused: nothing here has carried yet
    d, a, b = e.ops
    wide = "u" + kind[1:]
    expr = f"{e.use(a, wide)} {_INFIX[name]} {e.use(b, wide)}"
    e.set(d, expr, wide, e.uniform(a, b))


@family("and", "or", "xor")
def logic(e: Emitter, mods: list[str]) -> None:
    kind = _kind(e, "pred", "b16", "b32", "b64")
    e.only()
    d, a, b = e.ops
    expr = f"{e.use(a, kind)} {_INFIX[e.instr.parts[0]]} {e.use(b, kind)}"
    e.set(d, expr, kind, e.uniform(a, b))


@family("not", "cnot")
def negate(e: Emitter, mods: list[str]) -> None:
    kind = _kind(e, "pred", "b16", "b32", "b64")
    e.only()
    d, a = e.ops
    x = e.use(a, kind)
    if e.instr.parts[0] == "cnot":
        x = f"({x} == 0).astype({numpy_name(kind)})"
    else:
        x = f"~{x}"
    e.set(d, x, kind, e.uniform(a))


@family("mul", "mad")
def multiply(e: Emitter, mods: list[str]) -> None:
    if mods[-1] in _FLOATS:
        emit_float(e)
        return
    kind = _kind(e, *_WORDS)
    part = e.flag("lo", "hi", "wide")
    saturates = e.flag("sat")
    e.only()
    if not part or (part == "wide" and kind[1:] == "64") or saturates:
        e.fail()
    d, a, b, *more = e.ops
    wide = "u" + kind[1:]
    out = wide
    if part == "lo":
        expr = f"{e.use(a, wide)} * {e.use(b, wide)}"
    elif part == "hi":
        expr = f"it.mul_hi(np.atleast_1d({e.use(a, kind)}), {e.use(b, kind)}).view(U{kind[1:]})"
    else:
        out = kind[0] + str(2 * int(kind[1:]))
        big = numpy_name(out)
        expr = f"({e.use(a, kind)}.astype({big}) * {e.use(b, kind)}.astype({big}))"
        expr += f".view(U{out[1:]})"
        out = "u" + out[1:]
    if more:
        expr = f"({expr}) + {e.use(more[0], out)}"
    e.set(d, expr, out, e.uniform(a, b, *more))


@family("mul24", "mad24")
def multiply24(e: Emitter, mods: list[str]) -> None:
    kind = _kind(e, "u32", "s32")
    part = e.flag("lo")
    e.only()
    if not part:
        e.fail()
    d, a, b, *more = e.ops
    x, y = ((f"(({e.use(v, kind)} << 8) >> 8)") for v in (a, b))
    expr = f"({x} * {y}).view(U32)"
    if more:
        expr = f"{expr} + {e.use(more[0], 'u32')}"
    e.set(d, expr, "u32", e.uniform(a, b, *more))


@family("div", "rem")
def divide(e: Emitter, mods: list[str]) -> None:
    if mods[-1] in _FLOATS:
        emit_float(e)
        return
    kind = _kind(e, *_WORDS)
    e.only()
    d, a, b = e.ops
    call = f"it.{e.instr.parts[0]}(np.atleast_1d({e.use(a, kind)}), {e.use(b, kind)})"
    if e.uniform(a) and not e.uniform(b):
        call = f"it.{e.instr.parts[0]}(full(n, {e.use(a, kind)}), {e.use(b, kind)})"
    e.set(d, call, kind, e.uniform(a, b))


@family("min", "max")
def extreme(e: Emitter, mods: list[str]) -> None:
    if mods[-1] in _FLOATS:
        emit_float(e)
        return
    kind = _kind(e, *_WORDS)
    e.only()
    d, a, b = e.ops
    name = {"min": "np.minimum", "max": "np.maximum"}[e.instr.parts[0]]
    e.set(d, f"{name}({e.use(a, kind)}, {e.use(b, kind)})", kind, e.uniform(a, b))


@family("neg", "abs")
def sign(e: Emitter, mods: list[str]) -> None:
    if mods[-1] in _FLOATS:
        emit_float(e)
        return
    kind = _kind(e, "s16", "s32", "s64")
    e.only()
    d, a = e.ops
    x = e.use(a, kind)
    e.set(d, f"-{x}" if e.instr.parts[0] == "neg" else f"np.abs({x})", kind, e.uniform(a))


@family("sad")
def sad(e: Emitter, mods: list[str]) -> None:
    kind = _kind(e, *_WORDS)
    e.only()
    d, a, b, c = e.ops
    x, y = e.use(a, kind), e.use(b, kind)
    wide = "u" + kind[1:]
    difference = f"(np.maximum({x}, {y}) - np.minimum({x}, {y})).view(U{kind[1:]})"
    e.set(d, f"{difference} + {e.use(c, wide)}", wide, e.uniform(a, b, c))


@family("shl", "shr")
def shift(e: Emitter, mods: list[str]) -> None:
    """Amounts of the width and beyond give 0 (or the sign): numpy defines it so too."""
    kind = _kind(e, "b16", "b32", "b64", *_WORDS)
    e.only()
    d, a, b = e.ops
    width = int(kind[1:])
    if isinstance(b, Imm):
        by = e.const(
            np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width // 8}").type(min(b.bits, width))
        )
    else:
        limit = e.const(np.uint32(width))
        by = f"np.minimum({e.use(b, 'u32')}, {limit}).astype({numpy_name(kind)})"
    e.set(
        d, f"{e.use(a, kind)} {'<<' if e.instr.parts[0] == 'shl' else '>>'} {by}", kind,
        e.uniform(a, b),
    )  # fmt: skip


@family("bfe")
def bfe(e: Emitter, mods: list[str]) -> None:
    kind = _kind(e, "u32", "s32", "u64", "s64")
    e.only()
    d, a, b, c = e.ops
    call = f"it.bfe({e.use(a, kind)}, {e.use(b, 'u32')}, {e.use(c, 'u32')})"
    e.set(d, call, kind, e.uniform(a, b, c))


@family("bfi")
def bfi(e: Emitter, mods: list[str]) -> None:
    kind = _kind(e, "b32", "b64")
    e.only()
    d, a, b, p, n = e.ops
    call = f"it.bfi({e.use(a, kind)}, {e.use(b, kind)}, {e.use(p, 'u32')}, {e.use(n, 'u32')})"
    e.set(d, call, kind, e.uniform(a, b, p, n))


@family("popc", "clz", "brev", "bfind")
def count(e: Emitter, mods: list[str]) -> None:
    name = e.instr.parts[0]
    kind = _kind(e, "b32", "b64", "u32", "s32", "u64", "s64")
    more = f", {bool(e.flag('shiftamt'))}" if name == "bfind" else ""
    e.only()
    d, a = e.ops
    out = kind if name == "brev" else "u32"
    e.set(d, f"it.{name}(np.atleast_1d({e.use(a, kind)}){more})", out)
    if e.uniform(a):
        e.fail("of a constant")


@family("prmt")
def prmt(e: Emitter, mods: list[str]) -> None:
    mode = e.flag("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    _kind(e, "b32")
    e.only()
    d, a, b, c = e.ops
    args = ", ".join(e.use(x, "u32") for x in (a, b, c))
    e.set(d, f"it.prmt({mode!r}, {args})", "u32", e.uniform(a, b, c))


@family("lop3")
def lop3(e: Emitter, mods: list[str]) -> None:
    _kind(e, "b32")
    e.only()
    d, a, b, c, table = e.ops
    if isinstance(d, Pair):
        e.fail()
    args = ", ".join(e.use(x, "u32") for x in (a, b, c))
    e.set(d, f"it.lop3({table.bits & 255}, {args})", "u32", e.uniform(a, b, c))


@family("shf")
def shf(e: Emitter, mods: list[str]) -> None:
    _kind(e, "b32")
    way, mode = e.flag("l", "r"), e.flag("wrap", "clamp")
    e.only()
    if not way or not mode:
        e.fail()
    d, a, b, c = e.ops
    args = ", ".join(e.use(x, "u32") for x in (a, b, c))
    e.set(d, f"it.shf({way == 'l'}, {mode == 'wrap'}, {args})", "u32", e.uniform(a, b, c))


@family("dp4a")
def dp4a(e: Emitter, mods: list[str]) -> None:
    right, left = mods.pop(), mods.pop()
    e.only()
    d, a, b, c = e.ops
    if not isinstance(d, Reg) or {left, right} - {"u32", "s32"}:
        e.fail()
    args = ", ".join(e.use(x, "u32") for x in (a, b, c))
    e.set(d, f"it.dot4({args}, {left == 's32'}, {right == 's32'})", "u32", e.uniform(a, b, c))
