"""``embedding``: rows of up to three tables, their sum, norm and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.reference.layernorm_ffn import OUTPUT_SITE, _norm, dropout

__all__ = ["embedding", "sinusoidal_positions"]


def sinusoidal_positions(positions: Tensor, columns: int) -> Tensor:
    """``sin(p / 10000^(2i / N))`` in even columns, ``cos`` of the same in odd ones; float32.

    "Attention is all you need", Vaswani et al., 1706.03762, section 3.5.

    >>> import torch
    >>> sinusoidal_positions(torch.arange(2), 4).shape
    torch.Size([2, 4])
    """
    i = torch.arange(0, columns, 2, device=positions.device, dtype=torch.float64)
    angle = positions[..., None].double() * torch.exp2(i * (-13.287712379549449 / columns))
    table = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
    return table[..., :columns].float()


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    positions: Tensor | None = None,
    position_weight: Tensor | str | None = None,
    position_offset: int = 0,
    segments: Tensor | None = None,
    segment_weight: Tensor | None = None,
    scale: float = 1.0,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """``s = scale * weight[ids] + position_weight[positions] + segment_weight[segments]``,
    ``dropout(norm(s))``; see :func:`fastattn.embedding`.

    >>> import torch
    >>> embedding(torch.tensor([1, 2]), torch.randn(5, 8), position_weight=torch.randn(9, 8)).shape
    torch.Size([2, 8])
    """
    s = F.embedding(ids, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    if scale != 1.0:
        s = s * scale
    if position_weight is not None:
        if positions is None:
            positions = torch.arange(ids.shape[-1], device=ids.device) + position_offset
        if isinstance(position_weight, str):
            s = (s + sinusoidal_positions(positions, weight.shape[1])).to(weight.dtype)
        else:
            s = s + F.embedding(positions, position_weight, position_padding_idx)
    if segment_weight is not None:
        segments = torch.zeros_like(ids) if segments is None else segments
        s = s + F.embedding(segments, segment_weight)
    s = s.to(weight.dtype)
    return dropout(_norm(s, norm, norm_weight, norm_bias, eps), dropout_p, seed, OUTPUT_SITE)
