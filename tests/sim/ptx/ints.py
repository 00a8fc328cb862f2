"""Integer instructions that numpy has no single operation for, on arrays of register bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64


def mul_hi(a: Array, b: Array) -> Array:
    """Upper half of the product; dtype of a tells width and sign."""
    b = np.broadcast_to(b, a.shape)
    width = a.dtype.itemsize * 8
    if width < 64:
        wide = np.dtype(f"{a.dtype.kind}{width // 4}")
        return ((a.astype(wide) * b.astype(wide)) >> width).astype(a.dtype)
    x, y = a.view(U64), np.ascontiguousarray(b).view(U64)
    half, mask = U64(32), U64(0xFFFFFFFF)
    xl, xh, yl, yh = x & mask, x >> half, y & mask, y >> half
    mid = xh * yl + ((xl * yl) >> half)
    carry = xl * yh + (mid & mask)
    out = xh * yh + (mid >> half) + (carry >> half)
    if a.dtype.kind == "i":
        out = out - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return out.view(a.dtype)


def div(a: Array, b: Array) -> Array:
    """Towards zero; by zero: all ones, as hardware gives (PTX: unspecified)."""
    b = np.broadcast_to(b, a.shape)
    safe = np.where(b == 0, a.dtype.type(1), b)
    if a.dtype.kind == "u":
        q = a // safe
    else:
        q = a // safe  # floors
        q = q + ((q * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, _ones(a.dtype), q)


def rem(a: Array, b: Array) -> Array:
    b = np.broadcast_to(b, a.shape)
    safe = np.where(b == 0, a.dtype.type(1), b)
    return np.where(b == 0, _ones(a.dtype), a - div(a, safe) * safe)


def _ones(dtype: np.dtype) -> np.generic:
    return dtype.type(-1) if dtype.kind == "i" else dtype.type(np.iinfo(dtype).max)


def bfe(a: Array, pos: Array, length: Array) -> Array:
    """Sign of dtype: a signed field repeats its top bit (of the register, where it ends beyond)."""
    width = a.dtype.itemsize * 8
    a, pos, length = np.broadcast_arrays(a, pos & U32(255), length & U32(255))
    u = np.dtype(f"u{width // 8}")
    x = np.ascontiguousarray(a).view(u)
    p, n = pos.astype(u), length.astype(u)
    one = u.type(1)
    field = (x >> p) & ((one << n) - one)  # numpy shifts by >= width give 0: all ones, as wanted
    if a.dtype.kind == "u":
        return field
    top = np.minimum(p + n - one, u.type(width - 1))
    sign = np.where(n == 0, u.type(0), (x >> top) & one)
    filled = field | np.where(sign == one, ~((one << n) - one), u.type(0))
    # A field that ends beyond the register: what is above the register is sign as well.
    there = np.minimum(np.maximum(u.type(width) - np.minimum(p, u.type(width)), u.type(0)), n)
    filled = np.where(sign == one, filled | ~((one << there) - one), filled)
    return np.where(n == 0, u.type(0), filled).view(a.dtype)


def bfi(a: Array, b: Array, pos: Array, length: Array) -> Array:
    """a into b."""
    a, b, pos, length = np.broadcast_arrays(a, b, pos & U32(255), length & U32(255))
    u = a.dtype
    p, n = pos.astype(u), length.astype(u)
    mask = ((u.type(1) << n) - u.type(1)) << p
    return (b & ~mask) | ((a << p) & mask)


def popc(a: Array) -> Array:
    return np.bitwise_count(a).astype(U32)


def bfind(a: Array, shift_amount: bool) -> Array:
    """Position of the highest bit that is not sign; all ones without one."""
    if a.dtype.kind == "i":
        a = np.where(a < 0, ~a, a)
    x = a.view(np.dtype(f"u{a.dtype.itemsize}")).astype(U64)
    width = a.dtype.itemsize * 8
    top = _top_bit(x)
    out = np.where(x == 0, U32(0xFFFFFFFF), top)
    if shift_amount:
        out = np.where(x == 0, U32(0xFFFFFFFF), U32(width - 1) - top)
    return out.astype(U32)


def _top_bit(x: Array) -> Array:
    for k in (1, 2, 4, 8, 16, 32):
        x = x | (x >> U64(k))
    return (np.bitwise_count(x).astype(U32) - U32(1)).astype(U32)


def clz(a: Array) -> Array:
    x = a.astype(U64)
    return np.where(x == 0, U32(a.dtype.itemsize * 8), U32(a.dtype.itemsize * 8 - 1) - _top_bit(x))


def brev(a: Array) -> Array:
    width = a.dtype.itemsize * 8
    x, t = a, a.dtype.type
    k, full = 1, (1 << width) - 1
    while k < width:
        mask = t(full // ((1 << k) + 1))
        x = ((x >> t(k)) & mask) | ((x & mask) << t(k))
        k *= 2
    return x


def shf(left: bool, wrap: bool, a: Array, b: Array, n: Array) -> Array:
    """Funnel shift of the 64 bits b:a."""
    n = n & U32(31) if wrap else np.minimum(n, U32(32))
    a, b, n = np.broadcast_arrays(a, b, n)
    both = (b.astype(U64) << U64(32)) | a.astype(U64)
    s = n.astype(U64)
    return ((both << s) >> U64(32)).astype(U32) if left else (both >> s).astype(U32)


_PRMT = {
    "f4e": lambda n: [n, n + 1, n + 2, n + 3],
    "b4e": lambda n: [n, n - 1 & 7, n - 2 & 7, n - 3 & 7],
    "rc8": lambda n: [n] * 4,
    "ecl": lambda n: [max(n, k) for k in range(4)],
    "ecr": lambda n: [min(n, k) for k in range(4)],
    "rc16": lambda n: [0, 1, 0, 1] if n % 2 == 0 else [2, 3, 2, 3],
}


def prmt(mode: str, a: Array, b: Array, c: Array) -> Array:
    """Bytes of b:a picked by nibbles of c; bit 3 of a nibble repeats the byte's sign."""
    a, b, c = np.broadcast_arrays(a, b, c)
    if mode:
        table = np.array([_PRMT[mode](n) for n in range(4)], U32) & U32(7)
        rows = table[c & U32(3)]
        c = rows[:, 0] | rows[:, 1] << U32(4) | rows[:, 2] << U32(8) | rows[:, 3] << U32(12)
    both = (b.astype(U64) << U64(32)) | a.astype(U64)
    out = np.zeros(both.shape, U32)
    for k in range(4):
        pick = (c >> U32(4 * k)) & U32(15)
        byte = ((both >> ((pick & U32(7)).astype(U64) * U64(8))) & U64(255)).astype(U32)
        sign = np.where(byte & U32(128), U32(255), U32(0))
        out |= np.where(pick & U32(8), sign, byte) << U32(8 * k)
    return out


def lop3(table: int, a: Array, b: Array, c: Array) -> Array:
    a, b, c = np.broadcast_arrays(a, b, c)
    out = np.zeros(a.shape, a.dtype)
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def sat_add(a: Array, b: Array, subtract: bool) -> Array:
    wide = a.astype(np.int64) + (-1 if subtract else 1) * np.asarray(b).astype(np.int64)
    return np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32)


def dot4(a: Array, b: Array, c: Array, signed_a: bool, signed_b: bool) -> Array:
    """dp4a."""
    a, b, c = (np.ascontiguousarray(x) for x in np.broadcast_arrays(a, b, c))
    x = a.view(np.int8 if signed_a else U8).reshape(-1, 4).astype(np.int64)
    y = b.view(np.int8 if signed_b else U8).reshape(-1, 4).astype(np.int64)
    return ((x * y).sum(1) + c.astype(np.int64)).astype(U32)
