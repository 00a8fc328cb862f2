"""The norm pass and its backward (Ba et al., 1607.06450; Zhang & Sennrich, 1910.07467).

    s = residual + dropout(x + x_bias)            rounded to the dtype it is stored in
    mean = sum s / N,  var = sum (s - mean)^2 / N (rms: mean = 0),  rstd = 1 / sqrt(var + eps)
    y = (s - mean) rstd weight + bias
    h = dy weight,  ds' = rstd (h - sum h / N - y_hat sum(h y_hat) / N) + ds,  dx = dropout(ds')
    dweight = sum_m dy y_hat,  dbias = sum_m dy,  dx_bias = sum_m dx;   y_hat = (s - mean) rstd

M rows of N columns. About 8 FLOPs an element forward, 12 backward, against 4 to 12 bytes: bound by
memory on every GPU; x, residual and weight are read once, y and s written once (backward: dy, ds
and s read once, dx and dresidual written once). A program owns whole rows in registers up to
``_WHOLE`` columns; wider rows are read again for each sum (three times, from L2) and need a second
kernel in the backward.

The statistics take two passes over fp32 values, the second corrected by the sum of its deviations,
so a mean of 1000 costs no digits. A row whose squares overflow fp32 is done again, scaled by the
power of two below its largest element: consumer GPUs have fp64 at 1/64 of their rate, and no norm
needs it. Sums over rows: see rows.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.launch import device_of, launch
from fastattn.kernels.rows import (
    TL_DTYPES,
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

NORM_NONE, NORM_LAYER, NORM_RMS = 0, 1, 2
_SITE = tl.constexpr(2)  # the last dropout of layernorm_ffn, fastattn.reference.OUTPUT_SITE

# Columns that stay in registers, elements of a tile, columns of a tile of wider rows. A tile of
# 4096 on 4 to 16 warps has 8 to 32 elements a thread: each of up to five operands takes that many
# registers, and the loads of a row are all in flight at once.
_WHOLE = {"forward": 8192, "backward": 4096}
_TILE = {"forward": 4096, "backward": 2048}
_WIDE = 2048
# With more rows of 64 columns ptxas spilled a few registers (32 on sm_80, 16 in fp32 on sm_100).
_MOST_ROWS = {"forward": 16, "backward": 8}
# Parts of a sum over rows: 512 programs of 4 warps fill 132 SMs twice over; each adds 4 N bytes to
# what is written, an eighth of a bf16 gradient of 8192 rows.
_STRIPS = 512
# The interpreter: several tiles of every kind in small tensors.
_CPU_WHOLE, _CPU_TILE, _CPU_WIDE, _CPU_STRIPS = 128, 256, 32, 3

_MOST = tl.constexpr(3.4028234663852886e38)  # finite fp32


# ---- statistics --------------------------------------------------------------------------------


@triton.jit
def sum_tile(
    x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual, seed_ptr, threshold, keep_scale,
    rows, first_col, M, SUM: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """s of a tile, fp32 with SUM's rounding; 0 beyond M and N."""
    cols = first_col + tl.arange(0, BLOCK_N)
    s = load_tile(x_ptr, stride_x, rows, cols, M, N, BLOCK_N)
    if x_bias_ptr is not None:
        s += load_vector(x_bias_ptr, cols, N, BLOCK_N)
    if threshold is not None:
        s = drop(s, seed_ptr, rows, first_col, threshold, keep_scale, _SITE, BLOCK_M, BLOCK_N)
    if residual_ptr is not None:
        s += load_tile(residual_ptr, stride_residual, rows, cols, M, N, BLOCK_N)
    return s.to(SUM).to(tl.float32)


