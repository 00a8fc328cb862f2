"""Swapping Hugging Face ``transformers`` models through their attention and mask interfaces.

A model asks ``AttentionInterface`` for the function named by ``config._attn_implementation`` and
``AttentionMaskInterface`` for the mask that this function wants.  We register both: with only the
first, ``create_*_mask`` returns None for an implementation that it does not know and padding would
be ignored without a word.

What travels between the two is always a mask that is right by itself, since models slice, move and
recompute it on the way: None (nothing masked, or purely causal), a bool view of shape
(B, 1, Sq, Sk) whose row stride is 0 (padding of a bidirectional model; the op gets (B, 1, 1, Sk)),
or the full bool mask, whose excluded blocks the kernels skip.

This module never imports transformers itself: it is used once a model made someone else do so.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import attention
from fastattn.swap._report import ALREADY, Replaced, Skipped, SwapReport
from fastattn.swap._select import Selection

UNDO = "_fastattn_config_undo"
OFF = "_fastattn_off"  # on an attention module that only / skip excluded: its former function

# Arguments that change the result and that this function does not serve.
_REFUSED = ("indices", "block_indices", "sinks", "cache")
CHANGING = (*_REFUSED, "position_bias", "softcap", "s_aux", "is_causal", "scaling", "dropout")


# ------------------------------------------------------------------------------ the two functions


def attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: str = "auto",
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``transformers``' attention function on :func:`fastattn.attention`.

    Args:
        module: the calling attention module; its ``is_causal`` counts where the argument is None.
        query: ``(B, H, Sq, D)``.
        key, value: ``(B, Hk, Sk, D)``; grouped heads are not repeated.
        attention_mask: None, bool (True = takes part) or float (added), 4-D.
        dropout: of the weights, already 0 in inference.
        scaling: multiplies the logits, default ``D ** -0.5``.
        is_causal: counts where there is no mask and more than one row, top-left, as with sdpa.
        position_bias: float ``(., H, Sq, Sk)``, added; its gradient is computed if required.
        softcap: of Gemma 2.
        s_aux: ``(H,)``, the sinks of gpt-oss.
        kwargs: the rest of what models pass along.  ``sliding_window`` is in the mask already,
            ``output_attentions`` is honoured, what would change the result raises.

    Returns:
        The output, ``(B, Sq, H, D)`` contiguous, and the weights if the model records them.

    Raises:
        ValueError: a mask that is neither 4-D bool nor float.
        NotImplementedError: an argument that is not served (sparse indices, a paged cache).
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"fastattn: {type(module).__name__} passes {name!r} to its attention, which is "
                "not served; leave this model out of the swap"
            )
    off = module.__dict__.get(OFF)
    if off is not None:
        return _former_attention(
            off, module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, position_bias=position_bias, softcap=softcap, s_aux=s_aux, **kwargs
        )  # fmt: skip

    mask: Tensor | None = None
    bias = position_bias
    causal = False
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        causal = bool(is_causal) and query.shape[2] > 1
    else:
        if attention_mask.dim() != 4:
            raise ValueError(
                "fastattn: attention_mask must be 4-D, (B, 1, Sq, Sk), when it reaches the "
                f"attention function, got shape {tuple(attention_mask.shape)} in "
                f"{type(module).__name__}"
            )
        if attention_mask.dtype == torch.bool:
            mask = attention_mask
            if mask.stride(2) == 0:  # the same for every row
                mask = mask[:, :, :1]
        elif attention_mask.is_floating_point():
            bias = attention_mask if bias is None else bias + attention_mask
        else:
            raise ValueError(
                "fastattn: attention_mask must be bool (True = takes part) or float (added to the "
                f"logits), got {attention_mask.dtype} in {type(module).__name__}"
            )
    results = attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=causal,
        softcap=softcap,
        sinks=s_aux,
        scale=scaling,
        dropout_p=dropout,
        return_weights=_wants_weights(module, kwargs),
        backend=backend,
    )
    o, weights = results if isinstance(results, tuple) else (results, None)
    return o.transpose(1, 2).contiguous(), weights


def mask_function(**kwargs: Any) -> Tensor | None:
    """``transformers``' mask function: sdpa's, without its reads of device values.

    A padding mask without padding is recognised by its values, and only where reading them costs
    nothing: on the CPU, outside of tracing.  Padding of a bidirectional model is returned as a
    view of the 2-D mask.
    """
    from transformers import masking_utils

    padding = kwargs.get("attention_mask")
    offset = kwargs.get("q_offset", 0)
    if isinstance(offset, Tensor) and not _readable(offset):
        kwargs["allow_is_causal_skip"] = False
    if padding is None:
        return masking_utils.sdpa_mask(**kwargs)  # type: ignore[no-any-return]
    readable = _readable(padding)
    bidirectional = getattr(masking_utils, "bidirectional_mask_function", mask_function)
    if kwargs.get("mask_function") is bidirectional:
        rows, keys = kwargs["q_length"], kwargs["kv_length"]
        start = kwargs.get("kv_offset", 0)
        padding = masking_utils.prepare_padding_mask(padding, keys, start)[:, start : start + keys]
        if readable and kwargs.get("allow_is_bidirectional_skip") and bool(padding.all()):
            return None
        return padding[:, None, None, :].expand(kwargs["batch_size"], 1, rows, keys)  # type: ignore[no-any-return]
    if not readable:
        kwargs["allow_is_causal_skip"] = kwargs["allow_is_bidirectional_skip"] = False
    return masking_utils.sdpa_mask(**kwargs)  # type: ignore[no-any-return]


def _readable(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return x.device.type == "cpu" and type(x) is Tensor


def _wants_weights(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the running forward records attention weights (``output_attentions``)."""
    if kwargs.get("output_attentions"):
        return True
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    if torch.compiler.is_compiling():
        return False
    # A model may keep the flag from its layers; what its hooks collect is the last word.
    return any("attentions" in key for key in collected() or ())


