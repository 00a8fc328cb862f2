"""A layer of transformers' ``DynamicCache`` that appends in place.

transformers' own concatenates: every token copies all keys and values of the sequence, in every
layer.  This one keeps room behind them, so a token writes one row.  It is a ``DynamicLayer`` in
everything else; ``keys`` and ``values`` are views of what is filled.

This module imports transformers, so it is imported by those alone who have seen a model of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

# Rows of room in the first memory and in what replaces it when it is full, at least; beyond that
# half as much again as is used, so that growing costs a constant number of copies a row.
_ROOM = 256


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, ``(B, Hk, length, D)``, with room to grow.

    Args:
        limit: the most tokens there will be, where that is known: no more room is made than for
            these. It is no error to have more.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._length = 0
        self._ours = False  # whether the memory is; what someone put there is not written
        super().__init__()

    # ----------------------------------------------------- what transformers sets and asks for

    @property
    def keys(self) -> Any:  # a tensor, or None as long as there is none
        return None if self._k is None else self._k.narrow(2, 0, self._length)

    @keys.setter
    def keys(self, keys: Any) -> None:
        """Whatever someone puts there is taken as it is, and copied when a row comes."""
        self._k, self._ours = keys, False
        self._length = 0 if keys is None else keys.shape[2]

    @property
    def values(self) -> Any:
        return None if self._v is None else self._v.narrow(2, 0, self._length)

    @values.setter
    def values(self, values: Any) -> None:
        self._v, self._ours = values, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._k, self._v = (
            x.new_empty((x.shape[0], x.shape[1], 0, x.shape[3])) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # which refuses
        self._length = max(self._length + tokens_to_remove, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams go on from others: into memory with as much room, so that the next row fits."""
        if not self._length:
            return
        assert self._k is not None
        assert self._v is not None
        index = beam_idx.to(self._k.device)
        self._k, self._v = (self._moved(x, index) for x in (self._k, self._v))

    def _moved(self, x: Tensor, index: Tensor) -> Tensor:
        moved = x.new_empty((index.shape[0], *x.shape[1:]))
        filled = x.narrow(2, 0, self._length)
        torch.index_select(filled, 0, index, out=moved.narrow(2, 0, self._length))
        return moved

    # ----------------------------------------------------------------------------- growing

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and all values."""
        room = self.room(key_states, value_states)
        if room is None:
            k, v = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
            self.keys, self.values = k, v
            return k, v
        start, rows = self._length, key_states.shape[2]
        for x, new in zip(room, (key_states, value_states), strict=True):
            x.narrow(2, start, rows).copy_(new)
        self._length = start + rows
        k, v = room
        return k.narrow(2, 0, self._length), v.narrow(2, 0, self._length)

    def room(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor] | None:
        """Memory whose rows up to ``length`` are filled and in which these fit behind them.

        None where they must be concatenated: gradients may be wanted (a query's alone keeps the
        keys for its backward, and nobody says here whether there is one), or they do not go
        together with what is there, and transformers decides what happens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled():
            return None
        return self._room(tuple(key_states.shape), key_states, value_states)

    def room_of(self, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor] | None:
        """The same for rows that are still to be computed, both in the dtype and on the device of
        ``like``; no gradient is wanted."""
        return self._room(shape, like, like)

    def _room(
        self, shape: tuple[int, ...], like_k: Tensor, like_v: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        k, v, need = self._k, self._v, self._length + shape[2]
        assert k is not None
        assert v is not None
        batch, heads, _, d = k.shape
        if (
            (batch, heads, d) != (shape[0], shape[1], shape[3])
            or not (_alike(k, like_k) and _alike(v, like_v))
            or k.requires_grad
        ):
            return None
        if not self._ours or k.shape[2] < need or v.shape[2] < need or _frozen(k):
            k, v = self._larger(k, need), self._larger(v, need)
            self._k, self._v, self._ours = k, v, True
        return k, v

    def append(self, rows: int) -> None:
        """Someone has written them behind the others, in :meth:`room`."""
        self._length += rows

    def _fresh(self, x: Tensor, need: int) -> Tensor:
        """Not cleared: on a CPU, memory that is not touched costs nothing."""
        size = need + max(need // 2, _ROOM)
        if self.limit is not None:
            size = max(need, min(size, self.limit))
        return x.new_empty((x.shape[0], x.shape[1], size, x.shape[3]))

    def _larger(self, x: Tensor, need: int) -> Tensor:
        larger = self._fresh(x, need)
        larger.narrow(2, 0, self._length).copy_(x.narrow(2, 0, self._length))
        return larger


def _alike(x: Tensor, like: Tensor) -> bool:
    return x.dtype == like.dtype and x.device == like.device


def _frozen(x: Tensor) -> bool:
    """Made in inference mode, which is over: such memory cannot be written any more."""
    return (
        not torch.compiler.is_compiling()
        and x.is_inference()
        and not torch.is_inference_mode_enabled()
    )


def make_growing(cache: Cache, limit: int | None = None) -> None:
    """Replace the empty layers of transformers' own kind in a cache that it has just made.

    Sliding, static and quantised layers stay what they are, and so does the cache.
    """
    if isinstance(cache, EncoderDecoderCache):  # what is attended to across is written once
        cache = cache.self_attention_cache
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = GrowingLayer(limit)


__all__ = ["GrowingLayer", "make_growing"]
