"""``fastattn.attention_with_kv_cache``: check, choose a backend, launch, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends import select
from fastattn.ops import attention_kv_cache_checks as check
from fastattn.ops import attention_kv_cache_cuda, attention_kv_cache_triton  # noqa: F401  register
from fastattn.ops import attention_kv_cache_op as op
from fastattn.ops._eager import wants_grad
from fastattn.ops._guard import as_named
from fastattn.ops.attention_checks import check_bool, check_numbers, window_limits

Window = tuple[int | None, int | None]


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lens: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    new_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_index: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: Window | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention of the newest rows of every sequence over its cached keys, for generation: appends
    the new keys and values in place, rotates them and q, and attends, in one call.

    The keys are split over the processors and the parts merged in a fixed order ("FlashDecoding",
    Dao et al. 2023); a cache may be made of pages (PagedAttention, Kwon et al., arXiv:2309.06180).
    All query heads that share a key head are served by one pass over its keys.

    With n_b rows appended, sequence b has total_b = cache_lens[b] + n_b keys. The rows of q are its
    last ones: row i stands at position total_b - Sq + i (with ``new_lens`` at cache_lens[b] + i).
    The logits are built in this order: scale, softcap, ALiBi, masks; then the sink joins the sum.

    Args:
        q: (B, H, Sq, D), the newest Sq >= 1 rows of every sequence; float32, bfloat16, float16 or
            float64 (the reference); any strides.
        k_cache: (B, Hk, S, D), or with ``block_table`` (pages, Hk, page_size, D); q's dtype and
            device; H % Hk == 0, query head h reads head h // (H // Hk). Any strides with 1 in the
            last dimension: a (B, S, Hk, D) cache is passed as a transposed view.
        v_cache: (B, Hk, S, Dv) or (pages, Hk, page_size, Dv), likewise.
        cache_lens: (B,) int32 or int64, keys that the cache holds before this call; not changed.
        k, v: (B, Hk, Sn, D) and (B, Hk, Sn, Dv), appended at cache_lens[b], ... before the
            attention; both or none. What is appended to must share no memory with them, with q or
            with the other cache; of that it is noticed if both caches are one tensor.
        new_lens: (B,), of a ragged batch: only the first new_lens[b] rows of k and v are appended,
            and rows of q from there on give o = 0, lse = -inf. Needs Sq == Sn. None: all.
        block_table: (B, max_pages) int32 or int64, the page of sequence b's keys
            [p page_size, (p + 1) page_size) in column p. Columns beyond total_b may hold anything.
            A page that is appended to must belong to one sequence alone; others may be shared.
        cache_index: (B,), the entry of a contiguous cache that sequence b uses, where the cache has
            more entries than the batch or in another order; distinct where k is given. None: b.
        rotary: (cos, sin), each (positions, R / 2), any float dtype, R <= D: the first R dims of
            the rows of q and k are rotated by their positions, in float32, and rounded once.
        rotary_interleaved: False: dim t turns with t + R / 2 (NeoX, Llama); True: neighbours turn
            (GPT-J).
        causal: True: a row sees the keys up to its own position; False: all total_b.
        window: (left, right) keys around the row's position, None on a side = unlimited. Keys
            outside are not read.
        mask: bool, broadcastable to (B, H, Sq, capacity), True = takes part (left padding);
            capacity is S, or max_pages * page_size.
        alibi_slopes: (H,) or (B, H); adds -slope * abs(position - j).
        softcap: c > 0; logits become c * tanh(logits / c).
        sinks: (H,), a logit a head that joins the softmax's sum and no value.
        scale: multiplies the logits; default D ** -0.5.
        return_lse: also return lse (B, H, Sq), natural log, float32 (float64 for float64).
        backend: "auto", "cpu", "triton", "cuda" or "reference".

    Returns:
        o (B, H, Sq, Dv) in q's dtype, or (o, lse). Memory is laid out as (B, Sq, H, Dv) where q is
        not contiguous. A row that sees no key gives o = 0, lse = -inf (or the sink's logit); a row
        of negative position (total_b < Sq) or beyond ``new_lens`` gives o = 0, lse = -inf.

    What lies in the cache beyond total_b, and pages not reached, is never read. There are no
    gradients. The result is bitwise repeatable, on the CPU for every number of threads.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value (the cache is
            full, a length is out of range), or a gradient is asked for. IndexError: a page, an
            entry or a rotary position outside its table. All before anything is written. Values on
            a CUDA device are read only under ``fastattn.debug_checks(True)``, and clamped by the
            kernels otherwise: lengths to the capacity (rows beyond it are dropped), pages and
            positions to their tables. In a compiled graph the op itself raises RuntimeError.

    >>> import torch, fastattn
    >>> k_cache = torch.zeros(2, 4, 128, 64)  # room for 128 keys of 2 sequences, 4 heads
    >>> v_cache = torch.zeros(2, 4, 128, 64)
    >>> lens = torch.zeros(2, dtype=torch.int64)
    >>> for rows in (10, 1, 1):  # a prompt, then token by token; 8 query heads
    ...     q, k, v = (torch.randn(2, h, rows, 64) for h in (8, 4, 4))
    ...     o = fastattn.attention_with_kv_cache(
    ...         q, k_cache, v_cache, cache_lens=lens, k=k, v=v)
    ...     lens += rows
    >>> o.shape, lens.tolist()
    (torch.Size([2, 8, 1, 64]), [12, 12])
    """
    cos: Tensor | None = None
    sin: Tensor | None = None
    if rotary is not None:
        cos, sin = (x.float().contiguous() for x in check.rotary_tables(rotary, q))
    left, right = (-1, -1) if window is None else window_limits(check.OP, window)
    if scale is not None or softcap is not None:
        check_numbers(check.OP, scale, softcap, 0.0)
    if type(causal) is not bool or type(return_lse) is not bool or rotary_interleaved is not False:
        _check_bools(causal, return_lse, rotary_interleaved)
    tensors = (
        q, k_cache, v_cache, cache_lens, k, v, new_lens, block_table, cache_index, cos, sin, mask,
        alibi_slopes, sinks,
    )  # fmt: skip
    plain = type(q) is Tensor and type(v_cache) is Tensor and q.dim() == 4 == v_cache.dim()
    if not (plain and q.is_floating_point()):  # what follows asks them for shapes and dtype
        check.check_call(check.Call(*tensors))
    head_dim = max(q.shape[3], v_cache.shape[3])
    chosen = select(check.OP, backend, q.device.type, q.dtype, head_dim)
    numbers = (
        q.shape[3] ** -0.5 if scale is None and q.shape[3] else scale, softcap or 0.0, causal,
        left, right, rotary_interleaved,
    )  # fmt: skip
    if chosen == "cpu" and plain and not torch.compiler.is_compiling():
        o, lse = _run_on_cpu(tensors, numbers)
        return (o, lse) if return_lse else o
    call = check.Call(*tensors)
    check.check_call(call)
    check.check_values(call)
    if chosen == "reference":
        return reference.attention_with_kv_cache(
            q, k_cache, v_cache, cache_lens=cache_lens, k=k, v=v, new_lens=new_lens,
            block_table=block_table, cache_index=cache_index, rotary=rotary,
            rotary_interleaved=rotary_interleaved, causal=causal, window=window, mask=mask,
            alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, scale=scale,
            return_lse=return_lse,
        )  # fmt: skip
    with as_named(backend, chosen):
        o, lse = op.run(chosen, *tensors, *numbers)
    return (o, lse) if return_lse else o


def _check_bools(causal: Any, return_lse: Any, rotary_interleaved: Any) -> None:
    check_bool(check.OP, "causal", causal)
    check_bool(check.OP, "return_lse", return_lse)
    check_bool(check.OP, "rotary_interleaved", rotary_interleaved)


def _run_on_cpu(tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The binding makes every check, values too, before it writes: in C++ they cost a small call
    nothing. Its refusal is worded here."""
    try:
        if torch.is_grad_enabled() and wants_grad(*tensors):
            check.check_no_gradient(check.Call(*tensors))
        return op.run("cpu", *tensors, *numbers)
    except (RuntimeError, TypeError, AttributeError) as error:
        refused = error
    call = check.Call(*tensors)
    check.check_call(call)
    check.check_values(call)
    raise refused
