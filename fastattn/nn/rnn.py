"""``fastattn.nn.RNN`` and ``RNNCell``: torch's modules on the fused recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.nn._recurrent import CELL_WEIGHTS, Layers, weights_of
from fastattn.ops.rnn import rnn, rnn_cell


class RNN(Layers, torch.nn.RNN):
    """Elman's recurrent network with the interface of :class:`torch.nn.RNN`.

    Signature, initialisation (the same seed gives the same parameters), ``state_dict``, dropout
    between layers (the same seed gives the same masks) and packed sequences are torch's.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
            bidirectional, device, dtype: as in torch.
        recurrent_dropout: keyword only; probability in [0, 1) with which a feature of h is dropped
            where it enters W_hh h, in all steps of a call alike. Default 0.
        backend: keyword only; see :func:`fastattn.rnn`.

    Differences from torch: ``lengths`` of a padded batch (see :meth:`forward`), an empty sequence
    (T = 0) gives the initial state, backward in eval mode and double backward work everywhere,
    and errors are TypeError and ValueError. The backward needs the output as it was, so changing it
    in place (``F.relu(y, inplace=True)``) is an error in the backward, as of torch's LSTM.

    >>> import torch, fastattn
    >>> rnn = fastattn.nn.RNN(5, 8, num_layers=2, bidirectional=True)
    >>> y, h_n = rnn(torch.randn(7, 3, 5), lengths=torch.tensor([4, 7, 0]))
    >>> y.shape, h_n.shape
    (torch.Size([7, 3, 16]), torch.Size([4, 3, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        torch.nn.RNN.__init__(
            self, input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
            bidirectional, device=device, dtype=dtype,
        )  # fmt: skip
        self._adopt(recurrent_dropout, backend)

    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002  torch's name
        hx: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, Tensor]:
        """Arguments and result are torch's; lengths: (B,), the steps of each sequence of a padded
        batch, in any order; see :func:`fastattn.rnn`."""
        return self._run(rnn, input, hx, lengths, nonlinearity=self.nonlinearity)  # type: ignore[no-any-return]


class RNNCell(torch.nn.RNNCell):
    """One step of Elman's network with the interface of :class:`torch.nn.RNNCell`.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as in torch.
        backend: keyword only; see :func:`fastattn.rnn_cell`.

    >>> import torch, fastattn
    >>> h = fastattn.nn.RNNCell(5, 8)(torch.randn(3, 5))
    >>> h.shape
    torch.Size([3, 8])
    """

    backend: str = "auto"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)
        self.backend = backend

    def forward(
        self,
        input: Tensor,  # noqa: A002  torch's name
        hx: Tensor | None = None,
    ) -> Tensor:
        weights: Any = weights_of(self, CELL_WEIGHTS)
        return rnn_cell(input, hx, *weights, nonlinearity=self.nonlinearity, backend=self.backend)


__all__ = ["RNN", "RNNCell"]
