"""The whole block in one kernel, for D <= 256: the hidden layer never reaches memory.

    xn = norm(x)                                     BLOCK_M rows, in registers for good
    for a block of hidden features:                  u = xn W1^T (g = xn Wg^T), a = act pass (u, g)
        z += a W2^T                                  fp32
    y = post(x + dropout(z + b2))

x (M, D), W1 and Wg (F, D), W2 (Dout, F). 4 M D F FLOPs (gated 6). Every block of rows reads all
weights, from L2: 4 D F bytes in 16 bit for 4 BLOCK_M D F FLOPs, so BLOCK_M FLOPs a byte, 16 to 64,
where an H100 has about 180 to its L2 (5.5 TB/s, measured by others): bound by L2, while the
composition of layernorm_ffn.py moves 8 F bytes a row through memory and launches five kernels. So
this serves few rows (``fastattn.backends.whole_block``), where launches decide.

Few rows are few programs: the hidden features are then split over programs too, whose fp32 parts of
z, (splits, M, Dout), a second kernel adds up in order. No atomics; splits follow from the shape.
What training saves of the hidden layer is written on the way and not read. The backward is the
composition's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.bias_act import activate
from fastattn.kernels.launch import device_of, launch
from fastattn.kernels.layernorm import moments
from fastattn.kernels.layernorm_ffn import SAVE_A, SAVE_STATS, SAVE_U, Call, Numbers, Passes
from fastattn.kernels.rows import (
    drop,
    dropout_arguments,
    load_tile,
    load_vector,
    on_cpu,
    store_tile,
)

_HIDDEN_SITE, _OUTPUT_SITE = tl.constexpr(1), tl.constexpr(2)
_PROGRAMS = 128  # the SMs of the GPUs that training is done on, about


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def store_hidden(ptr, x, rows, hidden, M, F):
    """Into a contiguous (M, F) tensor, where there is one."""
    if ptr is not None:
        ok = (rows[:, None] < M) & (hidden[None, :] < F)
        tl.store(ptr + rows[:, None] * F + hidden[None, :], x.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def project(
    xn, w_ptr, stride_w, bias_ptr, saved_ptr, rows, hidden, cols, M, F, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """xn W^T + bias for a block of hidden features, fp32; 0 beyond F. Saved without the bias."""
    ok = hidden[:, None] < F
    if D != BLOCK_D:
        ok = ok & (cols[None, :] < D)
    w = tl.load(w_ptr + hidden[:, None].to(tl.int64) * stride_w + cols[None, :], ok, other=0.0)
    u = tl.dot(xn, tl.trans(w), input_precision="ieee")
    store_hidden(saved_ptr, u, rows, hidden, M, F)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + hidden, mask=hidden < F, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit
def normalised(
    s, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, rows, cols, M, eps, NORM: tl.constexpr,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The norm of whole rows s, and its statistics into memory where they are wanted."""
    y = s
    if NORM != 0:
        mean, rstd = moments(
            s, eps, None, 0, None, None, 0, None, None, None, rows, M, tl.float32, N, NORM == 2,
            True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if NORM == 1:
            y = y - mean[:, None]
        y = y * rstd[:, None]
        if mean_ptr is not None:
            tl.store(mean_ptr + rows, mean, mask=rows < M)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + rows, rstd, mask=rows < M)
        if weight_ptr is not None:
            y = y * load_vector(weight_ptr, cols, N, BLOCK_N)
        if bias_ptr is not None:
            y = y + load_vector(bias_ptr, cols, N, BLOCK_N)
    return y


