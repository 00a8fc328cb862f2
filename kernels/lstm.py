"""The LSTM cell of the recurrent kernels (Hochreiter and Schmidhuber, 1997), gates i f g o.

    i, f, o = sigmoid, g = tanh of gx + W_hh h;   c' = f c + i g;   h' = o tanh(c')

A gate's sum is an fp32 tile (BLOCK_B, BLOCK_U), so the four of a unit meet in one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.attention_common import tanh
from fastattn.kernels.bias_act import sigmoid
from fastattn.kernels.recurrent_common import (
    dot,
    load_operand,
    load_units,
    load_weight,
    store_units,
)


@triton.jit
def lstm_products(
    i, f, g, o, x_ptr, w_ptr, b, ok, u, depth, H: tl.constexpr, P: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gates' inputs plus W_hh x, x (B, P). depth: P."""
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = load_operand(x_ptr, b, ok, k, P, P, BLOCK_K)
        i = dot(x, tl.trans(load_weight(w_ptr, u, k, H, P, BLOCK_U, BLOCK_K)), i)
        f = dot(x, tl.trans(load_weight(w_ptr + H * P, u, k, H, P, BLOCK_U, BLOCK_K)), f)
        g = dot(x, tl.trans(load_weight(w_ptr + 2 * H * P, u, k, H, P, BLOCK_U, BLOCK_K)), g)
        o = dot(x, tl.trans(load_weight(w_ptr + 3 * H * P, u, k, H, P, BLOCK_U, BLOCK_K)), o)
    return i, f, g, o


@triton.jit
def lstm_load(ptr, rows, here, u, H: tl.constexpr, BLOCK_U: tl.constexpr):
    """What the gates get from the input, or the saved gates."""
    i = load_units(ptr, rows, here, u, H, 4 * H, BLOCK_U)
    f = load_units(ptr + H, rows, here, u, H, 4 * H, BLOCK_U)
    g = load_units(ptr + 2 * H, rows, here, u, H, 4 * H, BLOCK_U)
    o = load_units(ptr + 3 * H, rows, here, u, H, 4 * H, BLOCK_U)
    return i, f, g, o


@triton.jit
def lstm_store(ptr, i, f, g, o, rows, here, u, H: tl.constexpr, BLOCK_U: tl.constexpr):
    """Gates, or their gradients, into rows of 4 H."""
    store_units(ptr, i, rows, here, u, H, 4 * H, BLOCK_U)
    store_units(ptr + H, f, rows, here, u, H, 4 * H, BLOCK_U)
    store_units(ptr + 2 * H, g, rows, here, u, H, 4 * H, BLOCK_U)
    store_units(ptr + 3 * H, o, rows, here, u, H, 4 * H, BLOCK_U)


@triton.jit
def lstm_cell(
    i, f, g, o, c, gates_ptr, cells_ptr, rows, here, u, H: tl.constexpr, BLOCK_U: tl.constexpr
):
    """h' (before a projection) and c'; gates and c' into memory where training saves them."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    if gates_ptr is not None:
        lstm_store(gates_ptr, i, f, g, o, rows, here, u, H, BLOCK_U)
        store_units(cells_ptr, c, rows, here, u, H, H, BLOCK_U)
    return o * tanh(c), c


@triton.jit
def lstm_gradients(
    dh, dc, i, f, g, o, c, c_before, dgx_ptr, rows, here, u, H: tl.constexpr, BLOCK_U: tl.constexpr
):
    """dgx, into memory too, and the gradient of c_before.

    dh: of h before a projection; dc: of c from later steps."""
    t = tanh(c)
    dc += dh * o * (1.0 - t * t)
    di = dc * g * i * (1.0 - i)
    df = dc * c_before * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = dh * t * o * (1.0 - o)
    lstm_store(dgx_ptr, di, df, dg, do, rows, here, u, H, BLOCK_U)
    return di, df, dg, do, dc * f
