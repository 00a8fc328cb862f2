"""Integer, logic and bit instructions, against Python's integers, one lane at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from .kit import WIDTH_OF, evaluate, integers

N = 320
INT = ("u16", "s16", "u32", "s32", "u64", "s64")


def bits(kind: str) -> int:
    return 8 * WIDTH_OF[kind]


def wrap(x: int, width: int) -> int:
    return x & ((1 << width) - 1)


def signed(x: int, width: int) -> int:
    x = wrap(x, width)
    return x - (1 << width) if x >> (width - 1) else x


def towards_zero(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def check(op: str, kinds: list[str], out: str, right: Callable[..., int], **fixed: object) -> None:
    """`right` of Python integers; its result is taken modulo the width of `out`."""
    inputs = [(k, fixed.get(f"x{i}", integers(k, N, i))) for i, k in enumerate(kinds)]
    names = ", ".join("{" + str(i) + "}" for i in range(len(kinds)))
    got = evaluate(f"{op} {{d}}, {names}", inputs, out)
    rows = zip(*(x.tolist() for _, x in inputs), strict=True)
    want = np.array([wrap(right(*row), bits(out)) for row in rows], got.dtype)
    wrong = np.flatnonzero(got != want)
    i = wrong[0] if len(wrong) else 0
    assert not len(wrong), (op, [x[i] for _, x in inputs], hex(got[i]), hex(want[i]))


def amounts(n: int, below: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, n).astype(np.uint32)


def not_zero(kind: str) -> np.ndarray:
    x = integers(kind, N, 1)
    return np.where(x == 0, x.dtype.type(3), x)


@pytest.mark.parametrize("kind", INT)
def test_add_sub_mul_min_max(kind: str) -> None:
    check(f"add.{kind}", [kind] * 2, kind, lambda a, b: a + b)
    check(f"sub.{kind}", [kind] * 2, kind, lambda a, b: a - b)
    check(f"mul.lo.{kind}", [kind] * 2, kind, lambda a, b: a * b)
    check(f"mul.hi.{kind}", [kind] * 2, kind, lambda a, b: (a * b) >> bits(kind))
    check(f"mad.lo.{kind}", [kind] * 3, kind, lambda a, b, c: a * b + c)
    check(f"mad.hi.{kind}", [kind] * 3, kind, lambda a, b, c: ((a * b) >> bits(kind)) + c)
    check(f"min.{kind}", [kind] * 2, kind, min)
    check(f"max.{kind}", [kind] * 2, kind, max)
    check(f"sad.{kind}", [kind] * 3, kind, lambda a, b, c: abs(a - b) + c)


@pytest.mark.parametrize("kind", INT)
def test_div_rem(kind: str) -> None:
    b = not_zero(kind)
    check(f"div.{kind}", [kind] * 2, kind, towards_zero, x1=b)
    check(f"rem.{kind}", [kind] * 2, kind, lambda a, b: a - b * towards_zero(a, b), x1=b)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_mul_wide(kind: str) -> None:
    wide = kind[0] + str(2 * bits(kind))
    check(f"mul.wide.{kind}", [kind] * 2, wide, lambda a, b: a * b)
    check(f"mad.wide.{kind}", [kind, kind, wide], wide, lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_mul24(kind: str) -> None:
    def low(a: int) -> int:
        return signed(a, 24) if kind == "s32" else a & 0xFFFFFF

    check(f"mul24.lo.{kind}", [kind] * 2, kind, lambda a, b: low(a) * low(b))
    check(f"mad24.lo.{kind}", [kind] * 3, kind, lambda a, b, c: low(a) * low(b) + c)


def test_saturating_add() -> None:
    def clamp(x: int) -> int:
        return max(-(2**31), min(2**31 - 1, x))

    check("add.sat.s32", ["s32"] * 2, "s32", lambda a, b: clamp(a + b))
    check("sub.sat.s32", ["s32"] * 2, "s32", lambda a, b: clamp(a - b))


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_neg_abs(kind: str) -> None:
    check(f"neg.{kind}", [kind], kind, lambda a: -a)
    check(f"abs.{kind}", [kind], kind, abs)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic(kind: str) -> None:
    check(f"and.{kind}", [kind] * 2, kind, lambda a, b: a & b)
    check(f"or.{kind}", [kind] * 2, kind, lambda a, b: a | b)
    check(f"xor.{kind}", [kind] * 2, kind, lambda a, b: a ^ b)
    check(f"not.{kind}", [kind], kind, lambda a: ~a)
    check(f"cnot.{kind}", [kind], kind, lambda a: int(a == 0))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_shifts_beyond_the_width(kind: str) -> None:
    n = amounts(N, 2 * bits(kind))
    check(f"shl.b{bits(kind)}", [kind, "u32"], kind, lambda a, s: a << s, x1=n)
    check(f"shr.{kind}", [kind, "u32"], kind, lambda a, s: a >> s, x1=n)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfe(kind: str) -> None:
    def field(a: int, p: int, n: int) -> int:
        width = bits(kind)
        p, n = p & 255, n & 255
        if n == 0:
            return 0
        whole = a if kind[0] == "s" else wrap(a, width)
        taken = wrap(whole >> p, n)  # Python's >> repeats the sign beyond the register
        return signed(taken, n) if kind[0] == "s" else taken

    p, n = amounts(N, bits(kind) + 8, 3), amounts(N, bits(kind) + 8, 4)
    check(f"bfe.{kind}", [kind, "u32", "u32"], kind, field, x1=p, x2=n)


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_bfi(kind: str) -> None:
    def insert(a: int, b: int, p: int, n: int) -> int:
        mask = wrap(((1 << n) - 1) << p, bits(kind))
        return (b & ~mask) | ((a << p) & mask)

    p, n = amounts(N, bits(kind) + 4, 3), amounts(N, bits(kind) + 4, 4)
    check(f"bfi.{kind}", [kind, kind, "u32", "u32"], kind, insert, x2=p, x3=n)


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_counting(kind: str) -> None:
    width = bits(kind)
    check(f"popc.{kind}", [kind], "u32", lambda a: bin(a).count("1"))
    check(f"clz.{kind}", [kind], "u32", lambda a: width - a.bit_length())
    check(f"brev.{kind}", [kind], kind, lambda a: int(f"{a:0{width}b}"[::-1], 2))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfind(kind: str) -> None:
    def top(a: int) -> int:
        return (~a if a < 0 else a).bit_length() - 1

    check(f"bfind.{kind}", [kind], "u32", top)
    check(
        f"bfind.shiftamt.{kind}", [kind], "u32",
        lambda a: -1 if top(a) < 0 else bits(kind) - 1 - top(a),
    )  # fmt: skip


def test_prmt() -> None:
    def pick(a: int, b: int, c: int) -> int:
        pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        out = 0
        for k in range(4):
            s = c >> 4 * k & 15
            byte = pool[s & 7]
            out |= (0xFF if s & 8 and byte & 128 else 0 if s & 8 else byte) << 8 * k
        return out

    check("prmt.b32", ["b32"] * 3, "b32", pick)


@pytest.mark.parametrize(
    ("mode", "bytes_of"),
    [
        ("f4e", lambda n: [(n + k) % 8 for k in range(4)]),
        ("b4e", lambda n: [(n - k) % 8 for k in range(4)]),
        ("rc8", lambda n: [n] * 4),
        ("ecl", lambda n: [max(k, n) for k in range(4)]),
        ("ecr", lambda n: [min(k, n) for k in range(4)]),
        ("rc16", lambda n: [2 * (n & 1), 2 * (n & 1) + 1] * 2),
    ],
)
def test_prmt_modes(mode: str, bytes_of: Callable[[int], list[int]]) -> None:
    def pick(a: int, b: int, c: int) -> int:
        pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        return int.from_bytes(bytes(pool[k] for k in bytes_of(c & 3)), "little")

    check(f"prmt.b32.{mode}", ["b32"] * 3, "b32", pick)


@pytest.mark.parametrize("table", [0x00, 0x80, 0x96, 0xE8, 0xCA, 0xFF, 0x1B])
def test_lop3(table: int) -> None:
    def look(a: int, b: int, c: int) -> int:
        return sum(
            (table >> ((a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1)) & 1) << k
            for k in range(32)
        )

    inputs = [("b32", integers("b32", N, i)) for i in range(3)]
    got = evaluate(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table}", inputs, "b32")
    rows = zip(*(x.tolist() for _, x in inputs), strict=True)
    assert got.tolist() == [look(*row) for row in rows]


@pytest.mark.parametrize("way", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(way: str, mode: str) -> None:
    def shift(a: int, b: int, c: int) -> int:
        n = c & 31 if mode == "wrap" else min(c, 32)
        both = b << 32 | a
        return (both << n) >> 32 if way == "l" else both >> n

    check(f"shf.{way}.{mode}.b32", ["b32"] * 3, "b32", shift, x2=amounts(N, 48))


@pytest.mark.parametrize("left", ["u32", "s32"])
@pytest.mark.parametrize("right", ["u32", "s32"])
def test_dp4a(left: str, right: str) -> None:
    def dot(a: int, b: int, c: int) -> int:
        def parts(x: int, kind: str) -> list[int]:
            found = [x >> 8 * k & 255 for k in range(4)]
            return [signed(y, 8) for y in found] if kind == "s32" else found

        return c + sum(x * y for x, y in zip(parts(a, left), parts(b, right), strict=True))

    check(f"dp4a.{left}.{right}", ["u32"] * 3, "u32", dot)


@pytest.mark.parametrize("kind", INT)
@pytest.mark.parametrize("how", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_setp_integer(kind: str, how: str) -> None:
    import operator

    inputs = [(kind, integers(kind, N, i)) for i in range(2)]
    inputs[1][1][40:80] = inputs[0][1][40:80]
    got = evaluate(f"setp.{how}.{kind} {{d}}, {{0}}, {{1}}", inputs, "u32", "pred")
    test = getattr(operator, how)
    rows = zip(*(x.tolist() for _, x in inputs), strict=True)
    assert got.tolist() == [int(test(a, b)) for a, b in rows]


@pytest.mark.parametrize(("how", "test"), [("lo", "<"), ("ls", "<="), ("hi", ">"), ("hs", ">=")])
def test_setp_unsigned_names(how: str, test: str) -> None:
    a, b = integers("u32", N, 0), integers("u32", N, 1)
    got = evaluate(f"setp.{how}.u32 {{d}}, {{0}}, {{1}}", [("u32", a), ("u32", b)], "u32", "pred")
    assert got.tolist() == [int(eval(f"{x} {test} {y}")) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("join", ["and", "or", "xor"])
def test_setp_joined_and_both_results(join: str) -> None:
    """p = (a < b) op c; q = !(a < b) op c."""
    import operator

    a, b, c = (integers("s32", N, i) for i in range(3))
    text = (
        f"setp.gt.s32 %p2, {{2}}, 0; setp.lt.{join}.s32 %p1|%p3, {{0}}, {{1}}, %p2; "
        "selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p3; add.u32 {d}, %r1, %r2"
    )
    got = evaluate(text, [("s32", a), ("s32", b), ("s32", c)], "u32")
    op = getattr(operator, join + "_" if join != "xor" else "xor")
    want = [
        int(op(x < y, z > 0)) + 2 * int(op(not x < y, z > 0))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert got.tolist() == want


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "f32", "f64", "u32"])
def test_selp_and_slct(kind: str) -> None:
    raw = f"b{bits(kind)}"
    a, b, c = integers(raw, N, 0), integers(raw, N, 1), integers("s32", N, 2)
    inputs = [(raw, a), (raw, b), ("s32", c)]
    got = evaluate(f"setp.ge.s32 %p2, {{2}}, 5; selp.{kind} {{d}}, {{0}}, {{1}}, %p2", inputs, raw)
    assert (got == np.array([x if z >= 5 else y for x, y, z in zip(a, b, c, strict=True)])).all()
    got = evaluate(f"slct.{kind}.s32 {{d}}, {{0}}, {{1}}, {{2}}", inputs, raw)
    assert (got == np.array([x if z >= 0 else y for x, y, z in zip(a, b, c, strict=True)])).all()


@pytest.mark.parametrize("out", ["u32", "s32", "u16", "f32"])
def test_set_integer(out: str) -> None:
    a, b = integers("s32", N, 0), integers("s32", N, 1)
    got = evaluate(f"set.le.{out}.s32 {{d}}, {{0}}, {{1}}", [("s32", a), ("s32", b)], out)
    yes = {"f32": 0x3F800000, "u16": 0xFFFF}.get(out, 0xFFFFFFFF)
    assert got.tolist() == [yes if x <= y else 0 for x, y in zip(a, b, strict=True)]


def test_predicate_logic() -> None:
    a, b = integers("b32", N, 0), integers("b32", N, 1)
    text = (
        "setp.gt.s32 %p2, {0}, 0; setp.gt.s32 %p3, {1}, 0; and.pred %p4, %p2, %p3; "
        "or.pred %p5, %p2, %p3; xor.pred %p6, %p4, %p5; not.pred %p7, %p6; mov.pred %p1, %p7"
    )
    got = evaluate(text, [("b32", a), ("b32", b)], "u32", "pred")
    x, y = a.view(np.int32) > 0, b.view(np.int32) > 0
    assert (got == ~((x & y) ^ (x | y))).all()


def test_mov_packs_and_unpacks() -> None:
    a, b = integers("b32", N, 0), integers("b32", N, 1)
    got = evaluate("mov.b64 {d}, {{0}, {1}}".replace("{{", "{ {").replace("}}", "} }"),
                   [("b32", a), ("b32", b)], "b64")  # fmt: skip
    assert got.tolist() == [y << 32 | x for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    text = "mov.b32 {%h1, %h2}, {0}; mov.b32 {d}, {%h2, %h1}"
    got = evaluate(text, [("b32", a)], "b32")
    assert got.tolist() == [(x >> 16 | x << 16) & 0xFFFFFFFF for x in a.tolist()]
    got = evaluate(
        "mov.b64 {_, %r1}, {0}; mov.b32 {d}, %r1", [("b64", integers("b64", N, 3))], "b32"
    )
    assert got.tolist() == [x >> 32 for x in integers("b64", N, 3).tolist()]


@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_cvt_between_integers(to: str, source: str) -> None:
    x = integers(source, N, 0)
    target = to if WIDTH_OF[to] > 1 else to[0] + "16"  # an 8-bit result sits in a wider register
    got = evaluate(f"cvt.{to}.{source} {{d}}, {{0}}", [(source, x)], target)
    width = bits(to)

    def value(a: int) -> int:
        return signed(a, width) if to[0] == "s" else wrap(a, width)

    assert got.tolist() == [wrap(value(a), bits(target)) for a in x.tolist()]
    if WIDTH_OF[to] > 1:
        low, high = (
            (-(1 << width - 1), (1 << width - 1) - 1) if to[0] == "s" else (0, (1 << width) - 1)
        )
        got = evaluate(f"cvt.sat.{to}.{source} {{d}}, {{0}}", [(source, x)], to)
        assert got.tolist() == [wrap(max(low, min(high, a)), width) for a in x.tolist()]


def test_immediates() -> None:
    a = integers("s32", N, 0)
    got = evaluate("add.s32 {d}, {0}, -3", [("s32", a)], "s32")
    assert got.tolist() == [wrap(x - 3, 32) for x in a.tolist()]
    got = evaluate("and.b32 {d}, {0}, 0xFF00U", [("b32", a.view(np.uint32))], "b32")
    assert got.tolist() == [x & 0xFF00 for x in a.view(np.uint32).tolist()]
    got = evaluate("shl.b32 %r1, 3, 4; sub.u32 {d}, %r1, 50", [("u32", a.view(np.uint32))], "u32")
    assert set(got.tolist()) == {wrap(-2, 32)}
