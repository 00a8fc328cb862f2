"""``fastattn.nn.LayerNorm`` and ``RMSNorm``: torch's modules on the fused ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.ops.layernorm import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalisation with the interface of :class:`torch.nn.LayerNorm`.

    Signature, initialisation and ``state_dict`` are torch's. Statistics are fp32 for every dtype,
    and the backward is bitwise repeatable whatever the thread count.

    Args:
        normalized_shape: the last dimensions of the input.
        eps: added to the variance. Default 1e-5.
        elementwise_affine: learn weight and bias. Default True. bias: learn a bias. Default True.
        device, dtype: of the parameters; fp32 parameters may serve a 16-bit input.
        backend: keyword only; see :func:`fastattn.layer_norm`.

    >>> import torch, fastattn
    >>> fastattn.nn.LayerNorm(64)(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    backend: str = "auto"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        if isinstance(input, Tensor) and input.is_nested:
            return super().forward(input)
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, backend=self.backend
        )


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square normalisation with the interface of :class:`torch.nn.RMSNorm`.

    Args:
        normalized_shape: the last dimensions of the input.
        eps: added to the mean square. Default: ``torch.finfo(input.dtype).eps``, as torch.
        elementwise_affine: learn a weight. Default True.
        device, dtype: of the weight; an fp32 weight may serve a 16-bit input.
        backend: keyword only; see :func:`fastattn.rms_norm`.

    >>> import torch, fastattn
    >>> fastattn.nn.RMSNorm(64)(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    backend: str = "auto"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.is_nested:
            return super().forward(x)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, backend=self.backend)


__all__ = ["LayerNorm", "RMSNorm"]
