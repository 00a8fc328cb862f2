"""Attention forward: tiled online softmax (Milakov & Gimelshein 2018; Dao et al., 2205.14135).

    for a block of query rows:  m = -inf, l = 0, acc = 0
      for a tile of keys that some row sees:
        S = q k^T;  m' = max(m, rowmax S);  P = exp(S - m');  a = exp(m - m')
        l = a l + rowsum P;  acc = a acc + dropout(P) v
    the sink joins l;  o = acc / l;  lse = m + log l

q (B, H, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv), or (T, H, D) packed. 2 H Sq Sk (D + Dv)
FLOPs; q, k, v read and o written once, k and v once more a block of rows, mostly from L2. One
program a (batch entry, head, BLOCK_M rows). Shared memory: q and ``num_stages`` tiles of k and v.
Bound by the tensor cores for many rows, by bandwidth for few (no split over keys yet).
"""

import triton
import triton.language as tl

from fastattn.kernels.attention_common import (
    diagonal,
    dropout_keep,
    first_row_of,
    join_sink,
    key_range,
    load_rows,
    locate,
    logits,
    lse_in_units,
    offsets,
    probabilities,
    sequence_of,
    slope_of,
    store_rows,
    visible,
)

# Values that change from call to call and that no code is better for knowing.
PLAIN_NUMBERS = [
    "H", "group", "B", "Sq", "Sk", "Tq", "Tk", "window_left", "window_right", "threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lse_lo_ptr,
    mask_ptr, bias_ptr, q_lens_ptr, k_lens_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, sinks_ptr, seed_ptr,
    stride_q, stride_k, stride_v, stride_o, stride_mask, stride_bias, stride_alibi,
    H, group, B, Sq, Sk, Tq, Tk,
    scale, unit, c, softcap, window_left, window_right, threshold, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h, first = locate(cu_q_ptr, tl.program_id(0), Sq, Tq, B, H, BLOCK_M, CAUSAL != 0)
    q_start, q_len = sequence_of(b, q_lens_ptr, cu_q_ptr, Sq, Tq)
    k_start, k_len = sequence_of(b, k_lens_ptr, cu_k_ptr, Sk, Tk)
    shift = diagonal(q_len, k_len, CAUSAL)
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    hk64 = (h // group).to(tl.int64)

    rows = first + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    q_base = q_ptr + b64 * stride_q[0] + h64 * stride_q[1] + q_start * stride_q[2]
    k_base = k_ptr + b64 * stride_k[0] + hk64 * stride_k[1] + k_start * stride_k[2]
    v_base = v_ptr + b64 * stride_v[0] + hk64 * stride_v[1] + k_start * stride_v[2]
    k_at = offsets(cols, stride_k[2], dims, stride_k[3])
    v_at = offsets(cols, stride_v[2], dims_v, stride_v[3])
    mask_at = b64 * stride_mask[0] + h64 * stride_mask[1]
    bias_at = b64 * stride_bias[0] + h64 * stride_bias[1]
    slope = slope_of(alibi_ptr, stride_alibi, b64, h64)
    q = load_rows(
        q_base + offsets(rows, stride_q[2], dims, stride_q[3]), rows, q_len, dims, D, BLOCK_D
    )

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    last = tl.minimum(first + BLOCK_M, q_len) - 1
    lo, hi, full_lo, full_hi = key_range(
        first, last, q_len, k_len, shift, window_left, window_right, CAUSAL, BLOCK_N
    )
    for j0 in range(lo, hi, BLOCK_N):
        j0 = tl.multiple_of(j0, BLOCK_N)
        keys = j0 + cols
        step = tl.cast(j0, tl.int64)
        k = load_rows(k_base + step * stride_k[2] + k_at, keys, k_len, dims, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x, _ = logits(
            s, rows[:, None], keys[None, :], q_len, k_len, mask_ptr, mask_at, stride_mask,
            bias_ptr, bias_at, stride_bias, slope, scale, softcap, PLAIN,
        )  # fmt: skip
        if (j0 < full_lo) | (j0 + BLOCK_N > full_hi):
            x = tl.where(
                visible(
                    rows[:, None], keys[None, :], q_len, k_len, shift, window_left, window_right,
                    CAUSAL,
                ),
                x, float("-inf"),
            )  # fmt: skip
        m_new = tl.maximum(m, tl.max(x, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: exp2(-inf - 0) = 0
        p = tl.exp2((x - base[:, None]) * c)
        alpha = tl.exp2((m - base) * c)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = acc * alpha[:, None]
        if threshold is not None:
            keep = dropout_keep(
                tl.load(seed_ptr), b * H + h, first, j0, threshold, BLOCK_M, BLOCK_N
            )
            p = tl.where(keep, p, 0.0)
        v = load_rows(v_base + step * stride_v[2] + v_at, keys, k_len, dims_v, Dv, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = m_new

    # No key, or no row: output 0, whatever the sink. A NaN is not 0 and stays.
    none = (l == 0.0) | (rows >= q_len)
    lse = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    factor = tl.full((BLOCK_M,), 1.0, tl.float32)
    top = tl.where(none, 0.0, m).to(tl.float64)
    if sinks_ptr is not None:
        raw = tl.load(sinks_ptr + h).to(tl.float32)
        top, l, factor = join_sink(raw, top, l, unit, c)  # noqa: E741
        lse = tl.where(rows < q_len, raw, lse)
    l = tl.where(none, 1.0, l)  # noqa: E741
    log2_l = tl.log2(l).to(tl.float64)
    whole = (top * unit + log2_l * 0.6931471805599453).to(tl.float32)
    lo_part = (log2_l + (top - lse_in_units(whole, unit).to(tl.float64)) * c).to(tl.float32)
    lse = tl.where(none, lse, whole)
    lse_lo = tl.where(none, 0.0, lo_part)
    if threshold is not None:
        factor = factor * keep_scale
    o = tl.where(none[:, None], 0.0, acc * (factor / l)[:, None])

    # A padded batch has rows beyond its length, to be zeroed; a packed one has other sequences.
    limit = q_len
    row_at = first_row_of(cu_q_ptr, b64, h64, q_start, Sq, Tq, H)
    if cu_q_ptr is None:
        limit = Sq
    tl.store(lse_ptr + row_at + rows, lse, mask=rows < limit)
    tl.store(lse_lo_ptr + row_at + rows, lse_lo, mask=rows < limit)
    o_base = o_ptr + b64 * stride_o[0] + h64 * stride_o[1] + q_start * stride_o[2]
    o_at = offsets(rows, stride_o[2], dims_v, stride_o[3])
    store_rows(o_base + o_at, o, rows, limit, dims_v, Dv, BLOCK_DV)


@triton.jit(do_not_specialize=[*PLAIN_NUMBERS, "heads"])
def weights_kernel(
    q_ptr, k_ptr, w_ptr, lse_ptr, lse_lo_ptr,
    mask_ptr, bias_ptr, q_lens_ptr, k_lens_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, seed_ptr,
    stride_q, stride_k, stride_w, stride_mask, stride_bias, stride_alibi,
    H, group, B, Sq, Sk, Tq, Tk, heads,
    scale, unit, c, softcap, window_left, window_right, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights after dropout, from the forward's lse: (B, H, Sq, Sk), or their mean over the heads.

    One program a tile of (b, H // heads); it sums its ``heads`` heads in order. Every element is
    written, 0 outside the sequences.
    """
    blocks_n = tl.cdiv(Sk, BLOCK_N)
    blocks_m = tl.cdiv(Sq, BLOCK_M)
    tile = tl.program_id(0)
    j0 = tile % blocks_n * BLOCK_N
    first = tile // blocks_n % blocks_m * BLOCK_M
    outer = tile // blocks_n // blocks_m
    b = outer // (H // heads)
    h0 = outer % (H // heads) * heads
    q_start, q_len = sequence_of(b, q_lens_ptr, cu_q_ptr, Sq, Tq)
    k_start, k_len = sequence_of(b, k_lens_ptr, cu_k_ptr, Sk, Tk)
    shift = diagonal(q_len, k_len, CAUSAL)
    b64 = b.to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    keys = j0 + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    q_at = offsets(rows, stride_q[2], dims, stride_q[3])
    k_at = offsets(keys, stride_k[2], dims, stride_k[3])
    seen = visible(
        rows[:, None], keys[None, :], q_len, k_len, shift, window_left, window_right, CAUSAL
    )

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for h in range(h0, h0 + heads):
        h64 = tl.cast(h, tl.int64)
        hk64 = tl.cast(h // group, tl.int64)
        q_base = q_ptr + b64 * stride_q[0] + h64 * stride_q[1] + q_start * stride_q[2]
        k_base = k_ptr + b64 * stride_k[0] + hk64 * stride_k[1] + k_start * stride_k[2]
        q = load_rows(q_base + q_at, rows, q_len, dims, D, BLOCK_D)
        k = load_rows(k_base + k_at, keys, k_len, dims, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x, _ = logits(
            s, rows[:, None], keys[None, :], q_len, k_len, mask_ptr,
            b64 * stride_mask[0] + h64 * stride_mask[1], stride_mask, bias_ptr,
            b64 * stride_bias[0] + h64 * stride_bias[1], stride_bias,
            slope_of(alibi_ptr, stride_alibi, b64, h64), scale, softcap, PLAIN,
        )  # fmt: skip
        x = tl.where(seen, x, float("-inf"))
        row_at = first_row_of(cu_q_ptr, b64, h64, q_start, Sq, Tq, H)
        lse = tl.load(lse_ptr + row_at + rows, mask=rows < q_len, other=float("-inf"))
        lse_lo = tl.load(lse_lo_ptr + row_at + rows, mask=rows < q_len, other=0.0)
        lse = tl.where(lse == float("-inf"), float("inf"), lse_in_units(lse, unit))
        w = probabilities(x, lse[:, None], lse_lo[:, None], c)
        if threshold is not None:
            keep = dropout_keep(
                tl.load(seed_ptr), b * H + h, first, j0, threshold, BLOCK_M, BLOCK_N
            )
            w = tl.where(keep, w * keep_scale, 0.0)
        total += w
    w_base = w_ptr + b64 * stride_w[0] + h0.to(tl.int64) * stride_w[1]
    at = rows[:, None].to(tl.int64) * stride_w[2] + keys[None, :].to(tl.int64) * stride_w[3]
    inside = (rows[:, None] < Sq) & (keys[None, :] < Sk)
    tl.store(w_base + at, (total / heads).to(w_ptr.dtype.element_ty), mask=inside)
