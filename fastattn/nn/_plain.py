"""Whether calling a module does what its class does, and nothing else: what may be fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules.module import _has_any_global_hook

from fastattn.nn.layer_norm import LayerNorm
from fastattn.ops.layernorm import Activation

_FUNCTIONS: dict[Any, Activation] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
}
_TRANSFORMERS: dict[str, Activation] = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
    "SiLUActivation": "silu",
}


def anyone_hooks_all() -> bool:
    """Whether a hook of all modules is registered."""
    return bool(_has_any_global_hook())


def hooked(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def plain(module: Any, *classes: type[torch.nn.Module]) -> bool:
    """A class of these, no hooks on it, no forward of its own (as accelerate sets one)."""
    return type(module) in classes and not hooked(module) and "forward" not in module.__dict__


def norm_is_plain(module: Any) -> bool:
    return plain(module, torch.nn.LayerNorm, LayerNorm)


def activation_name(activation: Any) -> Activation | None:
    """The op's name of a callable, None where it has none."""
    if isinstance(activation, torch.nn.Module):
        cls: Any = type(activation)
        if not plain(activation, cls):
            return None
        if cls is torch.nn.GELU:
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
        if cls.__module__ == "transformers.activations":
            return _TRANSFORMERS.get(cls.__name__)
        return {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu"}.get(cls)  # type: ignore[return-value]
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # a callable without a hash
        return None


def drop_probability(dropout: Any) -> float:
    return float(dropout.p) if dropout.training else 0.0
