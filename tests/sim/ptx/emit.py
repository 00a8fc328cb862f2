"""Instructions to lines of Python over numpy arrays, one element a lane of the group that runs.

A segment becomes one function of (m, g, n, R): the machine, the lanes of the group, how many, and
the register file. Registers are unsigned arrays of their width (predicates are bool) and are never
written in place, so a move costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from . import floats, ints
from .faults import Unsupported
from .flow import Flow, Segment
from .syntax import Imm, Instr, Not, Operand, Pair, Reg, Special, Sym, Vec

NUMPY = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_DTYPES = {
    "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
    "F16": np.float16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip
BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip


def numpy_name(kind: str) -> str:
    """The numpy type in which values of a PTX type are computed with."""
    if kind in ("f32", "f64", "f16"):
        return kind.upper()
    return ("I" if kind[0] == "s" else "U") + str(BITS[kind])


class Emitter:
    """Of one instruction; `e.lines` collects the Python."""

    families: dict[str, Callable[[Emitter, list[str]], None]] = {}

    def __init__(self, translator: Translator, instr: Instr) -> None:
        self.t, self.instr = translator, instr
        self.lines: list[str] = []
        self.mods = instr.parts[1:]

    # ---- complaints
    def fail(self, why: str = "") -> NoReturn:
        raise Unsupported(
            f"PTX line {self.instr.line}: {self.instr.text!r} {why or 'is not supported'}"
        )

    def only(self, *allowed: str) -> None:
        for mod in self.mods:
            if mod not in allowed:
                self.fail(f".{mod} is not supported here")

    def flag(self, *names: str) -> str:
        """Which of the modifiers is present ("" if none), and take it away."""
        for name in names:
            if name in self.mods:
                self.mods.remove(name)
                return name
        return ""

    # ---- operands
    @property
    def ops(self) -> list[Operand]:
        return self.instr.operands

    def const(self, value: Any) -> str:
        return self.t.const(value)

    def use(self, x: Operand | None, kind: str) -> str:
        """An expression of an array (or numpy scalar) of the type's numpy dtype."""
        if isinstance(x, Reg):
            width = self.t.widths[x.index]
            name = f"r{x.index}"
            if kind == "pred":
                if width != 1:
                    self.fail("a predicate is expected")
                return name
            bits = max(BITS[kind], 8)
            if width == 1 or bits > width:
                self.fail(f"operand of {width} bits where .{kind} is expected")
            if bits < width:
                name = f"{name}.astype(U{bits})"
            want = numpy_name(kind)
            return name if want == f"U{bits}" else f"{name}.view({want})"
        if isinstance(x, Not):
            return f"~r{x.operand.index}"
        if isinstance(x, Imm):
            return self.const(self.immediate(x, kind))
        if isinstance(x, Special):
            value = f"m.special({x.name!r}, g)"
            return f"{value}.astype({numpy_name(kind)})" if kind != "u32" else value
        if isinstance(x, Sym):
            value = self.const(np.uint64(self.t.address_of(x, self)))
            return f"{value}.astype({numpy_name(kind)})"
        return self.fail("operand is not supported")

    def immediate(self, x: Imm, kind: str) -> Any:
        if kind == "pred":
            return np.bool_(x.bits != 0)
        bits = BITS[kind]
        dtype = _DTYPES[numpy_name(kind)]
        value = x.bits
        if x.kind == "f64" and kind in ("f32", "f16", "bf16"):
            wide = np.array([value], np.uint64).view(np.float64)
            if kind == "f32":
                return wide.astype(np.float32)[0]
            if kind == "f16":
                return wide.astype(np.float16)[0]
            return floats.to_bf16(wide)[0]
        if x.kind == "int" and kind in ("f32", "f64"):
            self.fail("an integer literal as a float operand")
        raw = np.array([value & ((1 << bits) - 1)], np.dtype(f"u{bits // 8}"))
        return raw.view(dtype)[0]

    def uniform(self, *sources: Operand | None) -> bool:
        """Whether the expression of these operands is a scalar."""
        return not any(isinstance(x, (Reg, Not, Special)) for x in sources)

    # ---- results
    def set(self, x: Operand, expr: str, kind: str = "", scalar: bool = False) -> None:
        """Assign an expression of the type's numpy dtype (or of the register's)."""
        if isinstance(x, Pair) and x.first is None:
            return
        if not isinstance(x, Reg):
            self.fail("the result must be a register")
        width = self.t.widths[x.index]
        if kind and kind != "pred":
            bits = max(8, BITS[kind])
            if bits > width:
                self.fail(f"a result of {bits} bits for a register of {width}")
            if bits < width:
                wide = f"{'I' if kind[0] == 's' else 'U'}{width}"
                expr = f"({expr}).astype({wide})"
                if kind[0] == "s":
                    expr += f".view(U{width})"
            elif numpy_name(kind) != f"U{width}":
                expr = f"({expr}).view(U{width})"
        if scalar:
            expr = f"full(n, {expr})"
        guard = self.guard()
        name = f"r{x.index}"
        if guard:
            expr = f"where({guard}, {expr}, {name})"
        self.lines.append(f"{name} = {expr}")

    def guard(self) -> str:
        if self.instr.guard is None:
            return ""
        register, negated = self.instr.guard
        return f"{'~' if negated else ''}r{register}"

    def guard_or_none(self) -> str:
        return self.guard() or "None"

    def vector(self, x: Operand) -> list[Operand | None]:
        return list(x.parts) if isinstance(x, Vec) else [x]

    def multi(self, targets: list[Operand | None], call: str) -> None:
        """Assign what `call` returns (a tuple of arrays in register width) to several registers;
        the callee has merged the guard already."""
        names = [f"r{x.index}" if isinstance(x, Reg) else "_" for x in targets]
        self.lines.append(f"{', '.join(names)}, = {call}")

    def olds(self, targets: list[Operand | None]) -> str:
        """The former values, where a guard leaves lanes alone."""
        if self.instr.guard is None:
            return "None"
        names = [f"r{x.index}" if isinstance(x, Reg) else "None" for x in targets]
        return f"({', '.join(names)},)"


