"""The step tier of the recurrence: one kernel a step, for any H, P and B.

Forward, a program owns BLOCK_B sequences and all gates of BLOCK_U units of one direction:

    gates = gx[t] + W_hh x;   c, h = the cell;   y[t] = h;   x = h * h_mask, rounded, for step t + 1

so a step is one launch, and what all programs of the next one read, x, is (D, B, P) alone.
Backward, the product that ends a step begins the launch of the one before it:

    dh = dy[t] + mask (dgates[t + 1] W_hh) + what passed by;   dgates[t], dc = the cell's gradients

A step is 2 B G H P D FLOPs on G H P weights, from L2 (an LSTM of H = 1024 in 16 bit: 8 MB; 40 to
126 MB of L2 from the A100 to the B200): 2 B FLOPs a weight, so below B of about 100 it is bound by
L2, at 3 to 5 TB/s (measured by others) 2 to 3 us for those 8 MB, and by the launch before that:
Triton's takes some 10 us of Python. A captured graph has none of that: nothing is read back, and
everything is allocated before the first step.

State that one step leaves to the next has two buffers, so no program reads what another writes, and
no thread reads what another one of its program wrote. A projection is a kernel of its own between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels import recurrent_common as common
from fastattn.kernels.gru import (
    gru_bias,
    gru_cell,
    gru_gradients,
    gru_inputs,
    gru_load,
    gru_products,
    rnn_cell,
    rnn_gradient,
    rnn_products,
)
from fastattn.kernels.lstm import lstm_cell, lstm_gradients, lstm_load, lstm_products
from fastattn.kernels.recurrent_common import (
    dot,
    load_operand,
    load_units,
    load_weight,
    of_direction,
    place,
    rows_of,
    store_units,
    time_of,
)

_LSTM, _GRU = common.LSTM, common.GRU


# ---- forward -----------------------------------------------------------------------------------


@triton.jit
def store_hidden(
    h, h_ptr, mask_ptr, y_ptr, x_next_ptr, h_next_ptr, d, b, rows, here, B, u, RAGGED: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """h of a step: into y, into the fp32 state, and as the next step's operand. RAGGED: a sequence
    that does not have the step keeps its state."""
    ok = b < B
    at = d * B + b
    store_units(y_ptr + d * P, h, rows, here, u, P, D * P, BLOCK_U)
    if RAGGED:
        h = tl.where(here[:, None], h, load_units(h_ptr, at, ok, u, P, P, BLOCK_U))
    store_units(h_next_ptr, h, at, ok, u, P, P, BLOCK_U)
    if mask_ptr is not None:
        h *= load_units(mask_ptr, at, ok, u, P, P, BLOCK_U)
    store_units(x_next_ptr, h, at, ok, u, P, P, BLOCK_U)


@triton.jit(do_not_specialize=["step", "T", "reverse", "B", "N", "depth"])
def recurrent_step_kernel(
    gx_ptr, w0_ptr, w1_ptr, b_hn0_ptr, b_hn1_ptr, mask_ptr, offsets_ptr, lengths_ptr,
    x_ptr, h_ptr, c_ptr, y_ptr, x_next_ptr, h_next_ptr, c_next_ptr, m_ptr, gates_ptr, cells_ptr,
    step, T, reverse, B, N, depth, CELL: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, RAGGED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gx (D, N, G H), w (G H, P), b_hn (H,), x (D, B, P), h (D, B, P) and c (D, B, H) fp32 -> y (N,
    D P), the three states after the step, gates (D, N, 4 H), cells (D, N, H). m_ptr (D, B, H): h
    before its projection; y and the next x and h are then project_kernel's."""
    d, b, u = place(B, H, BLOCK_B, BLOCK_U)
    ok = b < B
    rows, here = rows_of(time_of(step, T, reverse, d), b, B, T, N, offsets_ptr, lengths_ptr)
    saved = d * N + rows
    w_ptr = of_direction(w0_ptr, w1_ptr, d)
    x_ptr += d * B * P
    if CELL == _LSTM:
        i, f, g, o = lstm_load(gx_ptr, saved, here, u, H, BLOCK_U)
        c = load_units(c_ptr, d * B + b, ok, u, H, H, BLOCK_U)
        i, f, g, o = lstm_products(
            i, f, g, o, x_ptr, w_ptr, b, ok, u, depth, H, P, BLOCK_U, BLOCK_K
        )
        h, c_new = lstm_cell(i, f, g, o, c, gates_ptr, cells_ptr, saved, here, u, H, BLOCK_U)
        if RAGGED:
            c_new = tl.where(here[:, None], c_new, c)
        store_units(c_next_ptr, c_new, d * B + b, ok, u, H, H, BLOCK_U)
    elif CELL == _GRU:
        r, z, n = gru_inputs(gx_ptr, saved, here, u, H, BLOCK_U)
        hn = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
        if b_hn0_ptr is not None:
            hn = gru_bias(of_direction(b_hn0_ptr, b_hn1_ptr, d), hn, u, H)
        before = load_units(h_ptr, d * B + b, ok, u, H, H, BLOCK_U)
        r, z, hn = gru_products(r, z, hn, x_ptr, w_ptr, b, ok, u, depth, H, BLOCK_U, BLOCK_K)
        h = gru_cell(r, z, n, hn, before, gates_ptr, saved, here, u, H, BLOCK_U)
    else:
        a = load_units(gx_ptr, saved, here, u, H, H, BLOCK_U)
        h = rnn_cell(rnn_products(a, x_ptr, w_ptr, b, ok, u, depth, H, BLOCK_U, BLOCK_K), CELL)
    if m_ptr is not None:
        store_units(m_ptr, h, d * B + b, ok, u, H, H, BLOCK_U)
    else:
        store_hidden(
            h, h_ptr, mask_ptr, y_ptr, x_next_ptr, h_next_ptr, d, b, rows, here, B, u, RAGGED, P, D,
            BLOCK_U,
        )  # fmt: skip


