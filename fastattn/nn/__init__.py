"""Drop-in modules on fastattn's ops: torch's signatures, defaults and state_dict."""

from fastattn.nn.embedding import Embedding
from fastattn.nn.gru import GRU, GRUCell
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.layer_norm import LayerNorm, RMSNorm
from fastattn.nn.layernorm_ffn import LayerNormFFN
from fastattn.nn.lstm import LSTM, LSTMCell
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.rnn import RNN, RNNCell
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Embedding",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "LayerNorm",
    "LayerNormFFN",
    "MultiheadAttention",
    "RMSNorm",
    "RNNCell",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
