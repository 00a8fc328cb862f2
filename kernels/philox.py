"""The dropout masks of every Triton kernel: Philox-4x32-10 (Salmon et al., SC11), recomputed
wherever a mask is needed and never stored; fastattn/reference/dropout.py in tiles."""

import triton
import triton.language as tl


@triton.jit
def keep_tile(
    seed, first_j, i, third, fourth, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Bool (BLOCK_M, BLOCK_N): False where Philox's word for (i, j) is below the threshold.

    Key = the seed, counter = (j >> 2, i, third, fourth), word j & 3: four columns a call. i is
    int32 (BLOCK_M,), first_j a multiple of 4 (of a tile); third and fourth are numbers or
    (BLOCK_M, 1).
    """
    group = first_j // 4 + tl.arange(0, BLOCK_N // 4)
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
    w0, w1, w2, w3 = tl.philox(
        seed, zero + group[None, :], zero + i[:, None], zero + third, zero + fourth
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words.to(tl.int64) >= threshold
