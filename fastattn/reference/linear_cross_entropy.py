"""``linear_cross_entropy``: the logits as a whole, then F.cross_entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """``F.cross_entropy(F.linear(x, weight, bias), target)``; see
    :func:`fastattn.linear_cross_entropy`.

    >>> import torch
    >>> x, w = torch.randn(3, 8), torch.randn(20, 8)
    >>> linear_cross_entropy(x, w, torch.tensor([1, -100, 4])).shape
    torch.Size([])
    """
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    wide = torch.promote_types(torch.float32, logits.dtype)
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).to(wide), target.flatten(), ignore_index=ignore_index,
        label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip
    return loss.view(target.shape) if reduction == "none" else loss
