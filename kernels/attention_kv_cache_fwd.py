"""Attention of a few new rows over a KV cache, by splits over the keys (FlashDecoding, Dao et al.
2023; block tables as in PagedAttention, Kwon et al., 2309.06180).

    for a block of rows and a split of the keys:
      q = rotate(q);  online softmax as in attention_fwd.py over the cached keys, then the new ones
      one split: o and lse;  several: m, l and acc, which merge_kernel sums in the order of splits
    the new rows:  rotate(k) and v into the cache

q (B, H, Sq, D); caches (entries, Hk, S, D) and (entries, Hk, S, Dv), an entry being a sequence or,
with a block table, a page; new k (B, Hk, Sn, D), v (B, Hk, Sn, Dv). One program a (b, hk, split,
block of rows), where the rows of a group of heads are packed: row r of kv head hk is head
hk group + r % group of query r // group, so a key is read once for all of them. 2 H Sq S (D + Dv)
FLOPs; every key and value that a row sees is read once a block of rows: bound by bandwidth up to
a hundred rows or so. Beside the results, several splits write and read 4 (Dv + 2) bytes a row each.

No program reads a row of the cache that its launch writes. A few new rows are appended by the way:
what lies below ``cached`` comes from the cache, the rest from k and v, in the last split, and each
new row is written by one program, whether or not any row attends to it. More of them
append_kernel writes before. Lengths, pages and entries are clamped, for nobody has read them on the
host.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention_common import (
    join_sink,
    key_range,
    load_rows,
    logits,
    offsets,
    store_rows,
    visible,
)

# How a tile of keys finds its rows: in one entry; each key by its page; a page holds whole tiles.
CONTIGUOUS = tl.constexpr(0)
BY_KEY = tl.constexpr(1)
BY_TILE = tl.constexpr(2)

# Values that change from call to call and that no code is better for knowing.
PLAIN_NUMBERS = [
    "group", "Sq", "Sn", "Hk", "capacity", "entries", "columns", "page_size", "positions", "splits",
    "window_left", "window_right",
]  # fmt: skip


# ---- lengths and places ------------------------------------------------------------------------


@triton.jit
def lengths(b, cache_lens_ptr, new_lens_ptr, capacity, Sn, Sq):
    """Of sequence b, whatever the device holds: keys in the cache, keys in all, rows of q that
    count, and where its row 0 stands."""
    cached = tl.load(cache_lens_ptr + b).to(tl.int64)
    cached = tl.minimum(tl.maximum(cached, 0), capacity).to(tl.int32)
    n = tl.minimum(Sn, capacity - cached)
    if new_lens_ptr is not None:
        given = tl.load(new_lens_ptr + b).to(tl.int64)
        n = tl.minimum(tl.maximum(given, 0), n).to(tl.int32)
    total = cached + n
    q_len = tl.zeros((), tl.int32) + Sq
    if new_lens_ptr is not None:
        q_len = tl.minimum(n, Sq)
    shift = total - q_len
    if new_lens_ptr is not None:
        shift = cached
    return cached, total, q_len, shift


@triton.jit
def entry_of(b, index_ptr, entries):
    """The entry of a contiguous cache that sequence b uses."""
    entry = tl.zeros((), tl.int64) + b
    if index_ptr is not None:
        entry = tl.load(index_ptr + b).to(tl.int64)
        entry = tl.minimum(tl.maximum(entry, 0), entries - 1)
    return entry


@triton.jit
def place(
    keys, first, limit, entry, b64, table_ptr, columns, page_size, entries, PAGED: tl.constexpr
):  # fmt: skip
    """Entry and row of the keys below ``limit``, int64; ``first`` is the tile's first key."""
    rows = keys.to(tl.int64)
    if PAGED == 1:
        at = table_ptr + b64 * columns + keys // page_size
        entry = tl.load(at, mask=keys < limit, other=0).to(tl.int64)
        entry = tl.minimum(tl.maximum(entry, 0), entries - 1)
        rows = (keys % page_size).to(tl.int64)
    if PAGED == 2:
        page = first // page_size
        entry = tl.load(table_ptr + b64 * columns + page).to(tl.int64)
        entry = tl.minimum(tl.maximum(entry, 0), entries - 1)
        rows = (keys - page * page_size).to(tl.int64)
    return entry, rows


