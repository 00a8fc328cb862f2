"""Floating-point instructions (PTX ISA 9.7.3 to 9.7.5). Rounding is to nearest even by default.

`mul` and `add` without a rounding modifier may be contracted by ptxas; here they never are.
"""

from __future__ import annotations

import numpy as np

from .emit import Emitter, family
from .syntax import Operand

_MODES = ("rn", "rz", "rm", "rp")


def emit_float(e: Emitter) -> None:
    """add, sub, mul, mad, fma, div, neg, abs, min, max of a float type."""
    kind = e.mods.pop()
    {"f32": _f32, "f64": _f64, "f16": _half, "bf16": _half, "f16x2": _half, "bf16x2": _half}[kind](
        e, kind
    )


def _operands(e: Emitter, kind: str, flush: bool = False) -> list[str]:
    found = []
    for x in e.ops[1:]:
        value = e.use(x, kind)
        if e.uniform(x):
            value = f"full(n, {value})"
        found.append(f"fl.ftz({value})" if flush else value)
    return found


def _f32(e: Emitter, kind: str) -> None:
    name = e.instr.parts[0]
    flush, sat, nan = bool(e.flag("ftz")), bool(e.flag("sat")), bool(e.flag("NaN"))
    full = e.flag("full", "approx") if name == "div" else ""
    mode = e.flag(*_MODES)
    e.only()
    x = _operands(e, "f32", flush)
    if nan and name not in ("min", "max"):
        e.fail()
    if name in ("fma", "mad"):
        expr = f"fl.fma32({', '.join(x)})" if mode in ("", "rn") else (
            f"fl.fma32_mode({', '.join(x)}, {mode!r})"
        )  # fmt: skip
    elif name == "add" or name == "sub":
        if mode in ("", "rn"):
            expr = f"({x[0]} {'+' if name == 'add' else '-'} {x[1]})"
        else:
            expr = f"fl.add32({x[0]}, {'' if name == 'add' else '-'}{x[1]}, {mode!r})"
    elif name == "mul":
        expr = f"({x[0]} * {x[1]})" if mode in ("", "rn") else f"fl.mul32({x[0]}, {x[1]}, {mode!r})"
    elif name == "div":
        if not full and not mode:
            e.fail("needs a rounding mode")
        expr = f"fl.div32({x[0]}, {x[1]}, {mode or 'rn'!r})"
    elif name in ("min", "max"):
        expr = f"fl.minmax({name!r}, {x[0]}, {x[1]}, {nan}, U32)"
    elif name in ("neg", "abs"):
        expr = f"(-{x[0]})" if name == "neg" else f"np.abs({x[0]})"
    else:
        e.fail()
    if sat:
        expr = f"fl.saturate({expr})"
    if flush and name not in ("neg", "abs", "min", "max"):
        expr = f"fl.ftz({expr})"
    e.set(e.ops[0], expr, "f32")


def _f64(e: Emitter, kind: str) -> None:
    name = e.instr.parts[0]
    mode = e.flag(*_MODES)
    e.only()
    if mode not in ("", "rn"):
        e.fail("(fp64: only .rn)")
    x = _operands(e, "f64")
    if name in ("fma", "mad"):
        expr = f"fl.fma64({', '.join(x)})"
    elif name in ("add", "sub", "mul", "div"):
        sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[name]
        expr = f"({x[0]} {sign} {x[1]})"
    elif name in ("min", "max"):
        expr = f"fl.minmax({name!r}, {x[0]}, {x[1]}, False, U64)"
    elif name in ("neg", "abs"):
        expr = f"(-{x[0]})" if name == "neg" else f"np.abs({x[0]})"
    else:
        e.fail()
    e.set(e.ops[0], expr, "f64")


