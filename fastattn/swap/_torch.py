"""Swapping ``torch.nn.MultiheadAttention``: alone and inside torch's encoder and decoder layers.

A module is swapped by changing its class and nothing else: parameters, hooks, flags, its identity
and every reference to it stay.  Undo information lives in the module's ``__dict__`` under
``UNDO``, so it follows ``copy.deepcopy`` and ``pickle`` and any part of a model can be unswapped.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.nn import MultiheadAttention

UNDO = "_fastattn_undo"

FUSED = "fastattn.nn.MultiheadAttention"


@dataclass(frozen=True)
class ClassUndo:
    """The class and the ``backend`` attribute to take away again."""

    former: type[torch.nn.Module]

    def __call__(self, module: torch.nn.Module) -> None:
        module.__class__ = self.former
        module.__dict__.pop("backend", None)


@dataclass(frozen=True)
class FastPathUndo:
    """``TransformerEncoderLayer.activation_relu_or_gelu`` as it was."""

    activation_relu_or_gelu: int

    def __call__(self, module: torch.nn.Module) -> None:
        module.activation_relu_or_gelu = self.activation_relu_or_gelu  # type: ignore[assignment]


def _rebuild(former: Any) -> Any:
    cls = _fused_class(former)
    return cls.__new__(cls)


def _reduce_ex(self: torch.nn.Module, protocol: int) -> tuple[Any, ...]:
    return _rebuild, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _fused_class(former: Any) -> Any:
    """The fused class of ``former``: ours for torch's own, else ours mixed into the subclass.

    A subclass that keeps torch's forward keeps everything else that it defines.  Its mixed class
    is made at run time, so pickle rebuilds it from the subclass.
    """
    if former is torch.nn.MultiheadAttention:
        return MultiheadAttention
    members = {"__module__": former.__module__, "__reduce_ex__": _reduce_ex}
    return type(former.__name__, (MultiheadAttention, former), members)


def why_not(module: torch.nn.MultiheadAttention) -> str | None:
    """None if the module can be swapped, else the reason."""
    if type(module).forward is not torch.nn.MultiheadAttention.forward:
        return "a subclass of torch.nn.MultiheadAttention with a forward of its own"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    return None


def swap_module(module: torch.nn.MultiheadAttention, backend: str) -> None:
    """Make ``module`` fused in place."""
    former: Any = type(module)  # Any: mypy takes no class of modules for hashable
    module.__class__ = _fused_class(former)
    if backend != "auto":
        module.__dict__["backend"] = backend
    module.__dict__[UNDO] = ClassUndo(former)


def close_fast_path(layer: torch.nn.TransformerEncoderLayer) -> bool:
    """Make torch's encoder layer call its attention in eval mode too; True if it did not before.

    In inference the layer sends its parameters to ``torch._transformer_encoder_layer_fwd``
    instead of calling ``self_attn``.  ``activation_relu_or_gelu`` serves only the conditions of
    that shortcut (0 = the activation is neither), so clearing it closes the shortcut on every
    torch version and in subclasses, and changes nothing else.  ``torch.nn.TransformerEncoder``
    may still turn padding into a nested tensor; our module serves it as a packed batch.
    """
    if UNDO in layer.__dict__ or not getattr(layer, "activation_relu_or_gelu", 0):
        return False
    layer.__dict__[UNDO] = FastPathUndo(layer.activation_relu_or_gelu)
    layer.activation_relu_or_gelu = 0
    return True