@triton.jit
def finish(
    z, x_ptr, stride_x, b2_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr,
    rows, M, eps, threshold, keep_scale, POST: tl.constexpr, RESIDUAL: tl.constexpr,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = post(x + dropout(z + b2)) and what is saved of it."""
    cols = tl.arange(0, BLOCK_N)
    s = z
    if b2_ptr is not None:
        s += load_vector(b2_ptr, cols, N, BLOCK_N)
    if threshold is not None:
        s = drop(s, seed_ptr, rows, 0, threshold, keep_scale, _OUTPUT_SITE, BLOCK_M, BLOCK_N)
    if RESIDUAL:
        s += load_tile(x_ptr, stride_x, rows, cols, M, N, BLOCK_N)
    s = s.to(y_ptr.dtype.element_ty).to(tl.float32)
    if s_ptr is not None:
        store_tile(s_ptr, s, rows, cols, M, N, BLOCK_N)
    y = normalised(
        s, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, rows, cols, M, eps, POST, N, BLOCK_M, BLOCK_N
    )
    store_tile(y_ptr, y, rows, cols, M, N, BLOCK_N)


@triton.jit(do_not_specialize=["M", "splits", "slice_f", "threshold", "hidden_threshold"])
def ffn_block_kernel(
    x_ptr, w1_ptr, w_gate_ptr, w2_ptr, b1_ptr, b_gate_ptr, b2_ptr, weight_ptr, bias_ptr, seed_ptr,
    parts_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr, u_ptr, g_ptr, a_ptr,
    M, F, splits, slice_f, stride_x, stride_w1, stride_wg, stride_w2, eps, threshold, keep_scale,
    hidden_threshold, hidden_keep_scale,
    PRE: tl.constexpr, POST: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    D: tl.constexpr, DOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DOUT: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows and ``slice_f`` hidden features. parts_ptr: None where there is
    one slice, and y is made here."""
    split = tl.program_id(0) % splits
    rows = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    out_cols = tl.arange(0, BLOCK_DOUT)
    x = load_tile(x_ptr, stride_x, rows, cols, M, D, BLOCK_D)
    if PRE != 0:  # of the splits the first alone writes the statistics
        x = normalised(
            x, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, tl.where(split == 0, rows, M + rows), cols,
            M, eps, PRE, D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    xn = x.to(w1_ptr.dtype.element_ty)
    z = tl.zeros((BLOCK_M, BLOCK_DOUT), tl.float32)
    for first in range(split * slice_f, tl.minimum((split + 1) * slice_f, F), BLOCK_F):
        hidden = first + tl.arange(0, BLOCK_F)
        u = project(
            xn, w1_ptr, stride_w1, b1_ptr, u_ptr, rows, hidden, cols, M, F, D, BLOCK_D
        )  # fmt: skip
        if w_gate_ptr is not None:
            g = project(
                xn, w_gate_ptr, stride_wg, b_gate_ptr, g_ptr, rows, hidden, cols, M, F, D, BLOCK_D
            )
            a = activate(g, ACT) * u
        else:
            a = activate(u, ACT)
        if hidden_threshold is not None:
            a = drop(
                a, seed_ptr, rows, first, hidden_threshold, hidden_keep_scale, _HIDDEN_SITE,
                BLOCK_M, BLOCK_F,
            )  # fmt: skip
        store_hidden(a_ptr, a, rows, hidden, M, F)
        ok = hidden[None, :] < F
        if DOUT != BLOCK_DOUT:
            ok = ok & (out_cols[:, None] < DOUT)
        at = out_cols[:, None].to(tl.int64) * stride_w2 + hidden[None, :]
        w2 = tl.load(w2_ptr + at, mask=ok, other=0.0)
        z = tl.dot(a.to(w2.dtype), tl.trans(w2), z, input_precision="ieee")
    if parts_ptr is not None:
        part = parts_ptr + split.to(tl.int64) * M * DOUT
        store_tile(part, z, rows, out_cols, M, DOUT, BLOCK_DOUT)
    else:
        finish(
            z, x_ptr, stride_x, b2_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, s_ptr, mean_ptr,
            rstd_ptr, rows, M, eps, threshold, keep_scale, POST, RESIDUAL, DOUT, BLOCK_M,
            BLOCK_DOUT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "splits", "threshold"])
def ffn_block_finish_kernel(
    parts_ptr, x_ptr, b2_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr,
    M, splits, stride_x, eps, threshold, keep_scale, POST: tl.constexpr, RESIDUAL: tl.constexpr,
    DOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DOUT: tl.constexpr,
):  # fmt: skip
    """The parts of z of BLOCK_M rows, added up in order, and what is behind."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_DOUT)
    z = tl.zeros((BLOCK_M, BLOCK_DOUT), tl.float32)
    for split in range(splits):
        part = parts_ptr + tl.cast(split, tl.int64) * M * DOUT
        z += load_tile(part, DOUT, rows, cols, M, DOUT, BLOCK_DOUT)
    finish(
        z, x_ptr, stride_x, b2_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, s_ptr, mean_ptr,
        rstd_ptr, rows, M, eps, threshold, keep_scale, POST, RESIDUAL, DOUT, BLOCK_M, BLOCK_DOUT,
    )  # fmt: skip


# ---- launcher ----------------------------------------------------------------------------------


def tile_of(rows: int, widest: int, dtype: torch.dtype, cpu: bool) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_F, warps, stages), as large as ahead-of-time compiles allow without spills:
    32 x 32 at D = 256 spills, and fp32 beyond 64 features, whose operands live in registers."""
    if cpu:
        return 16, 16, 1, 1
    if dtype == torch.float32:
        return 16, 16, 4, 1
    if widest > 64:
        return 16 if rows <= 16 or widest > 128 else 32, 32, 8, 1
    return 16 if rows <= 16 else 32 if rows <= 1024 else 64, 64, 4, 2


def ffn_block_forward(tensors: tuple[Any, ...], numbers: Numbers, save: int) -> tuple[Tensor, ...]:
    """As :func:`fastattn.kernels.layernorm_ffn.ffn_forward`, for the widths that
    ``fastattn.backends.whole_block`` names."""
    c = Call(tensors, numbers, Passes())
    w1, w2, w_gate = (
        w if w is None or w.shape[1] == 1 or w.stride(1) == 1 else w.contiguous()
        for w in (c.w1, c.w2, c.w_gate)
    )
    stats = bool(save & SAVE_STATS)
    y = c.x.new_empty((c.M, c.Dout))
    s = torch.empty_like(y) if stats and c.post else None
    mean, rstd = (
        c.x.new_empty((c.M,), dtype=torch.float32) if stats and wanted else None
        for wanted in (c.n.norm == 1, c.n.norm != 0)
    )
    u, g, a = (
        c.new(c.M, c.F) if wanted else None
        for wanted in (save & SAVE_U, save & SAVE_U and w_gate is not None, save & SAVE_A)
    )
    widest = max(c.D, c.Dout)
    block_m, block_f, warps, stages = tile_of(c.M, widest, c.dtype, on_cpu(c.x))
    row_blocks, f_blocks = triton.cdiv(c.M, block_m), triton.cdiv(c.F, block_f)
    programs = 3 if on_cpu(c.x) else _PROGRAMS
    slice_f = triton.cdiv(f_blocks, max(1, programs // max(row_blocks, 1))) * block_f
    splits = triton.cdiv(c.F, slice_f)
    parts = None
    if splits > 1:
        parts = c.x.new_empty((splits, c.M, c.Dout), dtype=torch.float32)
    block_d, block_dout = (max(16, triton.next_power_of_2(n)) for n in (c.D, c.Dout))
    seed, threshold, keep_scale = dropout_arguments(numbers.dropout_p, c.seed)
    hidden_seed, *hidden = dropout_arguments(numbers.hidden_dropout_p, c.seed)
    affine = c.norm_weight, c.norm_bias
    behind = (s, mean, rstd) if c.post else (None, None, None)
    if c.M:
        with device_of(c.x):
            launch(
                ffn_block_kernel, (row_blocks * splits,),
                c.x, w1, w_gate, w2, c.b1, c.b_gate, c.b2, *affine,
                seed if seed is not None else hidden_seed, parts, y, s, mean, rstd, u, g, a,
                c.M, c.F, splits, slice_f, c.x.stride(0), w1.stride(0),
                0 if w_gate is None else w_gate.stride(0), w2.stride(0), numbers.eps, threshold,
                keep_scale, *hidden, c.pre, c.post, numbers.residual, numbers.act, c.D, c.Dout,
                block_m, block_f, block_d, block_dout, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            if parts is not None:
                launch(
                    ffn_block_finish_kernel, (row_blocks,),
                    parts, c.x, c.b2, *affine, seed, y, *behind, c.M, splits, c.x.stride(0),
                    numbers.eps, threshold, keep_scale, c.post, numbers.residual, c.Dout, block_m,
                    block_dout, num_warps=4,
                )  # fmt: skip
    nothing, none = c.w1.new_empty((0,)), c.w1.new_empty((0,), dtype=torch.float32)
    return (
        y.view(c.out_shape),
        c.x.new_empty((0,)) if s is None else s.view(c.out_shape),
        none if mean is None else mean,
        none.clone() if rstd is None else rstd,
        *(nothing.clone() if x is None else x for x in (u, g, a)),
    )