# ---- rotary ------------------------------------------------------------------------------------


@triton.jit
def load_rotated(
    ptr, at, stride_d, ok, positions_of, cos_ptr, sin_ptr, positions,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows at offsets ``at``, their first R dims turned by their positions in fp32 and rounded once
    to their dtype; zero where not ``ok``."""
    dims = tl.arange(0, BLOCK_D)
    inside = ok[:, None] & (dims[None, :] < D)
    base = ptr + at[:, None]
    x = tl.load(base + dims[None, :].to(tl.int64) * stride_d, mask=inside, other=0.0)
    if cos_ptr is not None:
        half: tl.constexpr = R // 2
        if INTERLEAVED:
            leads = dims % 2 == 0
            pair = dims // 2
            partner = tl.where(leads, dims + 1, dims - 1)
        else:
            leads = dims < half
            pair = tl.where(leads, dims, dims - half)
            partner = tl.where(leads, dims + half, dims - half)
        turned = inside & (dims[None, :] < R)
        y = tl.load(base + partner[None, :].to(tl.int64) * stride_d, mask=turned, other=0.0)
        row = tl.minimum(tl.maximum(positions_of, 0), positions - 1).to(tl.int64) * half
        angle = row[:, None] + pair[None, :]
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
        y = tl.where(leads[None, :], -y.to(tl.float32), y.to(tl.float32))
        x = tl.where(turned, (x.to(tl.float32) * cos + y * sin).to(x.dtype), x)
    return x


@triton.jit
def within(keys, nearest, limit, window_left):
    """The keys to load: those left of the first row's window count as beyond ``limit``. A tile
    begins left of it, and what lies there (NaN) would leak through 0 * NaN."""
    if window_left is not None:
        keys = tl.where(keys >= nearest, keys, limit)
    return keys


# ---- softmax -----------------------------------------------------------------------------------


@triton.jit
def fold(
    m, l, acc, q, k, v, i, j0, keys, limit, q_len, total, shift, full_lo, full_hi,  # noqa: E741
    window_left, window_right, mask_ptr, mask_at, stride_mask, slope, scale, c, softcap,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over one more tile, the keys [j0, limit)."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    x, _ = logits(
        s, i, keys[None, :], q_len, total, mask_ptr, mask_at, stride_mask, None, None, None, slope,
        scale, softcap, PLAIN,
    )  # fmt: skip
    if (j0 < full_lo) | (j0 + BLOCK_N > tl.minimum(full_hi, limit)):
        seen = visible(
            i, keys[None, :], q_len, limit, shift, window_left, window_right, CAUSAL
        )  # fmt: skip
        x = tl.where(seen, x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: exp2(-inf - 0) = 0
    p = tl.exp2((x - base[:, None]) * c)
    alpha = tl.exp2((m - base) * c)
    l = l * alpha + tl.sum(p, 1)  # noqa: E741
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l, acc


@triton.jit
def finish(m, l, h, counts, sinks_ptr, unit, c):  # noqa: E741
    """What acc is to be multiplied by, and lse: -inf for rows that do not count."""
    none = l == 0.0  # a NaN is not 0 and stays
    top = tl.where(none, 0.0, m).to(tl.float64)
    factor = tl.where(none, 0.0, 1.0)
    empty = tl.where(none, float("-inf"), 0.0)
    if sinks_ptr is not None:
        raw = tl.load(sinks_ptr + h, mask=counts, other=0.0).to(tl.float32)
        top, l, lift = join_sink(raw, top, l, unit, c)  # noqa: E741
        factor = factor * lift
        empty = raw
    l = tl.where(none, 1.0, l)  # noqa: E741
    lse = (top * unit + tl.log2(l).to(tl.float64) * 0.6931471805599453).to(tl.float32)
    lse = tl.where(none, empty, lse)
    return factor / l, tl.where(counts, lse, float("-inf"))


# ---- the append --------------------------------------------------------------------------------


@triton.jit
def append(
    t0, b64, hk64, cached, total, entry, k_ptr, v_ptr, kc_base, vc_base, table_ptr, cos_ptr,
    sin_ptr, stride_k, stride_v, stride_kc, stride_vc, columns, page_size, entries, positions,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, PAGED: tl.constexpr, BLOCK_NEW: tl.constexpr,
):  # fmt: skip
    """The new rows [t0, t0 + BLOCK_NEW) of k, rotated, and of v, behind the ``cached`` ones."""
    t = t0 + tl.arange(0, BLOCK_NEW)
    keys = cached + t
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    entry = entry + keys.to(tl.int64) * 0
    slots = keys.to(tl.int64)
    if PAGED != 0:  # any page may end among the new rows
        entry, slots = place(
            keys, t0, total, entry, b64, table_ptr, columns, page_size, entries, 1
        )  # fmt: skip
    k_at = b64 * stride_k[0] + hk64 * stride_k[1] + t.to(tl.int64) * stride_k[2]
    k = load_rotated(
        k_ptr, k_at, stride_k[3], keys < total, keys, cos_ptr, sin_ptr, positions, R, INTERLEAVED,
        D, BLOCK_D,
    )  # fmt: skip
    v_base = v_ptr + b64 * stride_v[0] + hk64 * stride_v[1]
    v_at = offsets(t, stride_v[2], dims_v, stride_v[3])
    v = load_rows(v_base + v_at, keys, total, dims_v, Dv, BLOCK_DV)
    kc_at = (entry * stride_kc[0] + slots * stride_kc[2])[:, None]
    vc_at = (entry * stride_vc[0] + slots * stride_vc[2])[:, None]
    kc_at = kc_at + dims[None, :].to(tl.int64) * stride_kc[3]
    vc_at = vc_at + dims_v[None, :].to(tl.int64) * stride_vc[3]
    store_rows(kc_base + kc_at, k, keys, total, dims, D, BLOCK_D)
    store_rows(vc_base + vc_at, v, keys, total, dims_v, Dv, BLOCK_DV)


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def cached_attention_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, part_ptr, sums_ptr,
    cache_lens_ptr, new_lens_ptr, table_ptr, index_ptr, cos_ptr, sin_ptr, mask_ptr, alibi_ptr,
    sinks_ptr,
    stride_q, stride_kc, stride_vc, stride_k, stride_v, stride_o, stride_mask, stride_alibi,
    Hk, group, Sq, Sn, capacity, entries, columns, page_size, positions, splits,
    scale, unit, c, softcap, window_left, window_right,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, PAGED: tl.constexpr, CAUSAL: tl.constexpr,
    PLAIN: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NEW: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(group * Sq, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    split = tl.program_id(0) // blocks % splits
    outer = tl.program_id(0) // blocks // splits
    b64 = (outer // Hk).to(tl.int64)
    hk64 = (outer % Hk).to(tl.int64)
    cached, total, q_len, shift = lengths(b64, cache_lens_ptr, new_lens_ptr, capacity, Sn, Sq)
    if k_ptr is None:
        cached = total  # new rows, where there are some, were appended before
    entry = entry_of(b64, index_ptr, entries)
    kc_base = k_cache_ptr + hk64 * stride_kc[1]
    vc_base = v_cache_ptr + hk64 * stride_vc[1]

    rows = first + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    i = rows // group
    h = (hk64 * group + rows % group).to(tl.int64)
    q_at = b64 * stride_q[0] + h * stride_q[1] + i.to(tl.int64) * stride_q[2]
    q = load_rotated(
        q_ptr, q_at, stride_q[3], i < q_len, shift + i, cos_ptr, sin_ptr, positions, R, INTERLEAVED,
        D, BLOCK_D,
    )  # fmt: skip
    slope = None
    if alibi_ptr is not None:
        slope_at = b64 * stride_alibi[0] + h * stride_alibi[1]
        slope = tl.load(alibi_ptr + slope_at, mask=i < Sq, other=0.0).to(tl.float32)[:, None]
    mask_at = (b64 * stride_mask[0] + h * stride_mask[1])[:, None]

    # The keys that some row sees; each split has its share of the cached ones' tiles.
    i_first = first // group
    i_last = tl.minimum((first + BLOCK_M - 1) // group, q_len - 1)
    lo, hi, full_lo, full_hi = key_range(
        i_first, i_last, q_len, total, shift, window_left, window_right, CAUSAL, BLOCK_N
    )
    nearest = 0
    if window_left is not None:
        nearest = i_first + shift - window_left
    cached_hi = tl.minimum(hi, cached)
    share = tl.cdiv(tl.cdiv(tl.maximum(cached_hi - lo, 0), BLOCK_N), splits) * BLOCK_N

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for j0 in range(
        lo + split * share, tl.minimum(lo + (split + 1) * share, cached_hi), BLOCK_N
    ):  # fmt: skip
        j0 = tl.multiple_of(j0, BLOCK_N)
        keys = j0 + cols
        at, slots = place(
            keys, j0, cached, entry, b64, table_ptr, columns, page_size, entries, PAGED
        )  # fmt: skip
        k_at = (at * stride_kc[0] + slots * stride_kc[2])[:, None]
        v_at = (at * stride_vc[0] + slots * stride_vc[2])[:, None]
        k_at = k_at + dims[None, :].to(tl.int64) * stride_kc[3]
        v_at = v_at + dims_v[None, :].to(tl.int64) * stride_vc[3]
        near = within(keys, nearest, cached, window_left)
        k = load_rows(kc_base + k_at, near, cached, dims, D, BLOCK_D)
        v = load_rows(vc_base + v_at, near, cached, dims_v, Dv, BLOCK_DV)
        m, l, acc = fold(  # noqa: E741
            m, l, acc, q, k, v, i[:, None], j0, keys, cached, q_len, total, shift, full_lo, full_hi,
            window_left, window_right, mask_ptr, mask_at, stride_mask, slope, scale, c, softcap,
            CAUSAL, PLAIN, PRECISION, BLOCK_N,
        )  # fmt: skip

    if k_ptr is not None:
        k_base = b64 * stride_k[0] + hk64 * stride_k[1]
        v_base = v_ptr + b64 * stride_v[0] + hk64 * stride_v[1]
        new_hi = tl.where(split == splits - 1, hi - cached, 0)
        for t0 in tl.range(
            tl.maximum(lo - cached, 0) // BLOCK_NEW * BLOCK_NEW, new_hi, BLOCK_NEW, num_stages=1
        ):  # fmt: skip
            t = t0 + tl.arange(0, BLOCK_NEW)
            keys = cached + t
            near = within(keys, nearest, total, window_left)
            k = load_rotated(
                k_ptr, k_base + t.to(tl.int64) * stride_k[2], stride_k[3], near < total, keys,
                cos_ptr, sin_ptr, positions, R, INTERLEAVED, D, BLOCK_D,
            )  # fmt: skip
            v_at = offsets(t, stride_v[2], dims_v, stride_v[3])
            v = load_rows(v_base + v_at, near, total, dims_v, Dv, BLOCK_DV)
            m, l, acc = fold(  # noqa: E741
                m, l, acc, q, k, v, i[:, None], cached + t0, keys, total, q_len, total, shift,
                full_lo, full_hi, window_left, window_right, mask_ptr, mask_at, stride_mask, slope,
                scale, c, softcap, CAUSAL, PLAIN, PRECISION, BLOCK_NEW,
            )  # fmt: skip
        # In turn over the programs of this (b, hk).
        program = tl.program_id(0) % (blocks * splits)
        for t0 in tl.range(
            program * BLOCK_NEW, total - cached, blocks * splits * BLOCK_NEW, num_stages=1
        ):  # fmt: skip
            append(
                t0, b64, hk64, cached, total, entry, k_ptr, v_ptr, kc_base, vc_base, table_ptr,
                cos_ptr, sin_ptr, stride_k, stride_v, stride_kc, stride_vc, columns, page_size,
                entries, positions, D, Dv, BLOCK_D, BLOCK_DV, R, INTERLEAVED, PAGED, BLOCK_NEW,
            )  # fmt: skip

    if SPLIT:
        part = (outer.to(tl.int64) * splits + split) * (group * Sq) + rows
        tl.store(sums_ptr + 2 * part, m, mask=i < Sq)
        tl.store(sums_ptr + 2 * part + 1, l, mask=i < Sq)
        kept = (i < Sq) & (l != 0.0)  # the rest nobody reads
        acc_at = part[:, None] * Dv + dims_v[None, :]
        tl.store(part_ptr + acc_at, acc, mask=kept[:, None] & (dims_v[None, :] < Dv))
    else:
        counts = (i < q_len) & (i + shift >= 0)
        factor, lse = finish(m, l, h, counts, sinks_ptr, unit, c)
        o = tl.where(counts[:, None], acc * factor[:, None], 0.0)
        o_at = b64 * stride_o[0] + h * stride_o[1] + i.to(tl.int64) * stride_o[2]
        o_at = o_at[:, None] + dims_v[None, :].to(tl.int64) * stride_o[3]
        store_rows(o_ptr + o_at, o, i, Sq, dims_v, Dv, BLOCK_DV)
        tl.store(lse_ptr + (b64 * Hk * group + h) * Sq + i, lse, mask=i < Sq)


@triton.jit(
    do_not_specialize=["Hk", "Sq", "Sn", "capacity", "entries", "columns", "page_size", "positions"]
)
def append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, cache_lens_ptr, new_lens_ptr, table_ptr, index_ptr,
    cos_ptr, sin_ptr, stride_kc, stride_vc, stride_k, stride_v,
    Hk, Sq, Sn, capacity, entries, columns, page_size, positions,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, PAGED: tl.constexpr, BLOCK_NEW: tl.constexpr,
):  # fmt: skip
    """One program a (b, hk, tile of new rows)."""
    tiles = tl.cdiv(Sn, BLOCK_NEW)
    t0 = tl.program_id(0) % tiles * BLOCK_NEW
    outer = tl.program_id(0) // tiles
    b64 = (outer // Hk).to(tl.int64)
    hk64 = (outer % Hk).to(tl.int64)
    cached, total, _, _ = lengths(b64, cache_lens_ptr, new_lens_ptr, capacity, Sn, Sq)
    append(
        t0, b64, hk64, cached, total, entry_of(b64, index_ptr, entries), k_ptr, v_ptr,
        k_cache_ptr + hk64 * stride_kc[1], v_cache_ptr + hk64 * stride_vc[1], table_ptr, cos_ptr,
        sin_ptr, stride_k, stride_v, stride_kc, stride_vc, columns, page_size, entries, positions,
        D, Dv, BLOCK_D, BLOCK_DV, R, INTERLEAVED, PAGED, BLOCK_NEW,
    )  # fmt: skip


@triton.jit(do_not_specialize=["Hk", "group", "Sq", "Sn", "capacity", "splits"])
def merge_kernel(
    part_ptr, sums_ptr, o_ptr, lse_ptr, cache_lens_ptr, new_lens_ptr, sinks_ptr, stride_o,
    Hk, group, Sq, Sn, capacity, splits, unit, c,
    Dv: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """o and lse of one row (b, hk, r) from its splits, BLOCK_S at a time in their order."""
    packed = group * Sq
    r = tl.program_id(0) % packed
    outer = (tl.program_id(0) // packed).to(tl.int64)
    b64 = outer // Hk
    i = r // group
    h = outer % Hk * group + r % group
    _, _, q_len, shift = lengths(b64, cache_lens_ptr, new_lens_ptr, capacity, Sn, Sq)
    dims_v = tl.arange(0, BLOCK_DV)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.zeros((), tl.float32)  # noqa: E741
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for s0 in range(0, splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        part = (outer * splits + s) * packed + r
        m_s = tl.load(sums_ptr + 2 * part, mask=s < splits, other=float("-inf"))
        l_s = tl.load(sums_ptr + 2 * part + 1, mask=s < splits, other=0.0)
        live = (l_s != 0.0)[:, None] & (dims_v[None, :] < Dv)
        acc_s = tl.load(part_ptr + part[:, None] * Dv + dims_v[None, :], mask=live, other=0.0)
        m_new = tl.maximum(m, tl.max(m_s, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2((m_s - base) * c)
        alpha = tl.exp2((m - base) * c)
        l = l * alpha + tl.sum(l_s * weight, 0)  # noqa: E741
        acc = acc * alpha + tl.sum(acc_s * weight[:, None], 0)
        m = m_new

    counts = (i < q_len) & (i + shift >= 0)
    factor, lse = finish(m, l, h, counts, sinks_ptr, unit, c)
    o = tl.where(counts, acc * factor, 0.0).to(o_ptr.dtype.element_ty)
    o_at = b64 * stride_o[0] + h * stride_o[1] + i.to(tl.int64) * stride_o[2]
    o_at = o_at + dims_v.to(tl.int64) * stride_o[3]
    tl.store(o_ptr + o_at, o, mask=dims_v < Dv)
    tl.store(lse_ptr + (b64 * Hk * group + h) * Sq + i, lse)
