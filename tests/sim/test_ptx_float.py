"""Floating point: exact instructions against rational arithmetic rounded by integers, approximate
ones against float64 within the bounds of the PTX manual, fma also against libm."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from .kit import bf16_bits, bf16_values, evaluate, exactly, floats, same_floats

N = 320
DTYPE = {"f32": np.float32, "f64": np.float64}


def as_float(bits: np.ndarray) -> np.ndarray:
    return bits.view(f"f{bits.itemsize}")


def exact(form: str, mode: str, right: Callable[..., Fraction], *x: float) -> float:
    """Rounded once; infinities and NaN by way of numpy, signs of zero by IEEE's rules."""
    if all(math.isfinite(v) for v in x):
        try:
            value = right(*(Fraction(v) for v in x))
        except ZeroDivisionError:
            value = None
        if value is not None and value != 0:
            out = exactly(value, form, mode)
            return math.copysign(out, 1 if value > 0 else -1)
    with np.errstate(all="ignore"):
        return float(right(*(np.float64(v) for v in x)))


def check(
    op: str, form: str, n: int, right: Callable[..., Fraction], mode: str = "rn",
    zeros: bool = True,
) -> None:  # fmt: skip
    inputs = [(form, floats(form, N, i)) for i in range(n)]
    names = ", ".join("{" + str(i) + "}" for i in range(n))
    got = as_float(evaluate(f"{op} {{d}}, {names}", inputs, form))
    rows = list(zip(*(x.tolist() for _, x in inputs), strict=True))
    want = np.array([exact(form, mode, right, *row) for row in rows]).astype(DTYPE[form])
    good = same_floats(got, want) if zeros else ((got == want) | (np.isnan(got) & np.isnan(want)))
    i = int(np.argmin(good))
    assert good.all(), (op, rows[i], got[i], want[i])


@pytest.mark.parametrize("form", ["f32", "f64"])
def test_exact_arithmetic(form: str) -> None:
    check(f"add.{form}", form, 2, lambda a, b: a + b)
    check(f"sub.{form}", form, 2, lambda a, b: a - b)
    check(f"mul.{form}", form, 2, lambda a, b: a * b)
    check(f"div.rn.{form}", form, 2, lambda a, b: a / b)
    check(f"rcp.rn.{form}", form, 1, lambda a: 1 / a)
    check(f"fma.rn.{form}", form, 3, lambda a, b, c: a * b + c)
    check(f"neg.{form}", form, 1, lambda a: -a)
    check(f"abs.{form}", form, 1, abs)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode: str) -> None:
    """Signs of zero results are compared where no exact cancellation happens."""
    check(f"add.{mode}.f32", "f32", 2, lambda a, b: a + b, mode, zeros=False)
    check(f"sub.{mode}.f32", "f32", 2, lambda a, b: a - b, mode, zeros=False)
    check(f"mul.{mode}.f32", "f32", 2, lambda a, b: a * b, mode)
    check(f"div.{mode}.f32", "f32", 2, lambda a, b: a / b, mode)
    check(f"fma.{mode}.f32", "f32", 3, lambda a, b, c: a * b + c, mode, zeros=False)


@pytest.mark.parametrize("form", ["f32", "f64"])
def test_sqrt(form: str) -> None:
    x = np.abs(floats(form, N, 2, special=False))
    got = as_float(evaluate(f"sqrt.rn.{form} {{d}}, {{0}}", [(form, x)], form))
    for a, r in zip(x.tolist(), got.tolist(), strict=True):
        # r is nearest: a lies between the squares of the midpoints to its neighbours.
        r = DTYPE[form](r)
        low, high = (
            Fraction(float(np.nextafter(r, s))) for s in (DTYPE[form](0), DTYPE[form](np.inf))
        )
        mid = Fraction(float(r))
        assert ((low + mid) / 2) ** 2 <= Fraction(a) <= ((mid + high) / 2) ** 2


