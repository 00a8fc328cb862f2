"""The parts of a parsed PTX module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Reg(NamedTuple):
    index: int


class Imm(NamedTuple):
    """`bits` as an integer of any sign; `is_f64` for literals with a decimal point or 0d."""

    bits: int
    kind: str  # "int", "f32" (0f...), "f64" (0d... or decimal)


class Sym(NamedTuple):
    """A variable or, in a call or branch, a label or function."""

    name: str
    offset: int


class Special(NamedTuple):
    name: str  # %tid.x


class Vec(NamedTuple):
    parts: tuple[Operand | None, ...]  # None is the sink "_"


class Addr(NamedTuple):
    base: Reg | Sym | None
    offset: int


class Not(NamedTuple):
    operand: Reg


class Pair(NamedTuple):
    """p|q of setp and shfl."""

    first: Reg | None
    second: Reg | None


Operand = Reg | Imm | Sym | Special | Vec | Addr | Not | Pair


@dataclass
class Instr:
    op: str
    operands: list[Operand]
    line: int
    text: str
    loc: tuple[tuple[int, int, int], ...] = ()  # (file, line, column), innermost first
    guard: tuple[int, bool] | None = None  # register, True when negated
    call: tuple[list[str], str, list[str]] | None = None  # results, function, arguments
    pc: int = -1

    @property
    def parts(self) -> list[str]:
        return self.op.split(".")


@dataclass
class Variable:
    """A .param, .shared, .local, .global or .const variable."""

    name: str
    space: str
    size: int
    align: int
    line: int
    data: bytes | None = None  # initial bytes
    dynamic: bool = False  # .extern .shared x[]
    offset: int = -1  # where it lies in its space (or address, for global and const)


@dataclass
class Function:
    name: str
    entry: bool
    line: int
    params: list[Variable] = field(default_factory=list)
    results: list[Variable] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)  # of each register in bits, 1 a predicate
    reg_names: list[str] = field(default_factory=list)
    body: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index into body
    maxntid: tuple[int, int, int] | None = None
    reqntid: tuple[int, int, int] | None = None


@dataclass
class Program:
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
    target: str = ""
    version: str = ""
