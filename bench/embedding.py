"""Rows of embedding: three tables summed and normed, as BERT's input is.

The baseline is F.embedding three times, the sum and F.layer_norm. Gradients of the tables are dense
in both: V N items each, which bounds the backward.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.harness import DTYPES, Case, Contest, Setting, compiled, step


def bert(setting: Setting, B: int, S: int, N: int, V: int, dtype: str, train: bool) -> Contest:
    """ids (B, S); tables (V, N), (512, N), (2, N)."""
    t = DTYPES[dtype]
    ids, segments = torch.randint(V, (B, S)), torch.zeros((B, S), dtype=torch.int64)
    positions = torch.arange(S).expand(B, S).contiguous()
    leaves = [torch.randn(n, N).to(t) for n in (V, 512, 2)] + [torch.randn(N).to(t) for _ in "gb"]
    for x in leaves:
        x.requires_grad_(train)
    do = [torch.randn(B, S, N).to(t)]

    def stock(words: Tensor, places: Tensor, kinds: Tensor, g: Tensor, b: Tensor) -> Tensor:
        s = F.embedding(ids, words) + F.embedding(segments, kinds) + F.embedding(positions, places)
        return F.layer_norm(s, (N,), g, b)

    def fused(words: Tensor, places: Tensor, kinds: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return fastattn.embedding(
            ids, words, positions=positions, position_weight=places, segments=segments,
            segment_weight=kinds, norm="layer", norm_weight=g, norm_bias=b,
            backend=setting.backend,
        )  # fmt: skip

    others = {"torch.compile": step(compiled(stock), leaves, do, train)} if setting.peers else {}
    # Read a row of the words, write the result; back, read dy and write the tables.
    moved = 2 * B * S * N + (B * S * N + (V + 514) * N if train else 0)
    return Contest(
        step(stock, leaves, do, train), step(fused, leaves, do, train), others,
        bytes=float(moved * t.itemsize),
    )  # fmt: skip


CASES: dict[str, Case] = {
    case.name: case
    for dtype in ("fp32", "bf16")
    for train in (False, True)
    for case in [
        Case(
            f"{dtype}_{'train' if train else 'fwd'}_bert",
            f"words + positions + segments, norm, B=8 S=128 N=384 V=30522, {dtype} "
            f"{'fwd+bwd' if train else 'fwd'}",
            dtype, partial(bert, B=8, S=128, N=384, V=30522, dtype=dtype, train=train),
            roof="copy", tag="beside",
        )
    ]
}  # fmt: skip
