"""``fastattn.nn.GRU`` and ``GRUCell``: torch's modules on the fused recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.nn._recurrent import CELL_WEIGHTS, Layers, weights_of
from fastattn.ops.gru import gru, gru_cell


class GRU(Layers, torch.nn.GRU):
    """Gated recurrent units with the interface of :class:`torch.nn.GRU`.

    Signature, initialisation (the same seed gives the same parameters), ``state_dict``, dropout
    between layers (the same seed gives the same masks) and packed sequences are torch's.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as in torch.
        recurrent_dropout: keyword only; probability in [0, 1) with which a feature of h is dropped
            where it enters W_hh h, in all steps of a call alike. Default 0.
        backend: keyword only; see :func:`fastattn.gru`.

    Differences from torch: ``lengths`` of a padded batch (see :meth:`forward`), an empty sequence
    (T = 0) gives the initial state, backward in eval mode and double backward work everywhere,
    and errors are TypeError and ValueError. The backward needs the output as it was, so changing it
    in place (``F.relu(y, inplace=True)``) is an error in the backward, as of torch's LSTM.

    >>> import torch, fastattn
    >>> gru = fastattn.nn.GRU(5, 8, num_layers=2, bidirectional=True)
    >>> y, h_n = gru(torch.randn(7, 3, 5), lengths=torch.tensor([4, 7, 0]))
    >>> y.shape, h_n.shape
    (torch.Size([7, 3, 16]), torch.Size([4, 3, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
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
        torch.nn.GRU.__init__(
            self, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._adopt(recurrent_dropout, backend)

    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002  torch's name
        hx: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, Tensor]:
        """Arguments and result are torch's; lengths: (B,), the steps of each sequence of a padded
        batch, in any order; see :func:`fastattn.gru`."""
        return self._run(gru, input, hx, lengths)  # type: ignore[no-any-return]


class GRUCell(torch.nn.GRUCell):
    """One step of a GRU with the interface of :class:`torch.nn.GRUCell`.

    Args:
        input_size, hidden_size, bias, device, dtype: as in torch.
        backend: keyword only; see :func:`fastattn.gru_cell`.

    >>> import torch, fastattn
    >>> h = fastattn.nn.GRUCell(5, 8)(torch.randn(3, 5))
    >>> h.shape
    torch.Size([3, 8])
    """

    backend: str = "auto"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.backend = backend

    def forward(
        self,
        input: Tensor,  # noqa: A002  torch's name
        hx: Tensor | None = None,
    ) -> Tensor:
        weights: Any = weights_of(self, CELL_WEIGHTS)
        return gru_cell(input, hx, *weights, backend=self.backend)


__all__ = ["GRU", "GRUCell"]
