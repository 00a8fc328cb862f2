"""Warp-wide instructions at run time. The scheduler has made sure that the lanes they need are in
the group; lanes are sorted, so whole warps reshape to (warps, 32)."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import tensor
from .emit_memory import Access
from .emit_warp import Product
from .faults import Diverged, Fault
from .memory import Bytes
from .order import Order

Array = NDArray[Any]
U32 = np.uint32
_ALL = U32(0xFFFFFFFF)


class Warps:
    """The warp half of the machine."""

    order: Order
    shared: Bytes
    sums: str
    synchronises: bool
    lanes: int
    live_in_warp: Array
    described: dict[int, Any]
    progress: int

    def fault(self, kind: type[Fault], pc: int, lane: int, text: str) -> NoReturn:
        raise NotImplementedError

    def _whole(self, g: Array, mask: Array) -> bool:
        """Full warps with full masks, the usual case."""
        n = len(g)
        return n % 32 == 0 and bool((mask == _ALL).all()) and int(g[-1]) - int(g[0]) == n - 1

    def _members(self, pc: int, g: Array, mask: Array) -> None:
        """A lane outside of its own mask has no defined result."""
        own = (mask >> (g & 31).astype(U32)) & U32(1)
        if not own.all():
            i = int(np.flatnonzero(own == 0)[0])
            self.fault(Diverged, pc, int(g[i]), f"is not in its own mask {int(mask[i]):#x}")

    def _chosen(self, g: Array, guard: Array | None, *arrays: Array) -> tuple[Any, ...]:
        if guard is None:
            return (None, g, *arrays)
        sel = np.flatnonzero(guard)
        return (sel, g[sel], *(a[sel] for a in arrays))

    def _merged(self, sel: Array | None, olds: Any, *results: Array) -> Any:
        if sel is None:
            return results
        out = []
        for old, new in zip(olds, results, strict=True):
            merged = old.copy()
            merged[sel] = new
            out.append(merged)
        return out

    # --------------------------------------------------------------------------------- shfl

    def shfl(
        self, pc: int, g: Array, mode: str, a: Array, b: Array, c: Array, mask: Array,
        guard: Array | None, olds: Any,
    ) -> Any:  # fmt: skip
        sel, g, a, b, c, mask = self._chosen(g, guard, a, b, c, mask)
        if not len(g):
            return olds
        lane = (g & 31).astype(np.int64)
        clamp, segment = (c & U32(31)).astype(np.int64), ((c >> U32(8)) & U32(31)).astype(np.int64)
        by = (b & U32(31)).astype(np.int64)
        highest = (lane & segment) | (clamp & ~segment & 31)
        if mode == "up":
            j = lane - by
            inside = j >= highest
        elif mode == "down":
            j = lane + by
            inside = j <= highest
        elif mode == "bfly":
            j = lane ^ by
            inside = j <= highest
        else:
            j = (lane & segment) | (by & ~segment & 31)
            inside = j <= highest
        j = np.where(inside, j, lane)
        if self._whole(g, mask):
            got = a[np.arange(len(g)) - lane + j]
        else:
            got = self._from_lanes(pc, g, a, j, mask)
        return self._merged(sel, olds, got, inside)

    def _from_lanes(self, pc: int, g: Array, a: Array, j: Array, mask: Array) -> Array:
        self._members(pc, g, mask)
        source = (g & ~31) + j
        place = np.full(self.lanes, -1, np.int64)
        place[g] = np.arange(len(g))
        at = place[source]
        named = ((mask >> j.astype(U32)) & U32(1)) == 1
        bad = (at < 0) | ~named
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            self.fault(
                Diverged, pc, int(g[i]),
                f"reads lane {int(j[i])}, which is not in mask {int(mask[i]):#x} or not here",
            )  # fmt: skip
        return a[at]

    # --------------------------------------------------------------------- votes, reductions

    def _rows(self, g: Array, x: Array, fill: Any) -> tuple[Array, Array]:
        """(warps, 32) of a value and the row of each lane; lanes that are not here hold fill."""
        warps, row = np.unique(g >> 5, return_inverse=True)
        out = np.full((len(warps), 32), fill, x.dtype)
        out[row, g & 31] = x
        return out, row

    def vote(
        self, pc: int, g: Array, mode: str, p: Array, mask: Array, guard: Array | None, olds: Any
    ) -> Any:
        sel, g, p, mask = self._chosen(g, guard, p, mask)
        if not len(g):
            return olds
        self._members(pc, g, mask)
        yes, row = self._rows(g, p, False)
        here, _ = self._rows(g, np.ones(len(g), bool), False)
        bit = U32(1) << np.arange(32, dtype=U32)
        votes = (yes * bit).sum(1).astype(U32)[row] & mask
        if mode == "ballot":
            return self._merged(sel, olds, votes)
        voters = (here * bit).sum(1).astype(U32)[row] & mask
        every, some = votes == voters, votes != 0
        result = {"all": every, "any": some, "uni": every | ~some}[mode]
        return self._merged(sel, olds, result)

    def redux(
        self, pc: int, g: Array, op: str, signed: bool, a: Array, mask: Array,
        guard: Array | None, olds: Any,
    ) -> Any:  # fmt: skip
        sel, g, a, mask = self._chosen(g, guard, a, mask)
        if not len(g):
            return olds
        self._members(pc, g, mask)
        x = a.view(np.int32) if signed else a
        values, row = self._rows(g, x, 0)
        here, _ = self._rows(g, np.ones(len(g), bool), False)
        bits = (mask[:, None] >> np.arange(32, dtype=U32)) & U32(1)
        takes_part = (bits == 1) & here[row]
        v = values[row]
        info = np.iinfo(x.dtype)
        neutral = {"add": 0, "or": 0, "xor": 0, "and": -1 if signed else info.max,
                   "min": info.max, "max": info.min}[op]  # fmt: skip
        v = np.where(takes_part, v, x.dtype.type(neutral))
        reduce = {"add": np.add, "or": np.bitwise_or, "xor": np.bitwise_xor,
                  "and": np.bitwise_and, "min": np.minimum, "max": np.maximum}[op]  # fmt: skip
        out = reduce.reduce(v, axis=1, dtype=x.dtype)
        return self._merged(sel, olds, np.ascontiguousarray(out).view(U32))

    def match(
        self, pc: int, g: Array, a: Array, mask: Array, guard: Array | None, olds: Any
    ) -> Any:
        sel, g, a, mask = self._chosen(g, guard, a, mask)
        if not len(g):
            return olds
        self._members(pc, g, mask)
        values, row = self._rows(g, a, 0)
        here, _ = self._rows(g, np.ones(len(g), bool), False)
        bit = U32(1) << np.arange(32, dtype=U32)
        equal = ((values[row] == a[:, None]) & here[row]) * bit
        return self._merged(sel, olds, equal.sum(1).astype(U32) & mask)

    def activemask(self, g: Array, guard: Array | None) -> Array:
        _, row = np.unique(g >> 5, return_inverse=True)
        on = np.ones(len(g), bool) if guard is None else guard
        here, _ = self._rows(g, on, False)
        return (here * (U32(1) << np.arange(32, dtype=U32))).sum(1).astype(U32)[row]

    def warp_barrier(self, pc: int, g: Array, mask: Array, guard: Array | None) -> None:
        _, g, mask = self._chosen(g, guard, mask)
        if not len(g):
            return
        if self._whole(g, mask):
            self.order.warp_barriers(g)
            return
        self._members(pc, g, mask)
        key = (g >> 5).astype(np.int64) << 32 | mask.astype(np.int64)
        for one in np.unique(key):
            lanes = g[key == one]
            whole = len(lanes) == int(self.live_in_warp[lanes[0] >> 5])
            self.order.warp_barrier(lanes, whole)

    def fence(self, g: Array, scope: int, guard: Array | None) -> None:
        if self.synchronises:
            self.order.fence(g if guard is None else g[guard], scope)

    # -------------------------------------------------------------------------- tensor cores

    def ldmatrix(self, pc: int, g: Array, number: int, trans: bool, addr: Array) -> list[Array]:
        d: Access = self.described[pc]
        w = len(g) // 32
        lanes = np.ascontiguousarray(g.reshape(w, 32)[:, : 8 * number]).reshape(-1)
        rows = np.ascontiguousarray(addr.reshape(w, 32)[:, : 8 * number]).reshape(-1)
        words = self._read(pc, d, lanes, rows)  # type: ignore[attr-defined]
        return tensor.matrices(words.view(U32).reshape(w, 8 * number, 4), number, trans)

    def movmatrix(self, g: Array, a: Array) -> Array:
        rows = np.ascontiguousarray(a).reshape(-1, 8, 4)
        return tensor.matrices(rows, 1, True)[0]

    def mma(self, p: Product, n: int, a: Any, b: Any, c: Any) -> tuple[Array, ...]:
        return tensor.mma(p, a, b, c, self.sums)
