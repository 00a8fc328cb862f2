"""The budget's rows of attention over a KV cache; see budget.py. Every call has the append and
rotary, which the usual one has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kv_cache_tools import make, table

from .calls import tiles_of
from .launches import Launch, recorded

# "decode": one row, contiguous; "paged": by pages of 16; "many rows": a short prompt of 20 rows on
# a cache, whose append is a launch of its own; "cache everything": all that costs registers at
# once, on pages of 256; "many everything": the same of 8 rows, the most of the other tier that the
# kernel itself appends.
_MOST = ("decode", "many rows", "cache everything", "many everything")
FEATURES = {"bf16": (*_MOST, "paged"), "fp16": _MOST[:2], "fp32": _MOST}
_ROWS = {"many rows": 20, "many everything": 8}


def launches(arch: str, dtype: torch.dtype, head_dim: int, feature: str) -> Iterator[Launch]:
    """The launches of a call; nothing runs. Append and merge have no tile but of a head dim: the
    widest stands for all, and "decode" for every merge."""
    torch.manual_seed(0)
    everything = "everything" in feature
    call = make(
        (500, 30), h=8, sq=_ROWS.get(feature, 1), d=head_dim, capacity=4096,
        page_size=16 if feature == "paged" else 256 * everything, dtype=dtype,
        rotary=table(4096, head_dim // 2),
    )  # fmt: skip
    if everything:
        call.options |= {
            "window": (1000, 5), "causal": False, "softcap": 20.0, "sinks": torch.randn(8),
            "alibi_slopes": torch.rand(8), "mask": torch.rand(2, 1, 1, 4096) < 0.9,
            "rotary_interleaved": True,
        }  # fmt: skip
    with tiles_of(arch), recorded() as found:
        call.run("triton")
    of_dim = {"merge_kernel": feature == "decode", "append_kernel": True}
    yield from [x for x in found if x.name not in of_dim or (of_dim[x.name] and head_dim == 256)]
