"""fastattn: fused attention for PyTorch, one contract on every backend.

>>> import torch, fastattn
>>> q, k, v = (torch.randn(1, 4, 16, 32) for _ in range(3))
>>> fastattn.attention(q, k, v, causal=True).shape
torch.Size([1, 4, 16, 32])
"""

from fastattn import nn, reference
from fastattn._debug import debug_checks
from fastattn.backends import backends
from fastattn.ops.attention import attention, attention_varlen
from fastattn.swap import SwapReport, swap, unswap

__version__ = "0.1.0"

__all__ = [
    "SwapReport",
    "attention",
    "attention_varlen",
    "backends",
    "debug_checks",
    "nn",
    "reference",
    "swap",
    "unswap",
]