_CAPTURING = "transformers.utils.output_capturing"


def collected() -> Any:
    """What transformers' hooks collect in the running forward, None where nothing."""
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    return None if collector is None else collector.get()


def idle_hooks(hooks: dict[int, Any]) -> bool:
    """Whether all are transformers' own, which stay on a model once it was asked for attentions or
    hidden states, and collect nothing now."""
    return all(hook.__module__ == _CAPTURING for hook in hooks.values()) and not collected()


def takes_part(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a bidirectional attention module goes through our function here, wants nothing but
    its output, and gets nothing that changes it; for those who compute it themselves."""
    # By __dict__: the config's own lookup takes longer than the attention of a short sentence.
    config = module.config.__dict__
    return (
        config.get("_attn_implementation_internal") in ("fastattn", "fastattn_cpu")
        and OFF not in module.__dict__
        and not module.is_causal
        and not (module.training and module.dropout.p)  # type: ignore[union-attr]
        and not kwargs.get("output_attentions")
        and not config.get("_output_attentions")
        and not config.get("output_attentions")
        and not (kwargs and any(kwargs.get(name) is not None for name in CHANGING))
    )


def _former_attention(
    implementation: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The stock attention of a module left out of a swap, fed with our masks."""
    from transformers import modeling_utils

    kwargs = {name: argument for name, argument in kwargs.items() if argument is not None}
    if implementation != "eager":
        function = modeling_utils.ALL_ATTENTION_FUNCTIONS[implementation]
        return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    rows, keys = query.shape[2], key.shape[2]
    causal = kwargs.pop("is_causal", getattr(module, "is_causal", True))
    if attention_mask is None and causal and rows > 1:
        attention_mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()
        attention_mask = attention_mask[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        attention_mask = torch.where(attention_mask, zero, torch.finfo(query.dtype).min)
    function = sys.modules[type(module).__module__].eager_attention_forward
    return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------- registration


def implementation_name(backend: str) -> str:
    """The name in ``config._attn_implementation``; no part of it may mean anything to
    transformers, which looks for "flash", "sdpa", "paged|" and slashes."""
    return "fastattn" if backend == "auto" else f"fastattn_{backend}"


def register(backend: str) -> str:
    """Register both functions for a backend (again, if they were) and return their name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = implementation_name(backend)
    AttentionInterface.register(name, functools.partial(attention_function, backend=backend))
    AttentionMaskInterface.register(name, mask_function)
    return name


@dataclass(frozen=True)
class ConfigUndo:
    """The attention implementation that a module's config named before the swap.

    It is kept on the module and not on the config, which is written to ``config.json``.
    """

    implementation: str
    backend: str

    def __call__(self, module: torch.nn.Module) -> None:
        module.config._attn_implementation_internal = self.implementation  # type: ignore[union-attr]

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickling a swapped model, maybe in a process that never called fastattn.swap.
        self.__dict__.update(state)
        register(self.backend)


# ---------------------------------------------------------------------------------------- the swap


@dataclass
class _Group:
    """The attention modules that share one config, and so one attention implementation."""

    config: Any
    selected: list[str]
    excluded: list[str]


def swap_models(
    model: torch.nn.Module, selection: Selection, backend: str, report: SwapReport
) -> set[str]:
    """Swap Hugging Face attention; returns the names of all that is such, swapped or not."""
    base = _pretrained_model_class()
    if base is None:
        return set()
    modules = dict(model.named_modules())
    name_here = implementation_name(backend)
    groups: dict[int, _Group] = {}
    for name, module in modules.items():
        if not _uses_interface(module) or not hasattr(module, "config"):
            continue
        group = groups.setdefault(id(module.config), _Group(module.config, [], []))
        why = selection.why_not(name) or _why_not(_owner(modules, name))
        if why is None:
            group.selected.append(name)
        else:
            group.excluded.append(name)
            report.skipped.append(Skipped(name, type(module).__name__, why))

    changed: list[str] = []
    for group in groups.values():
        if not group.selected:
            continue
        former = group.config._attn_implementation
        fused_before = str(former).startswith("fastattn")
        if group.excluded and not fused_before and former not in ("eager", "sdpa"):
            why = (
                f"only / skip would leave part of what shares its config on {former!r}, whose "
                "masks differ; only 'sdpa' and 'eager' can be mixed with ours"
            )
            for name in group.selected:
                report.skipped.append(Skipped(name, type(modules[name]).__name__, why))
            continue
        register(backend)
        if getattr(group.config, "output_attentions", False):
            report.notes.append(
                "config.output_attentions is set: weights are returned, but transformers refuses "
                "to save such a config beside any implementation but 'eager', so unswap before "
                "save_pretrained, or pass output_attentions=True to the calls instead"
            )
        for name in group.selected:
            was_off = modules[name].__dict__.pop(OFF, None) is not None
            cls = type(modules[name]).__name__
            if former == name_here and not was_off:
                report.skipped.append(Skipped(name, cls, ALREADY))
            else:
                by = f'AttentionInterface["{name_here}"]'
                report.replaced.append(Replaced(name, cls, by))
                changed.append(name)
        if not fused_before:
            for name in group.excluded:
                modules[name].__dict__[OFF] = former
        _set_implementation(modules, group.config, backend)
    for config in _configs_around(modules, changed):
        if id(config) not in groups:
            _set_implementation(modules, config, backend)
    return {name for group in groups.values() for name in (*group.selected, *group.excluded)}


def _set_implementation(modules: dict[str, torch.nn.Module], config: Any, backend: str) -> None:
    """Name our functions in ``config`` and remember the former ones on a module that holds it."""
    base = _pretrained_model_class() or torch.nn.Module
    holders = [m for m in modules.values() if getattr(m, "config", None) is config]
    holder = next((m for m in holders if isinstance(m, base)), holders[0])
    undo = next((m.__dict__[UNDO] for m in holders if UNDO in m.__dict__), None)
    former = config._attn_implementation if undo is None else undo.implementation
    for module in holders:
        module.__dict__.pop(UNDO, None)
    # The public setter would also set the sub-configs, of models that may have been left out.
    config._attn_implementation_internal = implementation_name(backend)
    if not str(former).startswith("fastattn"):  # else the model was built with our name
        holder.__dict__[UNDO] = ConfigUndo(former, backend)


def _configs_around(modules: dict[str, torch.nn.Module], names: list[str]) -> list[Any]:
    """The configs of the models that contain swapped modules: they may make the masks."""
    base = _pretrained_model_class()
    configs = {}
    for name in names:
        for outer in [name[:i] for i, c in enumerate(name) if c == "."] + [""]:
            module = modules.get(outer)
            if base is not None and isinstance(module, base) and _why_not(module) is None:
                configs[id(module.config)] = module.config
    return list(configs.values())


def _pretrained_model_class() -> type[torch.nn.Module] | None:
    """``transformers.PreTrainedModel``, or None if nothing has imported it."""
    module = sys.modules.get("transformers.modeling_utils")
    return getattr(module, "PreTrainedModel", None)


@functools.cache
def _source(owner: Any) -> str:
    try:
        return inspect.getsource(owner)
    except (OSError, TypeError):
        return ""


def _uses_interface(module: torch.nn.Module) -> bool:
    """Whether a module's forward gets its attention from ``AttentionInterface``."""
    cls: Any = type(module)
    return "ALL_ATTENTION_FUNCTIONS" in _source(cls)


def _owner(modules: dict[str, torch.nn.Module], name: str) -> torch.nn.Module | None:
    """The innermost ``PreTrainedModel`` that contains the module called ``name``."""
    base = _pretrained_model_class()
    if base is None:
        return None
    parts = name.split(".")
    for i in range(len(parts), -1, -1):
        module = modules.get(".".join(parts[:i]))
        if isinstance(module, base):
            return module
    return None


def _why_not(model: torch.nn.Module | None) -> str | None:
    """None if this ``PreTrainedModel`` can take our functions, else the reason."""
    if model is None:  # layers taken out of their model keep its config, and that is enough
        return None
    can_set: Callable[[], bool] | None = getattr(model, "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        return f"the code of {type(model).__name__} does not use transformers' AttentionInterface"
    code = _source(sys.modules.get(type(model).__module__))
    if re.search(r"_attn_implementation\s*(==|!=|in)\s*[^\n]*[\"']sdpa[\"']", code):
        return (
            f"the code of {type(model).__name__} tells 'sdpa' from other implementations by name, "
            "so another one may compute something else"
        )
    return None


def why_unknown(modules: dict[str, torch.nn.Module], name: str) -> str:
    """Why a module that is called attention is none that a swap knows."""
    owner = _owner(modules, name)
    if owner is not None:
        return _why_not(owner) or "its forward does not ask transformers' AttentionInterface"
    return "neither torch.nn.MultiheadAttention nor attention of a transformers model"
