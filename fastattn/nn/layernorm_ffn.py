"""``fastattn.nn.LayerNormFFN``: the feed-forward block of a transformer as one module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastattn.nn.layer_norm import LayerNorm, RMSNorm
from fastattn.ops import layernorm_checks as check
from fastattn.ops.layernorm import ACTIVATIONS, Activation, NormName
from fastattn.ops.layernorm_ffn import layernorm_ffn
from fastattn.ops.layernorm_ffn_op import RECOMPUTE


class LayerNormFFN(torch.nn.Module):
    """Norm, Linear, activation, Linear, dropout and residual as one op.

    ``x + dropout(linear2(hidden_dropout(act(linear1(norm(x))))))``, with ``pre_norm=False``
    ``norm(x + dropout(linear2(...)))``; see :func:`fastattn.layernorm_ffn`. Initialisation is that
    of torch's Linear and LayerNorm.

    Args:
        d_model: D, features. dim_feedforward: F, hidden features.
        dropout: of the result, in training only. hidden_dropout: of the hidden layer; default: as
            ``dropout``.
        activation: "gelu" (erf), "gelu_tanh", "relu", "relu2", "silu".
        gated: a third projection, ``gate``; hidden = act(gate(x)) * linear1(x).
        norm: "layer", "rms" or None.
        pre_norm, residual: see above. Default True.
        bias: of the projections and of a layer norm. Default True.
        eps: of the norm. Default 1e-5.
        recompute: what the backward computes again: "none", "activation" or "all".
        device, dtype: of the parameters.
        backend: see :func:`fastattn.layernorm_ffn`.

    >>> import torch, fastattn
    >>> ffn = fastattn.nn.LayerNormFFN(64, 256, gated=True, activation="silu", norm="rms")
    >>> ffn(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        dropout: float = 0.0,
        hidden_dropout: float | None = None,
        activation: Activation = "gelu",
        *,
        gated: bool = False,
        norm: NormName | None = "layer",
        pre_norm: bool = True,
        residual: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        recompute: Literal["none", "activation", "all"] = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check.check_choice("LayerNormFFN", "activation", activation, ACTIVATIONS)
        check.check_choice("LayerNormFFN", "recompute", recompute, RECOMPUTE)
        check.check_probability("LayerNormFFN", "dropout", dropout)
        if hidden_dropout is not None:
            check.check_probability("LayerNormFFN", "hidden_dropout", hidden_dropout)
        self.norm: LayerNorm | RMSNorm | None = None
        if norm == "layer":
            self.norm = LayerNorm(d_model, eps, bias=bias, device=device, dtype=dtype)
        elif norm == "rms":
            self.norm = RMSNorm(d_model, eps, device=device, dtype=dtype)
        elif norm is not None:
            raise ValueError(f"LayerNormFFN: norm must be 'layer', 'rms' or None, got {norm!r}")
        make = torch.nn.Linear
        self.linear1 = make(d_model, dim_feedforward, bias, device, dtype)
        self.gate = make(d_model, dim_feedforward, bias, device, dtype) if gated else None
        self.linear2 = make(dim_feedforward, d_model, bias, device, dtype)
        self.dropout = dropout
        self.hidden_dropout = dropout if hidden_dropout is None else hidden_dropout
        self.activation: Activation = activation
        self.norm_name = norm
        self.pre_norm, self.residual, self.eps = pre_norm, residual, eps
        self.recompute, self.backend = recompute, backend

    def forward(self, x: Tensor) -> Tensor:
        """``(*, D)`` to ``(*, D)``."""
        gate = self.gate
        return layernorm_ffn(
            x,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            norm=self.norm_name,
            norm_weight=None if self.norm is None else self.norm.weight,
            norm_bias=getattr(self.norm, "bias", None),
            eps=self.eps,
            activation=self.activation,
            w_gate=None if gate is None else gate.weight,
            b_gate=None if gate is None else gate.bias,
            pre_norm=self.pre_norm,
            residual=self.residual,
            dropout_p=self.dropout if self.training else 0.0,
            hidden_dropout_p=self.hidden_dropout if self.training else 0.0,
            recompute=self.recompute,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        parts = [f"activation={self.activation!r}", f"pre_norm={self.pre_norm}"]
        if self.dropout or self.hidden_dropout:
            parts.append(f"dropout={self.dropout}, hidden_dropout={self.hidden_dropout}")
        return ", ".join(parts)


__all__ = ["LayerNormFFN"]
