"""Rows of attention with a KV cache: new rows of every sequence are appended and attended to.

The baseline is what a model does without the op: index_copy_ of the new rows, then
F.scaled_dot_product_attention over a slice of the cache, with enable_gqa where heads share keys.
One new row of a sequence reads 2 Hk S D items and makes 4 H S D FLOPs of them: bound by memory, so
the ceiling of the long rows is the best of several loops that read a buffer as large.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.harness import DTYPES, Case, Contest, Setting, Thunk, compiled

READ_SHARE = 0.7
ROOM = 64  # rows of a cache that are never used


def decode(
    setting: Setting, B: int, H: int, Hk: int, S: int, D: int, dtype: str, rows: int = 1,
    page_size: int = 0, layout: str = "bhsd",
) -> Contest:  # fmt: skip
    """`rows` new rows a sequence onto S - rows cached ones."""

    def make(*shape: int) -> Tensor:
        return torch.randn(shape).to(DTYPES[dtype])

    def cache() -> Tensor:
        if layout == "bshd":
            return make(B, S + ROOM, Hk, D).transpose(1, 2)
        return make(B, Hk, S + ROOM, D)

    q, k, v = make(B, H, rows, D), make(B, Hk, rows, D), make(B, Hk, rows, D)
    k_cache, v_cache = cache(), cache()
    at, lens = torch.arange(S - rows, S), torch.full((B,), S - rows, dtype=torch.int32)
    mask = torch.ones(rows, S, dtype=torch.bool).tril(S - rows) if rows > 1 else None
    gqa: dict[str, Any] = {"enable_gqa": True} if Hk != H else {}

    def stock() -> Tensor:
        k_cache.index_copy_(2, at, k)
        v_cache.index_copy_(2, at, v)
        keys, values = k_cache[:, :, :S], v_cache[:, :, :S]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, **gqa)

    caches, table = (k_cache, v_cache), None
    if page_size:
        columns = -(-(S + ROOM) // page_size)
        caches = (make(B * columns, Hk, page_size, D), make(B * columns, Hk, page_size, D))
        table = torch.randperm(B * columns).view(B, columns).int()

    def fused() -> Tensor:
        return fastattn.attention_with_kv_cache(  # type: ignore[no-any-return]
            q, *caches, cache_lens=lens, k=k, v=v, block_table=table, backend=setting.backend
        )

    def quiet(fn: Thunk) -> Thunk:
        def call() -> object:
            with torch.no_grad():
                return fn()

        return call

    others = {"torch.compile": quiet(compiled(stock))} if setting.peers else {}
    return Contest(
        quiet(stock), quiet(fused), others,
        flops=4.0 * B * H * rows * S * D, bytes=2.0 * B * Hk * S * D * q.element_size(),
    )  # fmt: skip


def _case(ratio: float, share: float | None, **sizes: Any) -> Case:
    given = {"rows": 1, "page_size": 0, "layout": "bhsd", **sizes}
    name = "{dtype}_b{B}_h{H}x{Hk}_s{S}_d{D}".format(**given)
    what = "{dtype} B={B} H={H} Hk={Hk} S={S} D={D}".format(**given)
    for option, plain in (("rows", 1), ("page_size", 0), ("layout", "bhsd")):
        if given[option] != plain:
            name += f"_{option}_{given[option]}"
            what += f", {option} {given[option]}"
    make = partial(decode, **sizes)
    return Case(name, what, given["dtype"], make, ratio, share, roof="read", both=share is not None)


def _cases() -> list[Case]:
    cases = []
    for dtype in ("bf16", "fp32"):
        long = {"B": 1, "H": 32, "Hk": 8, "S": 16384, "D": 128, "dtype": dtype}
        cases.append(_case(1.5, READ_SHARE, **long))
        cases.append(_case(1.5, READ_SHARE, **long, page_size=16))
        cases.append(_case(1.5, READ_SHARE, **long, layout="bshd"))
        cases.append(_case(1.5, None, **long, rows=4))
        for B in (1, 8):
            for S in (64, 128, 512, 2048):
                cases.append(_case(1.0, None, B=B, H=12, Hk=12, S=S, D=64, dtype=dtype))
        cases.append(_case(1.0, None, B=1, H=12, Hk=12, S=2048, D=64, dtype=dtype, rows=512))
    return cases


CASES: dict[str, Case] = {case.name: case for case in _cases()}
