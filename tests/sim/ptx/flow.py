"""A function's body as segments: stretches without a place where lanes may part, meet or wait.

Device functions are inlined first (recursion is refused), so that registers are numbered once and
a lane needs one program counter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from .faults import Unsupported
from .syntax import Addr, Function, Instr, Not, Operand, Pair, Program, Reg, Sym, Variable, Vec

_FULL = (1 << 32) - 1


@dataclass
class Segment:
    start: int
    end: int  # one beyond the last instruction
    terminator: str  # next, bra, exit, bar
    target: int = -1  # of a branch
    guarded: bool = False
    collective: str = ""  # "", "warp" (all lanes that have not exited), "all32", "mask"
    spins: bool = False  # its branch closes a loop that may wait for other threads
    live_in: tuple[int, ...] = ()
    live_out: tuple[int, ...] = ()
    runs: int = 0  # warps that executed it
    full: object = None
    partial: object = None


@dataclass
class Flow:
    function: Function
    segments: dict[int, Segment] = field(default_factory=dict)


# ------------------------------------------------------------------------------------ inlining


def inlined(program: Program, function: Function) -> Function:
    """The function with every call replaced by the callee's body."""
    out = Function(
        function.name, function.entry, function.line, list(function.params), [],
        dict(function.variables), list(function.widths), list(function.reg_names),
        maxntid=function.maxntid, reqntid=function.reqntid,
    )  # fmt: skip
    _append(program, function, out, {r: r for r in range(len(function.widths))}, {}, "", ())
    for pc, instr in enumerate(out.body):
        instr.pc = pc
    if len(out.body) >= 1 << 16:
        raise Unsupported(f"{function.name}: more than 65535 instructions")
    return out


def _append(
    program: Program,
    source: Function,
    out: Function,
    registers: dict[int, int],
    names: dict[str, str],
    prefix: str,
    path: tuple[str, ...],
) -> None:
    if source.name in path:
        raise Unsupported(f"PTX line {source.line}: recursion in {source.name}")
    places: dict[int, int] = {}
    end = f"{prefix}$end"
    for i, instr in enumerate(source.body):
        places[i] = len(out.body)
        if instr.call is not None:
            _call(program, source, out, instr, registers, names, prefix, path)
            continue
        copy = replace(
            instr, operands=[_renamed(x, registers, names, prefix, source) for x in instr.operands]
        )
        if instr.guard is not None:
            copy.guard = (registers[instr.guard[0]], instr.guard[1])
        if prefix and instr.op.split(".")[0] == "ret":
            copy.op, copy.operands = "bra", [Sym(end, 0)]
        out.body.append(copy)
    places[len(source.body)] = len(out.body)
    for name, at in source.labels.items():
        out.labels[prefix + name] = places[at]
    if prefix:
        out.labels[end] = len(out.body)


def _call(
    program: Program,
    source: Function,
    out: Function,
    instr: Instr,
    registers: dict[int, int],
    names: dict[str, str],
    prefix: str,
    path: tuple[str, ...],
) -> None:
    assert instr.call is not None
    results, name, arguments = instr.call
    callee = program.functions.get(name)
    if name == "__assertfail":  # the device runtime's: it prints and stops
        guard = None if instr.guard is None else (registers[instr.guard[0]], instr.guard[1])
        out.body.append(replace(instr, op="trap", call=None, operands=[], guard=guard))
        return
    if callee is None:
        raise Unsupported(f"PTX line {instr.line}: call of {name}, which has no body here")
    inner_prefix = f"{prefix}{name}@{len(out.body)}$"
    if instr.guard is not None:  # jump around the inlined body
        around = (registers[instr.guard[0]], not instr.guard[1])
        end = [Sym(f"{inner_prefix}$end", 0)]
        out.body.append(replace(instr, op="bra", call=None, operands=end, guard=around))
    inner = {}
    for r, width in enumerate(callee.widths):
        inner[r] = len(out.widths)
        out.widths.append(width)
        out.reg_names.append(f"{name}:{callee.reg_names[r]}")
    formal = [p.name for p in (*callee.results, *callee.params)]
    actual = [names.get(x, prefix + x if prefix else x) for x in (*results, *arguments)]
    inner_names = dict(zip(formal, actual, strict=True))
    for variable in callee.variables.values():
        unique = inner_prefix + variable.name
        inner_names[variable.name] = unique
        out.variables[unique] = replace(variable, name=unique)
    _append(program, callee, out, inner, inner_names, inner_prefix, (*path, source.name))


