"""Nested tensors, both layouts, as the packed ``(T, E)`` form of ``attention_varlen`` and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A nested ``(B, *, E)`` tensor as one buffer.

    ``values`` is ``(T, E)``, ``cu_seqlens`` ``(B + 1,)`` on its device, ``max_len`` the longest
    sequence (None where asking a jagged tensor for it would read the device), ``source`` the
    nested tensor it came from.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_len: int | None
    source: Any


def pack(x: Any, name: str) -> Packed:
    """View a nested tensor as one buffer; only a non-contiguous strided one is copied.

    Raises:
        ValueError: ``x`` is not ``(B, ragged, E)``, or is jagged with holes or along another dim.
    """
    if x.dim() != 3:
        raise ValueError(
            f"MultiheadAttention: nested {name} must be (B, ragged, E), got {x.dim()}-D"
        )
    if x.layout is torch.jagged:
        # The ragged dim and the lengths of a tensor with holes have no public accessor.
        if getattr(x, "_ragged_idx", 1) != 1 or getattr(x, "_lengths", None) is not None:
            raise ValueError(
                f"MultiheadAttention: jagged {name} must be ragged in dim 1 and have no holes; "
                "rebuild it with torch.nested.nested_tensor_from_jagged(values, offsets)"
            )
        return Packed(x.values(), x.offsets(), getattr(x, "_maybe_max_seqlen", None), x)
    x = x.contiguous()
    sizes = x._nested_tensor_size()  # (B, 2), always on the CPU: no device is read
    lengths = sizes[:, 0]
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(x.device, non_blocking=True)
    max_len = int(lengths.max()) if lengths.numel() else 0
    return Packed(x.values().view(-1, x.size(-1)), cu_seqlens, max_len, x)


def unpack(values: Tensor, like: Packed) -> Tensor:
    """The nested tensor of ``like``'s layout and lengths that ``values`` ``(T, E)`` makes up."""
    source = like.source
    if source.layout is torch.jagged:
        return torch.nested.nested_tensor_from_jagged(
            values, source.offsets(), max_seqlen=like.max_len
        )
    width = values.shape[-1]
    sizes = source._nested_tensor_size().clone()
    sizes[:, 1] = width
    strides = torch.ones_like(sizes)
    strides[:, 0] = width
    offsets = F.pad(sizes[:, 0].cumsum(0) * width, (1, 0))[:-1]
    return torch._nested_view_from_buffer(values.contiguous().view(-1), sizes, strides, offsets)