def _half(e: Emitter, kind: str) -> None:
    name = e.instr.parts[0]
    form, packed = kind.removesuffix("x2"), kind.endswith("x2")
    flush, sat, relu = bool(e.flag("ftz")), bool(e.flag("sat")), bool(e.flag("relu"))
    nan = bool(e.flag("NaN"))
    e.flag("rn")
    e.only()
    raw = "u32" if packed else "u16"
    args = []
    for x in e.ops[1:]:
        value = e.use(x, raw)
        args.append(f"full(n, {value})" if e.uniform(x) else value)
    if form == "bf16" and (flush or sat):
        e.fail()
    names = ["a", "b", "c"][: len(args)]
    inner = [f"fl.flush_f16({v})" for v in names] if flush else names
    if name in ("neg", "abs"):
        sign, rest = e.const(np.uint16(0x8000)), e.const(np.uint16(0x7FFF))
        body = f"a ^ {sign}" if name == "neg" else f"a & {rest}"
    elif name in ("min", "max"):
        body = f"fl.half_minmax({name!r}, {form!r}, {nan}, {', '.join(inner)})"
    elif name in ("add", "sub", "mul", "fma"):
        body = f"fl.half_op({form!r}, {name!r}, 'rn', {', '.join(inner)})"
    else:
        e.fail()
    if sat:
        body = f"fl.to_f16(fl.saturate(fl.f16_to_f32({body})))"
    if relu:
        body = f"fl.relu_bits({body})"
    if flush and name not in ("neg", "abs"):
        body = f"fl.flush_f16({body})"
    function = f"(lambda {', '.join(names)}: {body})"
    joined = ", ".join(args)
    expr = f"fl.pair_op({function}, {joined})" if packed else f"{function}({joined})"
    e.set(e.ops[0], expr, raw)


@family("fma")
def fma(e: Emitter, mods: list[str]) -> None:
    if not e.flag("rn"):
        mode = next((m for m in mods if m in _MODES), "")
        if not mode or mods[-1] != "f32":
            e.fail("needs a rounding mode")
    emit_float(e)


@family("ex2", "lg2", "sin", "cos", "tanh", "rsqrt")
def approximate(e: Emitter, mods: list[str]) -> None:
    _approximate(e, e.instr.parts[0])


@family("rcp", "sqrt")
def root(e: Emitter, mods: list[str]) -> None:
    name = e.instr.parts[0]
    if "approx" in mods:
        _approximate(e, name)
        return
    kind = mods.pop()
    mode = e.flag(*_MODES)
    flush = bool(e.flag("ftz"))
    e.only()
    if not mode or kind not in ("f32", "f64") or (kind == "f64" and mode != "rn"):
        e.fail()
    (x,) = _operands(e, kind, flush)
    if kind == "f64":
        expr = f"1.0 / {x}" if name == "rcp" else f"np.sqrt({x})"
    else:
        expr = f"fl.{name}32({x}, {mode!r})"
        if flush:
            expr = f"fl.ftz({expr})"
    e.set(e.ops[0], expr, kind)


def _approximate(e: Emitter, name: str) -> None:
    kind = e.mods.pop()
    flush = bool(e.flag("ftz"))
    if not e.flag("approx"):
        e.fail()
    e.only()
    d, a = e.ops
    if kind == "f32":
        e.set(d, f"fl.approx({name!r}, {_array(e, a, 'f32')}, {flush})", "f32")
        return
    if name not in ("ex2", "tanh") or kind not in ("f16", "bf16", "f16x2", "bf16x2"):
        e.fail()
    form = kind.removesuffix("x2")
    body = f"fl.to_{form}(fl.approx({name!r}, fl.{form}_to_f32(a), False))"
    raw = "u32" if kind.endswith("x2") else "u16"
    value = _array(e, a, raw)
    function = f"(lambda a: {body})"
    e.set(d, f"fl.pair_op({function}, {value})" if raw == "u32" else f"{function}({value})", raw)


def _array(e: Emitter, x: Operand, kind: str) -> str:
    return f"full(n, {e.use(x, kind)})" if e.uniform(x) else e.use(x, kind)


@family("copysign")
def copysign(e: Emitter, mods: list[str]) -> None:
    """The sign of a onto b."""
    kind = mods.pop()
    e.only()
    if kind not in ("f32", "f64"):
        e.fail()
    d, a, b = e.ops
    e.set(d, f"np.copysign({_array(e, b, kind)}, {_array(e, a, kind)})", kind)


@family("testp")
def testp(e: Emitter, mods: list[str]) -> None:
    kind = mods.pop()
    test = e.flag("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    e.only()
    if kind not in ("f32", "f64") or not test:
        e.fail()
    d, a = e.ops
    x = _array(e, a, kind)
    tiny = "2.0**-126" if kind == "f32" else "2.0**-1022"
    expr = {
        "finite": f"np.isfinite({x})",
        "infinite": f"np.isinf({x})",
        "number": f"~np.isnan({x})",
        "notanumber": f"np.isnan({x})",
        "normal": f"(np.isfinite({x}) & (np.abs({x}) >= {tiny}))",
        "subnormal": f"((np.abs({x}) < {tiny}) & ({x} != 0))",
    }[test]
    e.set(d, expr, "pred")