def _renamed(
    x: Operand | None,
    registers: dict[int, int],
    names: dict[str, str],
    prefix: str,
    source: Function,
) -> Operand | None:
    def sub(y: Operand | None) -> Operand | None:
        return _renamed(y, registers, names, prefix, source)

    if isinstance(x, Reg):
        return Reg(registers[x.index])
    if isinstance(x, Not):
        return Not(Reg(registers[x.operand.index]))
    if isinstance(x, Pair):
        return Pair(sub(x.first), sub(x.second))  # type: ignore[arg-type]
    if isinstance(x, Vec):
        return Vec(tuple(sub(y) for y in x.parts))
    if isinstance(x, Addr):
        return Addr(sub(x.base), x.offset)  # type: ignore[arg-type]
    if isinstance(x, Sym):
        if x.name in source.labels:
            return Sym(prefix + x.name, x.offset)
        return Sym(names.get(x.name, x.name), x.offset)
    return x


# ------------------------------------------------------------------------------------ segments

_COLLECTIVE = {"shfl", "vote", "match", "redux", "mma", "ldmatrix", "movmatrix"}
_ALIGNED = {"mma", "ldmatrix", "movmatrix"}


def collective_kind(instr: Instr) -> str:
    """Which lanes of a warp must arrive together."""
    parts = instr.parts
    if parts[0] in _ALIGNED:
        return "all32"
    if parts[0] == "bar" and parts[1] == "warp":
        return _mask_kind(instr.operands[0])
    if parts[0] in _COLLECTIVE:
        return _mask_kind(instr.operands[-1])
    if parts[0] == "bar" or (parts[0] == "barrier" and "aligned" in parts):
        return "warp"
    return ""


def _mask_kind(mask: Operand) -> str:
    bits = getattr(mask, "bits", None)
    return "warp" if bits is not None and bits & _FULL == _FULL else "mask"


def _is_barrier(instr: Instr) -> bool:
    parts = instr.parts
    return parts[0] == "barrier" or (parts[0] == "bar" and parts[1] != "warp")


def target_of(function: Function, instr: Instr) -> int:
    label = instr.operands[0]
    if not isinstance(label, Sym) or label.name not in function.labels:
        raise Unsupported(f"PTX line {instr.line}: branch to what is no label: {instr.text}")
    return function.labels[label.name]


def build(function: Function) -> Flow:
    body = function.body
    if not body or body[-1].op.split(".")[0] not in ("ret", "exit", "bra", "trap"):
        line = body[-1].line if body else function.line
        body.append(Instr("ret", [], line, "(end of function)", pc=len(body)))
    starts = {0} | {at for at in function.labels.values() if at < len(body)}
    for at in function.labels.values():
        if at >= len(body):
            body.append(Instr("ret", [], body[-1].line, "(end of function)", pc=len(body)))
            starts.add(len(body) - 1)
            break
    for pc, instr in enumerate(body):
        name = instr.parts[0]
        if name in ("bra", "exit", "ret", "nanosleep"):
            starts.add(pc + 1)
        if _is_barrier(instr) or collective_kind(instr) == "mask":
            starts |= {pc, pc + 1}
    flow = Flow(function)
    edges = sorted(s for s in starts if s < len(body))
    edges = _split_at_collectives(body, edges)
    for start, end in zip(edges, [*edges[1:], len(body)], strict=True):
        flow.segments[start] = _segment(function, start, end)
    _mark_spins(function, flow)
    _liveness(function, flow)
    return flow


def _split_at_collectives(body: list[Instr], edges: list[int]) -> list[int]:
    """The first warp-wide instruction of a stretch begins a segment: lanes may wait there for the
    rest of their warp. The next ones of the stretch find the warp together."""
    more = set(edges)
    for start, end in zip(edges, [*edges[1:], len(body)], strict=True):
        strongest = ""
        for pc in range(start, end):
            kind = collective_kind(body[pc])
            if kind and (not strongest or (kind == "all32" and strongest == "warp")):
                more.add(pc)
                strongest = kind
    return sorted(more)