@triton.jit
def deviations(
    s, centre, scale, x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual, seed_ptr,
    threshold, keep_scale, rows, M, SUM: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Means over a row of d = scale s - centre and of d^2: of the tile s where it is WHOLE."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WHOLE:
        sums = s * scale[:, None] - centre[:, None]
        if N != BLOCK_N:
            sums = tl.where(tl.arange(0, BLOCK_N)[None, :] < N, sums, 0.0)
        squares = sums * sums
    else:
        for first_col in range(0, N, BLOCK_N):
            part = sum_tile(
                x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual, seed_ptr, threshold,
                keep_scale, rows, first_col, M, SUM, N, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            d = part * scale[:, None] - centre[:, None]
            if N % BLOCK_N != 0:
                d = tl.where((first_col + tl.arange(0, BLOCK_N))[None, :] < N, d, 0.0)
            sums += d
            squares += d * d
    return tl.sum(sums, 1) * (1.0 / N), tl.sum(squares, 1) * (1.0 / N)


@triton.jit
def largest(
    s, x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual, seed_ptr, threshold, keep_scale,
    rows, M, SUM: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """max |s| of a row."""
    top = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WHOLE:
        top = tl.abs(s)
    else:
        for first_col in range(0, N, BLOCK_N):
            part = sum_tile(
                x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual, seed_ptr, threshold,
                keep_scale, rows, first_col, M, SUM, N, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            top = tl.maximum(top, tl.abs(part))
    return tl.max(top, 1)


@triton.jit
def moments(
    s, eps, x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual, seed_ptr, threshold,
    keep_scale, rows, M, SUM: tl.constexpr, N: tl.constexpr, RMS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """mean and rstd of each row."""
    zero = tl.zeros((BLOCK_M,), tl.float32)
    mean = zero
    off = zero
    if not RMS:
        mean, _ = deviations(
            s, zero, zero + 1.0, x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual,
            seed_ptr, threshold, keep_scale, rows, M, SUM, N, WHOLE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    off, var = deviations(
        s, mean, zero + 1.0, x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual,
        seed_ptr, threshold, keep_scale, rows, M, SUM, N, WHOLE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if not RMS:
        var = var - off * off
        var = tl.where(var < 0.0, 0.0, var)  # a NaN stays
        mean = mean + off
    fits = var <= _MOST
    rstd = tl.math.div_rn(1.0, tl.math.sqrt_rn(var + eps))
    if tl.min(fits.to(tl.int32), 0) == 0:
        top = largest(
            s, x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual, seed_ptr, threshold,
            keep_scale, rows, M, SUM, N, WHOLE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        # 2^e <= top < 2^(e + 1), e at most 126, so that 2^-e is no denormal.
        power = tl.minimum(top.to(tl.int32, bitcast=True) & 0x7F800000, 253 << 23)
        scale = ((254 << 23) - power).to(tl.float32, bitcast=True)
        unit = power.to(tl.float32, bitcast=True)
        centre = zero
        if not RMS:
            centre, _ = deviations(
                s, zero, scale, x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual,
                seed_ptr, threshold, keep_scale, rows, M, SUM, N, WHOLE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        off, square = deviations(
            s, centre, scale, x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual,
            seed_ptr, threshold, keep_scale, rows, M, SUM, N, WHOLE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if not RMS:
            square = square - off * off
            square = tl.where(square < 0.0, 0.0, square)
            mean = tl.where(fits, mean, (centre + off) * unit)
        true = square * unit * unit
        scaled = tl.where(
            true <= _MOST,
            tl.math.div_rn(1.0, tl.math.sqrt_rn(true + eps)),
            tl.math.div_rn(scale, tl.math.sqrt_rn(square)),
        )
        rstd = tl.where(fits, rstd, scaled)
    return mean, rstd


# ---- forward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "threshold"])
def norm_forward_kernel(
    x_ptr, x_bias_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, s_ptr, mean_ptr,
    rstd_ptr, M, stride_x, stride_residual, eps, threshold, keep_scale,
    SUM: tl.constexpr, NORM: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows. Any of s_ptr, mean_ptr, rstd_ptr may be None."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = mean + 1.0
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WHOLE:
        s = sum_tile(
            x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual, seed_ptr, threshold,
            keep_scale, rows, 0, M, SUM, N, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if NORM != 0:
        mean, rstd = moments(
            s, eps, x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual, seed_ptr, threshold,
            keep_scale, rows, M, SUM, N, NORM == 2, WHOLE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if mean_ptr is not None:
            tl.store(mean_ptr + rows, mean, mask=rows < M)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    for first_col in range(0, N, BLOCK_N):
        if not WHOLE:
            s = sum_tile(
                x_ptr, stride_x, x_bias_ptr, residual_ptr, stride_residual, seed_ptr, threshold,
                keep_scale, rows, first_col, M, SUM, N, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        cols = first_col + tl.arange(0, BLOCK_N)
        if s_ptr is not None:
            store_tile(s_ptr, s, rows, cols, M, N, BLOCK_N)
        y = s
        if NORM == 1:
            y = y - mean[:, None]
        if NORM != 0:
            y = y * rstd[:, None]
        if weight_ptr is not None:
            y = y * load_vector(weight_ptr, cols, N, BLOCK_N)
        if bias_ptr is not None:
            y = y + load_vector(bias_ptr, cols, N, BLOCK_N)
        store_tile(y_ptr, y, rows, cols, M, N, BLOCK_N)


# ---- backward ----------------------------------------------------------------------------------


@triton.jit
def upstream_tile(
    dy_ptr, stride_dy, s_ptr, stride_s, weight_ptr, mean, rstd, rows, cols, M,
    NORM: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dy, y_hat and h = dy weight; all 0 beyond M and N."""
    dy = load_tile(dy_ptr, stride_dy, rows, cols, M, N, BLOCK_N)
    y_hat = load_tile(s_ptr, stride_s, rows, cols, M, N, BLOCK_N)
    if NORM == 1:
        y_hat = y_hat - mean[:, None]
    y_hat = y_hat * rstd[:, None]
    if N % BLOCK_N != 0:  # -mean rstd may be infinite, and h is 0 there: 0 * inf
        y_hat = tl.where(cols[None, :] < N, y_hat, 0.0)
    h = dy
    if weight_ptr is not None:
        h = dy * load_vector(weight_ptr, cols, N, BLOCK_N)
    return dy, y_hat, h


@triton.jit
def row_constants(mean_ptr, rstd_ptr, rows, M, NORM: tl.constexpr):
    rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
    mean = rstd
    if NORM == 1:
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
    return mean, rstd


@triton.jit(do_not_specialize=["M"])
def norm_row_sums_kernel(
    dy_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr, M, stride_dy, stride_s,
    NORM: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of rows that fit no tile: c1 = sum h / N and c2 = sum(h y_hat) / N."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean, rstd = row_constants(mean_ptr, rstd_ptr, rows, M, NORM)
    c1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_col in range(0, N, BLOCK_N):
        cols = first_col + tl.arange(0, BLOCK_N)
        _, y_hat, h = upstream_tile(
            dy_ptr, stride_dy, s_ptr, stride_s, weight_ptr, mean, rstd, rows, cols, M, NORM, N,
            BLOCK_N,
        )  # fmt: skip
        c1 += h
        c2 += h * y_hat
    tl.store(c1_ptr + rows, tl.sum(c1, 1) * (1.0 / N), mask=rows < M)
    tl.store(c2_ptr + rows, tl.sum(c2, 1) * (1.0 / N), mask=rows < M)


@triton.jit(do_not_specialize=["M", "strip_rows", "threshold"])
def norm_backward_kernel(
    dy_ptr, ds_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr, seed_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, dx_bias_ptr,
    M, strip_rows, stride_dy, stride_ds, stride_s, threshold, keep_scale,
    NORM: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a strip of rows and BLOCK_N columns. dweight_ptr, dbias_ptr, dx_bias_ptr are
    parts, (strips, N); any result may be None, and dy or ds."""
    blocks = tl.cdiv(N, BLOCK_N)
    strip = tl.program_id(0) // blocks
    first_col = tl.program_id(0) % blocks * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dx_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    start = strip.to(tl.int64) * strip_rows
    for first in range(start, tl.minimum(start + strip_rows, M), BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if dy_ptr is not None:
            if NORM == 0:
                grad = load_tile(dy_ptr, stride_dy, rows, cols, M, N, BLOCK_N)
            else:
                mean, rstd = row_constants(mean_ptr, rstd_ptr, rows, M, NORM)
                dy, y_hat, h = upstream_tile(
                    dy_ptr, stride_dy, s_ptr, stride_s, weight_ptr, mean, rstd, rows, cols, M, NORM,
                    N, BLOCK_N,
                )  # fmt: skip
                dweight += dy * y_hat
                dbias += dy
                if WHOLE:
                    c1 = tl.sum(h, 1) * (1.0 / N)
                    c2 = tl.sum(h * y_hat, 1) * (1.0 / N)
                else:
                    c1 = tl.load(c1_ptr + rows, mask=rows < M, other=0.0)
                    c2 = tl.load(c2_ptr + rows, mask=rows < M, other=0.0)
                grad = h - y_hat * c2[:, None]
                if NORM == 1:
                    grad = grad - c1[:, None]
                grad = grad * rstd[:, None]
        if ds_ptr is not None:
            grad += load_tile(ds_ptr, stride_ds, rows, cols, M, N, BLOCK_N)
        if dresidual_ptr is not None:
            store_tile(dresidual_ptr, grad, rows, cols, M, N, BLOCK_N)
        if threshold is not None:
            grad = drop(
                grad, seed_ptr, rows, first_col, threshold, keep_scale, _SITE, BLOCK_M, BLOCK_N
            )
        if dx_ptr is not None:
            store_tile(dx_ptr, grad, rows, cols, M, N, BLOCK_N)
        if dx_bias_ptr is not None:
            dx_bias += grad  # 0 beyond M, where rstd is
    if dweight_ptr is not None:
        store_part(dweight_ptr, dweight, strip, cols, N, BLOCK_N)
    if dbias_ptr is not None:
        store_part(dbias_ptr, dbias, strip, cols, N, BLOCK_N)
    if dx_bias_ptr is not None:
        store_part(dx_bias_ptr, dx_bias, strip, cols, N, BLOCK_N)


# ---- launchers ---------------------------------------------------------------------------------


def tile_of(columns: int, direction: str, cpu: bool) -> tuple[bool, int, int, int]:
    """(whole rows?, BLOCK_M, BLOCK_N, warps) for rows of ``columns``."""
    whole, tile, wide = (
        (_CPU_WHOLE, _CPU_TILE, _CPU_WIDE) if cpu else (_WHOLE[direction], _TILE[direction], _WIDE)
    )
    block_n = max(16, triton.next_power_of_2(columns))
    fits = block_n <= whole
    block_n = block_n if fits else wide
    block_m = max(1, min(_MOST_ROWS[direction], tile // block_n))
    # A warp for 512 elements of a backward tile (16 a thread), for 1024 of a forward one.
    per_warp = 512 if direction == "backward" else 1024
    warps = 1 if cpu else min(16, max(4, block_m * block_n // per_warp))
    return fits, block_m, block_n, warps


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    norm: int,
    eps: float,
    dropout_p: float,
    y_dtype: torch.dtype,
    want_sum: bool,
    want_stats: bool,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y (M, N) in y_dtype, s, mean and rstd (fp32, (M,)).

    Args:
        x, residual: (M, N), columns next to each other. x_bias, weight, bias: (N,) contiguous.
        norm: NORM_*. want_sum: return s. want_stats: return mean (layer norm) and rstd.
        sum_dtype: of s; None = residual's, or x's without one.
    """
    M, N = x.shape
    sum_dtype = sum_dtype or (x if residual is None else residual).dtype
    y = x.new_empty((M, N), dtype=y_dtype)
    s = x.new_empty((M, N), dtype=sum_dtype) if want_sum else None
    mean, rstd = (
        x.new_empty((M,), dtype=torch.float32) if want_stats and wanted else None
        for wanted in (norm == NORM_LAYER, norm != NORM_NONE)
    )
    whole, block_m, block_n, warps = tile_of(N, "forward", on_cpu(x))
    seed, threshold, keep_scale = dropout_arguments(dropout_p, seed)
    if M:
        with device_of(x):
            launch(
                norm_forward_kernel, (triton.cdiv(M, block_m),),
                x, x_bias, residual, weight, bias, seed, y, s, mean, rstd,
                M, x.stride(0), 0 if residual is None else residual.stride(0), eps, threshold,
                keep_scale, TL_DTYPES[sum_dtype], norm, N, whole, block_m, block_n,
                num_warps=warps,
            )  # fmt: skip
    return y, s, mean, rstd


def norm_backward(
    dy: Tensor | None,
    ds: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    *,
    norm: int,
    dropout_p: float,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    sums: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """dx, dresidual (M, N) and the gradients of weight, bias and x_bias (N,).

    Args:
        dy, ds: upstream of y and of s, None = 0. s: as the forward normalised it (norm none: any
            tensor of its shape). All (M, N), columns next to each other.
        mean, rstd: the forward's. weight: (N,) contiguous.
        dx_dtype, dresidual_dtype: None = not wanted. sums: dtypes of the three sums over rows, None
            = not wanted.
    """
    M, N = s.shape
    dx, dresidual = (
        None if dtype is None else s.new_empty((M, N), dtype=dtype)
        for dtype in (dx_dtype, dresidual_dtype)
    )
    cpu = on_cpu(s)
    whole, block_m, block_n, warps = tile_of(N, "backward", cpu)
    strips, strip_rows = strips_of(M, block_m, _CPU_STRIPS if cpu else _STRIPS)
    totals = RowSums(s, N, strips, sums)
    seed, threshold, keep_scale = dropout_arguments(dropout_p, seed)
    strides = [0 if x is None else x.stride(0) for x in (dy, ds)]
    c1 = c2 = None
    with device_of(s):
        if M and not whole and norm and dy is not None:
            c1, c2 = (s.new_empty((M,), dtype=torch.float32) for _ in range(2))
            launch(
                norm_row_sums_kernel, (triton.cdiv(M, block_m),),
                dy, s, weight, mean, rstd, c1, c2, M, strides[0], s.stride(0), norm, N, block_m,
                block_n, num_warps=warps,
            )  # fmt: skip
        if M:
            launch(
                norm_backward_kernel, (strips * triton.cdiv(N, block_n),),
                dy, ds, s, weight, mean, rstd, c1, c2, seed, dx, dresidual, *totals.pointers(),
                M, strip_rows, *strides, s.stride(0), threshold, keep_scale, norm, N, whole,
                block_m, block_n, num_warps=warps,
            )  # fmt: skip
        return dx, dresidual, totals.results()
