"""Warp-wide and block-wide instructions (PTX ISA 9.7.9, 9.7.13 to 9.7.15)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .emit import Emitter, family
from .syntax import Addr, Operand, Pair, Reg


def _array(e: Emitter, x: Operand, kind: str) -> str:
    return f"full(n, {e.use(x, kind)})" if e.uniform(x) else e.use(x, kind)


def _sync(e: Emitter) -> None:
    if not e.flag("sync"):
        e.fail("without .sync is not supported (removed from sm_70 on)")


@family("shfl")
def shfl(e: Emitter, mods: list[str]) -> None:
    _sync(e)
    mode = e.flag("up", "down", "bfly", "idx")
    if mods.pop() != "b32" or not mode:
        e.fail()
    e.only()
    d, a, b, c, mask = e.ops
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    targets: list[Operand | None] = [first, second]
    args = ", ".join(_array(e, x, "u32") for x in (a, b, c, mask))
    call = (
        f"m.shfl({e.instr.pc}, g, {mode!r}, {args}, {e.guard_or_none()}, "
        f"{_olds(e, targets, ['U32', 'np.bool_'])})"
    )
    e.multi(targets, call)


def _olds(e: Emitter, targets: list[Operand | None], kinds: list[str]) -> str:
    if e.instr.guard is None:
        return "None"
    names = [
        f"r{x.index}" if isinstance(x, Reg) else f"np.zeros(n, {kind})"
        for x, kind in zip(targets, kinds, strict=True)
    ]
    return f"({', '.join(names)},)"


@family("vote")
def vote(e: Emitter, mods: list[str]) -> None:
    _sync(e)
    mode = e.flag("all", "any", "uni", "ballot")
    kind = mods.pop()
    e.only()
    if not mode or kind != ("b32" if mode == "ballot" else "pred"):
        e.fail()
    d, p, mask = e.ops
    args = f"{_array(e, p, 'pred')}, {_array(e, mask, 'u32')}"
    call = f"m.vote({e.instr.pc}, g, {mode!r}, {args}, {e.guard_or_none()}, {e.olds([d])})"
    e.multi([d], call)


@family("redux")
def redux(e: Emitter, mods: list[str]) -> None:
    _sync(e)
    op = e.flag("add", "min", "max", "and", "or", "xor")
    kind = mods.pop()
    e.only()
    if not op or kind not in ("u32", "s32", "b32"):
        e.fail()
    d, a, mask = e.ops
    args = f"{_array(e, a, 'u32')}, {_array(e, mask, 'u32')}"
    signed = kind == "s32"
    call = f"m.redux({e.instr.pc}, g, {op!r}, {signed}, {args}, {e.guard_or_none()}, {e.olds([d])})"
    e.multi([d], call)


@family("match")
def match(e: Emitter, mods: list[str]) -> None:
    _sync(e)
    mode = e.flag("any", "all")
    kind = mods.pop()
    e.only()
    if mode != "any" or kind not in ("b32", "b64"):
        e.fail()
    d, a, mask = e.ops
    args = f"{_array(e, a, kind)}, {_array(e, mask, 'u32')}"
    e.multi([d], f"m.match({e.instr.pc}, g, {args}, {e.guard_or_none()}, {e.olds([d])})")


@family("activemask")
def activemask(e: Emitter, mods: list[str]) -> None:
    e.mods.pop()
    e.only()
    e.set(e.ops[0], f"m.activemask(g, {e.guard_or_none()})", "u32")


# ------------------------------------------------------------------------------ tensor cores


@family("ldmatrix")
def ldmatrix(e: Emitter, mods: list[str]) -> None:
    _aligned(e)
    number = e.flag("x1", "x2", "x4")
    trans = bool(e.flag("trans"))
    e.flag("shared", "shared::cta") or e.fail("(generic address)")
    if not e.flag("m8n8") or mods.pop() != "b16" or not number:
        e.fail()
    e.only()
    d, address = e.ops
    targets = e.vector(d)
    if len(targets) != int(number[1]) or not isinstance(address, Addr):
        e.fail()
    from .emit_memory import Access, _address

    e.t.described[e.instr.pc] = Access("matrix", "shared", 16)
    at = _address(e, address, "shared")
    e.multi(targets, f"m.ldmatrix({e.instr.pc}, g, {int(number[1])}, {trans}, {at})")


@family("movmatrix")
def movmatrix(e: Emitter, mods: list[str]) -> None:
    _aligned(e)
    if not e.flag("trans") or not e.flag("m8n8") or mods.pop() != "b16":
        e.fail()
    e.only()
    d, a = e.ops
    e.set(d, f"m.movmatrix(g, {_array(e, a, 'u32')})", "u32")


def _aligned(e: Emitter) -> None:
    if not e.flag("sync") or not e.flag("aligned"):
        e.fail()
    if e.instr.guard is not None:
        e.fail("with a guard is not supported")


@dataclass(frozen=True)
class Product:
    """Of one mma shape: what the fragments hold."""

    k: int
    kind: str  # of A and B: f16, bf16, tf32
    a: int  # registers of A
    b: int
    acc: str  # f32, f16


_PRODUCTS = {
    ("m16n8k16", "f16"): (16, 4, 2), ("m16n8k16", "bf16"): (16, 4, 2),
    ("m16n8k8", "f16"): (8, 2, 1), ("m16n8k8", "bf16"): (8, 2, 1),
    ("m16n8k8", "tf32"): (8, 4, 2), ("m16n8k4", "tf32"): (4, 2, 1),
}  # fmt: skip


@family("mma")
def mma(e: Emitter, mods: list[str]) -> None:
    _aligned(e)
    match = re.fullmatch(
        r"(m\d+n\d+k\d+)\.row\.col\.(f32|f16)\.(\w+)\.(\w+)\.(f32|f16)", ".".join(mods)
    )
    if match is None or match[3] != match[4] or match[2] != match[5]:
        e.fail()
    shape = _PRODUCTS.get((match[1], match[3]))
    if shape is None or (match[2] == "f16" and match[3] != "f16"):
        e.fail()
    product = Product(shape[0], match[3], shape[1], shape[2], match[2])
    d, a, b, c = (e.vector(x) for x in e.ops)
    accumulators = 4 if product.acc == "f32" else 2
    wanted = (accumulators, product.a, product.b, accumulators)
    if tuple(len(x) for x in (d, a, b, c)) != wanted:
        e.fail(f"wants fragments of {wanted} registers")
    args = [f"({', '.join(_array(e, y, 'b32') for y in x)},)" for x in (a, b, c)]
    e.multi(d, f"m.mma({e.const(product)}, n, {', '.join(args)})")


# ------------------------------------------------------------------------- barriers and fences


@dataclass
class Barrier:
    """Of one bar or barrier instruction."""

    what: str  # sync, arrive, red
    op: str = ""  # of red: popc, and, or
    aligned: bool = True
    counted: bool = False  # a thread count is given


@family("bar", "barrier")
def barrier(e: Emitter, mods: list[str]) -> None:
    name = e.instr.parts[0]
    if name == "bar" and e.flag("warp"):
        _sync(e)
        e.only()
        mask = _array(e, e.ops[0], "u32")
        e.lines.append(f"m.warp_barrier({e.instr.pc}, g, {mask}, {e.guard_or_none()})")
        return
    aligned = name == "bar" or bool(e.flag("aligned"))
    e.flag("cta")
    what = e.flag("sync", "arrive", "red")
    op = e.flag("popc", "and", "or") if what == "red" else ""
    kind = mods.pop() if what == "red" and mods else ""
    e.only()
    if not what or (what == "red" and kind != ("u32" if op == "popc" else "pred")):
        e.fail()
    operands = list(e.ops)
    if what == "red":
        operands.pop(0)
    predicate = operands.pop() if what == "red" else None
    counted = len(operands) > 1
    if what == "arrive" and not counted:
        e.fail("needs a thread count")
    e.t.described[e.instr.pc] = Barrier(what, op, aligned, counted)
    args = [_array(e, operands[0], "u32"), _array(e, operands[1], "u32") if counted else "None"]
    args.append(_array(e, predicate, "pred") if predicate is not None else "None")
    args.append(e.guard_or_none())
    e.lines.append(f"return ({', '.join(args)})")


@family("membar", "fence")
def fence(e: Emitter, mods: list[str]) -> None:
    name = e.instr.parts[0]
    if name == "membar":
        scope = {"cta": 1, "gl": 2, "sys": 3}.get(e.flag("cta", "gl", "sys"))
    else:
        e.flag("sc", "acq_rel")
        scope = {"cta": 1, "cluster": 2, "gpu": 2, "sys": 3}.get(
            e.flag("cta", "cluster", "gpu", "sys")
        )
    e.only()
    if scope is None:
        e.fail()
    e.lines.append(f"m.fence(g, {scope}, {e.guard_or_none()})")
