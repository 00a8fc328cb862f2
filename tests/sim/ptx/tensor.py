"""Fragments of ldmatrix and mma.sync, and their products.

Layouts: PTX ISA 9.7.14.5 (figures of the m16n8k* fragments). With g = lane / 4 and t = lane % 4, a
32-bit register of 16-bit elements holds columns 2t and 2t + 1 of row g (A), or rows 2t, 2t + 1 of
column g (B); further registers are 8 rows (A) or 8 of k on. tf32 registers hold one element, of k
t and t + 4. The tests hold these against two independent descriptions.

Sums: products are exact in float64. `exact` sums in float64 and rounds once to the accumulator;
`ascending` and `descending` add in fp32, one product after the other; `truncated` cuts every sum
to fp32 towards zero, near to what tensor cores were measured to do (Fasi, Higham, Mikaitis, Pranesh
2021). Hardware's order is not specified: a kernel has to be right under all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .emit_warp import Product
from .floats import round_bits

Array = NDArray[Any]
SUMS = ("exact", "ascending", "descending", "truncated")


def _halves(registers: Array, kind: str) -> Array:
    """(..., lanes) words to (..., lanes, 2) float64."""
    half = np.ascontiguousarray(registers).view(np.uint16).reshape(*registers.shape, 2)
    if kind == "f16":
        return half.view(np.float16).astype(np.float64)
    return (half.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _tf32(registers: Array) -> Array:
    """Hardware reads the upper 19 bits."""
    cut = registers & np.uint32(0xFFFFE000)
    return np.ascontiguousarray(cut).view(np.float32).astype(np.float64)


def fragment_a(p: Product, registers: tuple[Array, ...]) -> Array:
    """(warps, 16, k)"""
    x = np.stack(registers).reshape(p.a, -1, 32)
    w = x.shape[1]
    if p.kind == "tf32":
        y = _tf32(x).reshape(p.a // 2, 2, w, 8, 4)  # k block, row block, warp, g, t
        return y.transpose(2, 1, 3, 0, 4).reshape(w, 16, p.k)
    y = _halves(x, p.kind).reshape(p.a // 2, 2, w, 8, 4, 2)
    return y.transpose(2, 1, 3, 0, 4, 5).reshape(w, 16, p.k)


def fragment_b(p: Product, registers: tuple[Array, ...]) -> Array:
    """(warps, k, 8)"""
    x = np.stack(registers).reshape(p.b, -1, 32)
    w = x.shape[1]
    if p.kind == "tf32":
        y = _tf32(x).reshape(p.b, w, 8, 4)  # k block, warp, column, t
        return y.transpose(1, 0, 3, 2).reshape(w, p.k, 8)
    y = _halves(x, p.kind).reshape(p.b, w, 8, 4, 2)
    return y.transpose(1, 0, 3, 4, 2).reshape(w, p.k, 8)


def fragment_c(p: Product, registers: tuple[Array, ...]) -> Array:
    """(warps, 16, 8)"""
    if p.acc == "f16":
        x = _halves(np.stack(registers).reshape(2, -1, 32), "f16")
        w = x.shape[1]
        return x.reshape(2, w, 8, 4, 2).transpose(1, 0, 2, 3, 4).reshape(w, 16, 8)
    x = np.stack(registers).view(np.float32).astype(np.float64).reshape(2, 2, -1, 8, 4)
    return x.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)


def scatter_c(p: Product, d: Array) -> tuple[Array, ...]:
    """(warps, 16, 8) back into registers."""
    w = len(d)
    if p.acc == "f16":
        half = d.astype(np.float16).reshape(w, 2, 8, 4, 2).transpose(1, 0, 2, 3, 4)
        words = np.ascontiguousarray(half).view(np.uint32).reshape(2, w * 32)
        return tuple(words)
    x = d.astype(np.float32).reshape(w, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return tuple(np.ascontiguousarray(x).view(np.uint32).reshape(4, w * 32))


def product(p: Product, a: Array, b: Array, c: Array, sums: str) -> Array:
    if sums == "exact":
        return np.matmul(a, b) + c
    order = range(p.k - 1, -1, -1) if sums == "descending" else range(p.k)
    total = c.copy()
    for k in order:
        total = total + a[:, :, k, None] * b[:, None, k, :]
        if sums == "truncated":
            total = round_bits(total, 23, -126, 127, "rz")
        else:
            total = total.astype(np.float32).astype(np.float64)
    return total


def mma(p: Product, a: Any, b: Any, c: Any, sums: str) -> tuple[Array, ...]:
    d = product(p, fragment_a(p, a), fragment_b(p, b), fragment_c(p, c), sums)
    return scatter_c(p, d)


def matrices(rows: Array, number: int, trans: bool) -> list[Array]:
    """rows: (warps, 8 number, 4) words as addressed; the registers of ldmatrix."""
    w = len(rows)
    out = []
    for k in range(number):
        m = np.ascontiguousarray(rows[:, 8 * k : 8 * k + 8])
        if trans:
            half = m.view(np.uint16).reshape(w, 8, 8).transpose(0, 2, 1)
            m = np.ascontiguousarray(half).view(np.uint32)
        out.append(m.reshape(w * 32))
    return out
