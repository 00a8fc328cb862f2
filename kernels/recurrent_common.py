"""What the kernels of LSTM, GRU and RNN share: which rows a step has, and tiles of them.

T steps, B sequences, H hidden units, P features of h (P = H without a projection), D directions,
G gates (LSTM 4, GRU 3, RNN 1), N rows of gx and y. A tile is (BLOCK_B sequences, BLOCK_U units).
Step s of a direction is time s, or T - 1 - s where its bit of ``reverse`` is set.
"""

from __future__ import annotations

import triton
import triton.language as tl

LSTM, GRU, RNN_TANH, RNN_RELU = (
    tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3),
)  # fmt: skip


@triton.jit
def place(B, UNITS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr):
    """A program's direction, sequences (int64) and units."""
    unit_blocks = tl.cdiv(UNITS, BLOCK_U)
    batch_blocks = tl.cdiv(B, BLOCK_B)
    block = tl.program_id(0) // unit_blocks
    u = tl.program_id(0) % unit_blocks * BLOCK_U + tl.arange(0, BLOCK_U)
    b = (block % batch_blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    return (block // batch_blocks).to(tl.int64), b, u


@triton.jit
def of_direction(ptr0, ptr1, d):
    """A weight of direction d; ptr1: None where there is one direction."""
    ptr = ptr0
    if ptr1 is not None:  # noqa: SIM102  (d is a tensor)
        if d == 1:
            ptr = ptr1
    return ptr


@triton.jit
def time_of(step, T, reverse, d):
    return tl.where(((reverse >> d.to(tl.int32)) & 1) != 0, T - 1 - step, step)


@triton.jit
def rows_of(t, b, B, T, N, offsets_ptr, lengths_ptr):
    """The row of gx and y of each sequence at time t (int64), and whether it has that step. A wrong
    offset or length stays inside the N rows; no step lies outside of 0 <= t < T."""
    inside = (t >= 0) & (t < T)
    here = (b < B) & inside
    if offsets_ptr is not None:
        first = tl.load(offsets_ptr + t, mask=inside, other=0)
        end = tl.load(offsets_ptr + t + 1, mask=inside, other=0)
        rows = tl.maximum(first, 0) + b
        here = here & (rows < tl.minimum(end, N))
    else:
        rows = t.to(tl.int64) * B + b
    if lengths_ptr is not None:
        here = here & (t < tl.load(lengths_ptr + b, mask=b < B, other=0))
    return rows, here


@triton.jit
def load_units(ptr, rows, here, u, UNITS: tl.constexpr, stride, BLOCK_U: tl.constexpr):
    """fp32 (rows, units), 0 where there are none; ptr: the first unit of row 0."""
    ok = here[:, None]
    if UNITS % BLOCK_U != 0:
        ok = ok & (u[None, :] < UNITS)
    return tl.load(ptr + rows[:, None] * stride + u[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def store_units(ptr, x, rows, here, u, UNITS: tl.constexpr, stride, BLOCK_U: tl.constexpr):
    ok = here[:, None]
    if UNITS % BLOCK_U != 0:
        ok = ok & (u[None, :] < UNITS)
    at = rows[:, None] * stride + u[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def load_operand(ptr, rows, here, k, K: tl.constexpr, stride, BLOCK_K: tl.constexpr):
    """(rows, BLOCK_K features from k on) as they are stored, 0 where there are none."""
    ok = here[:, None]
    if K % BLOCK_K != 0:
        ok = ok & (k[None, :] < K)
    return tl.load(ptr + rows[:, None] * stride + k[None, :], mask=ok, other=0.0)


@triton.jit
def load_weight(
    w_ptr, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of a contiguous (ROWS, COLS) block of a weight, 0 beyond it."""
    at = rows[:, None].to(tl.int64) * COLS + cols[None, :]
    if ROWS % BLOCK_R != 0 and COLS % BLOCK_C != 0:
        return tl.load(w_ptr + at, mask=(rows[:, None] < ROWS) & (cols[None, :] < COLS), other=0.0)
    if ROWS % BLOCK_R != 0:
        return tl.load(w_ptr + at, mask=rows[:, None] < ROWS, other=0.0)
    if COLS % BLOCK_C != 0:
        return tl.load(w_ptr + at, mask=cols[None, :] < COLS, other=0.0)
    return tl.load(w_ptr + at)


@triton.jit
def dot(a, b, total):
    """fp32 operands stay fp32."""
    return tl.dot(a, b, total, input_precision="ieee")
