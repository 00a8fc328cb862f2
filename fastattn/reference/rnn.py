"""The oracle of ``fastattn.rnn`` and ``rnn_cell``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.reference.recurrent import RNN_RELU, RNN_TANH, cell_step, stack

__all__ = ["rnn", "rnn_cell"]


def rnn(
    x: Tensor | PackedSequence,
    state: Tensor | None,
    weights: Sequence[Any],
    *,
    nonlinearity: str = "tanh",
    **options: Any,
) -> tuple[Any, Tensor]:
    """``output, h_n``; arguments as :func:`fastattn.rnn`, without ``backend``.

    >>> import torch
    >>> w = [(torch.randn(4, 3), torch.randn(4, 4))]
    >>> rnn(torch.randn(5, 2, 3), None, w, nonlinearity="relu")[0].shape
    torch.Size([5, 2, 4])
    """
    cell = RNN_TANH if nonlinearity == "tanh" else RNN_RELU
    return stack(x, state, None, weights, cell, **options)[:2]


def rnn_cell(
    x: Tensor,
    state: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """``h`` after one step; see :func:`fastattn.rnn_cell`."""
    cell = RNN_TANH if nonlinearity == "tanh" else RNN_RELU
    return cell_step(x, state, None, (w_ih, w_hh, b_ih, b_hh), cell)[0]