def family(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            Emitter.families[name] = function
        return function

    return register


class Translator:
    """Of one kernel. `memory_ops[pc]` and `warp_ops[pc]` describe what the machine executes."""

    def __init__(self, flow: Flow, addresses: dict[str, int]) -> None:
        self.flow = flow
        self.widths = flow.function.widths
        self.addresses = addresses  # of variables, by name
        self.described: dict[int, Any] = {}
        self.env: dict[str, Any] = {
            **_DTYPES, "np": np, "full": np.full, "where": np.where, "fl": floats, "it": ints,
            "cat": np.ascontiguousarray,
        }  # fmt: skip
        self._constants: dict[Any, str] = {}
        self._lines: dict[int, list[str]] = {}
        for instr in flow.function.body:
            self._lines[instr.pc] = self._emit(instr)

    def const(self, value: Any) -> str:
        key = (type(value), value.tobytes() if hasattr(value, "tobytes") else value)
        if key not in self._constants:
            name = f"k{len(self._constants)}"
            self._constants[key] = name
            self.env[name] = value
        return self._constants[key]

    def address_of(self, x: Sym, e: Emitter) -> int:
        if x.name not in self.addresses:
            e.fail(f"unknown symbol {x.name}")
        return self.addresses[x.name] + x.offset

    def _emit(self, instr: Instr) -> list[str]:
        e = Emitter(self, instr)
        function = Emitter.families.get(instr.parts[0])
        if function is None:
            e.fail(f": opcode {instr.parts[0]} is not supported")
        try:
            function(e, e.mods)
        except (ValueError, IndexError, KeyError, AttributeError) as error:
            # An operand too many or of another kind, a modifier that is missing.
            raise Unsupported(
                f"PTX line {instr.line}: {instr.text!r} is malformed or not supported"
            ) from error
        return e.lines

    def compile(self, segment: Segment, full: bool) -> Callable[..., Any]:
        """The segment's function, for all lanes of the machine or for a group."""
        lines = ["def run(m, g, n, R):"]
        for r in segment.live_in:
            lines.append(f"    r{r} = R[{r}]" + ("" if full else "[g]"))
        for pc in range(segment.start, segment.end):
            lines += [f"    {line}" for line in self._lines[pc]]
        returns = next((x for x in reversed(lines) if x.startswith("    return ")), None)
        if returns is not None:
            lines.remove(returns)
        # The result of bar.red is written by the machine, once the barrier has completed.
        for r in segment.live_out if segment.terminator != "bar" else ():
            if full:
                lines.append(f"    R[{r}] = r{r}")
            else:  # a copy: other registers may share the array
                lines += [f"    _a = R[{r}].copy()", f"    _a[g] = r{r}", f"    R[{r}] = _a"]
        lines.append(returns or "    return None")
        scope: dict[str, Any] = {}
        name = f"<{self.flow.function.name}:{segment.start}>"
        exec(compile("\n".join(lines), name, "exec"), self.env, scope)
        run: Callable[..., Any] = scope["run"]
        return run
