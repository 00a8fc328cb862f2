"""The cells without a state of their own beside h: GRU (Cho, 2014, in cuDNN's form) and plain RNN.

GRU:  r, z = sigmoid(gx + W_hh h),  hn = W_hn h + b_hn,  n = tanh(gx_n + r hn),
      h' = (1 - z) n + z h
RNN:  h' = tanh or relu (gx + W_hh h)
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.attention_common import tanh
from fastattn.kernels.bias_act import sigmoid
from fastattn.kernels.recurrent_common import (
    RNN_TANH,
    dot,
    load_operand,
    load_units,
    load_weight,
    store_units,
)

_RNN_TANH = RNN_TANH


@triton.jit
def gru_products(
    r, z, hn, x_ptr, w_ptr, b, ok, u, depth, H: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The inputs of r and z plus W_hh x, and hn, whose input joins only after r has scaled it."""
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = load_operand(x_ptr, b, ok, k, H, H, BLOCK_K)
        r = dot(x, tl.trans(load_weight(w_ptr, u, k, H, H, BLOCK_U, BLOCK_K)), r)
        z = dot(x, tl.trans(load_weight(w_ptr + H * H, u, k, H, H, BLOCK_U, BLOCK_K)), z)
        hn = dot(x, tl.trans(load_weight(w_ptr + 2 * H * H, u, k, H, H, BLOCK_U, BLOCK_K)), hn)
    return r, z, hn


@triton.jit
def gru_inputs(gx_ptr, rows, here, u, H: tl.constexpr, BLOCK_U: tl.constexpr):
    r = load_units(gx_ptr, rows, here, u, H, 3 * H, BLOCK_U)
    z = load_units(gx_ptr + H, rows, here, u, H, 3 * H, BLOCK_U)
    n = load_units(gx_ptr + 2 * H, rows, here, u, H, 3 * H, BLOCK_U)
    return r, z, n


@triton.jit
def gru_bias(b_hn_ptr, hn, u, H: tl.constexpr):
    """What hn starts from: b_hn where there is one (hn: zeros)."""
    if b_hn_ptr is not None:
        hn += tl.load(b_hn_ptr + u, mask=u < H, other=0.0).to(tl.float32)[None, :]
    return hn


@triton.jit
def gru_cell(r, z, n, hn, h, gates_ptr, rows, here, u, H: tl.constexpr, BLOCK_U: tl.constexpr):
    """h'; r z n and hn into memory where training saves them. n: gx's."""
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(n + r * hn)
    if gates_ptr is not None:
        store_units(gates_ptr, r, rows, here, u, H, 4 * H, BLOCK_U)
        store_units(gates_ptr + H, z, rows, here, u, H, 4 * H, BLOCK_U)
        store_units(gates_ptr + 2 * H, n, rows, here, u, H, 4 * H, BLOCK_U)
        store_units(gates_ptr + 3 * H, hn, rows, here, u, H, 4 * H, BLOCK_U)
    return (1.0 - z) * n + z * h


@triton.jit
def gru_load(gates_ptr, rows, here, u, H: tl.constexpr, BLOCK_U: tl.constexpr):
    """r, z, n and hn as ``gru_cell`` saved them."""
    r = load_units(gates_ptr, rows, here, u, H, 4 * H, BLOCK_U)
    z = load_units(gates_ptr + H, rows, here, u, H, 4 * H, BLOCK_U)
    n = load_units(gates_ptr + 2 * H, rows, here, u, H, 4 * H, BLOCK_U)
    hn = load_units(gates_ptr + 3 * H, rows, here, u, H, 4 * H, BLOCK_U)
    return r, z, n, hn


@triton.jit
def gru_gradients(
    dh, r, z, n, hn, h_before, dgx_ptr, dghn_ptr, rows, here, u, H: tl.constexpr,
    BLOCK_U: tl.constexpr,
):  # fmt: skip
    """dgx and dghn into memory; returns what W_hh transposes (dr, dz, dhn), and the part of the
    gradient of h_before that passes W_hh by."""
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dr = dn * hn * r * (1.0 - r)
    dz = dh * (h_before - n) * z * (1.0 - z)
    store_units(dgx_ptr, dr, rows, here, u, H, 3 * H, BLOCK_U)
    store_units(dgx_ptr + H, dz, rows, here, u, H, 3 * H, BLOCK_U)
    store_units(dgx_ptr + 2 * H, dn, rows, here, u, H, 3 * H, BLOCK_U)
    store_units(dghn_ptr, dn * r, rows, here, u, H, H, BLOCK_U)
    return dr, dz, dn * r, dh * z


@triton.jit
def rnn_products(
    a, x_ptr, w_ptr, b, ok, u, depth, H: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = load_operand(x_ptr, b, ok, k, H, H, BLOCK_K)
        a = dot(x, tl.trans(load_weight(w_ptr, u, k, H, H, BLOCK_U, BLOCK_K)), a)
    return a


@triton.jit
def rnn_cell(a, CELL: tl.constexpr):
    if CELL == _RNN_TANH:
        h = tanh(a)
    else:
        h = tl.where(a < 0.0, 0.0, a)  # a NaN passes
    return h


@triton.jit
def rnn_gradient(
    dh, y, dgx_ptr, rows, here, u, CELL: tl.constexpr, H: tl.constexpr, BLOCK_U: tl.constexpr
):
    """dgx, into memory too; the derivative from y, which is h'."""
    if CELL == _RNN_TANH:
        da = dh * (1.0 - y * y)
    else:
        da = tl.where(y > 0.0, dh, 0.0)
    store_units(dgx_ptr, da, rows, here, u, H, H, BLOCK_U)
    return da
