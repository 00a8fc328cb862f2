"""PTX text to a Program. Grammar: PTX ISA, chapters 4 (syntax), 5 (state spaces) and 11
(directives). Anything else raises Unsupported with its line."""

from __future__ import annotations

import bisect
import re
import struct
from collections.abc import Collection
from typing import NoReturn

from .faults import Unsupported
from .syntax import (
    Addr,
    Function,
    Imm,
    Instr,
    Not,
    Operand,
    Pair,
    Program,
    Reg,
    Special,
    Sym,
    Variable,
    Vec,
)

_TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/)
    |"[^"]*"
    |0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?
    |[0-9]+\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+U?
    |\.[\w$]+(?:::\w+)*|[%$_A-Za-z][\w$]*(?:(?:\.|::)[\w$]+)*
    |[-+{}()\[\];:,|@!<>=~]
    |(?P<bad>\S)""",
    re.VERBOSE | re.DOTALL,
)
_WIDTH = {
    "pred": 1, "b8": 16, "u8": 16, "s8": 16,
    "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip
BYTES = {k: max(1, int(re.sub(r"x2$", "", re.sub(r"^[a-z]+", "", k) or "1")) // 8)
         for k in _WIDTH if k != "pred"} | {"f16x2": 4, "bf16x2": 4, "tf32": 4}  # fmt: skip
_SPACES = ("global", "const", "shared", "local", "param")
_LINKAGE = (".visible", ".extern", ".weak", ".common")
_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.[xyz]$"
    r"|%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock_hi|clock64|globaltimer|globaltimer_lo"
    r"|globaltimer_hi|lanemask_(eq|lt|le|gt|ge)|dynamic_smem_size|total_smem_size)$"
)


class _Parser:
    def __init__(self, text: str, only: Collection[str] | None = None) -> None:
        self.text, self.only = text, only
        self.newlines = [m.start() for m in re.finditer("\n", text)]
        self.tokens: list[str] = []
        self.starts: list[int] = []
        for match in _TOKEN.finditer(text):
            kind = match.lastgroup
            if kind is None:
                self.tokens.append(match[0])
                self.starts.append(match.start())
            elif kind == "bad":
                line = bisect.bisect_left(self.newlines, match.start()) + 1
                found = text[match.start() : match.start() + 30]
                raise Unsupported(f"PTX line {line}: cannot read {found!r}")
        self.i = 0
        self.program = Program()
        self.loc: tuple[tuple[int, int, int], ...] = ()
        self.function = Function("", False, 0)
        self.scopes: list[dict[str, int]] = []
        self.families: list[dict[str, tuple[int, int, int]]] = []  # prefix -> first, count, width

    # ---- tokens
    def peek(self) -> str:
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    @property
    def line(self) -> int:
        return self.line_of(min(self.i, len(self.tokens) - 1))

    def line_of(self, i: int) -> int:
        return bisect.bisect_left(self.newlines, self.starts[i]) + 1

    def next(self) -> str:
        if self.i >= len(self.tokens):
            self.fail("unexpected end")
        self.i += 1
        return self.tokens[self.i - 1]

    def take(self, wanted: str) -> bool:
        if self.peek() == wanted:
            self.i += 1
            return True
        return False

    def expect(self, wanted: str) -> None:
        if not self.take(wanted):
            self.fail(f"expected {wanted!r}, got {self.peek()!r}")

    def fail(self, what: str) -> NoReturn:
        raise Unsupported(f"PTX line {self.line}: {what}")

    def rest_of_line(self) -> list[str]:
        end = self.text.find("\n", self.starts[self.i - 1])
        first = self.i
        while self.i < len(self.tokens) and (self.starts[self.i] < end or end < 0):
            self.i += 1
        return self.tokens[first : self.i]

    # ---- module
    def module(self) -> Program:
        while self.i < len(self.tokens):
            token = self.next()
            if token == ".version":
                self.program.version = " ".join(self.rest_of_line())
            elif token == ".target":
                self.program.target = str(self.next())
                self.rest_of_line()
            elif token == ".address_size":
                if self.next() != "64":
                    self.fail("only 64-bit addresses")
            elif token == ".file":
                self.file()
            elif token == ".section":
                while self.next() != "{":
                    pass
                while self.next() != "}":
                    pass
            elif token in _LINKAGE:
                if token == ".extern" and self.peek() == ".shared":
                    self.next()
                    self.add(self.variable("shared"), self.program.variables)
            elif token in (".entry", ".func"):
                self.a_function(token == ".entry")
            elif token.startswith(".") and token[1:] in _SPACES:
                self.add(self.variable(token[1:]), self.program.variables)
            else:
                self.i -= 1
                self.fail(f"unknown directive {token!r}")
        return self.program

    def file(self) -> None:
        words = self.rest_of_line()
        self.program.files[int(words[0])] = words[1].strip('"')

    def add(self, variable: Variable, to: dict[str, Variable]) -> None:
        to[variable.name] = variable

    def variable(self, space: str, end: str = ";") -> Variable:
        """After its state space: alignment, type, name, array size, initialiser."""
        line, align, kind, lanes = self.line, 0, "", 1
        while self.peek().startswith("."):
            word = self.next()[1:]
            if word == "align":
                align = int(self.next())
            elif word in ("v2", "v4"):
                lanes = int(word[1])
            elif word in BYTES:
                kind = word
            elif word == "ptr" or word in _SPACES:  # .param .u64 .ptr .global .align 16 name
                pass
            else:
                self.fail(f"unknown .{word} of a variable")
        # `.align` after `.ptr` speaks of what is pointed to.
        size = BYTES[kind] * lanes
        name = str(self.next())
        dynamic, count = False, 1
        while self.take("["):
            if self.take("]"):
                dynamic = True
                continue
            count *= int(self.next().rstrip("U"))
            self.expect("]")
        data = self.initialiser(kind, size * count) if self.take("=") else None
        if end:
            self.expect(end)
        natural = size
        return Variable(name, space, size * count, max(align, natural), line, data, dynamic)

    def initialiser(self, kind: str, size: int) -> bytes:
        numbers: list[int] = []

        def one() -> None:
            if self.take("{"):
                while not self.take("}"):
                    one()
                    self.take(",")
                return
            sign = -1 if self.take("-") else 1
            token = self.next()
            if not token[0].isdigit():
                self.i -= 1
                self.fail(f"initialiser {token!r} (only numbers)")
            literal = _literal(token)
            bits = literal.bits
            if literal.kind == "f64" and kind == "f32":
                bits = _f32_bits(struct.unpack("<d", struct.pack("<Q", bits))[0])
            numbers.append(sign * bits)

        one()
        width = BYTES[kind]
        out = b"".join((n & ((1 << 8 * width) - 1)).to_bytes(width, "little") for n in numbers)
        return out.ljust(size, b"\0")

    # ---- functions
    def a_function(self, entry: bool) -> None:
        function = Function("", entry, self.line)
        if self.peek() == "(":
            function.results = self.params()
        function.name = str(self.next())
        if self.peek() == "(":
            function.params = self.params()
        self.function = function
        while self.peek() not in ("{", ";"):
            word = self.next()
            if word in (".maxntid", ".reqntid"):
                dims = [int(self.next())]
                while self.take(","):
                    dims.append(int(self.next()))
                setattr(function, word[1:], tuple([*dims, 1, 1][:3]))
            elif word in (".minnctapersm", ".maxnreg", ".maxnctapersm", ".abi_preserve"):
                self.next()
            elif word == ".noreturn":
                pass
            else:
                self.i -= 1
                self.fail(f"unknown directive {word!r} of a function")
        if self.take(";"):  # a declaration: a call of it is what would fail
            return
        if entry and self.only is not None and function.name not in self.only:
            self.skip_body()
            return
        self.scopes, self.families, self.loc = [], [], ()
        self.body()
        self.program.functions[function.name] = function

    def skip_body(self) -> None:
        self.expect("{")
        depth = 1
        while depth:
            token = self.next()
            depth += (token == "{") - (token == "}")

    def params(self) -> list[Variable]:
        self.expect("(")
        found: list[Variable] = []
        while not self.take(")"):
            space = self.next()
            if space != ".param":
                self.i -= 1
                self.fail(f"{space!r} as a parameter (only .param)")
            found.append(self.parameter())
            self.take(",")
        offset = 0
        for p in found:
            offset = -(-offset // p.align) * p.align
            p.offset = offset
            offset += p.size
        return found

    def parameter(self) -> Variable:
        """`.align` counts before `.ptr`; behind it, it describes the memory pointed to."""
        start = self.i
        depth = self.i
        while not self.tokens[depth].startswith(".") or self.tokens[depth] != ".ptr":
            if self.tokens[depth] in (",", ")"):
                return self.variable("param", end="")
            depth += 1
        variable = self.variable("param", end="")
        before = self.tokens[start:depth]
        align = int(before[before.index(".align") + 1]) if ".align" in before else 0
        variable.align = max(align, variable.size)
        return variable

    def body(self) -> None:
        self.expect("{")
        self.open_scope()
        depth = 1
        while depth:
            token = self.next()
            if token == "{":
                self.open_scope()
                depth += 1
            elif token == "}":
                self.scopes.pop()
                self.families.pop()
                depth -= 1
            elif token == ";":
                pass
            elif token == ".loc":
                self.location()
            elif token == ".file":
                self.file()
            elif token == ".reg":
                self.registers()
            elif token == ".pragma":
                while self.next() != ";":
                    pass
            elif token.startswith(".") and token[1:] in ("shared", "local", "param", "global"):
                self.add(self.variable(token[1:]), self.function.variables)
            elif token.startswith("."):
                self.i -= 1
                self.fail(f"unknown directive {token!r}")
            elif self.peek() == ":":
                self.next()
                self.label(token)
            else:
                self.i -= 1
                self.instruction()

    def label(self, name: str) -> None:
        """Labels of inline assembly are local to their braces; so far nobody reuses a name."""
        if name in self.function.labels:
            self.fail(f"label {name} twice in a function")
        self.function.labels[str(name)] = len(self.function.body)

    def open_scope(self) -> None:
        self.scopes.append({})
        self.families.append({})

    def location(self) -> None:
        words = [w for w in self.rest_of_line() if w != ","]
        spot = (int(words[0]), int(words[1]), int(words[2]))
        if "inlined_at" in words:
            k = words.index("inlined_at")
            outer = (int(words[k + 1]), int(words[k + 2]), int(words[k + 3]))
            self.loc = (spot, outer)
        else:
            self.loc = (spot,)

    def registers(self) -> None:
        kind = self.next()[1:]
        if kind not in _WIDTH:
            self.fail(f"register type .{kind}")
        width = _WIDTH[kind]
        while True:
            name = str(self.next())
            if self.take("<"):
                count = int(self.next())
                self.expect(">")
                self.families[-1][name] = (len(self.function.widths), count, width)
                self.function.widths += [width] * count
                self.function.reg_names += [f"{name}{k}" for k in range(count)]
            else:
                self.scopes[-1][name] = len(self.function.widths)
                self.function.widths.append(width)
                self.function.reg_names.append(name)
            if self.take(";"):
                return
            self.expect(",")

    def register(self, name: str) -> Reg | None:
        for depth in range(len(self.scopes) - 1, -1, -1):
            if name in self.scopes[depth]:
                return Reg(self.scopes[depth][name])
            stem = name.rstrip("0123456789")
            if stem != name and stem in self.families[depth]:
                first, count, _ = self.families[depth][stem]
                if int(name[len(stem) :]) < count:
                    return Reg(first + int(name[len(stem) :]))
        return None

    # ---- instructions
    def instruction(self) -> None:
        first = self.i
        guard = None
        if self.take("@"):
            negated = self.take("!")
            reg = self.register(self.next())
            if reg is None:
                self.fail("unknown guard predicate")
            guard = (reg.index, negated)
        opcode = self.next()
        instr = Instr(str(opcode), [], self.line_of(first), "", self.loc, guard)
        if opcode.split(".")[0] == "call":
            self.call(instr)
        else:
            while not self.take(";"):
                instr.operands.append(self.operand())
                if not self.take(",") and self.peek() != ";":
                    self.fail(f"unexpected {self.peek()!r}")
        end = self.starts[self.i - 1]
        instr.text = " ".join(self.text[self.starts[first] : end].split())
        self.function.body.append(instr)

    def call(self, instr: Instr) -> None:
        def names() -> list[str]:
            found = []
            while not self.take(")"):
                found.append(str(self.next()))
                self.take(",")
            return found

        results = names() if self.take("(") else []
        self.take(",")
        target = str(self.next())
        if target.startswith("%"):
            self.fail("indirect call")
        self.take(",")
        arguments = names() if self.take("(") else []
        if not self.take(";"):
            self.fail("call with a prototype")
        instr.call = (results, target, arguments)

    def operand(self) -> Operand:
        if self.take("{"):
            parts: list[Operand | None] = []
            while not self.take("}"):
                parts.append(None if self.take("_") else self.operand())
                self.take(",")
            return Vec(tuple(parts))
        if self.take("["):
            return self.address()
        if self.take("!"):
            reg = self.register(self.next())
            if reg is None:
                self.fail("! of what is no register")
            return Not(reg)
        if self.peek() in "-+" or self.peek()[0].isdigit():
            return self.number()
        name = str(self.next())
        if name == "_" or self.register(name) is not None:
            reg = self.register(name)
            if self.take("|"):
                second = self.next()
                return Pair(reg, None if second == "_" else self.register(second))
            return Pair(None, None) if reg is None else reg
        if name.startswith("%"):
            if not _SPECIAL.match(name):
                self.i -= 1
                self.fail(f"special register or undeclared register {name}")
            return Special(name)
        return Sym(name, self.offset())

    def offset(self) -> int:
        total = 0
        while self.peek() in ("+", "-"):
            sign = 1 if self.next() == "+" else -1
            if self.take("-"):
                sign = -sign
            total += sign * _literal(self.next()).bits
        return total

    def address(self) -> Addr:
        if self.peek()[0].isdigit():
            base: Reg | Sym | None = None
            offset = _literal(self.next()).bits
        else:
            name = str(self.next())
            base = self.register(name) or Sym(name, 0)
            offset = 0
            if isinstance(base, Sym) and name.startswith("%"):
                self.fail(f"undeclared register {name}")
        offset += self.offset()
        self.expect("]")
        return Addr(base, offset)

    def number(self) -> Imm:
        sign = 1
        while self.peek() in ("-", "+"):
            if self.next() == "-":
                sign = -sign
        literal = _literal(self.next())
        if sign < 0 and literal.kind != "int":
            width = 32 if literal.kind == "f32" else 64
            return Imm(literal.bits ^ (1 << width - 1), literal.kind)
        return Imm(sign * literal.bits, literal.kind)


def _f32_bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _literal(token: str) -> Imm:
    low = token.lower()
    if low.startswith("0f"):
        return Imm(int(low[2:], 16), "f32")
    if low.startswith("0d"):
        return Imm(int(low[2:], 16), "f64")
    if "." in low:
        return Imm(struct.unpack("<Q", struct.pack("<d", float(low)))[0], "f64")
    low = low.rstrip("u")
    if not low[:1].isdigit():
        raise Unsupported(f"{token!r} where a number is expected")
    if low.startswith("0x"):
        return Imm(int(low, 16), "int")
    return Imm(int(low, 8) if len(low) > 1 and low.startswith("0") else int(low), "int")


def parse(text: str, only: Collection[str] | None = None) -> Program:
    """only: names of the kernels wanted; the bodies of others are skipped unread."""
    return _Parser(text, only).module()
