"""``fastattn.nn.Embedding``: torch's module on the fused op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.embedding import embedding


class Embedding(torch.nn.Embedding):
    """A table of vectors, with the interface of :class:`torch.nn.Embedding`.

    Signature, initialisation and ``state_dict`` are torch's. The gradient of the table is summed in
    fp32 whatever the dtype, and is bitwise repeatable whatever the thread count. ``sparse=True``
    has a gradient of another layout and goes to ``F.embedding``, as do nested ids; ``max_norm``
    renormalises the rows in place first, by torch's own function.

    For the sum of several tables with norm and dropout see :func:`fastattn.embedding`.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            _weight, _freeze, device, dtype: as in torch.
        backend: keyword only; see :func:`fastattn.embedding`.

    Difference from torch: ids outside the table raise an IndexError that names them.

    >>> import torch, fastattn
    >>> table = fastattn.nn.Embedding(10, 4, padding_idx=0)
    >>> table(torch.tensor([[1, 2, 0]])).shape
    torch.Size([1, 3, 4])
    """

    backend: str = "auto"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
            sparse, _weight, _freeze, device, dtype,
        )  # fmt: skip
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        nested = isinstance(input, Tensor) and input.is_nested
        if self.sparse or nested or not self.embedding_dim:
            return super().forward(input)
        if self.max_norm is not None:
            # As F.embedding does it: in place, outside of autograd.
            torch.embedding_renorm_(
                self.weight.detach(), input.contiguous(), self.max_norm, self.norm_type
            )
        return embedding(
            input, self.weight, padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq, backend=self.backend,
        )  # fmt: skip


__all__ = ["Embedding"]
