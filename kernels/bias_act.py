"""The act pass and its backward: what lies between the GEMMs of an FFN.

    a = dropout(act(x + bias))   or gated   dropout(act(g + gate_bias) * (x + bias))

M rows of N columns. Read x (and g), write a: 4 to 8 bytes an element in 16 bit against about 25
instructions, so bound by memory. The derivative is recomputed from x; the backward reads da and
x (and g), writes dx over da where the caller allows it, and sums over rows as rows.py says. All
arithmetic is fp32, the gated product included: in fp16 what fits the result comes out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.launch import device_of, launch
from fastattn.kernels.rows import (
    RowSums,
    drop,
    dropout_arguments,
    load_tile,
    load_vector,
    on_cpu,
    store_part,
    store_tile,
    strips_of,
)

ACT_GELU, ACT_GELU_TANH, ACT_RELU, ACT_RELU2, ACT_SILU, ACT_IDENTITY = range(6)
_SITE = tl.constexpr(1)  # fastattn.reference.HIDDEN_SITE

# Tiles of 2048 elements on 4 warps: 16 a thread, which the six operands of the gated backward hold
# in registers, and rows of 256 columns, of which a warp reads 512 contiguous bytes in 16 bit.
_TILE, _COLUMNS = 2048, 256
_MOST_ROWS = 16  # with 32 rows of 64 columns ptxas spilled a few registers on sm_90
_PROGRAMS = 1024  # of a backward, 132 SMs twice over at 4 warps; parts are then 1024 x 1 KB
_CPU_TILE, _CPU_COLUMNS, _CPU_PROGRAMS = 128, 32, 6


# ---- activations -------------------------------------------------------------------------------


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def normal(x):
    """Phi(x) and e^(-x^2 / 2). Upper tail: e^(-a^2 / 2) R(1 / (1 + 0.35 a)), a = |x|, the
    polynomial of csrc/cpu/activation.h (relative error 3.2e-8): Phi keeps its digits in the lower
    tail, where 1 + erf would cancel, and the derivative wants the exponential anyway."""
    t = 1.0 / (1.0 + 0.35 * tl.abs(x))
    r = t * -0.02915624901652336 + 0.14402349293231964
    r = r * t - 0.2558247447013855
    r = r * t + 0.1593046486377716
    r = r * t - 0.023202842101454735
    r = r * t + 0.10554882884025574
    r = r * t + 0.11982212960720062
    r = r * t + 0.13986341655254364
    r = r * t + 0.1396213173866272
    bell = tl.exp2(x * x * -0.7213475204444817)
    tail = bell * (r * t)
    return tl.where(x < 0.0, tail, 1.0 - tail), bell


@triton.jit
def activate(x, ACT: tl.constexpr):
    y = x
    if ACT == 0:
        phi, _ = normal(x)
        y = x * phi
    elif ACT == 1:  # (1 + tanh z) / 2 = sigmoid(2 z)
        y = x * sigmoid(x * (x * x * 0.07135481627159814 + 1.5957691216057308))
    elif ACT == 2:
        y = tl.where(x < 0.0, 0.0, x)  # a NaN passes
    elif ACT == 3:
        y = tl.where(x < 0.0, 0.0, x)
        y = y * y
    elif ACT == 4:
        y = x * sigmoid(x)
    return y


@triton.jit
def activate_with_slope(x, ACT: tl.constexpr):
    """act(x) and act'(x)."""
    y = x
    slope = x * 0.0 + 1.0
    if ACT == 0:
        phi, bell = normal(x)
        y = x * phi
        slope = x * 0.3989422804014327 * bell + phi
    elif ACT == 1:
        x2 = x * x
        s = sigmoid(x * (x2 * 0.07135481627159814 + 1.5957691216057308))
        steep = s * (1.0 - s)
        y = x * s
        # 0 * inf at the far ends, where the slope is that of 0 or x for good.
        slope = tl.where(
            steep == 0.0, s, x * steep * (x2 * 0.21406444881479442 + 1.5957691216057308) + s
        )
    elif ACT == 2:
        y = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == 3:
        up = tl.where(x < 0.0, 0.0, x)
        y = up * up
        slope = 2.0 * up
    elif ACT == 4:
        s = sigmoid(x)
        steep = s * (1.0 - s)
        y = x * s
        slope = tl.where(steep == 0.0, s, x * steep + s)
    return y, slope


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "threshold"])
def act_forward_kernel(
    x_ptr, g_ptr, bias_ptr, gate_bias_ptr, seed_ptr, a_ptr, M, stride_x, stride_g, threshold,
    keep_scale, ACT: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows and BLOCK_N columns."""
    blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(0) % blocks * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    up = load_tile(x_ptr, stride_x, rows, cols, M, N, BLOCK_N)
    if bias_ptr is not None:
        up += load_vector(bias_ptr, cols, N, BLOCK_N)
    if g_ptr is not None:
        gate = load_tile(g_ptr, stride_g, rows, cols, M, N, BLOCK_N)
        if gate_bias_ptr is not None:
            gate += load_vector(gate_bias_ptr, cols, N, BLOCK_N)
        a = activate(gate, ACT) * up
    else:
        a = activate(up, ACT)
    if threshold is not None:
        a = drop(a, seed_ptr, rows, first_col, threshold, keep_scale, _SITE, BLOCK_M, BLOCK_N)
    store_tile(a_ptr, a, rows, cols, M, N, BLOCK_N)


@triton.jit(do_not_specialize=["M", "strip_rows", "threshold"])
def act_backward_kernel(
    da_ptr, x_ptr, g_ptr, bias_ptr, gate_bias_ptr, seed_ptr, dx_ptr, dg_ptr, a_ptr, dbias_ptr,
    dgate_bias_ptr, M, strip_rows, stride_da, stride_x, stride_g, threshold, keep_scale,
    ACT: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a strip of rows and BLOCK_N columns. dbias_ptr and dgate_bias_ptr are parts,
    (strips, N); a is the forward's, made again. Any result may be None. dx may lie over da: a tile
    is read whole before it is written."""
    blocks = tl.cdiv(N, BLOCK_N)
    strip = tl.program_id(0) // blocks
    first_col = tl.program_id(0) % blocks * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dgate_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    start = strip.to(tl.int64) * strip_rows
    for first in range(start, tl.minimum(start + strip_rows, M), BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        da = load_tile(da_ptr, stride_da, rows, cols, M, N, BLOCK_N)
        up = load_tile(x_ptr, stride_x, rows, cols, M, N, BLOCK_N)
        if bias_ptr is not None:
            up += load_vector(bias_ptr, cols, N, BLOCK_N)
        if threshold is not None:
            da = drop(da, seed_ptr, rows, first_col, threshold, keep_scale, _SITE, BLOCK_M, BLOCK_N)
        if g_ptr is not None:
            gate = load_tile(g_ptr, stride_g, rows, cols, M, N, BLOCK_N)
            if gate_bias_ptr is not None:
                gate += load_vector(gate_bias_ptr, cols, N, BLOCK_N)
            y, slope = activate_with_slope(gate, ACT)
            a = y * up
            dx = da * y
            dgate = da * up * slope
            dgate_bias += dgate
            if dg_ptr is not None:
                store_tile(dg_ptr, dgate, rows, cols, M, N, BLOCK_N)
        else:
            a, slope = activate_with_slope(up, ACT)
            dx = da * slope
        dbias += dx
        if dx_ptr is not None:
            store_tile(dx_ptr, dx, rows, cols, M, N, BLOCK_N)
        if a_ptr is not None:
            if threshold is not None:
                a = drop(
                    a, seed_ptr, rows, first_col, threshold, keep_scale, _SITE, BLOCK_M, BLOCK_N
                )
            store_tile(a_ptr, a, rows, cols, M, N, BLOCK_N)
    if dbias_ptr is not None:
        store_part(dbias_ptr, dbias, strip, cols, N, BLOCK_N)
    if dgate_bias_ptr is not None:
        store_part(dgate_bias_ptr, dgate_bias, strip, cols, N, BLOCK_N)


# ---- launchers ---------------------------------------------------------------------------------


def tile_of(columns: int, cpu: bool) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, warps)."""
    tile, widest = (_CPU_TILE, _CPU_COLUMNS) if cpu else (_TILE, _COLUMNS)
    block_n = min(widest, max(16, triton.next_power_of_2(columns)))
    return min(_MOST_ROWS, tile // block_n), block_n, 1 if cpu else 4


def act_forward(
    x: Tensor,
    g: Tensor | None,
    bias: Tensor | None,
    gate_bias: Tensor | None,
    seed: Tensor | None,
    *,
    act: int,
    dropout_p: float,
    out: Tensor | None = None,
) -> Tensor:
    """a, (M, N) in x's dtype; ``out``, contiguous, may be x or g itself.

    Args:
        x, g: (M, N), columns next to each other; g present = gated. bias, gate_bias: (N,)
            contiguous. act: ACT_*.
    """
    M, N = x.shape
    a = x.new_empty((M, N)) if out is None else out
    block_m, block_n, warps = tile_of(N, on_cpu(x))
    seed, threshold, keep_scale = dropout_arguments(dropout_p, seed)
    if M:
        with device_of(x):
            launch(
                act_forward_kernel, (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),),
                x, g, bias, gate_bias, seed, a, M, x.stride(0), 0 if g is None else g.stride(0),
                threshold, keep_scale, act, N, block_m, block_n, num_warps=warps,
            )  # fmt: skip
    return a


def act_backward(
    da: Tensor,
    x: Tensor,
    g: Tensor | None,
    bias: Tensor | None,
    gate_bias: Tensor | None,
    seed: Tensor | None,
    *,
    act: int,
    dropout_p: float,
    want_dx: bool,
    want_dg: bool,
    want_a: bool,
    sums: tuple[torch.dtype | None, torch.dtype | None],
    over_da: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """dx, dg, a (M, N) in x's dtype, and the gradients of bias and gate_bias (N,).

    Args:
        da: upstream, (M, N), columns next to each other; the rest as in :func:`act_forward`.
        sums: dtypes of the two sums over rows, None = not wanted.
        over_da: dx takes da's memory, which is then contiguous and of x's dtype.
    """
    M, N = x.shape
    dx = (da if over_da else x.new_empty((M, N))) if want_dx else None
    dg, a = (x.new_empty((M, N)) if wanted else None for wanted in (want_dg, want_a))
    cpu = on_cpu(x)
    block_m, block_n, warps = tile_of(N, cpu)
    blocks = triton.cdiv(N, block_n)
    programs = _CPU_PROGRAMS if cpu else _PROGRAMS
    strips, strip_rows = strips_of(M, block_m, max(1, programs // blocks))
    totals = RowSums(x, N, strips, sums)
    seed, threshold, keep_scale = dropout_arguments(dropout_p, seed)
    with device_of(x):
        if M:
            launch(
                act_backward_kernel, (strips * blocks,),
                da, x, g, bias, gate_bias, seed, dx, dg, a, *totals.pointers(), M, strip_rows,
                da.stride(0), x.stride(0), 0 if g is None else g.stride(0), threshold, keep_scale,
                act, N, block_m, block_n, num_warps=warps,
            )  # fmt: skip
        return dx, dg, a, totals.results()
