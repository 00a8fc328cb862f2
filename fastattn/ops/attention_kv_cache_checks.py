"""What ``fastattn.attention_with_kv_cache`` accepts, checked before anything is written.

Shapes, dtypes and devices are checked always. Values (lengths, pages) are read on the CPU always
and on another device only under ``fastattn.debug_checks(True)``: a read would synchronise. The CPU
binding makes the same checks in C++, where they cost nothing; those here word what is wrong.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention_checks import (
    _FLOATS,
    _INTS,
    _readable,
    _shape,
    check_alibi,
    check_broadcast,
    check_sinks,
    check_strided,
    check_vector,
    fail,
)

OP = "attention_with_kv_cache"


class Call(NamedTuple):
    """The tensors of a call, in the order of the op's schema."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lens: Tensor
    k: Tensor | None
    v: Tensor | None
    new_lens: Tensor | None
    block_table: Tensor | None
    cache_index: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None

    @property
    def capacity(self) -> int:
        size = self.k_cache.shape[2]
        return size if self.block_table is None else size * self.block_table.shape[1]


def check_call(call: Call) -> None:
    """Everything but values."""
    _check_q_and_caches(call)
    _check_new_rows(call)
    _check_where(call)
    check_no_gradient(call)
    q = call.q
    batch, heads, rows = q.shape[:3]
    if call.mask is not None:
        target = (batch, heads, rows, call.capacity)
        check_broadcast(
            OP, "mask", call.mask, q, target, wants_bool=True, keys="capacity",
            or_else="none is added here; of one of 0 and -inf it is mask == 0",
        )  # fmt: skip
    if call.alibi_slopes is not None:
        check_alibi(OP, call.alibi_slopes, q, batch, heads)
    if call.sinks is not None:
        check_sinks(OP, call.sinks, q, heads)


def _check_four(name: str, x: Any, layout: str) -> None:
    if not isinstance(x, Tensor):
        fail(OP, f"{name} must be a Tensor, got {type(x).__name__}", TypeError)
    check_strided(OP, name, x)
    if x.dim() != 4:
        fail(OP, f"{name} must have 4 dimensions {layout}, got shape {_shape(x)}")


