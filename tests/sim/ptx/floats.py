"""Floating point as PTX defines it, on arrays of register bits.

Values travel as float64 where that is exact: fp32, fp16 and bf16 operands and their products fit.
A sum of such a product and a third operand is rounded twice if it is first rounded to float64, so
`rounded` gets the error of the sum as well and rounds once (to odd in between, Boldo and
Melquiond, "Emulation of FMA and correctly rounded sums", 2008).

NaNs keep numpy's payload, where hardware gives 0x7fffffff. The `.approx` functions are computed in
float64 and rounded: hardware differs in the last bits, within the bounds of the PTX manual.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray  # register bits (uint16, uint32, uint64) or values, one a lane

F32_TINY = np.float32(2.0**-126)
U16, U32, U64 = np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64


def f32(bits: Array) -> Array:
    return bits.view(F32)


def f64(bits: Array) -> Array:
    return bits.view(F64)


# ------------------------------------------------------------------- 16-bit formats to and from


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(U32) << U32(16)).view(F32)


def f16_to_f32(bits: Array) -> Array:
    return bits.view(F16).astype(F32)


def ftz(x: Array) -> Array:
    """fp32 values, subnormals as zeros of their sign."""
    bits = x.view(U32)
    low = (bits & U32(0x7F800000)) == 0
    return np.where(low, bits & U32(0x80000000), bits).view(F32)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def to_odd(s: Array, e: Array) -> Array:
    """s + e rounded to odd, where s is their sum rounded to nearest and e its error."""
    bits = s.view(np.int64)
    fix = (e != 0) & ((bits & 1) == 0) & np.isfinite(s) & np.isfinite(e)
    step = np.where((e > 0) == (s > 0), 1, -1)
    return np.where(fix, bits + step, bits).view(F64)


def round_bits(x: Array, mantissa: int, emin: int, emax: int, mode: str) -> Array:
    """float64 values to a format of `mantissa` stored bits, as float64 values.

    emin: exponent of the smallest normal number; emax: of the largest. mode: rn, rna (ties away),
    rz, rm, rp. x must be exact or rounded to odd.
    """
    _, e = np.frexp(np.abs(x))  # |x| = m 2^e, m in [1/2, 1)
    ulp = np.maximum(e - 1, emin) - mantissa
    scaled = np.ldexp(np.abs(x), -ulp)
    low = np.floor(scaled)
    part = scaled - low
    if mode == "rn":
        up = (part > 0.5) | ((part == 0.5) & (np.mod(low, 2) == 1))
    elif mode == "rna":
        up = part >= 0.5
    elif mode == "rz":
        up = np.zeros(x.shape, bool)
    else:
        up = (part > 0) & (np.signbit(x) if mode == "rm" else ~np.signbit(x))
    out = np.ldexp(low + up, ulp)
    largest = (2.0 - 2.0**-mantissa) * 2.0**emax
    to_inf = {"rn": True, "rna": True, "rz": False}.get(
        mode, np.signbit(x) if mode == "rm" else ~np.signbit(x)
    )
    out = np.where(out > largest, np.where(to_inf, np.inf, largest), out)
    out = np.where(np.isfinite(x), out, np.abs(x))
    return np.copysign(out, x)


_FORMATS = {"f32": (23, -126, 127), "f16": (10, -14, 15), "bf16": (7, -126, 127),
            "tf32": (10, -126, 127)}  # fmt: skip


def rounded(s: Array, e: Array | None, mode: str = "rn") -> Array:
    """s (+ its error e) as fp32 values, rounded once."""
    if mode == "rn":
        out = s.astype(F32)
        if e is None:
            return out
        hard = ((s.view(np.int64) & 0x1FFFFFFF) == 0x10000000) & (e != 0)
        small = (np.abs(out) <= F32_TINY) & (e != 0)
        hard |= small
        if hard.any():
            out[hard] = to_odd(s[hard], e[hard]).astype(F32)
        return out
    return round_bits(s if e is None else to_odd(s, e), *_FORMATS["f32"], mode).astype(F32)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Round to nearest, the most frequent instruction of all: the error is computed only where the
    sum in float64 looks like a tie of fp32, or may be subnormal."""
    p = a.astype(F64) * b
    s = p + c
    out = s.astype(F32)
    hard = (s.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    hard |= (np.abs(out) <= F32_TINY) & (s != 0)
    if hard.any():
        c = np.broadcast_to(c, s.shape)[hard].astype(F64)
        t, e = two_sum(p[hard], c)
        out[hard] = to_odd(t, e).astype(F32)
    return out


def fma32_mode(a: Array, b: Array, c: Array, mode: str) -> Array:
    s, e = two_sum(a.astype(F64) * b, np.broadcast_to(c, a.shape).astype(F64))
    s = _zero_sum(s, e, mode)
    return rounded(s, e, mode)


def _zero_sum(s: Array, e: Array, mode: str) -> Array:
    """x + -x is -0 when rounding down."""
    if mode != "rm":
        return s
    exact = (s == 0) & (e == 0)
    return np.where(exact & ~np.signbit(s), -0.0, s)


def add32(a: Array, b: Array, mode: str) -> Array:
    a64 = a.astype(F64)
    b64 = np.broadcast_to(b, a64.shape).astype(F64)
    s, e = two_sum(a64, b64)
    if mode == "rm":  # but -0 only if the operands were not both +0
        both = (a64 == 0) & (b64 == 0) & ~np.signbit(a64) & ~np.signbit(b64)
        s = np.where(both, 0.0, _zero_sum(s, e, mode))
    return rounded(s, e, mode)


def mul32(a: Array, b: Array, mode: str) -> Array:
    return rounded(a.astype(F64) * b, None, mode)


def div32(a: Array, b: Array, mode: str) -> Array:
    if mode == "rn":
        return np.divide(a, b, dtype=F32)
    a64, b64 = a.astype(F64), np.broadcast_to(b, a.shape).astype(F64)
    q = a64 / b64
    # The remainder's sign tells on which side of q the quotient lies: q b is not exact in float64,
    # but fma is.
    r = -fma64(q, b64, -a64)
    e = np.where(np.isfinite(r), np.sign(r) * np.sign(b64), 0.0)
    return rounded(q, e, mode)


def sqrt32(a: Array, mode: str) -> Array:
    if mode == "rn":
        return np.sqrt(a)
    a64 = a.astype(F64)
    q = np.sqrt(a64)
    r = -fma64(q, q, -a64)
    return rounded(q, np.where(np.isfinite(r), np.sign(r), 0.0), mode)


def rcp32(a: Array, mode: str) -> Array:
    return div32(np.ones_like(a), a, mode)


# ---------------------------------------------------------------------------------------- fp64


def _split(a: Array) -> tuple[Array, Array]:
    t = a * 134217729.0  # 2^27 + 1 (Veltkamp)
    high = t - (t - a)
    return high, a - high


def two_prod(a: Array, b: Array) -> tuple[Array, Array]:
    p = a * b
    ah, al = _split(a)
    bh, bl = _split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Exact but for the last rounding. Where an intermediate could over- or underflow, Python's
    fractions take over."""
    a, b, c = (np.ascontiguousarray(x) for x in np.broadcast_arrays(a, b, c))
    uh, ul = two_prod(a, b)
    th, tl = two_sum(c, ul)
    vh, vl = two_sum(uh, th)
    z, ze = two_sum(tl, vl)
    out = vh + to_odd(z, ze)
    size = np.abs(a * b)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    safe = (size > 1e-200) & (size < 1e290) & (np.abs(a) < 1e290) & (np.abs(b) < 1e290)
    safe &= (np.abs(c) < 1e290) & ((np.abs(c) > 1e-290) | (c == 0))
    plain = (a == 0) | (b == 0) | ~finite
    out = np.where(plain, a * b + c, out)
    for i in np.flatnonzero(~safe & ~plain):
        out[i] = _fma_slow(float(a[i]), float(b[i]), float(c[i]))
    return out


def _fma_slow(a: float, b: float, c: float) -> float:
    from fractions import Fraction

    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c
    try:
        return float(exact)  # rounds to nearest even, subnormals included
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


# ---------------------------------------------------------------------- 16-bit formats, rounded


def to_f16(x: Array, mode: str = "rn") -> Array:
    """float64 or float32 values (exact or rounded to odd) to fp16 bits."""
    if mode == "rn":
        return x.astype(F16).view(U16)
    return round_bits(x.astype(F64), *_FORMATS["f16"], mode).astype(F16).view(U16)


def to_bf16(x: Array, mode: str = "rn") -> Array:
    if x.dtype == F32 and mode in ("rn", "rz"):
        bits = x.view(U32)
        up = bits + (U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) if mode == "rn" else bits
        out = (up >> U32(16)).astype(U16)
        nan = (bits & U32(0x7FFFFFFF)) > U32(0x7F800000)
        return np.where(nan, U16(0x7FFF), out) if nan.any() else out
    y = round_bits(x.astype(F64), *_FORMATS["bf16"], mode).astype(F32)
    return to_bf16(y, "rz")


def to_tf32(x: Array, mode: str = "rna") -> Array:
    """fp32 values to fp32 bits with the 13 low mantissa bits zero."""
    return round_bits(x.astype(F64), *_FORMATS["tf32"], mode).astype(F32).view(U32)


def half_op(kind: str, op: str, mode: str, *bits: Array) -> Array:
    """add, sub, mul, fma of fp16 or bf16 bits, rounded once."""
    x = [(f16_to_f32 if kind == "f16" else bf16_to_f32)(b).astype(F64) for b in bits]
    if op == "mul":
        s, e = x[0] * x[1], None
    elif op == "fma":
        s, e = two_sum(x[0] * x[1], x[2])
    else:
        s, e = two_sum(x[0], x[1] if op == "add" else -x[1])
    if e is not None:
        s = np.where(np.isfinite(s), to_odd(s, e), s)
    if kind == "f16" and mode == "rn":
        return s.astype(F16).view(U16)
    return (to_f16 if kind == "f16" else to_bf16)(s, mode)


def flush_f16(bits: Array) -> Array:
    """.ftz of f16: subnormals to zeros of their sign."""
    return np.where((bits & U16(0x7C00)) == 0, bits & U16(0x8000), bits)


def pair_op(bits_op, *operands: Array) -> Array:  # type: ignore[no-untyped-def]
    """An operation on 16-bit halves, applied to both halves of 32-bit registers."""
    halves = [np.ascontiguousarray(x).view(U16) for x in operands]
    return np.ascontiguousarray(bits_op(*halves)).view(U32)


# ------------------------------------------------------------------------- min, max, compare


def minmax(kind: str, a: Array, b: Array, nan: bool, ints: type) -> Array:
    """Values of float dtype; -0 < +0; a single NaN loses unless `.NaN`."""
    b = np.broadcast_to(b, a.shape)
    out = (np.fmin if kind == "min" else np.fmax)(a, b)
    zero = (out == 0) & (a == b)
    if zero.any():
        x = np.ascontiguousarray(a).view(ints)
        y = np.ascontiguousarray(b).view(ints)
        signed = (x | y) if kind == "min" else (x & y)
        out = np.where(zero, signed, out.view(ints)).view(out.dtype)
    if nan:
        out = np.where(np.isnan(a) | np.isnan(b), np.array(np.nan, out.dtype), out)
    return out


def half_minmax(kind: str, form: str, nan: bool, a: Array, b: Array) -> Array:
    if form == "f16":
        out = minmax(kind, a.view(F16), b.view(F16), nan, U16)
        return out.view(U16)
    out = minmax(kind, bf16_to_f32(a), bf16_to_f32(b), nan, U32)
    return (out.view(U32) >> U32(16)).astype(U16)


_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def compare(how: str, a: Array, b: Array) -> Array:
    """Of float values. `ne` is false for NaN in PTX; the u forms are true."""
    if how == "num":
        return ~(np.isnan(a) | np.isnan(b))
    if how == "nan":
        return np.isnan(a) | np.isnan(b)
    if how.endswith("u") and how != "num":
        return _ORDERED[how[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    out = _ORDERED[how](a, b)
    return out & ~(np.isnan(a) | np.isnan(b)) if how == "ne" else out


# ------------------------------------------------------------------------------------- approx


def approx(op: str, x: Array, flush: bool) -> Array:
    """Of fp32 values."""
    if flush:
        x = ftz(x)
    y = x.astype(F64)
    if op == "ex2":
        y = np.exp2(y)
    elif op == "lg2":
        y = np.log2(y)
    elif op == "rcp":
        y = 1.0 / y
    elif op == "rsqrt":
        y = np.where(y == 0, np.copysign(np.inf, y), 1.0 / np.sqrt(y))
    elif op == "sqrt":
        y = np.sqrt(y)
    else:
        y = {"sin": np.sin, "cos": np.cos, "tanh": np.tanh}[op](y)
    out = y.astype(F32)
    return ftz(out) if flush else out


# --------------------------------------------------------------------------------- conversions

_INT_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def round_to_int(x: Array, mode: str) -> Array:
    return _INT_ROUND[mode](x)


def to_int(x: Array, mode: str, bits: int, signed: bool, wide_nan: bool) -> Array:
    """Float values to two's complement of `bits`, clamped. wide_nan: a 64-bit side makes NaN 2^63
    (or the top bit of the destination) instead of 0."""
    y = _INT_ROUND[mode](x.astype(F64))
    low = -(2.0 ** (bits - 1)) if signed else 0.0
    high = 2.0 ** (bits - 1) if signed else 2.0**bits
    ints = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
    inside = (y >= low) & (y < high)
    out = np.where(inside, y, 0.0).astype(ints)
    out = np.where(y < low, np.iinfo(ints).min, out).astype(ints)
    out = np.where(y >= high, np.iinfo(ints).max, out).astype(ints)
    if wide_nan:
        out = np.where(
            np.isnan(x), ints.type(-(2 ** (bits - 1)) if signed else 2 ** (bits - 1)), out
        )
    return out.astype(ints)


def int_to_f32(x: Array, mode: str) -> Array:
    """Of int32, uint32, int64 or uint64."""
    if mode == "rn":
        return x.astype(F32)
    high = (x >> 32).astype(F64) * 4294967296.0 if x.dtype.itemsize == 8 else x.astype(F64)
    low = (x & 0xFFFFFFFF).astype(F64) if x.dtype.itemsize == 8 else np.zeros(x.shape)
    s, e = two_sum(high, low)
    return rounded(s, e, mode)


def f64_to_f32(x: Array, mode: str) -> Array:
    return rounded(x, None, mode)


def saturate(x: Array) -> Array:
    """To [0, 1]; NaN gives +0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def relu_bits(bits: Array) -> Array:
    """max(x, 0) on fp16 or bf16 bits; NaN stays NaN."""
    return np.where((bits & U16(0x8000)) != 0, U16(0), bits)
