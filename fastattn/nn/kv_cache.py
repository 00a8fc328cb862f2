"""``fastattn.nn.KVCache``: keys and values of what was generated so far, for decoding.

One cache serves all layers of a model: they grow together, so there is one tensor of lengths, one
check that the next tokens fit, one table of pages and one reordering of beams a step, not one a
layer.  It is no ``nn.Module``: it belongs to a batch of requests and not to a model, and must not
turn up in a ``state_dict`` or be cast with the weights.

Dimensions: ``B`` sequences, ``H`` / ``Hk`` heads of queries and of keys, ``D`` / ``Dv`` features of
a key and of a value, ``n`` new tokens of a step.

Lengths and tables live on the device, where kernels read them, and once more on the host, which
decides about them; so a step copies nothing from the device and waits for nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.nn._pages import Pages
from fastattn.ops.attention_kv_cache import attention_with_kv_cache

Ints = Sequence[int] | Tensor  # a tensor on another device is read back


class KVCache:
    """Keys and values of ``batch`` sequences in ``layers`` layers, contiguous or in pages.

    Every step of generation says how many tokens come, :meth:`extend`, and hands what that returns
    to the layers of the model, whose attention is then ``step[layer].attend(q, k, v)``:
    :func:`fastattn.attention_with_kv_cache`, which appends k and v in place and attends to all that
    the layer holds. Sequences may have different lengths, with no padding between them.

    With ``page_size`` the memory is a pool of pages that sequences take as they grow and give back
    with :meth:`reset` or :meth:`crop`: many short and a few long ones share what each would
    otherwise need alone, and beams share what they began with (:meth:`reorder` copies no page).
    "Efficient memory management for large language model serving with PagedAttention", Kwon et
    al., 2309.06180.

    The memory is not cleared: what lies beyond a length is never read.

    Args:
        layers: layers of the model that attend with a cache.
        batch: B, sequences.
        heads: Hk, heads of keys and values.
        head_dim: D.
        capacity: the most tokens that a sequence can have, prompt included.
        value_dim: Dv. Default D.
        page_size: tokens in a page, at least 1. Default: no pages.
        pages: pages in the pool. Default: ``batch * ceil(capacity / page_size)``, enough for all.
        dtype, device: of keys and values, as those of the queries. Default: torch's.

    Attributes:
        k, v: a tensor a layer, ``(B, Hk, capacity, D)``, paged ``(pages, Hk, page_size, D)``.
        lens: ``(B,)`` int64 on the device; ``lengths`` is the same as a tuple.
        block_table: ``(B, ceil(capacity / page_size))`` int32 on the device, or None.

    >>> import torch, fastattn
    >>> cache = fastattn.nn.KVCache(layers=2, batch=1, heads=4, head_dim=16, capacity=64)
    >>> with torch.no_grad():
    ...     for tokens in (10, 1, 1):  # a prompt of ten, then one by one
    ...         step = cache.extend(tokens)
    ...         for layer in range(2):
    ...             q, k, v = (torch.randn(1, 4, tokens, 16) for _ in range(3))
    ...             o = step[layer].attend(q, k, v)
    >>> o.shape, cache.lengths, cache.nbytes // 1024
    (torch.Size([1, 4, 1, 16]), (12,), 64)
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        capacity: int,
        *,
        value_dim: int | None = None,
        page_size: int | None = None,
        pages: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        batch, capacity = _int("batch", batch), _int("capacity", capacity)
        for name, number in (("layers", layers), ("heads", heads), ("head_dim", head_dim)):
            if _int(name, number) < 1:
                raise ValueError(f"KVCache: {name} must be at least 1, got {number}")
        if batch < 0 or capacity < 0:
            raise ValueError(f"KVCache: batch {batch} and capacity {capacity} must not be negative")
        if page_size is None and pages is not None:
            raise ValueError("KVCache: pages are made with a page_size, which is None")
        if page_size is not None and page_size < 1:
            raise ValueError(f"KVCache: page_size must be at least 1, got {page_size}")
        self.layers, self.batch, self.capacity = layers, batch, capacity
        self._lengths = [0] * batch
        self._pages: Pages | None = None
        self.block_table: Tensor | None = None
        rows = (batch, heads, capacity)
        if page_size is not None:
            width = -(-capacity // page_size)
            count = batch * width if pages is None else pages
            self._pages = Pages(batch, count, page_size)
            self.block_table = torch.zeros(batch, width, dtype=torch.int32, device=device)
            rows = (count, heads, page_size)
        wide = head_dim if value_dim is None else value_dim

        def make(features: int) -> list[Tensor]:
            return [torch.empty(*rows, features, dtype=dtype, device=device) for _ in range(layers)]

        self.k, self.v = make(head_dim), make(wide)
        self.lens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._fix_addresses()

    # --------------------------------------------------------------------------------- what it is

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, as the host knows them."""
        return tuple(self._lengths)

    @property
    def page_size(self) -> int | None:
        return None if self._pages is None else self._pages.size

    @property
    def free_pages(self) -> int | None:
        """Pages that no sequence holds; None without pages."""
        return None if self._pages is None else self._pages.free

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, used or not."""
        return sum(x.nbytes for x in (*self.k, *self.v))

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """A copy of the keys and values of one sequence, ``(Hk, length, D)`` and ``(., ., Dv)``."""
        length = self._lengths[sequence]
        if self._pages is None:
            k, v = (x[layer][sequence, :, :length] for x in (self.k, self.v))
            return k.clone(), v.clone()
        pages = torch.tensor(
            self._pages.tables[sequence], dtype=torch.int64, device=self.lens.device
        )
        k, v = (x[layer][pages].transpose(0, 1).flatten(1, 2) for x in (self.k, self.v))
        return k[:, :length], v[:, :length]

    def __repr__(self) -> str:
        (_, heads, _, d), x = self.k[0].shape, self.k[0]
        paged = "" if self._pages is None else f", page_size={self._pages.size}"
        if self._pages is not None:
            paged += f", pages={self._pages.count} ({self._pages.free} free)"
        return (
            f"KVCache(layers={self.layers}, batch={self.batch}, heads={heads}, head_dim={d}, "
            f"capacity={self.capacity}{paged}, dtype={x.dtype}, device={x.device}): "
            f"{self.nbytes / 2**20:.1f} MB, lengths {self._lengths}"
        )

    # -------------------------------------------------------------------------------------- a step

    def extend(
        self, rows: int, *, new_lens: Ints | None = None, sequences: Ints | None = None
    ) -> KVStep:
        """Make room for ``rows`` more tokens of every sequence; their keys come with the step.

        Call it once a step, outside of what is compiled, and give the result to all layers.

        Args:
            rows: n, tokens of this step in q, k and v: those of the prompt, 1 in decoding, a few
                in speculative decoding.
            new_lens: ``(B,)``, where prompts of different lengths are padded at their end to
                ``rows``: how many are there. Default: all.
            sequences: which sequences of the cache the batch of this step is, each at most once:
                a new request in a batch that goes on. Ints, or a bool mask ``(B,)``. Default: all.

        Returns:
            The step: ``step[layer].attend(q, k, v)``, ``step.positions``.

        Raises:
            RuntimeError: a sequence would be longer than ``capacity``, or the pages do not suffice.
                Nothing has changed then.
            ValueError: arguments out of range. TypeError: floats, or bools that are no mask.
        """
        rows, chosen = _int("rows", rows), self._chosen(sequences)
        counts = [rows] * len(chosen) if new_lens is None else _ints("new_lens", new_lens)
        if len(counts) != len(chosen) or rows < 0 or any(not 0 <= n <= rows for n in counts):
            raise ValueError(
                f"KVCache: new_lens must be {len(chosen)} numbers of 0 to rows={rows}, got {counts}"
            )
        lengths = [self._lengths[b] for b in chosen]
        for b, length, n in zip(chosen, lengths, counts, strict=True):
            if length + n > self.capacity:
                raise RuntimeError(
                    f"KVCache: full: sequence {b} has {length} of {self.capacity} tokens and {n} "
                    f"more come; make it with capacity={length + n} or more, grow() it, or crop() "
                    "or reset() the sequence"
                )
        if self._pages is not None:
            self._take_pages(self._pages, chosen, lengths, counts)
        for b, length, n in zip(chosen, lengths, counts, strict=True):
            self._lengths[b] = length + n
        return self._step(rows, None if new_lens is None else counts, sequences, chosen)

    def _step(
        self, rows: int, counts: list[int] | None, sequences: Ints | None, chosen: Sequence[int]
    ) -> KVStep:
        """The device's side of ``extend``: lengths before it for the step, in place after it."""
        device = self.lens.device
        index: Tensor | None = None
        if sequences is None:
            before = self.lens.clone()
        else:
            index = torch.tensor(chosen, dtype=torch.int64, device=device)
            before = self.lens[index]
        table = self.block_table
        if table is not None and index is not None:
            table = table[index]
        more = None if counts is None else torch.tensor(counts, dtype=torch.int64, device=device)
        if index is not None:
            self.lens.index_add_(0, index, torch.full_like(before, rows) if more is None else more)
        elif more is not None:
            self.lens += more
        else:
            self.lens += rows
        return KVStep(self.k, self.v, rows, before, more, table, index if table is None else None)

    # ------------------------------------------------------------------------ changing what it has

    def crop(self, length: int | Ints, *, sequences: Ints | None = None) -> None:
        """Forget tokens at the end: at most ``length`` (a number, or one a sequence) remain.

        After speculative decoding these are the tokens accepted. ``sequences`` as in
        :meth:`extend`: ints or a bool mask.
        """
        chosen = self._chosen(sequences)
        one = isinstance(length, int) or getattr(length, "ndim", None) == 0
        keep = [_int("length", length)] * len(chosen) if one else _ints("length", length)
        if len(keep) != len(chosen) or any(n < 0 for n in keep):
            raise ValueError(
                f"KVCache: length must be at least 0, one or {len(chosen)} numbers, got {length}"
            )
        freed = False
        for b, n in zip(chosen, keep, strict=True):
            self._lengths[b] = min(self._lengths[b], n)
            if self._pages is not None:
                freed |= self._pages.crop(b, self._lengths[b])
        if freed:
            self._upload_table()
        self._upload_lengths()

    def reset(self, sequences: Ints | None = None) -> None:
        """Forget all tokens, of some sequences (ints, or a bool mask ``(B,)``: those that are done)
        or of all; their pages are free again."""
        self.crop(0, sequences=sequences)

    def reorder(self, index: Ints) -> None:
        """Sequence b goes on from what sequence ``index[b]`` was: beam search, or one prompt for
        several samples.

        ``index``: ``(B,)``. Contiguous memory is copied as far as it is used and needed; of pages
        only tables are, and a page that was begun when its sequence grows.
        """
        new = _ints("index", index)
        if len(new) != self.batch or any(not 0 <= i < self.batch for i in new):
            raise ValueError(
                f"KVCache: index must be {self.batch} sequences of 0 to {self.batch - 1}, got {new}"
            )
        moved = [b for b, i in enumerate(new) if b != i]
        if not moved:
            return
        if self._pages is None:
            longest = max(self._lengths[new[b]] for b in moved)
            to = torch.tensor(moved, dtype=torch.int64, device=self.lens.device)
            source = torch.tensor([new[b] for b in moved], device=self.lens.device)
            for x in (*self.k, *self.v):
                x[to, :, :longest] = x[source, :, :longest]
        else:
            self._pages.reorder(new)
            self._upload_table()
        self._lengths = [self._lengths[i] for i in new]
        self._upload_lengths()

    def grow(self, capacity: int, pages: int | None = None) -> None:
        """Make it larger; what it holds stays. The tensors are new ones.

        ``pages``: of a paged one. Default: as many more as the sequences can have more.
        """
        capacity = _int("capacity", capacity)
        if capacity < self.capacity:
            raise ValueError(f"KVCache: capacity is {self.capacity} already, got {capacity}")
        if self._pages is None:
            if pages is not None:
                raise ValueError("KVCache: pages are made with a page_size, which is None")
            rows = 2
            size = capacity
        else:
            width = -(-capacity // self._pages.size)
            assert self.block_table is not None
            more = self.batch * (width - self.block_table.shape[1])
            size = self._pages.count + more if pages is None else pages
            if size < self._pages.count:
                raise ValueError(f"KVCache: there are {self._pages.count} pages, got {size}")
            self._pages.grow(size)
            table = self.block_table.new_zeros(self.batch, width)
            self.block_table = table
            self._upload_table()
            rows = 0
        for tensors in (self.k, self.v):
            for i, x in enumerate(tensors):
                shape = list(x.shape)
                shape[rows] = size
                tensors[i] = x.new_empty(shape)
                tensors[i].narrow(rows, 0, x.shape[rows]).copy_(x)
        self.capacity = capacity
        self._fix_addresses()

    # ------------------------------------------------------------------------------------- helpers

    def _chosen(self, sequences: Ints | None) -> Sequence[int]:
        if sequences is None:
            return range(self.batch)
        mask = _mask(sequences)
        if mask is not None:
            if len(mask) != self.batch:
                raise ValueError(
                    f"KVCache: a bool mask of sequences must have shape ({self.batch},), got "
                    f"({len(mask)},)"
                )
            return [b for b, on in enumerate(mask) if on]
        chosen = _ints("sequences", sequences)
        if len(set(chosen)) != len(chosen) or any(not 0 <= b < self.batch for b in chosen):
            raise ValueError(
                f"KVCache: sequences must be distinct, of 0 to {self.batch - 1}, got {chosen}"
            )
        return chosen

    def _take_pages(
        self, pages: Pages, chosen: Sequence[int], lengths: list[int], counts: list[int]
    ) -> None:
        free = pages.free
        copies = pages.extend(chosen, lengths, counts)
        if copies:
            source, to = torch.tensor(copies, device=self.lens.device).unbind(1)
            for x in (*self.k, *self.v):
                x[to] = x[source]
        if pages.free != free:  # most steps fit the last page
            self._upload_table()

    def _upload_table(self) -> None:
        """In place: captured graphs and steps of the model know its address."""
        assert self._pages is not None
        assert self.block_table is not None
        width = self.block_table.shape[1]
        # Entries behind a sequence's pages are never read; 0 is a page that exists.
        rows = [table + [0] * (width - len(table)) for table in self._pages.tables]
        host = torch.tensor(rows, dtype=torch.int32).view(self.batch, width)
        self.block_table.copy_(host, non_blocking=True)

    def _upload_lengths(self) -> None:
        self.lens.copy_(torch.tensor(self._lengths, dtype=torch.int64), non_blocking=True)

    def _fix_addresses(self) -> None:
        """On a GPU, tell torch.compile that these stay where they are: mode="reduce-overhead"
        (CUDA graphs) would otherwise copy them in and out at every step, or give up."""
        if self.lens.device.type == "cuda":
            for x in (*self.k, *self.v):
                torch._dynamo.mark_static_address(x)


@dataclass(frozen=True)
class KVStep:
    """One step of a :class:`KVCache`, from :meth:`KVCache.extend`: tensors alone, so a compiled
    model that takes it as an argument is compiled once for all steps of as many rows.

    Attributes:
        k, v: of the cache, a tensor a layer.
        rows: n, tokens of the step.
        lens: ``(B,)`` int64, tokens of each sequence before the step.
        new_lens: ``(B,)`` int64, how many of the rows count, or None: all.
        block_table, index: where the sequences of the step lie.
    """

    k: list[Tensor]
    v: list[Tensor]
    rows: int
    lens: Tensor
    new_lens: Tensor | None = None
    block_table: Tensor | None = None
    index: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """``(B, n)`` int64: positions of the step's tokens, for embeddings of positions."""
        return self.lens[:, None] + torch.arange(self.rows, device=self.lens.device)

    def __len__(self) -> int:
        """Layers."""
        return len(self.k)

    def __getitem__(self, layer: int) -> KVLayer:
        """The step for one layer; from the last where it is negative."""
        layers = len(self.k)
        if not -layers <= layer < layers:
            raise IndexError(f"KVCache: layer {layer} of a cache of {layers} layers")
        return KVLayer(self, layer % layers)

    def __iter__(self) -> Iterator[KVLayer]:
        return (KVLayer(self, layer) for layer in range(len(self.k)))


@dataclass(frozen=True)
class KVLayer:
    """What one layer needs in one step: ``step[layer]``."""

    step: KVStep
    layer: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Append k and v and attend from q to all that the layer holds, causally by default.

        Args:
            q: ``(B, H, n, D)``. k, v: ``(B, Hk, n, D)``, ``(B, Hk, n, Dv)``; any strides.
            options: of :func:`fastattn.attention_with_kv_cache`: ``rotary``, ``causal``,
                ``window``, ``mask``, ``softcap``, ``alibi_slopes``, ``sinks``, ``scale``,
                ``return_lse``, ``backend``.

        Returns:
            ``(B, H, n, Dv)``; rows of padding are 0.

        Raises:
            ValueError: k has other rows than the step. TypeError: no k or v.
        """
        step = self.step
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"KVCache: attend appends the {step.rows} rows of its step, so {name} must be "
                    f"a Tensor, got {type(x).__name__}"
                )
        if k.dim() == 4 and k.shape[2] != step.rows:
            raise ValueError(
                f"KVCache: this step was made by extend({step.rows}), got {k.shape[2]} keys"
            )
        return attention_with_kv_cache(
            q, step.k[self.layer], step.v[self.layer], cache_lens=step.lens, k=k, v=v,
            new_lens=step.new_lens, block_table=step.block_table, cache_index=step.index,
            **options,
        )  # fmt: skip


def _int(name: str, number: Any) -> int:
    """What is an int in Python, numpy or torch; a float or a bool is a mistake."""
    if type(number) is int:
        return number
    right = not (isinstance(number, bool) or (isinstance(number, Tensor) and _not_ints(number)))
    try:
        if right:
            return operator.index(number)
    except TypeError:
        pass
    raise TypeError(f"KVCache: {name} must be an int, got {number!r}")


def _ints(name: str, numbers: Any) -> list[int]:
    if isinstance(numbers, Tensor) and numbers.dim() == 1 and not _not_ints(numbers):
        return numbers.tolist()
    if isinstance(numbers, Tensor) or not hasattr(numbers, "__iter__"):
        got = f"{numbers.dtype} {tuple(numbers.shape)}" if isinstance(numbers, Tensor) else numbers
        raise TypeError(f"KVCache: {name} must be a sequence of ints or such a Tensor, got {got}")
    return [_int(name, n) for n in numbers]


def _not_ints(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex() or x.dtype == torch.bool


def _mask(numbers: Any) -> list[bool] | None:
    """Bools, one a sequence, of a Tensor, an array or a list of them; None where it is none."""
    if isinstance(numbers, Tensor):
        return numbers.tolist() if numbers.dtype == torch.bool and numbers.dim() == 1 else None
    values = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    one_by_one = isinstance(values, (list, tuple)) and len(values) > 0
    return list(values) if one_by_one and all(type(x) is bool for x in values) else None


__all__ = ["KVCache", "KVLayer", "KVStep"]