def test_fma_rounds_once() -> None:
    """Products whose sum with c is a tie of fp32 but for a bit far below what float64 keeps."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    libm.fma.restype, libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    rng = np.random.default_rng(0)
    n = 512
    a = (1 + rng.integers(0, 1 << 12, n) * 2.0**-12).astype(np.float32)
    b = (1 + rng.integers(0, 1 << 12, n) * 2.0**-12).astype(np.float32)
    c = (a.astype(np.float64) * b * 2.0**-24 + 2.0 ** rng.integers(-60, 40, n)).astype(np.float32)
    c = np.where(rng.random(n) < 0.5, c, -c).astype(np.float32)
    # 2^24 + 1 is a tie; the third operand tips it, whatever its size.
    a[:64], b[:64] = 2.0**12 + 1, 2.0**12
    c[:64] = np.ldexp(np.where(np.arange(64) % 2, 1.0, -1.0), -np.arange(64)).astype(np.float32)
    a[64:96], b[64:96] = 4097.0, 4097.0  # 2^24 + 2^13 + 1
    c[64:96] = np.ldexp(1.0, -np.arange(30, 62)).astype(np.float32)
    tiny = np.float32(2.0**-149)
    a[96:128], b[96:128], c[96:128] = tiny, np.float32(0.5), tiny * np.arange(32, dtype=np.float32)
    got = as_float(
        evaluate("fma.rn.f32 {d}, {0}, {1}, {2}", [("f32", x) for x in (a, b, c)], "f32")
    )
    want = np.array([libm.fmaf(*row) for row in zip(*(x.tolist() for x in (a, b, c)), strict=True)])
    assert (got == want.astype(np.float32)).all()
    naive = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (naive != got).any(), "these inputs would not see a second rounding"
    x = [floats("f64", n, i) for i in range(3)]
    x[2][256:] = -(x[0][256:] * x[1][256:])  # what is left is the product's error
    got = as_float(evaluate("fma.rn.f64 {d}, {0}, {1}, {2}", [("f64", v) for v in x], "f64"))
    want = np.array([libm.fma(*row) for row in zip(*(v.tolist() for v in x), strict=True)])
    assert same_floats(got, want).all()


def test_ftz_flushes_inputs_and_results() -> None:
    small = np.float32(2.0**-130)
    a = np.array([small, -small, 2.0**-100, -(2.0**-100), 1.0, small], np.float32)
    b = np.array([1.0, 1.0, 2.0**-30, 2.0**-30, 2.0**-130, small], np.float32)
    got = as_float(evaluate("mul.ftz.f32 {d}, {0}, {1}", [("f32", a), ("f32", b)], "f32"))
    assert got.view("u4").tolist() == [0, 1 << 31, 0, 1 << 31, 0, 0]
    got = as_float(evaluate("add.ftz.f32 {d}, {0}, {1}", [("f32", a), ("f32", b)], "f32"))
    assert got.tolist() == [1.0, 1.0, np.float32(2.0**-30), np.float32(2.0**-30), 1.0, 0.0]
    got = as_float(evaluate("add.f32 {d}, {0}, {1}", [("f32", a), ("f32", b)], "f32"))
    assert got[5] == 2 * small
    got = as_float(evaluate("sub.ftz.f32 {d}, {0}, {1}", [("f32", a), ("f32", a)], "f32"))
    assert (got == 0).all()
    got = as_float(evaluate("fma.rn.ftz.f32 {d}, {0}, {1}, {0}", [("f32", a), ("f32", b)], "f32"))
    assert got[0] == 0
    assert got[4] == 1


def test_saturation() -> None:
    a, b = floats("f32", N, 0), floats("f32", N, 1)
    got = as_float(evaluate("add.sat.f32 {d}, {0}, {1}", [("f32", a), ("f32", b)], "f32"))
    with np.errstate(all="ignore"):
        s = a + b
    want = [0.0 if math.isnan(x) else min(max(x, 0.0), 1.0) for x in s.tolist()]
    assert got.tolist() == [np.float32(x) for x in want]


@pytest.mark.parametrize("form", ["f32", "f64"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_min_max(form: str, name: str) -> None:
    a, b = floats(form, N, 0), floats(form, N, 1)

    def right(x: float, y: float) -> float:
        if math.isnan(x) or math.isnan(y):
            return y if math.isnan(x) else x
        if x == y == 0:
            signs = (math.copysign(1, x), math.copysign(1, y))
            return math.copysign(0.0, min(signs) if name == "min" else max(signs))
        return min(x, y) if name == "min" else max(x, y)

    got = as_float(evaluate(f"{name}.{form} {{d}}, {{0}}, {{1}}", [(form, a), (form, b)], form))
    want = np.array([right(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    assert same_floats(got, want.astype(DTYPE[form])).all()
    if form == "f32":
        got = as_float(
            evaluate(f"{name}.NaN.f32 {{d}}, {{0}}, {{1}}", [(form, a), (form, b)], form)
        )
        assert (np.isnan(got) == (np.isnan(a) | np.isnan(b))).all()


BOUNDS = {  # PTX ISA: largest error in ulp, or absolute (lg2, sin, cos)
    "rcp.approx.f32": (lambda x: 1 / x, 1.0), "rcp.approx.ftz.f32": (lambda x: 1 / x, 1.0),
    "sqrt.approx.f32": (math.sqrt, 2.0), "rsqrt.approx.f32": (lambda x: 1 / math.sqrt(x), 2.0),
    "ex2.approx.f32": (lambda x: 2.0**x, 2.0), "ex2.approx.ftz.f32": (lambda x: 2.0**x, 2.0),
    "lg2.approx.f32": (math.log2, 2.0), "sin.approx.f32": (math.sin, 2.0),
    "cos.approx.f32": (math.cos, 2.0), "tanh.approx.f32": (math.tanh, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("op", BOUNDS)
def test_approximations(op: str) -> None:
    right, ulps = BOUNDS[op]
    x = np.abs(floats("f32", N, 3, special=False)) % 100 + np.float32(0.001)
    got = as_float(evaluate(f"{op} {{d}}, {{0}}", [("f32", x)], "f32")).astype(np.float64)
    want = np.array([right(v) for v in x.astype(np.float64).tolist()])
    assert (np.abs(got - want) <= ulps * np.spacing(np.abs(want).astype(np.float32))).all()


def test_approximations_at_the_edges() -> None:
    inf, nan, small = np.inf, np.nan, np.float32(2.0**-130)
    cases = {
        "ex2.approx.f32": ([-inf, inf, nan, 0.0, -140.0, 128.0], [0, inf, nan, 1, 2.0**-140, inf]),
        "ex2.approx.ftz.f32": ([-130.0, small], [0.0, 1.0]),
        "lg2.approx.f32": ([0.0, -0.0, inf, -1.0], [-inf, -inf, inf, nan]),
        "lg2.approx.ftz.f32": ([small], [-inf]),
        "rcp.approx.f32": ([0.0, -0.0, inf, -inf, 2.0**-127], [inf, -inf, 0.0, -0.0, 2.0**127]),
        "rcp.approx.ftz.f32": ([small, -small], [inf, -inf]),
        "rsqrt.approx.f32": ([0.0, -0.0, inf, -1.0], [inf, -inf, 0.0, nan]),
        "sqrt.approx.ftz.f32": ([small, 4.0], [0.0, 2.0]),
        "tanh.approx.f32": ([inf, -inf], [1.0, -1.0]),
    }
    for op, (given, right) in cases.items():
        x = np.array(given, np.float32)
        got = as_float(evaluate(f"{op} {{d}}, {{0}}", [("f32", x)], "f32"))
        assert same_floats(got, np.array(right, np.float32)).all(), (op, got)


def test_division_forms() -> None:
    a, b = floats("f32", N, 0, False), floats("f32", N, 1, False)
    want = a.astype(np.float64) / b
    for op in ("div.full.f32", "div.approx.f32", "div.full.ftz.f32"):
        got = as_float(evaluate(f"{op} {{d}}, {{0}}, {{1}}", [("f32", a), ("f32", b)], "f32"))
        assert (np.abs(got - want) <= 2 * np.spacing(np.abs(want).astype(np.float32))).all()


@pytest.mark.parametrize("form", ["f32", "f64"])
def test_copysign_and_testp(form: str) -> None:
    a, b = floats(form, N, 0), floats(form, N, 1)
    got = as_float(evaluate(f"copysign.{form} {{d}}, {{0}}, {{1}}", [(form, a), (form, b)], form))
    want = [math.copysign(y, x) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert same_floats(got, np.array(want, DTYPE[form])).all()
    tiny = float(np.finfo(DTYPE[form]).tiny)
    tests: dict[str, Callable[[float], bool]] = {
        "finite": math.isfinite, "infinite": math.isinf, "notanumber": math.isnan,
        "number": lambda v: not math.isnan(v),
        "normal": lambda v: math.isfinite(v) and abs(v) >= tiny,
        "subnormal": lambda v: 0 < abs(v) < tiny,
    }  # fmt: skip
    for name, right in tests.items():
        got = evaluate(f"testp.{name}.{form} {{d}}, {{0}}", [(form, a)], "u32", "pred")
        assert got.tolist() == [int(right(v)) for v in a.tolist()], name


@pytest.mark.parametrize("form", ["f32", "f64", "f16", "bf16"])
def test_setp_float(form: str) -> None:
    if form in ("f32", "f64"):
        a, b = floats(form, N, 0), floats(form, N, 1)
        inputs = [(form, a), (form, b)]
    else:
        bits = [_halves(form, floats("f32", N, i)) for i in range(2)]
        inputs = [(form, x) for x in bits]
        a, b = (_values(form, x) for x in bits)
    rows = list(zip(a.tolist(), b.tolist(), strict=True))
    ordered: dict[str, Callable[[float, float], bool]] = {
        "eq": lambda x, y: x == y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
        "ne": lambda x, y: x < y or x > y,
    }  # fmt: skip

    def nan(x: float, y: float) -> bool:
        return math.isnan(x) or math.isnan(y)

    def result(how: str) -> list[int]:
        got = evaluate(f"setp.{how}.{form} {{d}}, {{0}}, {{1}}", inputs, "u32", "pred")
        found: list[int] = got.tolist()
        return found

    for how, right in ordered.items():
        assert result(how) == [int(right(x, y)) for x, y in rows], how
        assert result(how + "u") == [int(nan(x, y) or right(x, y)) for x, y in rows], how
    assert result("nan") == [int(nan(x, y)) for x, y in rows]
    assert result("num") == [int(not nan(x, y)) for x, y in rows]


def test_set_float() -> None:
    a, b = floats("f32", N, 0), floats("f32", N, 1)
    for out, yes in (("u32", 0xFFFFFFFF), ("f32", 0x3F800000)):
        got = evaluate(f"set.gt.{out}.f32 {{d}}, {{0}}, {{1}}", [("f32", a), ("f32", b)], out)
        assert got.tolist() == [yes if x > y else 0 for x, y in zip(a, b, strict=True)]
    h = [_halves("f16", x) for x in (a, b)]
    got = evaluate("set.eq.f16.f16 {d}, {0}, {1}", [("f16", h[0]), ("f16", h[1])], "f16")
    x, y = (v.view(np.float16) for v in h)
    assert got.tolist() == [0x3C00 if p == q else 0 for p, q in zip(x, y, strict=True)]


# ------------------------------------------------------------------------------- fp16 and bf16


def _halves(form: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return x.astype(np.float16).view("u2") if form == "f16" else bf16_bits(x)


def _values(form: str, bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32) if form == "f16" else bf16_values(bits)


def _half_check(op: str, form: str, n: int, right: Callable[..., Fraction], packed: bool) -> None:
    bits = [_halves(form, floats("f32", N, i)) for i in range(n)]
    values = [_values(form, x) for x in bits]
    rows = zip(*(x.tolist() for x in values), strict=True)
    want = np.array([exact(form, "rn", right, *row) for row in rows])
    names = ", ".join("{" + str(i) + "}" for i in range(n))
    if packed:
        inputs = [(f"{form}x2", x.view("u4")) for x in bits]
        got = evaluate(f"{op}.{form}x2 {{d}}, {names}", inputs, f"{form}x2").view("u2")
    else:
        got = evaluate(f"{op}.{form} {{d}}, {names}", [(form, x) for x in bits], form)
    good = same_floats(_values(form, got), want.astype(np.float32))
    i = int(np.argmin(good))
    assert good.all(), (op, form, [v[i] for v in values], _values(form, got)[i], want[i])


@pytest.mark.parametrize("packed", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("form", ["f16", "bf16"])
def test_half_arithmetic(form: str, packed: bool) -> None:
    """add, sub and mul of bf16 need sm_90 in hardware; nvcc makes them of fma here."""
    if form == "f16":
        _half_check("add", form, 2, lambda a, b: a + b, packed)
        _half_check("sub", form, 2, lambda a, b: a - b, packed)
        _half_check("mul", form, 2, lambda a, b: a * b, packed)
    _half_check("fma.rn", form, 3, lambda a, b, c: a * b + c, packed)
    _half_check("neg", form, 1, lambda a: -a, packed)
    _half_check("abs", form, 1, abs, packed)


@pytest.mark.parametrize("form", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_half_min_max(form: str, name: str) -> None:
    bits = [_halves(form, floats("f32", N, i)) for i in range(2)]
    a, b = (_values(form, x) for x in bits)
    with np.errstate(all="ignore"):
        want = (np.fmin if name == "min" else np.fmax)(a, b)
    got = evaluate(f"{name}.{form} {{d}}, {{0}}, {{1}}", [(form, x) for x in bits], form)
    values = _values(form, got)
    assert ((values == want) | (np.isnan(values) & np.isnan(want))).all()
    inputs = [(f"{form}x2", x.view("u4")) for x in bits]
    got = evaluate(f"{name}.NaN.{form}x2 {{d}}, {{0}}, {{1}}", inputs, f"{form}x2").view("u2")
    assert (np.isnan(_values(form, got)) == (np.isnan(a) | np.isnan(b))).all()


def test_half_relu_and_approximations() -> None:
    bits = [_halves("f16", floats("f32", N, i)) for i in range(3)]
    plain = evaluate("fma.rn.f16 {d}, {0}, {1}, {2}", [("f16", x) for x in bits], "f16")
    relu = evaluate("fma.rn.relu.f16 {d}, {0}, {1}, {2}", [("f16", x) for x in bits], "f16")
    x, y = plain.view(np.float16), relu.view(np.float16)
    assert (np.where(x > 0, x, 0)[~np.isnan(x)] == y[~np.isnan(x)]).all()
    small = _halves("f16", np.linspace(-4, 4, N, dtype=np.float32))
    for op, right in (("ex2.approx.f16", np.exp2), ("tanh.approx.f16", np.tanh)):
        got = evaluate(f"{op} {{d}}, {{0}}", [("f16", small)], "f16").view(np.float16)
        want = right(small.view(np.float16).astype(np.float64))
        assert (np.abs(got - want) <= 2.0**-9 * np.maximum(np.abs(want), 2.0**-10)).all()
