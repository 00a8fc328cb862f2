"""The oracle of ``fastattn.lstm`` and ``lstm_cell``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.reference.recurrent import LSTM, cell_step, stack

__all__ = ["lstm", "lstm_cell"]


def lstm(
    x: Tensor | PackedSequence,
    state: tuple[Tensor, Tensor] | None,
    weights: Sequence[Any],
    **options: Any,
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """``output, (h_n, c_n)``; arguments as :func:`fastattn.lstm`, without ``backend``.

    >>> import torch
    >>> w = [(torch.randn(16, 3), torch.randn(16, 4))]
    >>> lstm(torch.randn(5, 2, 3), None, w, lengths=torch.tensor([2, 5]))[0].shape
    torch.Size([5, 2, 4])
    """
    h0, c0 = (None, None) if state is None else state
    y, h_n, c_n = stack(x, h0, c0, weights, LSTM, **options)
    return y, (h_n, c_n)


def lstm_cell(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``h, c`` after one step; see :func:`fastattn.lstm_cell`."""
    h, c = (None, None) if state is None else state
    return cell_step(x, h, c, (w_ih, w_hh, b_ih, b_hh), LSTM)
