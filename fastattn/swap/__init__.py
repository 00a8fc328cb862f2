"""``fastattn.swap`` and ``fastattn.unswap``: fused attention in a model that exists already.

Split by mechanism: ``_torch`` (modules of torch, by changing their class), ``_transformers``
(Hugging Face models, by their attention and mask interfaces), ``_select`` (``only`` / ``skip``),
``_report``.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fastattn.nn import MultiheadAttention
from fastattn.swap import _torch, _transformers
from fastattn.swap._report import ALREADY, Replaced, Skipped, SwapReport
from fastattn.swap._select import Patterns, Selection, lineage

__all__ = ["Replaced", "Skipped", "SwapReport", "swap", "unswap"]

_BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")


def swap(
    model: Any,
    *,
    only: Patterns = None,
    skip: Patterns = None,
    backend: str = "auto",
) -> SwapReport:
    """Make the attention of a model fused, in place.

    Served are ``torch.nn.MultiheadAttention`` (its subclasses too if they keep its forward), alone
    and inside ``torch.nn.TransformerEncoderLayer`` / ``TransformerDecoderLayer``, whose shortcut
    for inference is closed so that the fused attention really runs, and every model of
    ``transformers`` whose attention goes through ``AttentionInterface``, wherever it sits (in a
    ``SentenceTransformer``, in a wrapper).  Parameters, ``state_dict``, hooks, the modules'
    identity and their training flags stay as they are, so optimizers, checkpoints,
    ``copy.deepcopy``, ``pickle``, ``save_pretrained``, DDP and ``torch.compile`` work as before.

    Calling it twice changes nothing more; with another ``backend`` it changes the backend.

    As with ``set_attn_implementation`` of transformers, a Hugging Face model is swapped through
    its config, so models that share one config object are swapped together.  Its attention weights
    are returned where a call says ``output_attentions=True``.

    Args:
        model: any module; changed in place.
        only: swap only these: globs on module names (``"encoder.layers.*"``), module classes, or
            an iterable of both.  A pattern takes what it matches and everything inside.
        skip: leave these alone; wins over ``only``.
        backend: the backend of :func:`fastattn.attention` for all of them. Default "auto".

    Returns:
        A :class:`SwapReport` of what was replaced, what was left alone and why.  If nothing was
        replaced (and nothing was fused before), a ``UserWarning`` says so too.

    Raises:
        TypeError: ``model`` is not a module, or a pattern is neither a string nor a class.
        ValueError: an unknown ``backend``.

    >>> import torch, fastattn
    >>> model = torch.nn.Transformer(32, 4, 2, 2, 64)
    >>> len(fastattn.swap(model))
    6
    >>> type(model.encoder.layers[0].self_attn) is fastattn.nn.MultiheadAttention
    True
    """
    if not isinstance(model, torch.nn.Module):
        inner = getattr(model, "model", None)  # such as a transformers pipeline has
        hint = "; pass its .model" if isinstance(inner, torch.nn.Module) else ""
        raise TypeError(f"fastattn.swap: model must be a torch.nn.Module, got {type(model)}{hint}")
    if backend not in _BACKENDS:
        raise ValueError(f"fastattn.swap: backend must be one of {_BACKENDS}, got {backend!r}")
    selection = Selection(model, only, skip)
    report = SwapReport(type(model).__name__)
    for pattern in selection.unmatched:
        report.notes.append(f"no module matches {pattern!r}")
    seen = _swap_torch(model, selection, backend, report)
    seen |= _transformers.swap_models(model, selection, backend, report)
    _report_others(model, seen, report)
    if not report and not report.fused_before:
        reasons = "; ".join(f"{s.name or 'the model'}: {s.why}" for s in report.skipped[:3])
        warnings.warn(
            f"fastattn.swap replaced nothing in {report.model} ({reasons or 'no attention found'})",
            UserWarning,
            stacklevel=2,
        )
    return report


def unswap(model: torch.nn.Module) -> bool:
    """Undo :func:`swap` on a model, on a part of one, or on a copy of one.

    Classes, attributes and attention implementations become what they were, so the outputs are
    the stock model's again, bit for bit.  Modules built as ``fastattn.nn`` stay.

    Args:
        model: any module; changed in place.

    Returns:
        Whether there was anything to undo.

    >>> import torch, fastattn
    >>> model = torch.nn.TransformerEncoderLayer(32, 4)
    >>> _ = fastattn.swap(model)
    >>> fastattn.unswap(model), type(model.self_attn) is torch.nn.MultiheadAttention
    (True, True)
    """
    undone = False
    for module in list(model.modules()):
        module.__dict__.pop(_transformers.OFF, None)
        for key in (_torch.UNDO, _transformers.UNDO):
            undo = module.__dict__.pop(key, None)
            if undo is not None:
                undo(module)
                undone = True
    return undone


def _swap_torch(
    model: torch.nn.Module, selection: Selection, backend: str, report: SwapReport
) -> set[str]:
    """Swap torch's modules; returns the names of all that are attention, swapped or not."""
    seen = set()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.MultiheadAttention):
            continue
        seen.add(name)
        cls = type(module).__name__
        why = selection.why_not(name)
        if why is None and isinstance(module, MultiheadAttention):
            if module.backend == backend:
                why = ALREADY
            else:
                module.backend = backend
        elif why is None:
            why = _torch.why_not(module)
            if why is None:
                _torch.swap_module(module, backend)
        if why is None:
            report.replaced.append(Replaced(name, cls, _torch.FUSED))
        else:
            report.skipped.append(Skipped(name, cls, why))
    closed = sum(
        _torch.close_fast_path(layer)
        for layer in model.modules()
        if isinstance(layer, torch.nn.TransformerEncoderLayer)
        and isinstance(getattr(layer, "self_attn", None), MultiheadAttention)
    )
    if closed:
        report.notes.append(
            f"{closed} TransformerEncoderLayer: torch's shortcut for inference, which bypasses "
            "self_attn, is closed"
        )
    return seen


def _report_others(model: torch.nn.Module, seen: set[str], report: SwapReport) -> None:
    """Add what is called attention and was not recognised as such."""
    modules = dict(model.named_modules())
    around = {outer for name in seen for outer in lineage(name)}
    reported: set[str] = set()
    for name, module in modules.items():
        cls = type(module).__name__
        if "attention" not in cls.lower() or name in around:
            continue
        if not any(outer in seen or outer in reported for outer in lineage(name)):
            reported.add(name)
            report.skipped.append(Skipped(name, cls, _transformers.why_unknown(modules, name)))
