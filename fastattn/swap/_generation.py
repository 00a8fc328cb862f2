"""What ``model.generate`` of a swapped Hugging Face model does differently: its cache appends in
place, and GPT-2 and Llama decode by one op a layer that appends and attends.

Caches that a user passes are used as they are.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fastattn.ops._eager import functorch_active
from fastattn.ops.attention import attention
from fastattn.ops.attention_kv_cache import attention_with_kv_cache
from fastattn.swap._block import Block
from fastattn.swap._classes import change_class, why_not_changed
from fastattn.swap._report import ALREADY, Replaced, Skipped, SwapReport
from fastattn.swap._select import Selection
from fastattn.swap._transformers import CHANGING, OFF, collected

KIND = "cache"
_MAKES_CACHE = "_prepare_cache_for_generation"
_SPECIAL = frozenset(CHANGING)
_MOST_ROWS = 16  # of a step that reads a cache; more is a prompt, and goes the way of prompts


class Generation:
    """Mixed into a model that generates: the cache that ``generate`` makes gets our layers."""

    backend: str = "auto"

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        result = getattr(super(), _MAKES_CACHE)(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if made is not None and made is not given:
            from fastattn.swap._growing import make_growing

            make_growing(made, generation_config.max_length)
        return result


def kv_cache(model: Any, max_length: int | None = None) -> Any:
    """A cache that appends in place, for loops that call a Hugging Face model themselves.

    ``model.generate`` of a swapped model makes one by itself. This is transformers' own
    ``DynamicCache`` (for an encoder-decoder an ``EncoderDecoderCache``) with layers that keep room
    for more tokens; sliding layers are transformers'. It serves a model that is not swapped too.
    ``keys`` and ``values`` of a layer are views of that memory: after a ``crop`` the next tokens
    are written over those that it took away, so clone what you keep. With gradients enabled tokens
    are concatenated, as transformers does it, and nothing is overwritten.

    Args:
        model: a model of transformers with a decoder.
        max_length: the most tokens there will be, prompt included, where that is known: no more
            memory is taken than for these.

    >>> import torch, transformers, fastattn
    >>> from fastattn.swap import kv_cache
    >>> config = transformers.GPT2Config(
    ...     vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> report = fastattn.swap(model)
    >>> past, ids = kv_cache(model, max_length=20), torch.tensor([[3, 1, 4]])
    >>> with torch.no_grad():
    ...     for _ in range(3):
    ...         ids = model(ids, past_key_values=past).logits[:, -1:].argmax(-1)
    >>> past.get_seq_length()
    5
    """
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    from fastattn.swap._growing import make_growing

    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    if model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache(config=config))
    make_growing(cache, max_length)
    return cache


class CachedAttention(Block):
    """What the attention modules below share: one call that appends to a layer of a cache and
    attends to it, where that is all that is asked for."""

    KIND = KIND
    OP = "fastattn.attention_with_kv_cache"
    is_causal: bool
    scaling: float
    training: bool

    def cached_layer(
        self, cache: Any, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Any:
        """The layer of the cache that this call can append to and read, or None."""
        if cache is None or x.shape[1] > _MOST_ROWS or torch.is_grad_enabled():
            return None
        # By __dict__: the config's own lookup takes longer than the attention of one token.
        config = self.config.__dict__  # type: ignore[attr-defined]
        layers = getattr(cache, "layers", ())
        index: int = self.layer_idx  # type: ignore[attr-defined]
        layer = layers[index] if index < len(layers) else None
        if (
            layer is None
            or type(layer).__name__ not in ("GrowingLayer", "StaticLayer")
            or not layer.is_initialized
            or not self.is_causal
            or self.training
            or not str(config.get("_attn_implementation_internal")).startswith("fastattn")
            or OFF in self.__dict__
            or getattr(cache, "offloading", False)
            or not (mask is None or (mask.dtype == torch.bool and mask.dim() == 4))
            or not (_SPECIAL.isdisjoint(kwargs) or all(kwargs.get(n) is None for n in _SPECIAL))
            or kwargs.get("output_attentions")
            or config.get("_output_attentions")
            or config.get("output_attentions")
            or any("attentions" in key for key in collected() or ())
        ):
            return None
        return layer

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """o, ``(B, n, H D)``, with k and v behind what the layer holds."""
        rows = k.shape[2]
        o: Tensor
        room: tuple[Tensor, Tensor] | None
        static = type(layer).__name__ == "StaticLayer"
        if static:
            room = layer.keys, layer.values
            lens = layer.cumulative_length.expand(q.shape[0])
        else:
            # Under autocast a rotation leaves q and k in float32 and v in 16 bits, which the op
            # refuses and `attention` casts.
            room = layer.room(k, v) if q.dtype == k.dtype == v.dtype else None
            if room is None:
                keys, values = layer.update(k, v)
                o = attention(
                    q, keys, values, mask=mask, causal="bottom_right" if mask is None else False,
                    scale=self.scaling, backend=self.backend,
                )  # fmt: skip
                return o.transpose(1, 2).flatten(2)
            start = layer.get_seq_length()
            # As long as the mask, which knows no room behind the keys.
            room = room[0].narrow(2, 0, start + rows), room[1].narrow(2, 0, start + rows)
            lens = lengths(q.shape[0], start, q.device)
        # A finished mask says everything, causality too; without one the rows are the last.
        o = attention_with_kv_cache(
            q, *room, cache_lens=lens, k=k, v=v, mask=mask, causal=mask is None,
            scale=self.scaling, backend=self.backend,
        )  # fmt: skip
        if static:
            layer.cumulative_length.add_(rows)
        else:
            layer.append(rows)
        return o.transpose(1, 2).flatten(2)


_last_lengths: tuple[tuple[int, int], Tensor] | None = None


def lengths(batch: int, length: int, device: torch.device) -> Tensor:
    """``(batch,)`` of one number. All layers of a step ask for the same, so on the CPU, where
    making it takes a tenth of a short attention, the last one is kept; on a GPU it might belong to
    a graph that was captured, and what a mode of torch's makes belongs to that mode."""
    global _last_lengths
    if device.type != "cpu" or torch.compiler.is_compiling() or _watched():
        return torch.full((batch,), length, dtype=torch.int64, device=device)
    last = _last_lengths
    if last is None or last[0] != (batch, length):
        last = (batch, length), torch.full((batch,), length, dtype=torch.int64, device=device)
        _last_lengths = last
    return last[1]


def _watched() -> bool:
    """Whether a mode may make something else of a tensor than it is; ``torch.device`` as a context
    and a default device are such modes too, and leave alone what names its device."""
    return torch._C._len_torch_dispatch_stack() > 0 or functorch_active()


class Gpt2Attention(CachedAttention):
    """GPT-2's self attention with a cache; everything else is transformers' own."""

    FORWARD = (
        "self", "hidden_states", "past_key_values", "attention_mask", "encoder_hidden_states",
        "encoder_attention_mask", "output_attentions", "kwargs",
    )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        layer = None
        if encoder_hidden_states is None and not output_attentions:
            layer = self.cached_layer(past_key_values, hidden_states, attention_mask, kwargs)
        if layer is not None:
            modules = self._modules  # type: ignore[attr-defined]
            qkv = modules["c_attn"](hidden_states)
            heads, d = self.num_heads, self.head_dim  # type: ignore[attr-defined]
            q, k, v = qkv.view(*qkv.shape[:2], 3, heads, d).permute(2, 0, 3, 1, 4).unbind()
            o = self.attend(layer, q, k, v, attention_mask)
            return modules["resid_dropout"](modules["c_proj"](o)), None
        return super().forward(  # type: ignore[misc]
            hidden_states, past_key_values, attention_mask, encoder_hidden_states,
            encoder_attention_mask, output_attentions, **kwargs,
        )  # fmt: skip


class LlamaAttention(CachedAttention):
    """The same for Llama; its rotary embedding is the one of its module, whoever replaced it."""

    FORWARD = (
        "self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values",
        "kwargs",
    )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        layer = self.cached_layer(past_key_values, hidden_states, attention_mask, kwargs)
        if layer is None or position_embeddings is None:
            return super().forward(  # type: ignore[misc]
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        modules, shape = self._modules, (*hidden_states.shape[:2], -1, self.head_dim)  # type: ignore[attr-defined]
        q, k, v = (
            modules[name](hidden_states).view(shape).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
        q, k = rotate(q, k, *position_embeddings)
        return modules["o_proj"](self.attend(layer, q, k, v, attention_mask)), None


# ---------------------------------------------------------------------------------------- the swap


def swap_generation(
    model: torch.nn.Module, selection: Selection, backend: str, report: SwapReport
) -> None:
    """Mix :class:`Generation` into the models that generate with attention of ours."""
    for name, module in model.named_modules():
        can = getattr(type(module), "can_generate", None)
        if can is None or not _attends_by_us(module) or not can():
            continue
        cls, by = type(module).__name__, "a cache that grows in place"
        why = selection.why_not(name) or why_not_changed(module)
        if isinstance(module, Generation):
            why = why or ALREADY
        elif not hasattr(module, _MAKES_CACHE):
            why = f"its generate() has no {_MAKES_CACHE} in this version of transformers"
        if why is not None:
            report.skipped.append(Skipped(name, cls, why, KIND))
            continue
        change_class(module, Generation, backend)
        report.replaced.append(Replaced(name, cls, by, KIND))


def _attends_by_us(module: Any) -> bool:
    config: Any = getattr(module, "config", None)
    decoder = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return any(
        str(getattr(c, "_attn_implementation", "")).startswith("fastattn")
        for c in (config, decoder)
    )