@triton.jit(do_not_specialize=["step", "T", "reverse", "B", "N", "depth"])
def project_kernel(
    m_ptr, w0_ptr, w1_ptr, mask_ptr, offsets_ptr, lengths_ptr, h_ptr, y_ptr, x_next_ptr, h_next_ptr,
    step, T, reverse, B, N, depth, H: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = m W_hr^T: a program owns BLOCK_U features of P. m (D, B, H), W_hr (P, H), depth H."""
    d, b, u = place(B, P, BLOCK_B, BLOCK_U)
    ok = b < B
    rows, here = rows_of(time_of(step, T, reverse, d), b, B, T, N, offsets_ptr, lengths_ptr)
    w_ptr = of_direction(w0_ptr, w1_ptr, d)
    h = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        m = load_operand(m_ptr, d * B + b, ok, k, H, H, BLOCK_K)
        h = dot(m, tl.trans(load_weight(w_ptr, u, k, P, H, BLOCK_U, BLOCK_K)), h)
    store_hidden(
        h, h_ptr, mask_ptr, y_ptr, x_next_ptr, h_next_ptr, d, b, rows, here, B, u, RAGGED, P, D,
        BLOCK_U,
    )  # fmt: skip


# ---- backward ----------------------------------------------------------------------------------


@triton.jit
def multiply(
    total, x_ptr, stride, rows, here, w_ptr, u, end, K: tl.constexpr, P: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + x W for BLOCK_U columns of W (K, P); rows that are not there count as 0. end: K, or 0
    where no row is there."""
    for first in range(0, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = load_operand(x_ptr, rows, here, k, K, stride, BLOCK_K)
        total = dot(x, load_weight(w_ptr, k, u, K, P, BLOCK_K, BLOCK_U), total)
    return total


@triton.jit
def hidden_gradient(
    step, dh_ptr, dgx_ptr, dghn_ptr, w_ptr, mask_ptr, offsets_ptr, lengths_ptr, d, b, u, T, reverse,
    B, N, units, CELL: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of what ``step`` leaves behind: what passed the following step by, dh, and what
    comes through its product with W_hh. Behind the last step there is dh alone."""
    after = time_of(step + 1, T, reverse, d)
    rows, here = rows_of(after, b, B, T, N, offsets_ptr, lengths_ptr)
    rows += d * N
    there = tl.where((after >= 0) & (after < T), units, 0)
    total = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
    if CELL == _LSTM:
        total = multiply(
            total, dgx_ptr, 4 * H, rows, here, w_ptr, u, 4 * there, 4 * H, P, BLOCK_U, BLOCK_K
        )
    elif CELL == _GRU:
        total = multiply(
            total, dgx_ptr, 3 * H, rows, here, w_ptr, u, 2 * there, 2 * H, P, BLOCK_U, BLOCK_K
        )
        total = multiply(
            total, dghn_ptr, H, rows, here, w_ptr + 2 * H * H, u, there, H, P, BLOCK_U, BLOCK_K
        )
    else:
        total = multiply(
            total, dgx_ptr, H, rows, here, w_ptr, u, there, H, P, BLOCK_U, BLOCK_K
        )  # fmt: skip
    if mask_ptr is not None:
        total *= load_units(mask_ptr, d * B + b, b < B, u, P, P, BLOCK_U)
    return total + load_units(dh_ptr, d * B + b, b < B, u, P, P, BLOCK_U)


@triton.jit
def of_step_before(
    ptr, first_ptr, step, d, b, here, u, T, reverse, B, N, stride, offsets_ptr, lengths_ptr,
    H: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """fp32 state before ``step``: of the row before it (ptr + row stride), else first (D, B, H)."""
    before = time_of(step - 1, T, reverse, d)
    rows, had = rows_of(before, b, B, T, N, offsets_ptr, lengths_ptr)
    state = load_units(ptr, rows, here & had, u, H, stride, BLOCK_U)
    return state + load_units(first_ptr, d * B + b, here & (had == 0), u, H, H, BLOCK_U)


@triton.jit
def load_saved(
    step, d, b, rows, here, y_ptr, gates_ptr, cells_ptr, h0_ptr, c0_ptr, offsets_ptr, lengths_ptr,
    T, reverse, B, N, u, CELL: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_U: tl.constexpr,
):  # fmt: skip
    """What the backward of a step wants of the forward, fp32: LSTM i f g o, c and c before; GRU r z
    n hn and h before; RNN h. Six; what a cell has not repeats another."""
    saved = d * N + rows
    if CELL == _LSTM:
        s0, s1, s2, s3 = lstm_load(gates_ptr, saved, here, u, H, BLOCK_U)
        s4 = load_units(cells_ptr, saved, here, u, H, H, BLOCK_U)
        s5 = of_step_before(
            cells_ptr + d * N * H, c0_ptr, step, d, b, here, u, T, reverse, B, N, H, offsets_ptr,
            lengths_ptr, H, BLOCK_U,
        )  # fmt: skip
    elif CELL == _GRU:
        s0, s1, s2, s3 = gru_load(gates_ptr, saved, here, u, H, BLOCK_U)
        s4 = of_step_before(
            y_ptr + d * H, h0_ptr, step, d, b, here, u, T, reverse, B, N, D * H, offsets_ptr,
            lengths_ptr, H, BLOCK_U,
        )  # fmt: skip
        s5 = s4
    else:
        s0 = load_units(y_ptr + d * H, rows, here, u, H, D * H, BLOCK_U)
        s1, s2, s3, s4, s5 = s0, s0, s0, s0, s0
    return s0, s1, s2, s3, s4, s5


@triton.jit
def cell_gradients(
    dh, dc, s0, s1, s2, s3, s4, s5, dgx_ptr, dghn_ptr, saved, here, u, CELL: tl.constexpr,
    H: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """dgx (and dghn) of a step into memory. Returns the gradients that W_hh transposes (four; what
    a cell has not repeats its first), the part of dh that passes the step by, and the gradient of c
    before it. s0 to s5: as :func:`load_saved` gives them."""
    by = tl.zeros_like(dh)
    if CELL == _LSTM:
        g0, g1, g2, g3, dc = lstm_gradients(
            dh, dc, s0, s1, s2, s3, s4, s5, dgx_ptr, saved, here, u, H, BLOCK_U
        )
    elif CELL == _GRU:
        g0, g1, g2, by = gru_gradients(
            dh, s0, s1, s2, s3, s4, dgx_ptr, dghn_ptr, saved, here, u, H, BLOCK_U
        )
        g3 = g0
    else:
        g0 = rnn_gradient(dh, s0, dgx_ptr, saved, here, u, CELL, H, BLOCK_U)
        g1, g2, g3 = g0, g0, g0
    return g0, g1, g2, g3, by, dc


@triton.jit(do_not_specialize=["step", "T", "reverse", "B", "N", "units", "depth"])
def recurrent_step_backward_kernel(
    dy_ptr, dm_ptr, y_ptr, gates_ptr, cells_ptr, w0_ptr, w1_ptr, h0_ptr, c0_ptr, mask_ptr,
    offsets_ptr, lengths_ptr, dh_ptr, dc_ptr, dgx_ptr, dghn_ptr, dh_next_ptr, dc_next_ptr,
    step, T, reverse, B, N, units, depth, CELL: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, RAGGED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dgx (D, N, G H) and dghn (D, N, H) of a step; dh (D, B, P) and dc (D, B, H), fp32, from the
    following step and to the one before. dm_ptr (D, N, P): the whole gradient of h, where w is
    W_hr; else it is made here, and w is W_hh. units: H, and depth: P, as no constants."""
    d, b, u = place(B, H, BLOCK_B, BLOCK_U)
    ok = b < B
    at = d * B + b
    rows, here = rows_of(time_of(step, T, reverse, d), b, B, T, N, offsets_ptr, lengths_ptr)
    w_ptr = of_direction(w0_ptr, w1_ptr, d)
    # Asked for before the product, whose loads they then overlap.
    s0, s1, s2, s3, s4, s5 = load_saved(
        step, d, b, rows, here, y_ptr, gates_ptr, cells_ptr, h0_ptr, c0_ptr, offsets_ptr,
        lengths_ptr, T, reverse, B, N, u, CELL, H, D, BLOCK_U,
    )  # fmt: skip
    if dm_ptr is not None:
        dh = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
        dh = multiply(dh, dm_ptr, P, d * N + rows, here, w_ptr, u, depth, P, H, BLOCK_U, BLOCK_K)
    else:
        dh = hidden_gradient(
            step, dh_ptr, dgx_ptr, dghn_ptr, w_ptr, mask_ptr, offsets_ptr, lengths_ptr, d, b, u, T,
            reverse, B, N, units, CELL, H, P, BLOCK_B, BLOCK_U, BLOCK_K,
        )  # fmt: skip
    kept = dh
    if dy_ptr is not None:
        dh += load_units(dy_ptr + d * P, rows, here, u, P, D * P, BLOCK_U)
    dc = dh
    if CELL == _LSTM:
        dc = load_units(dc_ptr, at, ok, u, H, H, BLOCK_U)
    _, _, _, _, by, dc_before = cell_gradients(
        dh, dc, s0, s1, s2, s3, s4, s5, dgx_ptr, dghn_ptr, d * N + rows, here, u, CELL, H, BLOCK_U
    )
    if RAGGED:
        by = tl.where(here[:, None], by, kept)
        dc_before = tl.where(here[:, None], dc_before, dc)
    if dm_ptr is None:
        store_units(dh_next_ptr, by, at, ok, u, P, P, BLOCK_U)
    if CELL == _LSTM:
        store_units(dc_next_ptr, dc_before, at, ok, u, H, H, BLOCK_U)


@triton.jit(do_not_specialize=["step", "T", "reverse", "B", "N", "units"])
def hidden_gradient_kernel(
    dy_ptr, w0_ptr, w1_ptr, mask_ptr, offsets_ptr, lengths_ptr, dh_ptr, dgx_ptr, dghn_ptr,
    dm_ptr, dh_next_ptr, step, T, reverse, B, N, units, CELL: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of h of a step, into its rows of dm (D, N, P), for a projection; what has no
    such row, and at step -1 the whole (dh0), stays in dh (D, B, P)."""
    d, b, u = place(B, P, BLOCK_B, BLOCK_U)
    ok = b < B
    rows, here = rows_of(time_of(step, T, reverse, d), b, B, T, N, offsets_ptr, lengths_ptr)
    w_ptr = of_direction(w0_ptr, w1_ptr, d)
    dh = hidden_gradient(
        step, dh_ptr, dgx_ptr, dghn_ptr, w_ptr, mask_ptr, offsets_ptr, lengths_ptr, d, b, u, T,
        reverse, B, N, units, CELL, H, P, BLOCK_B, BLOCK_U, BLOCK_K,
    )  # fmt: skip
    kept = tl.where(here[:, None], 0.0, dh)
    store_units(dh_next_ptr, kept, d * B + b, ok, u, P, P, BLOCK_U)
    if dm_ptr is not None:
        if dy_ptr is not None:
            dh += load_units(dy_ptr + d * P, rows, here, u, P, D * P, BLOCK_U)
        store_units(dm_ptr, dh, d * N + rows, here, u, P, P, BLOCK_U)
