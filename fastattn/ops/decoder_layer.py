"""A transformer decoder layer over a KV cache, of a few new tokens, as one op of the CPU.

For one token the framework's time between the parts of a layer is longer than the parts; see
csrc/bindings/decoder_layer.cpp. There is no backward, and no check that names an argument: a swap
calls it where it has looked at everything, and the parts themselves everywhere else. It computes
what ``attention_with_kv_cache`` and ``layernorm_ffn`` compute, by the same kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops._eager import below_autograd
from fastattn.ops._fakes import register_fake
from fastattn.ops.layernorm_op import ACTIVATIONS, NORMS, lib

lib.define(
    "decoder_layer(Tensor x, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, "
    "Tensor? mask, Tensor? cos, Tensor? sin, Tensor wq, Tensor? bq, Tensor? wk, Tensor? bk, "
    "Tensor? wv, Tensor? bv, Tensor wo, Tensor? bo, Tensor? norm1_weight, Tensor? norm1_bias, "
    "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate, Tensor? b_gate, "
    "Tensor? norm2_weight, Tensor? norm2_bias, int heads, float scale, int norm, float eps1, "
    "float eps2, int act, bool by_columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_op = torch.ops.fastattn.decoder_layer.default


class DecoderWeights(NamedTuple):
    """In the schema's order. E features, F hidden ones, D a head's; (out, in) as nn.Linear stores
    them, or all (in, out).

    Attributes:
        wq, wk, wv: (H D, E), (Hk D, E), (Hk D, E); or wq is all three, one under the other, and the
            others None. Biases likewise.
        wo: (E, H D).
        w1: (F, E). w2: (E, F). w_gate: (F, E), of a gated block.
    """

    wq: Tensor
    bq: Tensor | None
    wk: Tensor | None
    bk: Tensor | None
    wv: Tensor | None
    bv: Tensor | None
    wo: Tensor
    bo: Tensor | None
    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None


def decoder_layer(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    weights: DecoderWeights,
    *,
    heads: int,
    scale: float,
    activation: str,
    eps: tuple[float, float],
    norm: str = "layer",
    mask: Tensor | None = None,
    rotary: tuple[Tensor | None, Tensor | None] = (None, None),
    by_columns: bool = False,
) -> Tensor:
    """One pre-norm layer, without dropout; only where ``encoder_layer.serves`` says so.

    Args:
        x: (B, n, E), the new rows, of the weights' dtype.
        k_cache, v_cache: (B, Hk, S, D) with room for n rows behind cache_lens[b]; written there.
        cache_lens: (B,) int32 or int64.
        norm: "layer" or "rms", both norms; eps: theirs.
        mask: bool, broadcastable to (B, heads, n, S), True = takes part. It says everything:
            without one a row sees the keys up to its own.
        rotary: cos and sin of the new rows, (B or 1, n, R), the second half of a row as the first.
        by_columns: the weights are (in, out).

    Returns:
        (B, n, E) in x's dtype.
    """
    args: tuple[Any, ...] = (
        x, k_cache, v_cache, cache_lens, mask, *rotary, *weights, heads, scale, NORMS[norm], *eps,
        ACTIVATIONS[activation], by_columns,
    )  # fmt: skip
    y: Tensor = below_autograd(_op, args)
    # Whoever saved a cache for a backward is told that it has changed.
    torch.autograd.graph.increment_version((k_cache, v_cache))
    return y


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


register_fake("fastattn::decoder_layer", _fake, lib=lib)
