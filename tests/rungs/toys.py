"""Small kernels, right and with a planted fault each: what the tests of the rungs run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.launch import launch


@triton.jit
def add_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    n,
    stride,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,
):
    """out = x + y. MASKED=False forgets the tail; SHARED: programs write one element more."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs * stride, mask=mask, other=0.0)
    y = tl.load(y_ptr + offs * stride, mask=mask, other=0.0)
    if MASKED:
        tl.store(out_ptr + offs, x + y, mask=mask)
    else:
        tl.store(out_ptr + offs, x + y)
    if SHARED:
        tl.store(out_ptr + tl.program_id(0) * 0, tl.program_id(0).to(tl.float32))


@triton.jit
def softmax_kernel(x_ptr, out_ptr, rows, cols, stride_xm, stride_om, BLOCK: tl.constexpr):
    """Softmax of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xm + offs, mask=offs < cols, other=float("-inf"))
    x = x.to(tl.float32)
    p = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * stride_om + offs, (p / tl.sum(p, 0)), mask=offs < cols)


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, rows, cols, stride_xm, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Sum of a row a program; WIDE=False multiplies the row by its stride in 32 bits."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xm + offs, mask=offs < cols, other=0.0)
    tl.store(out_ptr + row, tl.sum(x.to(tl.float32), 0))


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_bk, stride_cm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """c = a @ b; DOT=False keeps the tensor cores idle."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        inside_a = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        inside_b = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        a = tl.load(a_ptr + offs_m[:, None] * stride_am + offs_k[None, :], inside_a, other=0.0)
        b = tl.load(b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :], inside_b, other=0.0)
        if DOT:
            acc = tl.dot(a, b, acc)
        else:
            acc += tl.sum(a[:, :, None].to(tl.float32) * b[None, :, :].to(tl.float32), 1)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :], acc, inside)


def add(x: Tensor, y: Tensor, block: int = 64, masked: bool = True, shared: bool = False) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    n = x.numel()
    grid = (triton.cdiv(n, block),)
    launch(add_kernel, grid, x, y, out, n, x.stride(0), BLOCK=block, MASKED=masked, SHARED=shared)
    return out


def softmax(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32)
    block = triton.next_power_of_2(x.shape[1])
    launch(softmax_kernel, (x.shape[0],), x, out, *x.shape, x.stride(0), out.stride(0), BLOCK=block)
    return out


def row_sum(x: Tensor, wide: bool = True) -> Tensor:
    out = torch.empty(x.shape[0])
    block = triton.next_power_of_2(x.shape[1])
    launch(row_sum_kernel, (x.shape[0],), x, out, *x.shape, x.stride(0), BLOCK=block, WIDE=wide)
    return out


def matmul(
    a: Tensor, b: Tensor, m: int = 32, n: int = 32, k: int = 32, dot: bool = True, **options: int
) -> Tensor:
    c = torch.empty(a.shape[0], b.shape[1])
    sizes = (a.shape[0], b.shape[1], a.shape[1])
    strides = (a.stride(0), b.stride(0), c.stride(0))
    grid = (triton.cdiv(sizes[0], m), triton.cdiv(sizes[1], n))
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "DOT": dot}
    launch(matmul_kernel, grid, a, b, c, *sizes, *strides, **blocks, **options)
    return c
