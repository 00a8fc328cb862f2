"""fastattn: fused attention and LayerNorm + FFN for PyTorch, one contract on every backend.

>>> import torch, fastattn
>>> q, k, v = (torch.randn(1, 4, 16, 32) for _ in range(3))
>>> fastattn.attention(q, k, v, causal=True).shape
torch.Size([1, 4, 16, 32])
"""

from fastattn import nn, reference
from fastattn._debug import debug_checks
from fastattn.backends import backends
from fastattn.ops.attention import attention, attention_varlen
from fastattn.ops.embedding import embedding
from fastattn.ops.layernorm import add_layer_norm, bias_act, layer_norm, rms_norm
from fastattn.ops.layernorm_ffn import layernorm_ffn
from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.swap import SwapReport, swap, unswap

__version__ = "0.1.0"

__all__ = [
    "SwapReport",
    "add_layer_norm",
    "attention",
    "attention_varlen",
    "backends",
    "bias_act",
    "debug_checks",
    "embedding",
    "layer_norm",
    "layernorm_ffn",
    "linear_cross_entropy",
    "nn",
    "reference",
    "rms_norm",
    "swap",
    "unswap",
]
