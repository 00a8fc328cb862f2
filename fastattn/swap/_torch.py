"""Swapping torch's own modules: attention, encoder and decoder layers, norms, recurrent layers.

Each becomes the module of ``fastattn.nn`` that is its drop-in (see ``_classes``).
``torch.nn.TransformerEncoder``, ``TransformerDecoder`` and ``Transformer`` only call their layers
and keep their class: what they do about padding and causal masks stays torch's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.nn import (
    GRU,
    LSTM,
    RNN,
    GRUCell,
    LayerNorm,
    LSTMCell,
    MultiheadAttention,
    RMSNorm,
    RNNCell,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fastattn.ops.parts import of_part
from fastattn.swap._classes import UNDO, change_class, why_not_changed
from fastattn.swap._report import ALREADY, Replaced, Skipped, SwapReport
from fastattn.swap._select import Selection, lineage

_DROP_INS: tuple[tuple[Any, Any, str], ...] = (
    (torch.nn.MultiheadAttention, MultiheadAttention, "attention"),
    (torch.nn.TransformerEncoderLayer, TransformerEncoderLayer, "layer"),
    (torch.nn.TransformerDecoderLayer, TransformerDecoderLayer, "layer"),
    (torch.nn.LayerNorm, LayerNorm, "norm"),
    (torch.nn.RMSNorm, RMSNorm, "norm"),
    (torch.nn.LSTM, LSTM, "recurrent"),
    (torch.nn.GRU, GRU, "recurrent"),
    (torch.nn.RNN, RNN, "recurrent"),
    (torch.nn.LSTMCell, LSTMCell, "recurrent"),
    (torch.nn.GRUCell, GRUCell, "recurrent"),
    (torch.nn.RNNCell, RNNCell, "recurrent"),
)
_NORMS = {torch.nn.LayerNorm: "layer_norm", torch.nn.RMSNorm: "rms_norm"}
_RECURRENT = tuple(stock for stock, _, kind in _DROP_INS if kind == "recurrent")
_LIKE_RECURRENT = re.compile(r"(LSTM|GRU|RNN)(Cell)?$")
# What the forward of a recurrent module calls on itself.
_HELPERS = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)
_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


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
    if isinstance(module, _RECURRENT):
        return _why_not_recurrent(module, stock) or why_not_changed(module)
    return why_not_changed(module)


def _why_not_recurrent(module: Any, stock: Any) -> str | None:
    """Weights that are no parameters of the module are made by somebody's code in every call."""
    names = getattr(module, "_flat_weights_names", _CELL_WEIGHTS)
    if any(name not in module._parameters for name in names):
        return "its weights are computed ones (weight norm, a parametrisation, pruning)"
    for name in _HELPERS:
        if getattr(type(module), name, None) is not getattr(stock, name, None):
            return f"a subclass of torch.nn.{stock.__name__} with a {name} of its own"
    return None


def report_recurrent(model: torch.nn.Module, report: SwapReport) -> None:
    """Add what is called recurrent, is none of torch.nn's modules and holds none."""
    seen: set[str] = set()
    for name, module in model.named_modules():
        cls = type(module)
        if not _LIKE_RECURRENT.search(cls.__name__) or any(n in seen for n in lineage(name)):
            continue
        if any(isinstance(m, _RECURRENT) for m in module.modules()):
            continue
        seen.add(name)
        quantised = cls.__module__.startswith(("torch.ao.", "torch.nn.quant", "torchao."))
        why = "it is quantised" if quantised else "a class that the swap does not know"
        report.skipped.append(Skipped(name, cls.__name__, why, "recurrent"))


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
        mine = of_part(_NORMS[stock], backend) if kind == "norm" else backend
        if why is None and isinstance(module, fused):
            if module.backend == mine:
                why = ALREADY
            else:
                module.backend = mine
        elif why is None:
            why = why_not(module, stock)
            if why is None:
                _change(module, fused, kind, mine)
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