def _segment(function: Function, start: int, end: int) -> Segment:
    last = function.body[end - 1]
    name = last.parts[0]
    segment = Segment(start, end, "next", guarded=last.guard is not None)
    if name == "bra":
        segment.terminator, segment.target = "bra", target_of(function, last)
    elif name in ("exit", "ret"):
        segment.terminator = "exit"
    elif _is_barrier(last):
        segment.terminator = "bar"
    segment.collective = collective_kind(function.body[start])
    return segment


def _mark_spins(function: Function, flow: Flow) -> None:
    """Whoever closes a loop in which another thread's write may be awaited lets the others go
    first. A matter of speed alone: without it everybody still runs in the end."""
    for segment in flow.segments.values():
        if segment.terminator == "bra" and segment.target <= segment.start:
            for instr in function.body[segment.target : segment.end]:
                parts = instr.parts
                strong = {"volatile", "acquire", "relaxed", "acq_rel"} & set(parts)
                if parts[0] in ("atom", "nanosleep") or (parts[0] == "ld" and strong):
                    segment.spins = True


# ------------------------------------------------------------------------------------ liveness

_NO_RESULT = {
    "st", "red", "bra", "exit", "ret", "bar", "barrier", "membar", "fence", "trap", "brkpt",
    "nanosleep", "prefetch", "cp",
}  # fmt: skip


def _registers(x: Operand | None) -> list[int]:
    if isinstance(x, Reg):
        return [x.index]
    if isinstance(x, Not):
        return [x.operand.index]
    if isinstance(x, Pair):
        return _registers(x.first) + _registers(x.second)
    if isinstance(x, Vec):
        return [r for part in x.parts for r in _registers(part)]
    if isinstance(x, Addr):
        return _registers(x.base) if isinstance(x.base, Reg) else []
    return []


def uses_and_sets(instr: Instr) -> tuple[list[int], list[int]]:
    uses: list[int] = []
    sets: list[int] = []
    results = 0 if instr.parts[0] in _NO_RESULT else 1
    if re.match(r"(bar|barrier)(\.cta)?\.red", instr.op):
        results = 1
    for k, operand in enumerate(instr.operands):
        (sets if k < results else uses).extend(_registers(operand))
    if instr.guard is not None:
        uses.append(instr.guard[0])
        uses.extend(sets)  # what the guard leaves alone keeps its value
    return uses, sets


def _liveness(function: Function, flow: Flow) -> None:
    body, segments = function.body, flow.segments
    use: dict[int, int] = {}
    kill: dict[int, int] = {}
    for at, segment in segments.items():
        u = k = 0
        for instr in body[at : segment.end]:
            uses, sets = uses_and_sets(instr)
            for r in uses:
                if not k >> r & 1:
                    u |= 1 << r
            for r in sets:
                k |= 1 << r
        use[at], kill[at] = u, k
    live_in = dict.fromkeys(segments, 0)
    live_out = dict.fromkeys(segments, 0)
    changed = True
    order = sorted(segments, reverse=True)
    while changed:
        changed = False
        for at in order:
            out = 0
            for after in successors(segments[at]):
                out |= live_in.get(after, 0)
            now = use[at] | (out & ~kill[at])
            live_out[at] = out
            if now != live_in[at]:
                live_in[at] = now
                changed = True
    for at, segment in segments.items():
        segment.live_in = _bits(use[at])
        segment.live_out = _bits(live_out[at] & kill[at])


def successors(segment: Segment) -> list[int]:
    after = []
    if segment.terminator == "bra":
        after.append(segment.target)
    if segment.terminator in ("next", "bar") or segment.guarded:
        after.append(segment.end)
    return after


def _bits(x: int) -> tuple[int, ...]:
    found = []
    while x:
        low = x & -x
        found.append(low.bit_length() - 1)
        x ^= low
    return tuple(found)


def local_variables(function: Function) -> list[Variable]:
    return [v for v in function.variables.values() if v.space in ("local", "param")]
