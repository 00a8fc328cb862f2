"""What the kernels of layernorm_ffn and its parts share: tensors as rows, tiles of them, and sums
over rows.

A sum over M rows (the gradient of a weight or bias) has two steps and no atomics: each program
adds up one strip of rows and writes its part, (strips, N) fp32, then a second kernel adds the parts
up in order. Strips follow from the shape alone, so the result is bitwise the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import configs
from fastattn.kernels.launch import launch
from fastattn.kernels.philox import keep_tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ---- tiles -------------------------------------------------------------------------------------


@triton.jit
def load_tile(ptr, stride, rows, cols, M, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """fp32 (rows, cols); 0 beyond M rows and N columns. rows: int64, for a row times a stride may
    pass 2**31."""
    ok = rows[:, None] < M
    if N % BLOCK_N != 0:
        ok = ok & (cols[None, :] < N)
    at = rows[:, None] * stride + cols[None, :]
    return tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, x, rows, cols, M, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Into a contiguous (M, N) tensor."""
    ok = rows[:, None] < M
    if N % BLOCK_N != 0:
        ok = ok & (cols[None, :] < N)
    at = rows[:, None] * N + cols[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def load_vector(ptr, cols, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """fp32 (1, cols) of a contiguous vector, 0 beyond N."""
    if N % BLOCK_N != 0:
        x = tl.load(ptr + cols, mask=cols < N, other=0.0)
    else:
        x = tl.load(ptr + cols)
    return x.to(tl.float32)[None, :]


@triton.jit
def drop(
    x, seed_ptr, rows, first_col, threshold, keep_scale,
    SITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dropout(x) of a tile: counter (j >> 2, i, i >> 32, site). What is dropped is 0, whatever it
    was (an infinity too)."""
    high = (rows >> 32).to(tl.int32)
    keep = keep_tile(
        tl.load(seed_ptr), first_col, rows.to(tl.int32), high[:, None], SITE, threshold, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip
    return tl.where(keep, x * keep_scale, 0.0)


# ---- sums over rows ----------------------------------------------------------------------------


@triton.jit
def store_part(part_ptr, sums, strip, cols, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's sums over its strip, (rows of a tile, cols), as one row of (strips, N)."""
    at = strip.to(tl.int64) * N + cols
    total = tl.sum(sums, 0)
    if N % BLOCK_N != 0:
        tl.store(part_ptr + at, total, mask=cols < N)
    else:
        tl.store(part_ptr + at, total)


@triton.jit(do_not_specialize=["strips"])
def sum_parts_kernel(
    parts_ptr, out0_ptr, out1_ptr, out2_ptr, strips,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out_k = the parts (k, strip, :) added up in order, in out_k's dtype. One program a result and
    BLOCK_N columns: 4 strips N bytes a result, read once; far below everything else."""
    blocks = tl.cdiv(N, BLOCK_N)
    k = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    part_ptr = parts_ptr + k.to(tl.int64) * strips * N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, strips, BLOCK_M):
        rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        sums += load_tile(part_ptr, N, rows, cols, strips, N, BLOCK_N)
    total = tl.sum(sums, 0)
    if k == 0:
        tl.store(out0_ptr + cols, total.to(out0_ptr.dtype.element_ty), mask=cols < N)
    if out1_ptr is not None:  # noqa: SIM102  (k is a tensor)
        if k == 1:
            tl.store(out1_ptr + cols, total.to(out1_ptr.dtype.element_ty), mask=cols < N)
    if out2_ptr is not None:  # noqa: SIM102
        if k == 2:
            tl.store(out2_ptr + cols, total.to(out2_ptr.dtype.element_ty), mask=cols < N)


class RowSums:
    """The sums over rows that one launch makes: room for the parts, then the results."""

    def __init__(
        self, like: Tensor, columns: int, strips: int, wanted: Sequence[torch.dtype | None]
    ) -> None:
        """wanted: the dtype of each result, None = not wanted; at most three."""
        self.columns, self.strips, self.wanted = columns, strips, wanted
        n = sum(dtype is not None for dtype in wanted)
        self.parts = like.new_empty((n, strips, columns), dtype=torch.float32)
        self.like = like

    def pointers(self) -> list[Tensor | None]:
        """Where each one's parts go, (strips, N)."""
        parts = iter(self.parts)
        return [None if dtype is None else next(parts) for dtype in self.wanted]

    def results(self) -> list[Tensor | None]:
        dtypes = [dtype for dtype in self.wanted if dtype is not None]
        made = [self.like.new_empty((self.columns,), dtype=dtype) for dtype in dtypes]
        if made and not self.strips:  # no rows
            made = [x.zero_() for x in made]
        elif made:
            outs = [*made, *[None] * (3 - len(made))]
            rows, cols = (4, 16) if on_cpu(self.like) else (32, 32)
            grid = (len(made) * triton.cdiv(self.columns, cols),)
            launch(
                sum_parts_kernel, grid, self.parts, *outs, self.strips, self.columns, rows, cols,
                num_warps=4,
            )  # fmt: skip
        found = iter(made)
        return [None if dtype is None else next(found) for dtype in self.wanted]


def strips_of(rows: int, tile: int, most: int) -> tuple[int, int]:
    """(strips, rows of a strip): at most ``most``, each a whole number of tiles."""
    tiles = -(-rows // tile)
    per_strip = max(1, -(-tiles // most))
    return -(-tiles // per_strip), per_strip * tile


# ---- tensors as rows ---------------------------------------------------------------------------


def as_rows(x: Tensor, columns: int) -> Tensor:
    """(M, columns), columns next to each other: a view where x's strides allow one, else a copy."""
    rows = x.reshape(-1, columns)
    return rows if columns == 1 or rows.stride(1) == 1 else rows.contiguous()


def on_cpu(x: Tensor) -> bool:
    """Whether the interpreter's small tiles serve (as kernels/configs.py counts families)."""
    return configs.family_of(x.device) == "cpu"


def dropout_arguments(p: float, seed: Tensor | None) -> tuple[Any, ...]:
    """seed_ptr, threshold, keep_scale; None where nothing is dropped."""
    if not p:
        return None, None, None
    return seed, round(p * 2**32), 1.0 / (1.0 - p)
