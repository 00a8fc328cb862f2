"""Drop-in modules on fastattn's ops: torch's signatures, defaults and state_dict."""

from fastattn.nn.multihead_attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
