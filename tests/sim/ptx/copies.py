"""cp.async: issued, in flight, landed.

The bytes are fetched at the issue and land at the wait of the issuing thread. In between the target
holds poison and its records say that a copy is in flight: whoever touches it, the issuing thread
included, has a race.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .emit_memory import Access
from .faults import Fault, Misaligned, OutOfBounds
from .memory import Bytes
from .order import Conflict, Order, RaceFound, Shadow

Array = NDArray[Any]
_POISON = 0xFF  # a NaN in every float format, a wild index in every integer one


@dataclass
class Copy:
    """cp.async instructions in flight, of one execution."""

    pc: int
    lanes: Array
    group: Array  # per lane: how many groups the lane had committed before
    at: Array  # byte offset into shared memory
    words: Array
    size: int


class Copies:
    """The asynchronous part of the machine."""

    order: Order
    described: dict[int, Any]
    shared: Bytes
    shared_shadow: Shadow
    copies: list[Copy]
    committed: Array
    progress: int

    def fault(self, kind: type[Fault], pc: int, lane: int, text: str) -> NoReturn:
        raise NotImplementedError

    def copy_async(
        self, pc: int, g: Array, to: Array, source: Array, given: Array | None, guard: Array | None
    ) -> None:
        """The bytes land at the wait; until then the target is poisoned and nobody may touch it."""
        if guard is not None:
            sel = np.flatnonzero(guard)
            if not len(sel):
                return
            g, to, source = g[sel], to[sel], source[sel]
            given = None if given is None else given[sel]
        d: Access = self.described[pc]
        size = d.size
        ((_, (_, where), _),) = self._spaces(pc, d, g, to)
        words = self._copy_source(pc, d, g, source, given)
        shadow = self.shared_shadow
        at = self._granules(shadow, where, size)
        rec = self.order.stamp(g, pc, 0)
        try:
            twice = self.order.write(shadow, at, g, rec, None, flight=True)
        except RaceFound as race:
            self._race(pc, g, "shared", shadow, race.conflict, "copies into")
        if twice.any():
            row, column = (int(x[0]) for x in np.nonzero(twice))
            word = int(shadow.w[at[row, column]])
            other = Conflict(row, int(at[row, column]), word >> 20 & (1 << 24) - 1, pc, True, True)
            self._race(pc, g, "shared", shadow, other, "copies into")
        poison = np.full(words.nbytes, _POISON, np.uint8).view(words.dtype).reshape(words.shape)
        self.shared.write(where, size, poison)
        self.copies.append(Copy(pc, g, self.committed[g], where, words, size))
        self.progress += 1

    def _copy_source(
        self, pc: int, d: Access, g: Array, source: Array, given: Array | None
    ) -> Array:
        size = d.size
        whole = Access("load", "global", size)
        if given is None or (given == size).all():
            return self._read(pc, whole, g, source)
        if (given > size).any():
            i = int(np.flatnonzero(given > size)[0])
            self.fault(OutOfBounds, pc, int(g[i]), f"src-size {int(given[i])} of {size}")
        words = np.zeros(
            (len(g), 2) if size == 16 else len(g), np.uint64 if size == 16 else f"u{size}"
        )
        full = np.flatnonzero(given == size)
        if len(full):
            words[full] = self._read(pc, whole, g[full], source[full])
        flat = words.view(np.uint8).reshape(len(g), size)
        byte = Access("load", "global", 1)
        for i in np.flatnonzero((given > 0) & (given < size)).tolist():
            n = int(given[i])
            if int(source[i]) % size:
                self.fault(Misaligned, pc, int(g[i]), f"source {int(source[i]):#x}")
            lanes = np.full(n, g[i])
            flat[i, :n] = self._read(pc, byte, lanes, source[i] + np.arange(n, dtype=np.uint64))
        return words

    def commit_group(self, g: Array, guard: Array | None) -> None:
        self.committed[g if guard is None else g[guard]] += 1

    def wait_group(self, pc: int, g: Array, guard: Array | None, pending: int) -> None:
        """All but the `pending` youngest groups of each lane land (-1: whatever is in flight)."""
        if guard is not None:
            g = g[guard]
        limit = np.full(len(self.committed), -1, np.int64)
        limit[g] = self.committed[g] - pending if pending >= 0 else np.iinfo(np.int64).max
        left = []
        for copy in self.copies:
            lands = copy.group < limit[copy.lanes]
            if lands.all():
                self._land(copy, slice(None))
                continue
            if lands.any():
                self._land(copy, np.flatnonzero(lands))
                keep = np.flatnonzero(~lands)
                copy.lanes, copy.group = copy.lanes[keep], copy.group[keep]
                copy.at, copy.words = copy.at[keep], copy.words[keep]
            left.append(copy)
        self.copies = left

    def _land(self, copy: Copy, part: Any) -> None:
        lanes, where = copy.lanes[part], copy.at[part]
        self.shared.write(where, copy.size, copy.words[part])
        at = self._granules(self.shared_shadow, where, copy.size)
        self.shared_shadow.w[at] = self.order.stamp(lanes, copy.pc, 0)[:, None]
        self.progress += 1
