"""Attention backward: P is recomputed a tile at a time from q, k and lse (Dao et al., 2205.14135).

    delta = rowsum(do * o) - dlse + rowsum(dweights * weights)
    P = exp(logits - lse);  dv += dropout(P)^T do
    dP = dropout(do v^T + dweights);  dS = P * (dP - delta)
    dbias += dS;  dq += scale dS k;  dk += scale dS^T q;  dsinks -= sum exp(sink - lse) delta

Two passes: dk and dv by blocks of keys (a program owns a kv head's block and walks the heads of
the group and their rows in order), dq by blocks of rows. Seven products where one pass needs five,
and no sum has two owners: the result is bitwise repeatable. With atomics the first pass also adds
dq (and a bias gradient that heads share) into fp32 memory as it goes: five products, and the order
of a sum is a matter of timing. 2 H Sq Sk (3 D + 2 Dv) FLOPs in one pass, (4 D + 3 Dv) in two.

A bias gradient goes where its shape lets one owner have it:
  STORE  no two tiles share an element: the pass by rows writes dS itself
  KEYS   one row of bias for all rows: sums over rows in the pass by keys, (B, H, Sk)
  ROWS   one column for all keys: sums over keys in the pass by rows, (B, H, Sq)
  SHARED heads or batch entries share an (Sq, Sk) slice: a kernel of its own, a program a tile
and what is left to sum of KEYS and ROWS (over heads, batch, all) is small.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention_common import (
    diagonal,
    dropout_keep,
    first_row_of,
    key_range,
    load_rows,
    locate,
    logits,
    lse_in_units,
    offsets,
    probabilities,
    product_of_rows,
    row_range,
    sequence_of,
    slope_of,
    store_rows,
    visible,
)
from fastattn.kernels.attention_fwd import PLAIN_NUMBERS

DBIAS_NONE, DBIAS_STORE, DBIAS_KEYS, DBIAS_ROWS, DBIAS_SHARED = range(5)
_STORE = tl.constexpr(DBIAS_STORE)
_KEYS = tl.constexpr(DBIAS_KEYS)
_ROWS = tl.constexpr(DBIAS_ROWS)
_SHARED = tl.constexpr(DBIAS_SHARED)


@triton.jit
def tile_grads(
    s, dp, i, j, first_i, first_j, b, h, H, q_len, k_len, shift, partial, lse, lse_lo, delta,
    mask_ptr, bias_ptr, alibi_ptr, seed_ptr, dw_ptr, stride_mask, stride_bias, stride_alibi,
    stride_dw, scale, c, softcap, window_left, window_right, threshold, keep_scale, dw_scale,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From s = q k^T and dp = do v^T of a tile: the weights after dropout, dS (which is dbias), and
    the gradient of scale * s. ``partial``: not every pair of the tile takes part."""
    b64 = tl.cast(b, tl.int64)
    h64 = tl.cast(h, tl.int64)
    x, t = logits(
        s, i, j, q_len, k_len, mask_ptr, b64 * stride_mask[0] + h64 * stride_mask[1], stride_mask,
        bias_ptr, b64 * stride_bias[0] + h64 * stride_bias[1], stride_bias,
        slope_of(alibi_ptr, stride_alibi, b64, h64), scale, softcap, PLAIN,
    )  # fmt: skip
    if partial:
        seen = visible(i, j, q_len, k_len, shift, window_left, window_right, CAUSAL)
        x = tl.where(seen, x, float("-inf"))
    p = probabilities(x, lse, lse_lo, c)
    w = p
    if dw_ptr is not None:
        at = b64 * stride_dw[0] + h64 * stride_dw[1]
        at += i.to(tl.int64) * stride_dw[2] + j.to(tl.int64) * stride_dw[3]
        # Only where a key takes part: what autograd hands over elsewhere has no meaning.
        dw = tl.load(dw_ptr + at, mask=(i < q_len) & (j < k_len) & (p > 0.0), other=0.0)
        dp += dw.to(tl.float32) * dw_scale
    if threshold is not None:
        keep = dropout_keep(
            tl.load(seed_ptr), b * H + h, first_i, first_j, threshold, BLOCK_M, BLOCK_N
        )
        if TRANSPOSED:
            keep = tl.trans(keep)
        w = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    dx = ds
    if softcap is not None:
        dx = ds * (1.0 - t * t)
    return w, ds, dx


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """acc + a b for a = dS. WIDE (fp16): in tf32, which has fp16's mantissa and fp32's range, since
    dS of a long row is below fp16's and one of large values above."""
    if WIDE:
        return tl.dot(a, b.to(tl.float32), acc, input_precision="tf32")
    return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def prepare_kernel(
    q_ptr, k_ptr, o_ptr, do_ptr, dlse_ptr, dw_ptr, lse_ptr, lse_lo_ptr, delta_ptr, lse_units_ptr,
    mask_ptr, bias_ptr, q_lens_ptr, k_lens_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, seed_ptr,
    stride_q, stride_k, stride_o, stride_do, stride_dlse, stride_dw, stride_mask, stride_bias,
    stride_alibi,
    H, group, B, Sq, Sk, Tq, Tk,
    scale, unit, c, softcap, window_left, window_right, threshold, keep_scale, dw_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta, and lse in units (+inf for a row without keys), both laid out as lse."""
    b, h, first = locate(cu_q_ptr, tl.program_id(0), Sq, Tq, B, H, BLOCK_M, CAUSAL != 0)
    q_start, q_len = sequence_of(b, q_lens_ptr, cu_q_ptr, Sq, Tq)
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    row_at = first_row_of(cu_q_ptr, b64, h64, q_start, Sq, Tq, H)
    lse = tl.load(lse_ptr + row_at + rows, mask=rows < q_len, other=float("-inf"))
    none = lse == float("-inf")
    lse_units = tl.where(none, float("inf"), lse_in_units(lse, unit))
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if do_ptr is not None and o_ptr is not None:
        dims_v = tl.arange(0, BLOCK_DV)
        o_base = o_ptr + b64 * stride_o[0] + h64 * stride_o[1] + q_start * stride_o[2]
        do_base = do_ptr + b64 * stride_do[0] + h64 * stride_do[1] + q_start * stride_do[2]
        o_at = offsets(rows, stride_o[2], dims_v, stride_o[3])
        do_at = offsets(rows, stride_do[2], dims_v, stride_do[3])
        o = load_rows(o_base + o_at, rows, q_len, dims_v, Dv, BLOCK_DV)
        do = load_rows(do_base + do_at, rows, q_len, dims_v, Dv, BLOCK_DV)
        delta += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse_ptr is not None:
        at = b64 * stride_dlse[0] + h64 * stride_dlse[1]
        at += (q_start + rows) * stride_dlse[2]
        delta -= tl.load(dlse_ptr + at, mask=rows < q_len, other=0.0)
    if dw_ptr is not None:
        k_start, k_len = sequence_of(b, k_lens_ptr, cu_k_ptr, Sk, Tk)
        shift = diagonal(q_len, k_len, CAUSAL)
        cols = tl.arange(0, BLOCK_N)
        dims = tl.arange(0, BLOCK_D)
        hk64 = (h // group).to(tl.int64)
        q_base = q_ptr + b64 * stride_q[0] + h64 * stride_q[1] + q_start * stride_q[2]
        k_base = k_ptr + b64 * stride_k[0] + hk64 * stride_k[1] + k_start * stride_k[2]
        q_at = offsets(rows, stride_q[2], dims, stride_q[3])
        q = load_rows(q_base + q_at, rows, q_len, dims, D, BLOCK_D)
        lse_lo = tl.load(lse_lo_ptr + row_at + rows, mask=rows < q_len, other=0.0)
        last = tl.minimum(first + BLOCK_M, q_len) - 1
        lo, hi, full_lo, full_hi = key_range(
            first, last, q_len, k_len, shift, window_left, window_right, CAUSAL, BLOCK_N
        )
        for j0 in range(lo, hi, BLOCK_N):
            keys = j0 + cols
            k_at = offsets(keys, stride_k[2], dims, stride_k[3])
            k = load_rows(k_base + k_at, keys, k_len, dims, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            # With delta 0 and no do, dS is P dropout(dweights), whose row sum is what delta lacks.
            partial = (j0 < full_lo) | (j0 + BLOCK_N > full_hi)
            _, ds, _ = tile_grads(
                s, tl.zeros_like(s), rows[:, None], keys[None, :], first, j0, b, h, H, q_len,
                k_len, shift, partial, lse_units[:, None], lse_lo[:, None], 0.0, mask_ptr,
                bias_ptr, alibi_ptr, seed_ptr, dw_ptr, stride_mask, stride_bias, stride_alibi,
                stride_dw, scale, c, softcap, window_left, window_right, threshold, keep_scale,
                dw_scale, CAUSAL, PLAIN, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            delta += tl.sum(ds, 1)
    delta = tl.where(none, 0.0, delta)
    limit = q_len
    if cu_q_ptr is None:
        limit = Sq
    tl.store(delta_ptr + row_at + rows, delta, mask=rows < limit)
    tl.store(lse_units_ptr + row_at + rows, lse_units, mask=rows < limit)


@triton.jit(do_not_specialize=[*PLAIN_NUMBERS, "dbias_rows"])
def by_keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, lse_lo_ptr, delta_ptr, dk_ptr, dv_ptr, dq_ptr, dbias_ptr,
    mask_ptr, bias_ptr, q_lens_ptr, k_lens_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, seed_ptr, dw_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dk, stride_dv, stride_dbias, stride_mask,
    stride_bias, stride_alibi, stride_dw,
    H, group, B, Sq, Sk, Tq, Tk,
    scale, c, softcap, window_left, window_right, threshold, keep_scale, dw_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    DBIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys; dq_ptr given: dq too, added into fp32 laid out (B, H, Sq, D) or
    (H, Tq, D). lse is in units. Tiles are (keys, rows), so that no product transposes its P."""
    b, hk, first = locate(cu_k_ptr, tl.program_id(0), Sk, Tk, B, H // group, BLOCK_N, False)
    q_start, q_len = sequence_of(b, q_lens_ptr, cu_q_ptr, Sq, Tq)
    k_start, k_len = sequence_of(b, k_lens_ptr, cu_k_ptr, Sk, Tk)
    shift = diagonal(q_len, k_len, CAUSAL)
    b64 = b.to(tl.int64)
    hk64 = hk.to(tl.int64)
    keys = first + tl.arange(0, BLOCK_N)
    within = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    k_base = k_ptr + b64 * stride_k[0] + hk64 * stride_k[1] + k_start * stride_k[2]
    v_base = v_ptr + b64 * stride_v[0] + hk64 * stride_v[1] + k_start * stride_v[2]
    k_at = offsets(keys, stride_k[2], dims, stride_k[3])
    v_at = offsets(keys, stride_v[2], dims_v, stride_v[3])
    k = load_rows(k_base + k_at, keys, k_len, dims, D, BLOCK_D)
    v = load_rows(v_base + v_at, keys, k_len, dims_v, Dv, BLOCK_DV)
    q_at = offsets(within, stride_q[2], dims, stride_q[3])
    do_at = offsets(within, stride_do[2], dims_v, stride_do[3])

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    last = tl.minimum(first + BLOCK_N, k_len) - 1
    lo, hi, full_lo, full_hi = row_range(
        first, last, q_len, k_len, shift, window_left, window_right, CAUSAL, BLOCK_M
    )
    # A block that reaches beyond the keys has partial tiles only.
    full_hi = tl.where(first + BLOCK_N > k_len, 0, full_hi)
    for h in range(hk * group, (hk + 1) * group):
        h64 = tl.cast(h, tl.int64)
        row_at = first_row_of(cu_q_ptr, b64, h64, q_start, Sq, Tq, H)
        q_base = q_ptr + b64 * stride_q[0] + h64 * stride_q[1] + q_start * stride_q[2]
        sums = tl.zeros((BLOCK_N,), tl.float32)
        for i0 in range(lo, hi, BLOCK_M):
            i0 = tl.multiple_of(i0, BLOCK_M)
            rows = i0 + within
            step = tl.cast(i0, tl.int64)
            valid = rows < q_len
            q = load_rows(q_base + step * stride_q[2] + q_at, rows, q_len, dims, D, BLOCK_D)
            lse = tl.load(lse_ptr + row_at + rows, mask=valid, other=float("inf"))
            lse_lo = tl.load(lse_lo_ptr + row_at + rows, mask=valid, other=0.0)
            delta = tl.load(delta_ptr + row_at + rows, mask=valid, other=0.0)
            if CHUNK == BLOCK_D:
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            else:
                s = product_of_rows(
                    k_base, stride_k, keys, k_len, q_base, stride_q, rows, q_len, D, BLOCK_D, CHUNK,
                    PRECISION,
                )  # fmt: skip
            dp = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            if do_ptr is not None:
                do_base = do_ptr + b64 * stride_do[0] + h64 * stride_do[1] + q_start * stride_do[2]
                do_ptrs = do_base + step * stride_do[2] + do_at
                do = load_rows(do_ptrs, rows, q_len, dims_v, Dv, BLOCK_DV)
                if (dk_ptr is not None) or (dq_ptr is not None) or (DBIAS != 0):
                    if CHUNK_V == BLOCK_DV:
                        dp = tl.dot(v, tl.trans(do), dp, input_precision=PRECISION)
                    else:
                        dp = product_of_rows(
                            v_base, stride_v, keys, k_len, do_base, stride_do, rows, q_len, Dv,
                            BLOCK_DV, CHUNK_V, PRECISION,
                        )  # fmt: skip
            partial = (i0 < full_lo) | (i0 + BLOCK_M > full_hi)
            w, ds, dx = tile_grads(
                s, dp, rows[None, :], keys[:, None], i0, first, b, h, H, q_len, k_len, shift,
                partial, lse[None, :], lse_lo[None, :], delta[None, :], mask_ptr, bias_ptr,
                alibi_ptr, seed_ptr, dw_ptr, stride_mask, stride_bias, stride_alibi, stride_dw,
                scale, c, softcap, window_left, window_right, threshold, keep_scale, dw_scale,
                CAUSAL, PLAIN, True, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if (dv_ptr is not None) and (do_ptr is not None):
                dv = tl.dot(w.to(do.dtype), do, dv, input_precision=PRECISION)
            if dk_ptr is not None:
                dk = product(dx, q, dk, PRECISION, WIDE)
            if DBIAS == _KEYS:
                sums += tl.sum(ds, 1)
            if (DBIAS != 0) and (DBIAS != _KEYS):
                to = b64 * stride_dbias[0] + h64 * stride_dbias[1]
                i64 = rows.to(tl.int64)
                if DBIAS == _ROWS:
                    to += i64 * stride_dbias[2]
                    tl.atomic_add(dbias_ptr + to, tl.sum(ds, 0), mask=valid, sem="relaxed")
                else:
                    at = to + i64[None, :] * stride_dbias[2]
                    at += keys[:, None].to(tl.int64) * stride_dbias[3]
                    inside = valid[None, :] & (keys[:, None] < k_len)
                    if DBIAS == _STORE:
                        tl.store(dbias_ptr + at, ds.to(dbias_ptr.dtype.element_ty), mask=inside)
                    else:
                        tl.atomic_add(dbias_ptr + at, ds, mask=inside, sem="relaxed")
            if dq_ptr is not None:
                dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
                dq = product(tl.trans(dx), k, dq, PRECISION, WIDE) * scale
                at = (row_at + rows)[:, None] * D + dims[None, :]
                ok = valid[:, None] & (dims[None, :] < D)
                tl.atomic_add(dq_ptr + at, dq, mask=ok, sem="relaxed")
        if DBIAS == _KEYS:
            to = b64 * stride_dbias[0] + h64 * stride_dbias[1]
            to += keys.to(tl.int64) * stride_dbias[3]
            tl.store(dbias_ptr + to, sums, mask=keys < k_len)

    limit = k_len
    if cu_k_ptr is None:
        limit = Sk  # keys beyond the length: gradient 0
    there = (keys < k_len)[:, None]
    if dk_ptr is not None:
        dk_base = dk_ptr + b64 * stride_dk[0] + hk64 * stride_dk[1] + k_start * stride_dk[2]
        dk_at = offsets(keys, stride_dk[2], dims, stride_dk[3])
        store_rows(dk_base + dk_at, tl.where(there, dk * scale, 0.0), keys, limit, dims, D, BLOCK_D)
    if dv_ptr is not None:
        dv_base = dv_ptr + b64 * stride_dv[0] + hk64 * stride_dv[1] + k_start * stride_dv[2]
        dv_at = offsets(keys, stride_dv[2], dims_v, stride_dv[3])
        store_rows(dv_base + dv_at, tl.where(there, dv, 0.0), keys, limit, dims_v, Dv, BLOCK_DV)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def by_rows_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, lse_lo_ptr, delta_ptr, dq_ptr, dbias_ptr,
    mask_ptr, bias_ptr, q_lens_ptr, k_lens_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, seed_ptr, dw_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dq, stride_dbias, stride_mask, stride_bias,
    stride_alibi, stride_dw,
    H, group, B, Sq, Sk, Tq, Tk,
    scale, c, softcap, window_left, window_right, threshold, keep_scale, dw_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    DBIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of a block of rows, and dbias where it is STORE or ROWS. lse is in units."""
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
    valid = rows < q_len
    row_at = first_row_of(cu_q_ptr, b64, h64, q_start, Sq, Tq, H)
    q_base = q_ptr + b64 * stride_q[0] + h64 * stride_q[1] + q_start * stride_q[2]
    k_base = k_ptr + b64 * stride_k[0] + hk64 * stride_k[1] + k_start * stride_k[2]
    v_base = v_ptr + b64 * stride_v[0] + hk64 * stride_v[1] + k_start * stride_v[2]
    k_at = offsets(cols, stride_k[2], dims, stride_k[3])
    v_at = offsets(cols, stride_v[2], dims_v, stride_v[3])
    q_at = offsets(rows, stride_q[2], dims, stride_q[3])
    q = load_rows(q_base + q_at, rows, q_len, dims, D, BLOCK_D)
    if do_ptr is not None:
        do_base = do_ptr + b64 * stride_do[0] + h64 * stride_do[1] + q_start * stride_do[2]
        do_at = offsets(rows, stride_do[2], dims_v, stride_do[3])
        do = load_rows(do_base + do_at, rows, q_len, dims_v, Dv, BLOCK_DV)
    lse = tl.load(lse_ptr + row_at + rows, mask=valid, other=float("inf"))
    lse_lo = tl.load(lse_lo_ptr + row_at + rows, mask=valid, other=0.0)
    delta = tl.load(delta_ptr + row_at + rows, mask=valid, other=0.0)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    last = tl.minimum(first + BLOCK_M, q_len) - 1
    lo, hi, full_lo, full_hi = key_range(
        first, last, q_len, k_len, shift, window_left, window_right, CAUSAL, BLOCK_N
    )
    for j0 in range(lo, hi, BLOCK_N):
        j0 = tl.multiple_of(j0, BLOCK_N)
        keys = j0 + cols
        step = tl.cast(j0, tl.int64)
        k = load_rows(k_base + step * stride_k[2] + k_at, keys, k_len, dims, D, BLOCK_D)
        if CHUNK == BLOCK_D:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            s = product_of_rows(
                q_base, stride_q, rows, q_len, k_base, stride_k, keys, k_len, D, BLOCK_D, CHUNK,
                PRECISION,
            )  # fmt: skip
        dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if do_ptr is not None:
            v = load_rows(v_base + step * stride_v[2] + v_at, keys, k_len, dims_v, Dv, BLOCK_DV)
            if CHUNK_V == BLOCK_DV:
                dp = tl.dot(do, tl.trans(v), dp, input_precision=PRECISION)
            else:
                dp = product_of_rows(
                    do_base, stride_do, rows, q_len, v_base, stride_v, keys, k_len, Dv, BLOCK_DV,
                    CHUNK_V, PRECISION,
                )  # fmt: skip
        _, ds, dx = tile_grads(
            s, dp, rows[:, None], keys[None, :], first, j0, b, h, H, q_len, k_len, shift,
            (j0 < full_lo) | (j0 + BLOCK_N > full_hi), lse[:, None], lse_lo[:, None],
            delta[:, None], mask_ptr, bias_ptr, alibi_ptr, seed_ptr, dw_ptr, stride_mask,
            stride_bias, stride_alibi, stride_dw, scale, c, softcap, window_left, window_right,
            threshold, keep_scale, dw_scale, CAUSAL, PLAIN, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if DBIAS == _STORE:
            at = b64 * stride_dbias[0] + h64 * stride_dbias[1]
            at += rows[:, None].to(tl.int64) * stride_dbias[2]
            at += keys[None, :].to(tl.int64) * stride_dbias[3]
            inside = valid[:, None] & (keys[None, :] < k_len)
            tl.store(dbias_ptr + at, ds.to(dbias_ptr.dtype.element_ty), mask=inside)
        if DBIAS == _ROWS:
            sums += tl.sum(ds, 1)
        if dq_ptr is not None:
            dq = product(dx, k, dq, PRECISION, WIDE)

    if DBIAS == _ROWS:
        at = b64 * stride_dbias[0] + h64 * stride_dbias[1] + rows.to(tl.int64) * stride_dbias[2]
        tl.store(dbias_ptr + at, sums, mask=valid)
    if dq_ptr is not None:
        limit = q_len
        if cu_q_ptr is None:
            limit = Sq
        dq_base = dq_ptr + b64 * stride_dq[0] + h64 * stride_dq[1] + q_start * stride_dq[2]
        dq_at = offsets(rows, stride_dq[2], dims, stride_dq[3])
        dq = tl.where(valid[:, None], dq * scale, 0.0)
        store_rows(dq_base + dq_at, dq, rows, limit, dims, D, BLOCK_D)


@triton.jit(do_not_specialize=[*PLAIN_NUMBERS, "bias_b", "bias_h"])
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, lse_lo_ptr, delta_ptr, dbias_ptr,
    mask_ptr, bias_ptr, q_lens_ptr, k_lens_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, seed_ptr, dw_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dbias, stride_mask, stride_bias,
    stride_alibi, stride_dw,
    H, group, B, Sq, Sk, Tq, Tk, bias_b, bias_h,
    scale, c, softcap, window_left, window_right, threshold, keep_scale, dw_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of a (bias_b, bias_h, Sq, Sk) bias: the batch entries and heads that
    share it one after the other, in order. Every element is written."""
    blocks_n = tl.cdiv(Sk, BLOCK_N)
    blocks_m = tl.cdiv(Sq, BLOCK_M)
    tile = tl.program_id(0)
    j0 = tile % blocks_n * BLOCK_N
    first = tile // blocks_n % blocks_m * BLOCK_M
    outer = tile // blocks_n // blocks_m
    at_b = outer // bias_h
    at_h = outer % bias_h
    share_b = B // bias_b
    share_h = H // bias_h
    rows = first + tl.arange(0, BLOCK_M)
    keys = j0 + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    q_at = offsets(rows, stride_q[2], dims, stride_q[3])
    k_at = offsets(keys, stride_k[2], dims, stride_k[3])
    v_at = offsets(keys, stride_v[2], dims_v, stride_v[3])
    do_at = offsets(rows, stride_do[2], dims_v, stride_do[3])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for sharer in range(share_b * share_h):
        b = at_b * share_b + sharer // share_h
        h = at_h * share_h + sharer % share_h
        b64 = tl.cast(b, tl.int64)
        h64 = tl.cast(h, tl.int64)
        hk64 = tl.cast(h // group, tl.int64)
        q_start, q_len = sequence_of(b, q_lens_ptr, cu_q_ptr, Sq, Tq)
        k_start, k_len = sequence_of(b, k_lens_ptr, cu_k_ptr, Sk, Tk)
        shift = diagonal(q_len, k_len, CAUSAL)
        valid = rows < q_len
        row_at = first_row_of(cu_q_ptr, b64, h64, q_start, Sq, Tq, H)
        q_base = q_ptr + b64 * stride_q[0] + h64 * stride_q[1] + q_start * stride_q[2]
        k_base = k_ptr + b64 * stride_k[0] + hk64 * stride_k[1] + k_start * stride_k[2]
        q = load_rows(q_base + q_at, rows, q_len, dims, D, BLOCK_D)
        k = load_rows(k_base + k_at, keys, k_len, dims, D, BLOCK_D)
        lse = tl.load(lse_ptr + row_at + rows, mask=valid, other=float("inf"))
        lse_lo = tl.load(lse_lo_ptr + row_at + rows, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + row_at + rows, mask=valid, other=0.0)
        if CHUNK == BLOCK_D:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            s = product_of_rows(
                q_base, stride_q, rows, q_len, k_base, stride_k, keys, k_len, D, BLOCK_D, CHUNK,
                PRECISION,
            )  # fmt: skip
        dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if do_ptr is not None:
            v_base = v_ptr + b64 * stride_v[0] + hk64 * stride_v[1] + k_start * stride_v[2]
            do_base = do_ptr + b64 * stride_do[0] + h64 * stride_do[1] + q_start * stride_do[2]
            v = load_rows(v_base + v_at, keys, k_len, dims_v, Dv, BLOCK_DV)
            do = load_rows(do_base + do_at, rows, q_len, dims_v, Dv, BLOCK_DV)
            if CHUNK_V == BLOCK_DV:
                dp = tl.dot(do, tl.trans(v), dp, input_precision=PRECISION)
            else:
                dp = product_of_rows(
                    do_base, stride_do, rows, q_len, v_base, stride_v, keys, k_len, Dv, BLOCK_DV,
                    CHUNK_V, PRECISION,
                )  # fmt: skip
        _, ds, _ = tile_grads(
            s, dp, rows[:, None], keys[None, :], first, j0, b, h, H, q_len, k_len, shift,
            sharer >= 0, lse[:, None], lse_lo[:, None], delta[:, None], mask_ptr, bias_ptr,
            alibi_ptr, seed_ptr, dw_ptr, stride_mask, stride_bias, stride_alibi, stride_dw, scale,
            c, softcap, window_left, window_right, threshold, keep_scale, dw_scale,
            CAUSAL, PLAIN, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        total += ds
    to = at_b.to(tl.int64) * stride_dbias[0] + at_h.to(tl.int64) * stride_dbias[1]
    to += rows[:, None].to(tl.int64) * stride_dbias[2]
    at = to + keys[None, :].to(tl.int64) * stride_dbias[3]
    inside = (rows[:, None] < Sq) & (keys[None, :] < Sk)
    tl.store(dbias_ptr + at, total.to(dbias_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "H", "rows_total", "stride_b"])
def dsinks_kernel(
    sinks_ptr, lse_ptr, lse_lo_ptr, delta_ptr, dsinks_ptr, B, rows_total, stride_b, unit, c,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dsinks[h] = -sum over b, i of exp(sink - lse) delta; one program a head, rows in order.

    lse is in units, +inf where there is no row: those have no delta either.
    """
    h = tl.program_id(0).to(tl.int64)
    sink = (tl.load(sinks_ptr + h).to(tl.float32).to(tl.float64) / unit).to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for b in range(B):
        at = tl.cast(b, tl.int64) * stride_b + h * rows_total
        for i0 in range(0, rows_total, BLOCK):
            rows = i0 + tl.arange(0, BLOCK)
            lse = tl.load(lse_ptr + at + rows, mask=rows < rows_total, other=float("inf"))
            seen = lse < float("inf")
            lse_lo = tl.load(lse_lo_ptr + at + rows, mask=seen, other=0.0)
            delta = tl.load(delta_ptr + at + rows, mask=seen, other=0.0)
            x = (sink - lse.to(tl.float64)) * c - lse_lo.to(tl.float64)
            share = tl.exp2(x.to(tl.float32))
            total -= tl.where(seen, share * delta, 0.0).to(tl.float64)
    tl.store(dsinks_ptr + h, tl.sum(total, 0).to(dsinks_ptr.dtype.element_ty))
