"""The oracle of every op: the naive formula in plain PyTorch, in the caller's dtype.

Nothing here is fast, but every step is a line that can be compared with the equations.  All of it
is differentiable by plain autograd (twice too), runs on any device and under ``FakeTensorMode`` and
``vmap``, and reads no value back from the device.  float64 inputs are computed in float64
throughout.
"""

from fastattn.reference.attention import attention, attention_varlen
from fastattn.reference.attention_kv_cache import attention_with_kv_cache
from fastattn.reference.dropout import (
    draw_seed,
    dropout_keep,
    philox_4x32,
    philox_uniform_u32,
)
from fastattn.reference.embedding import embedding, sinusoidal_positions
from fastattn.reference.gru import gru, gru_cell
from fastattn.reference.layernorm_ffn import (
    add_layer_norm,
    bias_act,
    layer_norm,
    layernorm_ffn,
    rms_norm,
)
from fastattn.reference.linear_cross_entropy import linear_cross_entropy
from fastattn.reference.lstm import lstm, lstm_cell
from fastattn.reference.rnn import rnn, rnn_cell

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "bias_act",
    "draw_seed",
    "dropout_keep",
    "embedding",
    "gru",
    "gru_cell",
    "layer_norm",
    "layernorm_ffn",
    "linear_cross_entropy",
    "lstm",
    "lstm_cell",
    "philox_4x32",
    "philox_uniform_u32",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "sinusoidal_positions",
]
