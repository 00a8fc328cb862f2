"""One recurrent layer on a backend: the product of its inputs, then the recurrence."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.reference import recurrent as reference


def layer(
    x: Tensor,
    weights: Sequence[reference.Weights],
    h0: Tensor,
    c0: Tensor | None,
    h_mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    T: int,
    cell: int,
    reverse: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.layer(x, weights, h0, c0, h_mask, offsets, lengths, T, cell, reverse)
