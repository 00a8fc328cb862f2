"""Swapping torch's own modules: attention, encoder and decoder layers, norms.

Each becomes the module of ``fastattn.nn`` that is its drop-in (see ``_classes``).
``torch.nn.TransformerEncoder``, ``TransformerDecoder`` and ``Transformer`` only call their layers
and keep their class: what they do about padding and causal masks stays torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastattn.nn import (
    LayerNorm,
    MultiheadAttention,
    RMSNorm,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fastattn.swap._classes import UNDO, change_class, why_not_changed
from fastattn.swap._report import ALREADY, Replaced, Skipped, SwapReport
from fastattn.swap._select import Selection

_DROP_INS: tuple[tuple[Any, Any, str], ...] = (
    (torch.nn.MultiheadAttention, MultiheadAttention, "attention"),
    (torch.nn.TransformerEncoderLayer, TransformerEncoderLayer, "layer"),
    (torch.nn.TransformerDecoderLayer, TransformerDecoderLayer, "layer"),
    (torch.nn.LayerNorm, LayerNorm, "norm"),
    (torch.nn.RMSNorm, RMSNorm, "norm"),
)


@dataclass(frozen=True)
class FastPathUndo:
    """``TransformerEncoderLayer.activation_relu_or_gelu`` as it was."""

    activation_relu_or_gelu: int

    def __call__(self, module: torch.nn.Module) -> None:
        module.activation_relu_or_gelu = self.activation_relu_or_gelu  # type: ignore[assignment]


def why_not(module: torch.nn.Module, stock: type[torch.nn.Module]) -> str | None:
    """None if the module can be swapped, else the reason."""
    if type(module).forward is not stock.forward:
        return f"a subclass of torch.nn.{stock.__name__} with a forward of its own"
    return why_not_changed(module)


def swap_modules(
    model: torch.nn.Module, selection: Selection, owned: set[str], backend: str, report: SwapReport
) -> set[str]:
    """Swap torch's modules but those that a fused block owns; returns the names of all that is
    attention, swapped or not."""
    attention = set()
    for name, module in model.named_modules():
        row = next((r for r in _DROP_INS if isinstance(module, r[0])), None)
        if row is None or name in owned:
            continue
        stock, fused, kind = row
        if kind == "attention":
            attention.add(name)
        why = selection.why_not(name)
        if why is None and kind == "layer":
            why = _why_not_the_parts(name, module, selection)
        cls = type(module).__name__
        if why is None and isinstance(module, fused):
            if module.backend == backend:
                why = ALREADY
            else:
                module.backend = backend
        elif why is None:
            why = why_not(module, stock)
            if why is None:
                _change(module, fused, kind, backend)
        if why is None:
            report.replaced.append(Replaced(name, cls, f"fastattn.nn.{fused.__name__}", kind))
        else:
            report.skipped.append(Skipped(name, cls, why, kind))
    _close_fast_paths(model, report)
    return attention


def _change(module: Any, fused: Any, kind: str, backend: str) -> None:
    former = module.__dict__.pop(UNDO, None)
    if former is not None:  # a shortcut that an earlier swap has closed
        former(module)
    # Torch's shortcut for inference bypasses the submodules; ours has none.
    shut = {"activation_relu_or_gelu": 0} if hasattr(module, "activation_relu_or_gelu") else {}
    change_class(module, fused, backend, shut if kind == "layer" else None)


def _why_not_the_parts(name: str, layer: torch.nn.Module, selection: Selection) -> str | None:
    """A layer computes its feed-forward block and norms itself, so they must be selected too;
    attention is a module of its own."""
    for inner, module in layer.named_children():
        if not isinstance(module, torch.nn.MultiheadAttention):
            why = selection.why_not(f"{name}.{inner}" if name else inner)
            if why is not None:
                return f"its {inner} is {why}"
    return None


def _close_fast_paths(model: torch.nn.Module, report: SwapReport) -> None:
    closed = sum(
        close_fast_path(layer)
        for layer in model.modules()
        if isinstance(layer, torch.nn.TransformerEncoderLayer)
        and isinstance(getattr(layer, "self_attn", None), MultiheadAttention)
    )
    if closed:
        report.notes.append(
            f"{closed} TransformerEncoderLayer: torch's shortcut for inference, which bypasses "
            "self_attn, is closed"
        )


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
