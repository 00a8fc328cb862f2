"""The oracle of ``fastattn.gru`` and ``gru_cell``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.reference.recurrent import GRU, cell_step, stack

__all__ = ["gru", "gru_cell"]


def gru(
    x: Tensor | PackedSequence, state: Tensor | None, weights: Sequence[Any], **options: Any
) -> tuple[Any, Tensor]:
    """``output, h_n``; arguments as :func:`fastattn.gru`, without ``backend``.

    >>> import torch
    >>> w = [(torch.randn(12, 3), torch.randn(12, 4))]
    >>> gru(torch.randn(5, 2, 3), None, w, lengths=torch.tensor([2, 5]))[0].shape
    torch.Size([5, 2, 4])
    """
    return stack(x, state, None, weights, GRU, **options)[:2]


def gru_cell(
    x: Tensor,
    state: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """``h`` after one step; see :func:`fastattn.gru_cell`."""
    return cell_step(x, state, None, (w_ih, w_hh, b_ih, b_hh), GRU)[0]
