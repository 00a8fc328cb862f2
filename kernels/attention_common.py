"""What every attention kernel shares: which tile a program owns, which keys a row sees, the logits
with all their features, dropout, and a row's probabilities from its saved lse.

Tiles hold logits in units of ``unit``: plain ones (no softcap, ALiBi or bias) are q k^T itself and
``unit`` is the scale, others are the logits and ``unit`` is 1. A probability is
``exp2((x - m) * c)`` with ``c = unit * log2 e``: subtracting first keeps huge logits exact, and a
plain tile is never multiplied by the scale.

A feature that a call does not have is None (pointers, window limits, softcap, threshold), which
Triton treats as a constant: its code is not there. ``i`` and ``j`` are row and key indices local to
the sequence, shaped so that they broadcast to the tile, which may be (rows, keys) or transposed.
"""

import triton
import triton.language as tl

from fastattn.kernels.philox import keep_tile

CAUSAL_NONE = tl.constexpr(0)
CAUSAL_TOP_LEFT = tl.constexpr(1)
CAUSAL_BOTTOM_RIGHT = tl.constexpr(2)


# ---- which tile --------------------------------------------------------------------------------


@triton.jit
def packed_tile(cu_ptr, tile, B, BLOCK: tl.constexpr):
    """Batch entry and first row of tile ``tile`` of a packed batch.

    Sequence b owns the tiles from ``cu[b] // BLOCK + b`` on, which leaves room for its last,
    partial one; so ``total // BLOCK + B`` tiles serve any lengths, and no host reads them.
    """
    lo = 0
    hi = B
    while hi - lo > 1:
        mid = (lo + hi) // 2
        first = (tl.load(cu_ptr + mid) // BLOCK).to(tl.int32) + mid
        below = first <= tile
        lo = tl.where(below, mid, lo)
        hi = tl.where(below, hi, mid)
    first = (tl.load(cu_ptr + lo) // BLOCK).to(tl.int32) + lo
    # Never negative, whatever the device holds.
    return lo, tl.maximum(tile - first, 0) * BLOCK


@triton.jit
def locate(cu_ptr, tile, S, T, B, heads, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """``(b, head, first)`` of a grid of (b, head, block of S) or, packed, of (head, tile).

    REVERSE: the last blocks first, where they have the most work (causal rows).
    """
    if cu_ptr is not None:
        tiles = T // BLOCK + B
        head = tile // tiles
        b, first = packed_tile(cu_ptr, tile % tiles, B, BLOCK)
    else:
        blocks = tl.cdiv(S, BLOCK)
        block = tile % blocks
        if REVERSE:
            block = blocks - 1 - block
        first = block * BLOCK
        b = tile // blocks // heads
        head = tile // blocks % heads
    return b, head, first


@triton.jit
def sequence_of(b, lens_ptr, cu_ptr, S, T):
    """``(start, length)`` of batch entry b: int64 and int32, inside the tensors whatever lens and
    cu_seqlens hold, for nobody has read them on the host."""
    start = tl.zeros((), tl.int64)
    length = tl.zeros((), tl.int32) + S
    if cu_ptr is not None:
        start = tl.load(cu_ptr + b).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), T)
        room = tl.minimum(T - start, S)
        length = tl.load(cu_ptr + b + 1).to(tl.int64) - start
        length = tl.minimum(tl.maximum(length, 0), room).to(tl.int32)
    if lens_ptr is not None:
        length = tl.load(lens_ptr + b).to(tl.int64)
        length = tl.minimum(tl.maximum(length, 0), S).to(tl.int32)
    return start, length


@triton.jit
def first_row_of(cu_ptr, b, head, start, S, T, H):
    """Where a sequence's rows begin in lse and its like, (B, H, S) or packed (H, T); int64."""
    at = head * T + start
    if cu_ptr is None:
        at = (b * H + head) * S
    return at


@triton.jit
def diagonal(q_len, k_len, CAUSAL: tl.constexpr):
    """Row i stands at key i + diagonal."""
    shift = 0
    if CAUSAL == 2:
        shift = k_len - q_len
    return shift


@triton.jit
def key_range(
    first, last, q_len, k_len, shift, window_left, window_right,
    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys ``[lo, hi)`` that some of the rows [first, last] sees, lo on a tile's edge, and the keys
    ``[full_lo, full_hi)`` that each of them sees."""
    lo = 0
    hi = k_len
    full_lo = 0
    full_hi = k_len
    if CAUSAL != 0:
        hi = tl.minimum(hi, last + shift + 1)
        full_hi = tl.minimum(full_hi, first + shift + 1)
    if window_right is not None:
        hi = tl.minimum(hi, last + shift + window_right + 1)
        full_hi = tl.minimum(full_hi, first + shift + window_right + 1)
    if window_left is not None:
        lo = tl.maximum(lo, first + shift - window_left) // BLOCK_N * BLOCK_N
        full_lo = tl.maximum(full_lo, last + shift - window_left)
    hi = tl.where(first < q_len, hi, 0)  # rows beyond the length see nothing
    return lo, hi, full_lo, full_hi


@triton.jit
def row_range(
    first, last, q_len, k_len, shift, window_left, window_right,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows ``[lo, hi)`` that see some of the keys [first, last], lo on a tile's edge, and the rows
    ``[full_lo, full_hi)`` that see each of them."""
    lo = 0
    hi = q_len
    full_lo = 0
    full_hi = q_len
    if CAUSAL != 0:
        lo = tl.maximum(lo, first - shift)
        full_lo = tl.maximum(full_lo, last - shift)
    if window_right is not None:
        lo = tl.maximum(lo, first - shift - window_right)
        full_lo = tl.maximum(full_lo, last - shift - window_right)
    if window_left is not None:
        hi = tl.minimum(hi, last - shift + window_left + 1)
        full_hi = tl.minimum(full_hi, first - shift + window_left + 1)
    lo = lo // BLOCK_M * BLOCK_M
    hi = tl.where(first < k_len, hi, 0)
    full_hi = tl.where(last < k_len, full_hi, 0)
    return lo, hi, full_lo, full_hi


@triton.jit
def visible(i, j, q_len, k_len, shift, window_left, window_right, CAUSAL: tl.constexpr):
    """Whether key j takes part in row i, as far as indices decide it."""
    ok = (i < q_len) & (j < k_len)
    at = i + shift
    if CAUSAL != 0:
        ok = ok & (j <= at)
    if window_left is not None:
        ok = ok & (j >= at - window_left)
    if window_right is not None:
        ok = ok & (j <= at + window_right)
    return ok


# ---- loads and stores --------------------------------------------------------------------------


@triton.jit
def offsets(rows, stride_s, cols, stride_d):
    """int64 offsets of rows x cols: a row index times a stride may pass 2**31."""
    return rows[:, None].to(tl.int64) * stride_s + cols[None, :].to(tl.int64) * stride_d


@triton.jit
def load_rows(ptrs, rows, limit, cols, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """A (rows, cols) tile, zero beyond ``limit`` rows and WIDTH columns: what lies there (NaN, the
    next sequence) never leaks, not even through 0 * NaN."""
    ok = rows[:, None] < limit
    if WIDTH != BLOCK_WIDTH:
        ok = ok & (cols[None, :] < WIDTH)
    return tl.load(ptrs, mask=ok, other=0.0)


@triton.jit
def store_rows(ptrs, x, rows, limit, cols, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    ok = rows[:, None] < limit
    if WIDTH != BLOCK_WIDTH:
        ok = ok & (cols[None, :] < WIDTH)
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), mask=ok)


@triton.jit
def product_of_rows(
    a_base, stride_a, a_rows, a_limit, b_base, stride_b, b_rows, b_limit,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T, CHUNK columns at a time from memory: an fp32 product keeps whole rows of its operands
    in registers, and those of a wide head do not fit beside the gradients."""
    total = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
    for first in range(0, BLOCK_WIDTH, CHUNK):
        cols = first + tl.arange(0, CHUNK)
        a_at = offsets(a_rows, stride_a[2], cols, stride_a[3])
        b_at = offsets(b_rows, stride_b[2], cols, stride_b[3])
        a = load_rows(a_base + a_at, a_rows, a_limit, cols, WIDTH, BLOCK_WIDTH)
        b = load_rows(b_base + b_at, b_rows, b_limit, cols, WIDTH, BLOCK_WIDTH)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


# ---- logits ------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Cephes' tanhf: a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would lose what is small."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near = p * z * x + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * 2.8853900817779268) + 1.0)  # 2 log2 e
    far = tl.where(x < 0, -far, far)
    return tl.where(size < 0.625, near, far)


@triton.jit
def logits(
    s, i, j, q_len, k_len, mask_ptr, mask_at, stride_mask, bias_ptr, bias_at, stride_bias, slope,
    scale, softcap, PLAIN: tl.constexpr,
):  # fmt: skip
    """From q k^T to a tile of logits in units, -inf where ``mask`` hides a key; and the tanh of the
    softcap, for its derivative. The order is that of the public function."""
    x = s
    t = s
    if not PLAIN:
        x = x * scale
    if softcap is not None:
        t = tanh(x / softcap)
        x = softcap * t
    if slope is not None:
        x = x - slope * tl.abs(i + (k_len - q_len) - j).to(tl.float32)
    inside = (i < q_len) & (j < k_len)
    if bias_ptr is not None:
        at = bias_at + i.to(tl.int64) * stride_bias[2] + j.to(tl.int64) * stride_bias[3]
        x = x + tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        at = mask_at + i.to(tl.int64) * stride_mask[2] + j.to(tl.int64) * stride_mask[3]
        shown = tl.load(mask_ptr + at, mask=inside, other=0)
        x = tl.where(shown != 0, x, float("-inf"))
    return x, t


@triton.jit
def slope_of(alibi_ptr, stride_alibi, b, h):
    slope = None
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + b * stride_alibi[0] + h * stride_alibi[1]).to(tl.float32)
    return slope


@triton.jit
def dropout_keep(
    seed, bh, first_i, first_j, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """:func:`keep_tile` of the counter (j >> 2, i, b H + h, 0)."""
    i = first_i + tl.arange(0, BLOCK_M)
    return keep_tile(seed, first_j, i, bh, 0, threshold, BLOCK_M, BLOCK_N)


# ---- a row's lse -------------------------------------------------------------------------------


@triton.jit
def join_sink(raw, top, l, unit, c):  # noqa: E741
    """A row's maximum (fp64, in units) and sum with the sink's logit ``raw`` in it, and what its
    values are to be multiplied by."""
    # What the sum stands on: the row's maximum, or a sink above it. Never their difference: beside
    # a row of finfo.min it would drown both.
    sink = raw.to(tl.float64) / unit
    lift = tl.maximum(sink - top, 0.0) * c
    factor = tl.exp2((-lift).to(tl.float32))
    l = l * factor + tl.exp2(((sink - top) * c - lift).to(tl.float32))  # noqa: E741
    return tl.maximum(top, sink), l, factor


@triton.jit
def lse_in_units(lse, unit):
    """lse as a tile's logits are measured; in fp64, for forward and backward must round alike."""
    return (lse.to(tl.float64) / unit).to(tl.float32)


@triton.jit
def probabilities(x, lse, lse_lo, c):
    """exp(logits - lse) from the forward's own lse: fp32 lse alone is off by up to 2**-24 |lse|,
    and ``lse_lo`` (in log2) is what it rounds away. A row without keys has lse = +inf: all 0."""
    return tl.exp2((x - lse) * c - lse_lo)
