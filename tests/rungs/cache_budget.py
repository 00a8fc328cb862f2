"""The budget's rows of attention over a KV cache; see budget.py. Every call has the append and
rotary, which the usual one has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kv_cache_tools import make, table

from .calls import tiles_of
from .launches import Launch, recorded

# "decode": one row, contiguous; "paged": by pages of 16; "many rows": a short prompt of 20 rows on
# a cache; "cache everything": all that costs registers at once, on pages of 256.
FEATURES = ("decode", "paged", "many rows", "cache everything")


def launches(arch: str, dtype: torch.dtype, head_dim: int, feature: str) -> Iterator[Launch]:
    """The launches of a call; nothing runs."""
    torch.manual_seed(0)
    call = make(
        (500, 30), h=8, sq=20 if feature == "many rows" else 1, d=head_dim, capacity=4096,
        page_size={"paged": 16, "cache everything": 256}.get(feature, 0), dtype=dtype,
        rotary=table(4096, head_dim // 2),
    )  # fmt: skip
    if feature == "cache everything":
        call.options |= {
            "window": (1000, 5), "causal": False, "softcap": 20.0, "sinks": torch.randn(8),
            "alibi_slopes": torch.rand(8), "mask": torch.rand(2, 1, 1, 4096) < 0.9,
            "rotary_interleaved": True,
        }  # fmt: skip
    with tiles_of(arch), recorded() as found:
        call.run("triton")
    yield from found
