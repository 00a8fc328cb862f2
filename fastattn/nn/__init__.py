"""Drop-in modules on fastattn's ops: torch's signatures, defaults and state_dict."""

from fastattn.nn.embedding import Embedding
from fastattn.nn.layer_norm import LayerNorm, RMSNorm
from fastattn.nn.layernorm_ffn import LayerNormFFN
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "Embedding",
    "LayerNorm",
    "LayerNormFFN",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
