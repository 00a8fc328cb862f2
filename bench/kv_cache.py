"""Attention over a KV cache on the CPU.

    python -m bench.kv_cache --threads 2 --case NAME

The baseline is what a model does without the op: index_copy_ of the new rows, then
F.scaled_dot_product_attention over a slice of the cache. A second column reads memory: the best of
several loops over a buffer as large as the keys and values that a call uses, in the same rounds;
"of read" is its time over the fused call's. One new row of every sequence is 4 S (D + Dv) Hk bytes
in fp32, and 2 S (D + Dv) H multiply-adds: on one row a head bound by memory.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.contest import Case, Compiler, Contest, parser, run
from bench.harness import DTYPES, Thunk
from fastattn.measure import interleave, spread

READ_SHARE = 0.7


def reader(size: int) -> Thunk:
    """Reads `size` bytes as fast as any of these: which is found out here, once."""
    x = torch.randint(0, 100, (max(size // 8, 1),), dtype=torch.int64)
    floats = torch.zeros(max(size // 4, 1))
    rows = floats[: len(floats) // 4096 * 4096].view(-1, 4096) if len(floats) >= 4096 else floats
    ones = torch.ones(rows.shape[-1])
    loops: dict[str, Thunk] = {
        "sum": lambda: floats.sum(),
        "rows": lambda: rows.sum(-1),
        "max": lambda: x.max(),
        "dot": lambda: torch.dot(floats, floats),
        "mv": lambda: torch.mv(rows, ones) if rows.dim() == 2 else floats.sum(),
    }
    times = interleave(loops, rounds=5, max_seconds=5.0, min_rounds=3)
    return loops[min(times, key=lambda name: spread(times[name]).median)]


def generation(
    _: Compiler, B: int, H: int, Hk: int, S: int, D: int, dtype: str, rows: int = 1,
    page_size: int = 0, layout: str = "bhsd", read: bool = True,
) -> Contest:  # fmt: skip
    """`rows` new rows a sequence onto S - rows cached ones."""

    def make(heads: int, n: int) -> Tensor:
        return torch.randn(B, heads, n, D).to(DTYPES[dtype])

    q, k, v = make(H, rows), make(Hk, rows), make(Hk, rows)
    capacity = S + 64
    shape = (B, Hk, capacity, D) if layout == "bhsd" else (B, capacity, Hk, D)
    k_cache, v_cache = (torch.randn(shape).to(q.dtype) for _ in range(2))
    if layout == "bshd":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    at, lens = torch.arange(S - rows, S), torch.full((B,), S - rows, dtype=torch.int32)
    mask = torch.ones(rows, S, dtype=torch.bool).tril(S - rows) if rows > 1 else None
    gqa: dict[str, Any] = {"enable_gqa": True} if Hk != H else {}

    def stock() -> Tensor:
        k_cache.index_copy_(2, at, k)
        v_cache.index_copy_(2, at, v)
        return F.scaled_dot_product_attention(
            q, k_cache[:, :, :S], v_cache[:, :, :S], attn_mask=mask, **gqa
        )

    caches: Any = (k_cache, v_cache)
    table = None
    if page_size:
        columns = -(-capacity // page_size)
        caches = tuple(torch.randn(B * columns, Hk, page_size, D).to(q.dtype) for _ in range(2))
        table = torch.randperm(B * columns).view(B, columns).int()

    def fused() -> Tensor:
        return fastattn.attention_with_kv_cache(  # type: ignore[no-any-return]
            q, *caches, cache_lens=lens, k=k, v=v, block_table=table
        )

    size = 2 * B * Hk * S * D * q.element_size()
    return Contest(stock, fused, reader(size) if read else None)


def _case(target: float, share: float | None, **sizes: Any) -> Case:
    given = {"rows": 1, "page_size": 0, "layout": "bhsd", **sizes}
    name = "{dtype}_b{B}_h{H}x{Hk}_s{S}_d{D}".format(**given)
    what = "{dtype} B={B} H={H} Hk={Hk} S={S} D={D}".format(**given)
    for option, plain in (("rows", 1), ("page_size", 0), ("layout", "bhsd")):
        if given[option] != plain:
            name += f"_{option[0]}{given[option]}"
            what += f", {option} {given[option]}"
    make: Callable[[Compiler], Contest] = lambda c: generation(c, **sizes)  # noqa: E731
    return Case(name, what, make, target, share)


def _cases() -> dict[str, Case]:
    cases = []
    for dtype in ("bf16", "fp32"):
        long = {"B": 1, "H": 32, "Hk": 8, "S": 16384, "D": 128, "dtype": dtype}
        cases.append(_case(1.5, READ_SHARE, **long))
        cases.append(_case(1.5, READ_SHARE, **long, page_size=16))
        cases.append(_case(1.5, READ_SHARE, **long, layout="bshd"))
        cases.append(_case(1.5, None, **long, rows=4))
        for B in (1, 8):
            for S in (64, 128, 512, 2048):
                cases.append(_case(1.0, None, B=B, H=12, Hk=12, S=S, D=64, dtype=dtype, read=False))
        cases.append(
            _case(1.0, None, B=1, H=12, Hk=12, S=2048, D=64, dtype=dtype, rows=512, read=False)
        )
    return {case.name: case for case in cases}


CASES = _cases()


def main(argv: list[str] | None = None) -> None:
    commands: argparse.ArgumentParser = parser(__doc__)
    run(CASES, commands.parse_args(argv))


if __name__ == "__main__":
    main()
