"""``fastattn.swap`` and ``fastattn.unswap``: fused layers in a model that exists already.

Split by mechanism: ``_classes`` (changing the class of a module), ``_torch`` (modules of torch),
``_transformers`` (attention of Hugging Face models, by their attention and mask interfaces),
``_generation`` (their cache; ``_growing``),
``_known`` (what else they are made of; ``_blocks``, ``_embeddings``), ``_select`` (``only`` /
``skip``), ``_report``.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch

from fastattn.ops.parts import of_part
from fastattn.swap import _generation, _known, _torch, _transformers
from fastattn.swap._classes import UNDO
from fastattn.swap._generation import kv_cache
from fastattn.swap._report import ALREADY, Replaced, Skipped, SwapReport
from fastattn.swap._select import Patterns, Selection, lineage

__all__ = ["Replaced", "Skipped", "SwapReport", "kv_cache", "swap", "unswap"]

_BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")


def swap(
    model: Any,
    *,
    only: Patterns = None,
    skip: Patterns = None,
    backend: str = "auto",
) -> SwapReport:
    """Make the attention, feed-forward blocks, norms and recurrent layers of a model fused, in
    place.

    Served are ``torch.nn.MultiheadAttention``, ``TransformerEncoderLayer``,
    ``TransformerDecoderLayer`` (so the whole ``Transformer``), ``LayerNorm``, ``RMSNorm``,
    ``LSTM``, ``GRU``, ``RNN`` and their cells, their subclasses too if they keep the forward;
    every model of ``transformers`` whose attention goes through ``AttentionInterface``, wherever
    it sits (in a ``SentenceTransformer``, in a wrapper); and the feed-forward blocks, residuals,
    norms and embeddings of BERT, RoBERTa, DistilBERT, GPT-2, Llama and T5.  Weights are shared,
    not copied.  Where a part of a block has hooks or is not what it was (adapters, quantised
    layers), the block runs as its authors wrote it; a recurrent layer whose weights are computed
    (weight norm, parametrisations) stays as it is.
    ``model.generate`` keeps keys and values in a cache that grows in place (``kv_cache`` makes one
    for loops of your own), which GPT-2 and Llama extend and read by
    ``fastattn.attention_with_kv_cache``; caches that you pass are used as they are.
    Parameters, ``state_dict``, hooks, the modules' identity and their training flags stay as they
    are, so optimizers, checkpoints, ``copy.deepcopy``, ``pickle``, ``save_pretrained``, DDP and
    ``torch.compile`` work as before.

    Calling it twice changes nothing more; with another ``backend`` it changes the backend.

    As with ``set_attn_implementation`` of transformers, a Hugging Face model is swapped through
    its config, so models that share one config object are swapped together.  Its attention weights
    are returned where a call says ``output_attentions=True``.

    Args:
        model: any module; changed in place.
        only: swap only these: globs on module names (``"encoder.layers.*"``), module classes, or
            an iterable of both.  A pattern takes what it matches and everything inside.
        skip: leave these alone; wins over ``only``.
        backend: the backend of every op; what it has no kernel of (norms and embeddings, and
            feed-forward blocks wider than 256, for "cuda") takes "auto". Default "auto".

    Returns:
        A :class:`SwapReport` of what was replaced, what was left alone and why.  If nothing was
        replaced (and nothing was fused before), a ``UserWarning`` says so too.

    Raises:
        TypeError: ``model`` is not a module, or a pattern is neither a string nor a class.
        ValueError: an unknown ``backend``.

    >>> import torch, fastattn
    >>> model = torch.nn.Transformer(32, 4, 2, 2, 64)
    >>> report = fastattn.swap(model)
    >>> report.count("attention"), report.count("layer"), report.count("norm")
    (6, 4, 12)
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
    blocks = _known.swap_blocks(model, selection, backend, report)
    attention = _torch.swap_modules(model, selection, blocks, backend, report)
    attention |= _transformers.swap_models(model, selection, backend, report)
    _generation.swap_generation(model, selection, backend, report)
    _report_others(model, attention, report)
    _report_unknown(model, blocks, report)
    _torch.report_recurrent(model, report)
    _note_backends(backend, report)
    _warn_if_idle(report)
    return report


def _note_backends(backend: str, report: SwapReport) -> None:
    """Say what an explicit backend has no kernel of, before a call could."""
    ops = {"norm": "layer_norm", "residual + norm": "add_layer_norm", "embedding": "embedding"}
    for kind, op in ops.items():
        n = report.count(kind)
        if n and of_part(op, backend) != backend:
            report.notes.append(f"{n} {kind}: no kernel in backend={backend!r}, so 'auto'")


def _warn_if_idle(report: SwapReport) -> None:
    """Say loudly that nothing was replaced, or no attention where there is some."""
    alone = [s for s in report.skipped if s.kind == "attention"]
    fused = report.count("attention") or any(s.why == ALREADY for s in alone)
    if (report or report.fused_before) and (fused or not alone):
        return
    reasons = "; ".join(f"{s.name or 'the model'}: {s.why}" for s in (alone or report.skipped)[:3])
    what = "no attention" if report or report.fused_before else "nothing"
    warnings.warn(
        f"fastattn.swap replaced {what} in {report.model} ({reasons or 'no attention found'})",
        UserWarning,
        stacklevel=3,
    )


def unswap(model: torch.nn.Module) -> bool:
    """Undo :func:`swap` on a model, on a part of one, or on a copy of one.

    Classes, attributes and attention implementations become what they were, so the outputs are
    the stock model's again, bit for bit.  Modules built as ``fastattn.nn`` stay.

    Args:
        model: any module; changed in place.

    Returns:
        Whether there was anything to undo.

    Raises:
        TypeError: that is no module.

    >>> import torch, fastattn
    >>> model = torch.nn.TransformerEncoderLayer(32, 4)
    >>> _ = fastattn.swap(model)
    >>> fastattn.unswap(model), type(model.self_attn) is torch.nn.MultiheadAttention
    (True, True)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fastattn.unswap: model must be an nn.Module, got {type(model).__name__}")
    undone = False
    for module in list(model.modules()):
        module.__dict__.pop(_transformers.OFF, None)
        for key in (UNDO, _transformers.UNDO):
            undo = module.__dict__.pop(key, None)
            if undo is not None:
                undo(module)
                undone = True
    return undone


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


_LIKE_BLOCKS = re.compile(r"(Norm|RMSNorm|LayerNorm|MLP|FFN|LayerFF|FeedForward|DenseActDense)$")


def _report_unknown(model: torch.nn.Module, known: set[str], report: SwapReport) -> None:
    """Add norms and feed-forward blocks of classes that the swap does not know."""
    for name, module in model.named_modules():
        cls = type(module)
        inside = any(outer in known for outer in lineage(name))
        if inside or cls.__module__.startswith(("torch.", "fastattn.")):
            continue
        if _LIKE_BLOCKS.search(cls.__name__):
            why = "a class that the swap does not know"
            report.skipped.append(Skipped(name, cls.__name__, why, "?"))
