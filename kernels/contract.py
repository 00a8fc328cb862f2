"""What an op and its kernels agree upon, for every backend: codes, and results in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# attention_bwd computes only what this bit set asks for; the other results are empty.
NEED_DQ, NEED_DK, NEED_DV, NEED_DBIAS, NEED_DSINKS = 1, 2, 4, 8, 16
WEIGHTS_NONE, WEIGHTS_FULL, WEIGHTS_MEAN = 0, 1, 2


def empty_as(x: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """Memory order of every result: x's own where x is contiguous, else (B, S, H, D) memory,
    which is what a model that made heads by ``view(B, S, H, D).transpose(1, 2)`` reads next."""
    if x.dim() == 3 or x.is_contiguous():
        return x.new_empty(shape)
    b, h, s, d = shape
    return x.new_empty((b, s, h, d)).transpose(1, 2)
