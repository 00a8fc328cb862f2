"""The sequence tier of the recurrence: a program runs all T steps of BLOCK_B sequences of one
direction, for H whose recurrent weights one SM can hold.

A program reads W_hh once: the G blocks (BLOCK_H, BLOCK_H) are operands of products in a loop over
time, and Triton keeps what does not change in a loop in registers, or in shared memory. h and c
stay in registers; a step reads G rows of gx and writes y, and no step waits for memory that another
one wrote, so there is no barrier but those of the product's operands.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels import recurrent_common as common
from fastattn.kernels.gru import gru_bias, gru_cell, gru_inputs, rnn_cell
from fastattn.kernels.lstm import lstm_cell, lstm_load
from fastattn.kernels.recurrent_common import (
    dot,
    load_units,
    load_weight,
    of_direction,
    place,
    rows_of,
    store_units,
    time_of,
)
from fastattn.kernels.recurrent_steps import cell_gradients, load_saved

_LSTM, _GRU = common.LSTM, common.GRU


@triton.jit
def gate_weight(w_ptr, gate: tl.constexpr, u, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """(BLOCK_H units, BLOCK_H features), 0 beyond H."""
    return load_weight(w_ptr + gate * H * H, u, u, H, H, BLOCK_H, BLOCK_H)


@triton.jit
def load_inputs(
    gx_ptr, step, d, b, T, reverse, B, N, offsets_ptr, lengths_ptr, u, CELL: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """gx of a step, by gates (four; what a cell has not repeats its first); 0 beyond the last."""
    rows, here = rows_of(time_of(step, T, reverse, d), b, B, T, N, offsets_ptr, lengths_ptr)
    rows += d * N
    if CELL == _LSTM:
        x0, x1, x2, x3 = lstm_load(gx_ptr, rows, here, u, H, BLOCK_H)
    elif CELL == _GRU:
        x0, x1, x2 = gru_inputs(gx_ptr, rows, here, u, H, BLOCK_H)
        x3 = x0
    else:
        x0 = load_units(gx_ptr, rows, here, u, H, H, BLOCK_H)
        x1, x2, x3 = x0, x0, x0
    return x0, x1, x2, x3


@triton.jit(do_not_specialize=["T", "reverse", "B", "N"])
def recurrent_sequence_kernel(
    gx_ptr, w0_ptr, w1_ptr, b_hn0_ptr, b_hn1_ptr, h0_ptr, c0_ptr, mask_ptr, offsets_ptr,
    lengths_ptr, y_ptr, h_n_ptr, c_n_ptr, gates_ptr, cells_ptr, T, reverse, B, N,
    CELL: tl.constexpr, H: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """gx (D, N, G H), w (G H, H), b_hn (H,), h0, c0 and mask (D, B, H) -> y (N, D H), h_n and c_n
    (D, B, H), gates (D, N, 4 H), cells (D, N, H)."""
    d, b, u = place(B, H, BLOCK_B, BLOCK_H)
    ok = b < B
    at = d * B + b
    w_ptr = of_direction(w0_ptr, w1_ptr, d)
    w_0 = tl.trans(gate_weight(w_ptr, 0, u, H, BLOCK_H))
    if CELL == _LSTM or CELL == _GRU:  # noqa: SIM109  (constants of Triton's)
        w_1 = tl.trans(gate_weight(w_ptr, 1, u, H, BLOCK_H))
        w_2 = tl.trans(gate_weight(w_ptr, 2, u, H, BLOCK_H))
    if CELL == _LSTM:
        w_3 = tl.trans(gate_weight(w_ptr, 3, u, H, BLOCK_H))
    h = load_units(h0_ptr, at, ok, u, H, H, BLOCK_H)
    c = h
    if CELL == _LSTM:
        c = load_units(c0_ptr, at, ok, u, H, H, BLOCK_H)
    bias = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if b_hn0_ptr is not None:
        bias = gru_bias(of_direction(b_hn0_ptr, b_hn1_ptr, d), bias, u, H)
    if mask_ptr is not None:
        mask = load_units(mask_ptr, at, ok, u, H, H, BLOCK_H)
    x0, x1, x2, x3 = load_inputs(
        gx_ptr, 0, d, b, T, reverse, B, N, offsets_ptr, lengths_ptr, u, CELL, H, BLOCK_H
    )
    for step in range(T):
        # A step ahead: the memory's latency passes beside this step's products.
        n0, n1, n2, n3 = load_inputs(
            gx_ptr, step + 1, d, b, T, reverse, B, N, offsets_ptr, lengths_ptr, u, CELL, H, BLOCK_H
        )
        rows, here = rows_of(time_of(step, T, reverse, d), b, B, T, N, offsets_ptr, lengths_ptr)
        saved = d * N + rows
        operand = h
        if mask_ptr is not None:
            operand = h * mask
        x = operand.to(w_0.dtype)
        c_new = c
        if CELL == _LSTM:
            i, f, g, o = dot(x, w_0, x0), dot(x, w_1, x1), dot(x, w_2, x2), dot(x, w_3, x3)
            h_new, c_new = lstm_cell(
                i, f, g, o, c, gates_ptr, cells_ptr, saved, here, u, H, BLOCK_H
            )  # fmt: skip
        elif CELL == _GRU:
            r, z, hn = dot(x, w_0, x0), dot(x, w_1, x1), dot(x, w_2, bias)
            h_new = gru_cell(r, z, x2, hn, h, gates_ptr, saved, here, u, H, BLOCK_H)
        else:
            h_new = rnn_cell(dot(x, w_0, x0), CELL)
        store_units(y_ptr + d * H, h_new, rows, here, u, H, D * H, BLOCK_H)
        if RAGGED:  # a sequence that does not have the step keeps its state
            h_new = tl.where(here[:, None], h_new, h)
            c_new = tl.where(here[:, None], c_new, c)
        h, c = h_new, c_new
        x0, x1, x2, x3 = n0, n1, n2, n3
    store_units(h_n_ptr, h, at, ok, u, H, H, BLOCK_H)
    if CELL == _LSTM:
        store_units(c_n_ptr, c, at, ok, u, H, H, BLOCK_H)


@triton.jit(do_not_specialize=["T", "reverse", "B", "N"])
def recurrent_sequence_backward_kernel(
    dy_ptr, dh_n_ptr, dc_n_ptr, y_ptr, gates_ptr, cells_ptr, w0_ptr, w1_ptr, h0_ptr, c0_ptr,
    mask_ptr, offsets_ptr, lengths_ptr, dgx_ptr, dghn_ptr, dh0_ptr, dc0_ptr, T, reverse, B, N,
    CELL: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The backward of the same: dgx (D, N, G H), dghn (D, N, H), dh0 and dc0 (D, B, H)."""
    d, b, u = place(B, H, BLOCK_B, BLOCK_H)
    ok = b < B
    at = d * B + b
    w_ptr = of_direction(w0_ptr, w1_ptr, d)
    w_0 = gate_weight(w_ptr, 0, u, H, BLOCK_H)
    if CELL == _LSTM or CELL == _GRU:  # noqa: SIM109  (constants of Triton's)
        w_1 = gate_weight(w_ptr, 1, u, H, BLOCK_H)
        w_2 = gate_weight(w_ptr, 2, u, H, BLOCK_H)
    if CELL == _LSTM:
        w_3 = gate_weight(w_ptr, 3, u, H, BLOCK_H)
    by = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)  # what reaches dh past W_hh
    if dh_n_ptr is not None:
        by = load_units(dh_n_ptr, at, ok, u, H, H, BLOCK_H)
    dc = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if dc_n_ptr is not None:
        dc = load_units(dc_n_ptr, at, ok, u, H, H, BLOCK_H)
    g0 = tl.zeros((BLOCK_B, BLOCK_H), w_0.dtype)  # the gates' gradients of the step behind
    g1, g2, g3 = g0, g0, g0
    for back in range(T + 1):  # the last one, step -1, is the product of step 0 alone
        step = T - 1 - back
        rows, here = rows_of(time_of(step, T, reverse, d), b, B, T, N, offsets_ptr, lengths_ptr)
        # Asked for before the product, beside which their latency passes.
        s0, s1, s2, s3, s4, s5 = load_saved(
            step, d, b, rows, here, y_ptr, gates_ptr, cells_ptr, h0_ptr, c0_ptr, offsets_ptr,
            lengths_ptr, T, reverse, B, N, u, CELL, H, D, BLOCK_H,
        )  # fmt: skip
        dh = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        if dy_ptr is not None:
            dy = load_units(dy_ptr + d * H, rows, here, u, H, D * H, BLOCK_H)
        if mask_ptr is not None:  # anew in every step: kept in registers it made a GRU spill
            mask = load_units(mask_ptr, at, ok, u, H, H, BLOCK_H)
        dh = dot(g0, w_0, dh)
        if CELL == _LSTM or CELL == _GRU:  # noqa: SIM109  (constants of Triton's)
            dh = dot(g1, w_1, dh)
            dh = dot(g2, w_2, dh)
        if CELL == _LSTM:
            dh = dot(g3, w_3, dh)
        if mask_ptr is not None:
            dh *= mask
        dh += by
        if dy_ptr is not None:
            dh += dy  # 0 where there is no such step
        f0, f1, f2, f3, by, dc_before = cell_gradients(
            dh, dc, s0, s1, s2, s3, s4, s5, dgx_ptr, dghn_ptr, d * N + rows, here, u, CELL, H,
            BLOCK_H,
        )  # fmt: skip
        # A sequence that does not have the step leaves what it was given, and no gradient of gates.
        has = here[:, None]
        by = tl.where(has, by, dh)
        dc = tl.where(has, dc_before, dc)
        g0, g1 = tl.where(has, f0, 0.0).to(w_0.dtype), tl.where(has, f1, 0.0).to(w_0.dtype)
        g2, g3 = tl.where(has, f2, 0.0).to(w_0.dtype), tl.where(has, f3, 0.0).to(w_0.dtype)
    store_units(dh0_ptr, by, at, ok, u, H, H, BLOCK_H)
    if CELL == _LSTM:
        store_units(dc0_ptr, dc, at, ok, u, H, H, BLOCK_H)