def _check_goes_with_q(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        fail(OP, f"{name} must have q's dtype {q.dtype}, got {x.dtype}", TypeError)
    if x.device != q.device:
        fail(OP, f"{name} must be on q's device {q.device}, got {x.device}")


def _check_q_and_caches(call: Call) -> None:
    q = call.q
    _check_four("q", q, "(B, H, Sq, D)")
    if q.dtype not in _FLOATS:
        fail(OP, f"q must be float32, bfloat16, float16 or float64, got {q.dtype}", TypeError)
    if q.shape[2] == 0:
        fail(OP, f"q must have at least one row a sequence, got shape {_shape(q)}")
    layout = "(B, Hk, S, D)" if call.block_table is None else "(pages, Hk, page_size, D)"
    for name, x in (("k_cache", call.k_cache), ("v_cache", call.v_cache)):
        _check_four(name, x, layout)
        _check_goes_with_q(name, x, q)
    k_cache, v_cache = call.k_cache, call.v_cache
    if k_cache.shape[3] != q.shape[3]:
        fail(OP, f"k_cache must have head_dim {q.shape[3]} to match q, got {k_cache.shape[3]}")
    if q.shape[3] == 0 or v_cache.shape[3] == 0:
        fail(OP, f"head_dim must be at least 1, got q {_shape(q)} and v_cache {_shape(v_cache)}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        fail(
            OP,
            f"v_cache must have k_cache's first dimensions {tuple(k_cache.shape[:3])}, got "
            f"{tuple(v_cache.shape[:3])}",
        )
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        fail(OP, f"q's heads must be a multiple of the cache's, got {heads} and {kv_heads}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.shape[3] > 1 and x.stride(3) != 1:
            fail(
                OP,
                f"{name} is written in place, so its last dimension must have stride 1, got "
                f"strides {tuple(x.stride())}; transposed views of (B, S, Hk, D) have it",
            )


def _overlaps(x: Tensor) -> bool:
    """Whether two elements may share memory."""
    reach = 0
    dims = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1)
    for stride, n in dims:
        if stride <= reach:
            return True
        reach += stride * (n - 1)
    return False


def _check_new_rows(call: Call) -> None:
    q, k, v = call.q, call.k, call.v
    if (k is None) != (v is None):
        fail(OP, "k and v must be given together, or neither")
    if k is None or v is None:
        if call.new_lens is not None:
            fail(OP, "new_lens says how much of k and v is appended: it needs k and v")
        return
    shape = (q.shape[0], call.k_cache.shape[1])
    for name, x, cache in (("k", k, call.k_cache), ("v", v, call.v_cache)):
        _check_four(name, x, "(B, Hk, Sn, D)")
        _check_goes_with_q(name, x, q)
        want = (*shape, k.shape[2], cache.shape[3])
        if tuple(x.shape) != want:
            fail(OP, f"{name} must have shape (B, Hk, Sn, D) = {want}, got {_shape(x)}")
        if not torch.compiler.is_compiling() and x.numel() and _overlaps(cache):
            fail(
                OP,
                f"{name}_cache is written in place, so no two of its elements may share memory, "
                f"got strides {tuple(cache.stride())} for shape {_shape(cache)}",
            )
    if type(q) is Tensor and not torch.compiler.is_compiling() and k.numel():
        first, second = call.k_cache, call.v_cache
        if first.numel() and first.data_ptr() == second.data_ptr():
            fail(OP, "v_cache must not share k_cache's memory: both are written in place")
    if call.new_lens is not None:
        check_vector(OP, "new_lens", call.new_lens, q, ((q.shape[0],),), _INTS)
        if q.shape[2] != k.shape[2]:
            fail(
                OP,
                f"new_lens needs as many rows of q as of k (row i of q is key cache_lens + i), got "
                f"{q.shape[2]} and {k.shape[2]}",
            )


def _check_where(call: Call) -> None:
    q, batch = call.q, call.q.shape[0]
    check_vector(OP, "cache_lens", call.cache_lens, q, ((batch,),), _INTS)
    if call.block_table is not None:
        table = call.block_table
        if call.cache_index is not None:
            fail(OP, "cache_index is for a contiguous cache; block_table says where pages lie")
        if not isinstance(table, Tensor):
            fail(OP, f"block_table must be a Tensor, got {type(table).__name__}", TypeError)
        if table.dtype not in _INTS:
            fail(OP, f"block_table must be int32 or int64, got {table.dtype}", TypeError)
        if table.device != q.device:
            fail(OP, f"block_table must be on q's device {q.device}, got {table.device}")
        if table.dim() != 2 or table.shape[0] != batch:
            fail(OP, f"block_table must have shape (B, pages) = ({batch}, *), got {_shape(table)}")
        if call.k_cache.shape[2] == 0:
            fail(OP, f"a page must have at least one slot, got k_cache {_shape(call.k_cache)}")
    elif call.cache_index is not None:
        check_vector(OP, "cache_index", call.cache_index, q, ((batch,),), _INTS)
    elif call.k_cache.shape[0] != batch:
        fail(
            OP,
            f"k_cache has {call.k_cache.shape[0]} entries for {batch} sequences: say with "
            "cache_index which are meant, or with block_table that they are pages",
        )


def rotary_tables(rotary: Any, q: Any) -> tuple[Tensor, Tensor]:
    """(cos, sin), checked, as they were given."""
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        fail(OP, f"rotary must be (cos, sin) or None, got {type(rotary).__name__}", TypeError)
    cos, sin = rotary
    for name, x in (("cos", cos), ("sin", sin)):
        if not isinstance(x, Tensor):
            fail(OP, f"rotary's {name} must be a Tensor, got {type(x).__name__}", TypeError)
        if not x.is_floating_point():
            fail(OP, f"rotary's {name} must be of a float dtype, got {x.dtype}", TypeError)
        if isinstance(q, Tensor) and x.device != q.device:
            fail(OP, f"rotary's {name} must be on q's device {q.device}, got {x.device}")
    limit = q.shape[-1] // 2 if isinstance(q, Tensor) and q.dim() == 4 else cos.shape[-1]
    if cos.dim() != 2 or cos.shape != sin.shape or not 1 <= cos.shape[1] <= limit:
        fail(
            OP,
            "rotary's cos and sin must have one shape (positions, R / 2) with R at most q's "
            f"head_dim, got {_shape(cos)} and {_shape(sin)}",
        )
    return cos, sin


def check_no_gradient(call: Call) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in call._asdict().items():
        if isinstance(x, Tensor) and x.requires_grad:
            whose = f"rotary's {name}" if name in ("cos", "sin") else name
            fail(
                OP,
                f"{whose} has requires_grad=True, but attention over a cache has no gradient: call "
                "it under torch.no_grad(), or train with fastattn.attention",
            )


# ------------------------------------------------------------------------------------------ values


def check_values(call: Call) -> None:
    """Lengths, pages and positions, where they may be read."""
    if not _readable(call.cache_lens) or type(call.q) is not Tensor:
        return
    batch, capacity = call.q.shape[0], call.capacity
    lens = call.cache_lens.tolist()
    given = call.k.shape[2] if call.k is not None else 0
    new = [given] * batch if call.new_lens is None else call.new_lens.tolist()
    tables = None if call.block_table is None else call.block_table.tolist()
    for b, (at, n) in enumerate(zip(lens, new, strict=True)):
        if at < 0:
            fail(OP, f"cache_lens[{b}] must not be negative, got {at}")
        if not 0 <= n <= given:
            fail(OP, f"new_lens[{b}] must be in [0, {given}], the rows of k, got {n}")
        total = at + n
        if total > capacity:
            fail(OP, _full(call, b, at, n, capacity))
        if tables is not None:
            _check_pages(call, b, tables[b], total)
        rows = call.cos.shape[0] if call.cos is not None else total
        if total > rows and (n > 0 or call.new_lens is None):
            fail(
                OP,
                f"sequence {b} reaches position {total - 1}, beyond rotary's {rows} positions: "
                "pass longer tables",
                IndexError,
            )
    if tables is not None:
        _check_written_pages(call, tables, lens, new)
    if call.cache_index is not None:
        _check_entries(call, call.cache_index.tolist())


def _full(call: Call, b: int, at: int, n: int, capacity: int) -> str:
    what = f"cache_lens[{b}] = {at}" + (f" and {n} new rows" if n else "")
    remedy = "make a longer cache"
    if call.block_table is not None:
        remedy = "give block_table more columns, one a page"
    return (
        f"the cache is full: sequence {b} has {what}, more than the capacity of "
        f"{capacity}; {remedy}"
    )


def _check_pages(call: Call, b: int, table: list[int], total: int) -> None:
    pages = call.k_cache.shape[0]
    for p in range(-(-total // call.k_cache.shape[2])):
        if not 0 <= table[p] < pages:
            fail(
                OP,
                f"block_table[{b}, {p}] must be a page in [0, {pages}) as sequence {b} has {total} "
                f"keys, got {table[p]}",
                IndexError,
            )


def _check_written_pages(
    call: Call, tables: list[list[int]], lens: list[int], new: list[int]
) -> None:
    size = call.k_cache.shape[2]
    writer: dict[int, int] = {}
    for b, (at, n) in enumerate(zip(lens, new, strict=True)):
        for p in range(at // size, -(-(at + n) // size) if n else 0):
            page = tables[b][p]
            if page in writer:
                fail(
                    OP,
                    f"block_table[{b}, {p}] is page {page}, to which sequence {writer[page]} "
                    "appends too: sequences may read one page, but append to pages of their own",
                )
            writer[page] = b


def _check_entries(call: Call, entries: list[int]) -> None:
    limit = call.k_cache.shape[0]
    seen: dict[int, int] = {}
    for b, entry in enumerate(entries):
        if not 0 <= entry < limit:
            fail(
                OP,
                f"cache_index[{b}] must be an entry of the cache in [0, {limit}), got {entry}",
                IndexError,
            )
        if call.k is not None and entry in seen:
            fail(
                OP,
                f"cache_index[{b}] is {entry}, which sequence {seen[entry]} has too: sequences "
                "that append need entries of their own",
            )
        seen[entry] = b
