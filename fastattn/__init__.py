"""fastattn: fused attention, LayerNorm + FFN, LSTM and GRU for PyTorch, one contract on every
backend.

>>> import torch, fastattn
>>> q, k, v = (torch.randn(1, 4, 16, 32) for _ in range(3))
>>> fastattn.attention(q, k, v, causal=True).shape
torch.Size([1, 4, 16, 32])
"""

from fastattn import _program

__version__ = "0.1.0"

if not _program.starting():
    from fastattn import nn, reference
    from fastattn._debug import debug_checks
    from fastattn.backends import backends
    from fastattn.ops.attention import attention, attention_varlen
    from fastattn.ops.attention_kv_cache import attention_with_kv_cache
    from fastattn.ops.embedding import embedding
    from fastattn.ops.gru import gru, gru_cell
    from fastattn.ops.layernorm import add_layer_norm, bias_act, layer_norm, rms_norm
    from fastattn.ops.layernorm_ffn import layernorm_ffn
    from fastattn.ops.linear_cross_entropy import linear_cross_entropy
    from fastattn.ops.lstm import lstm, lstm_cell
    from fastattn.ops.rnn import rnn, rnn_cell
    from fastattn.swap import SwapReport, swap, unswap
    from fastattn.tune import TuneReport, tune

__all__ = [
    "SwapReport",
    "TuneReport",
    "add_layer_norm",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "backends",
    "bias_act",
    "debug_checks",
    "embedding",
    "gru",
    "gru_cell",
    "layer_norm",
    "layernorm_ffn",
    "linear_cross_entropy",
    "lstm",
    "lstm_cell",
    "nn",
    "reference",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "swap",
    "tune",
    "unswap",
]
