"""What loads, stores and atomics do at run time, for a group of lanes."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import memory as mem
from .atomics import apply_atomic
from .emit_memory import Access
from .faults import Fault, Misaligned, OutOfBounds, Race, UnwrittenRead
from .memory import SHARED_BASE, Bytes, Memory, Region
from .order import Conflict, Order, RaceFound, Shadow
from .traffic import Traffic, sectors, wavefronts

Array = NDArray[Any]


class Accesses:
    """The memory half of the machine."""

    memory: Memory
    order: Order
    described: dict[int, Any]
    shared: Bytes
    shared_bytes: int
    shared_shadow: Shadow
    local: Bytes
    local_bytes: int
    local_written: Array
    shared_at: Array  # per lane: what turns a shared address into an offset of `shared`
    local_at: Array
    global_shift: int
    synchronises: bool
    progress: int
    params_at: int
    check_races: bool

    def fault(self, kind: type[Fault], pc: int, lane: int, text: str) -> NoReturn:
        raise NotImplementedError

    def site(self, pc: int) -> str:
        raise NotImplementedError

    # ----------------------------------------------------------------------------- entry points

    def load(self, pc: int, g: Array, addr: Array, guard: Array | None, olds: Any) -> Any:
        d: Access = self.described[pc]
        lanes, sel = g, None
        if guard is not None:
            sel = np.flatnonzero(guard)
            if not len(sel):
                return olds
            lanes, addr = g[sel], addr[sel]
        words = self._read(pc, d, lanes, addr)
        columns = words.view(f"u{d.size}").reshape(len(lanes), d.count)
        out = []
        for k, width in enumerate(d.widths):
            column = columns[:, k]
            if width != 8 * d.size:
                if d.signed:
                    column = column.view(f"i{d.size}").astype(f"i{width // 8}")
                column = column.astype(f"u{width // 8}")
            else:
                column = np.ascontiguousarray(column)
            if sel is not None:
                if olds[k] is None:
                    column = None
                else:
                    merged = olds[k].copy()
                    merged[sel] = column
                    column = merged
            out.append(column)
        return out

    def store(self, pc: int, g: Array, addr: Array, values: Any, guard: Array | None) -> None:
        d: Access = self.described[pc]
        dtype = f"u{d.size}"
        if d.count == 1:
            data = values[0].astype(dtype, copy=False)
        else:
            data = np.empty((len(g), d.count), dtype)
            for k, value in enumerate(values):
                data[:, k] = value
        if guard is not None:
            sel = np.flatnonzero(guard)
            if not len(sel):
                return
            g, addr, data = g[sel], addr[sel], data[sel]
        data = np.ascontiguousarray(data)
        words = data.view(np.uint64 if d.bytes == 16 else f"u{d.bytes}")
        words = words.reshape((len(g), 2) if d.bytes == 16 else len(g))
        for lanes, where, part in self._spaces(pc, d, g, addr):
            self._store(pc, d, lanes, where, words if part is None else words[part])
        self.progress += 1

    def _read(self, pc: int, d: Access, lanes: Array, addr: Array) -> Array:
        pieces = list(self._spaces(pc, d, lanes, addr))
        if len(pieces) == 1:
            return self._load(pc, d, lanes, pieces[0][1])
        out = np.empty((len(lanes), 2) if d.bytes == 16 else len(lanes),
                       np.uint64 if d.bytes == 16 else f"u{d.bytes}")  # fmt: skip
        for some, where, part in pieces:
            out[part] = self._load(pc, d, some, where)
        return out

    # ------------------------------------------------------------------ addresses and bounds

    def _spaces(self, pc: int, d: Access, lanes: Array, addr: Array) -> Any:
        """(lanes, (space, offsets), selection) for each space or region that is hit."""
        size = d.bytes
        if size > 1:
            off = addr & np.uint64(size - 1)
            if off.any():
                i = int(np.flatnonzero(off)[0])
                self.fault(
                    Misaligned, pc, int(lanes[i]),
                    f"address {int(addr[i]):#x} of an access of {size} bytes",
                )  # fmt: skip
        if d.space == "shared":
            yield lanes, ("shared", self._shared(pc, size, lanes, addr)), None
        elif d.space == "local":
            yield lanes, ("local", self._local(pc, size, lanes, addr)), None
        elif d.space == "global" or not (addr >> np.uint64(56)).any():
            yield from self._regions(pc, d, lanes, addr, None)
        else:
            yield from self._generic(pc, d, lanes, addr)

    def _generic(self, pc: int, d: Access, lanes: Array, addr: Array) -> Any:
        window = addr >> np.uint64(56)
        for which in np.unique(window).tolist():
            part = np.flatnonzero(window == which)
            some, where = lanes[part], addr[part]
            if which == mem.SHARED_WINDOW >> 56:
                where = where - np.uint64(mem.SHARED_WINDOW)
                yield some, ("shared", self._shared(pc, d.bytes, some, where)), part
            elif which == mem.LOCAL_WINDOW >> 56:
                where = where - np.uint64(mem.LOCAL_WINDOW)
                yield some, ("local", self._local(pc, d.bytes, some, where)), part
            elif which == mem.PARAM_WINDOW >> 56:
                where = where - np.uint64(mem.PARAM_WINDOW) + np.uint64(self.params_at)
                yield from self._regions(pc, d, some, where, part)
            else:
                yield from self._regions(pc, d, some, where, part)

    def _regions(self, pc: int, d: Access, lanes: Array, addr: Array, part: Array | None) -> Any:
        if self.traffic is not None:
            self._count("global", pc, *sectors(addr, lanes, d.bytes))
        low, high = int(addr.min()), int(addr.max()) + d.bytes
        region = self.memory.find(low, high)
        if region is not None:
            yield lanes, (region, (addr - np.uint64(region.origin)).astype(np.int64)), part
            return
        starts, ends = self.memory.starts_and_ends()
        if not len(starts):
            self._outside(pc, d, lanes, addr, 0)
        which = np.searchsorted(starts, addr, "right") - 1
        bad = (which < 0) | (addr + np.uint64(d.bytes) > ends[which])
        if bad.any():
            self._outside(pc, d, lanes, addr, int(np.flatnonzero(bad)[0]))
        for r in np.unique(which).tolist():
            chosen = np.flatnonzero(which == r)
            region = self.memory.regions[r]
            where = (addr[chosen] - np.uint64(region.origin)).astype(np.int64)
            yield lanes[chosen], (region, where), chosen if part is None else part[chosen]

    def _count(self, space: str, pc: int, moved: int, ideal: int) -> None:
        assert self.traffic is not None
        entry = self.traffic.get((space, pc))
        if entry is None:
            entry = self.traffic[space, pc] = Traffic(space, self.site(pc))
        entry.moved += moved
        entry.ideal += ideal

    traffic: dict[tuple[str, int], Traffic] | None

    def _outside(self, pc: int, d: Access, lanes: Array, addr: Array, i: int) -> NoReturn:
        a = int(addr[i])
        text = f"{d.what} of {d.bytes} bytes at {a:#x}, {self.memory.near(a)}"
        self.fault(OutOfBounds, pc, int(lanes[i]), text)

    def _shared(self, pc: int, size: int, lanes: Array, addr: Array) -> Array:
        off = addr - np.uint64(SHARED_BASE)
        limit = self.shared_bytes - size
        if limit < 0 or int(off.max()) > limit:
            i = int(np.flatnonzero(off > np.uint64(max(limit, 0)))[0]) if limit >= 0 else 0
            at = int(addr[i]) - SHARED_BASE
            self.fault(
                OutOfBounds, pc, int(lanes[i]),
                f"{size} bytes at shared+{at}, of {self.shared_bytes} bytes of shared memory",
            )  # fmt: skip
        if self.traffic is not None:
            self._count("shared", pc, *wavefronts(addr, lanes, size))
        return addr.astype(np.int64) + self.shared_at[lanes]

    def _local(self, pc: int, size: int, lanes: Array, addr: Array) -> Array:
        off = addr - np.uint64(SHARED_BASE)
        limit = self.local_bytes - size
        if limit < 0 or int(off.max()) > limit:
            i = int(np.flatnonzero(off > np.uint64(max(limit, 0)))[0]) if limit >= 0 else 0
            self.fault(
                OutOfBounds, pc, int(lanes[i]),
                f"{size} bytes at local+{int(addr[i]) - SHARED_BASE}, of {self.local_bytes}",
            )  # fmt: skip
        return addr.astype(np.int64) + self.local_at[lanes]

    # -------------------------------------------------------------------------------- loads

    def _granules(self, shadow: Shadow, where: Array, size: int) -> Array:
        k = max(1, size >> shadow.shift)
        first = where >> shadow.shift
        return first[:, None] + np.arange(k) if k > 1 else first[:, None]

    def _load(self, pc: int, d: Access, lanes: Array, target: Any) -> Array:
        space, where = target
        if space == "local":
            return self._load_local(pc, d, lanes, where)
        if space == "shared":
            self._read_shared(pc, d.bytes, d.strength, lanes, where)
            words = self.shared.read(where, d.bytes)
        else:
            self._check_written(pc, d, lanes, space, where)
            self._read_global(pc, d, lanes, space, where)
            words = space.read(where, d.bytes)
        if d.strength and self.synchronises:
            self._after_strong_read(d, lanes, space, where)
        return words

    def _load_local(self, pc: int, d: Access, lanes: Array, where: Array) -> Array:
        there = self.local_written[where[:, None] + np.arange(d.bytes)]
        if not there.all():
            i = int(np.flatnonzero(~there.all(1))[0])
            self.fault(UnwrittenRead, pc, int(lanes[i]), "of local memory that it never wrote")
        return self.local.read(where, d.bytes)

    def _read_shared(self, pc: int, size: int, strength: int, lanes: Array, where: Array) -> None:
        shadow = self.shared_shadow
        at = self._granules(shadow, where, size)
        rec = self.order.stamp(lanes, pc, strength)
        try:
            w = self.order.read(shadow, at, lanes, rec)
        except RaceFound as race:
            self._race(pc, lanes, "shared", shadow, race.conflict, "reads")
        if not w.all():
            i = int(np.flatnonzero(~w.all(1))[0])
            off = self._shared_offset(int(at[i, int(np.flatnonzero(w[i] == 0)[0])]))
            self.fault(UnwrittenRead, pc, int(lanes[i]), f"of shared+{off}: nobody wrote it")

    def _shared_offset(self, granule: int) -> int:
        return (granule << self.shared_shadow.shift) % self.shared_stride

    shared_stride: int

    def _check_written(
        self, pc: int, d: Access, lanes: Array, region: Region, where: Array
    ) -> None:
        if region.written is None:
            return
        there = region.written.read(where, d.bytes)
        ones = there == np.iinfo(there.dtype).max
        if not ones.all():
            i = int(np.flatnonzero(~ones.reshape(len(lanes), -1).all(1))[0])
            place = region.place(int(where[i]) + region.origin)
            self.fault(UnwrittenRead, pc, int(lanes[i]), f"of {place}: nobody wrote it")

    def shadow_of(self, region: Region) -> Shadow:
        shadow = self.shadows.get(id(region))
        if shadow is None:
            shadow = self.shadows[id(region)] = Shadow(len(region.raw), self.global_shift, False)
        return shadow

    shadows: dict[int, Shadow]

    def _read_global(self, pc: int, d: Access, lanes: Array, region: Region, where: Array) -> None:
        if not region.writable or not self.stores_to_global:
            return
        shadow = self.shadow_of(region)
        at = self._granules(shadow, where, d.bytes)
        rec = self.order.stamp(lanes, pc, d.strength)
        try:
            w = self.order.read(shadow, at, lanes, rec)
        except RaceFound as race:
            self._race(pc, lanes, region, shadow, race.conflict, "reads")
        if d.nc and w.any():
            i = int(np.flatnonzero(w.any(1))[0])
            place = region.place(int(where[i]) + region.origin)
            self.fault(Race, pc, int(lanes[i]), f"ld.global.nc of {place}, which this launch wrote")

    stores_to_global: bool

    # ------------------------------------------------------------------------------- stores

    def _store(self, pc: int, d: Access, lanes: Array, target: Any, words: Array) -> None:
        space, where = target
        if space == "local":
            self.local.write(where, d.bytes, words)
            self.local_written[where[:, None] + np.arange(d.bytes)] = True
            return
        store, shadow = self._writable(pc, d, lanes, space, where)
        self._ordered_write(pc, d, lanes, space, store, shadow, where, words)
        if space != "shared" and space.written is not None:
            space.written.write(
                where, d.bytes, np.full(words.shape, ~np.uint64(0)).astype(words.dtype)
            )
        if self.synchronises:
            self._after_store(d, lanes, space, where)

    def _writable(
        self, pc: int, d: Access, lanes: Array, space: Any, where: Array
    ) -> tuple[Bytes, Shadow]:
        if space == "shared":
            return self.shared, self.shared_shadow
        if not space.writable:
            place = space.place(int(where[0]) + space.origin)
            self.fault(OutOfBounds, pc, int(lanes[0]), f"{d.what} to {place}, which is read-only")
        return space, self.shadow_of(space)

    def _ordered_write(
        self, pc: int, d: Access, lanes: Array, space: Any, store: Bytes, shadow: Shadow,
        where: Array, words: Array,
    ) -> None:  # fmt: skip
        at = self._granules(shadow, where, d.bytes)
        rec = self.order.stamp(lanes, pc, d.strength)
        piece = min(1 << shadow.shift, 8)
        new = np.ascontiguousarray(words).view(f"u{piece}").reshape(len(lanes), -1)

        def same(rows: Array, columns: Array) -> Array:
            now = self._pieces(store, shadow, at[rows, columns], piece)
            mine = _piece_of(new, columns, shadow, piece, rows)
            equal = now == mine
            if self.redundant_stores == "near" and piece >= 4:
                near = _near(now, mine)
                self.order.near += int((near & ~equal).sum())
                equal |= near
            return equal if equal.ndim == 1 else equal.all(1)

        excuse = None if self.redundant_stores == "fail" else same
        try:
            twice = self.order.write(shadow, at, lanes, rec, excuse)
        except RaceFound as race:
            self._race(pc, lanes, space, shadow, race.conflict, "writes")
        store.write(where, d.bytes, words)
        if d.strength == 0 and twice.any():
            rows, columns = np.nonzero(twice)
            differ = ~same(rows, columns)
            if self.redundant_stores == "fail":
                differ[:] = True
            self.order.redundant += len(rows)
            if differ.any():
                i = int(np.flatnonzero(differ)[0])
                word = int(shadow.w[at[rows[i], columns[i]]])
                other = Conflict(int(rows[i]), int(at[rows[i], columns[i]]),
                                 word >> 20 & (1 << 24) - 1, pc, True, False)  # fmt: skip
                self._race(pc, lanes, space, shadow, other, "writes")

    redundant_stores: str

    def _pieces(self, store: Bytes, shadow: Shadow, at: Array, piece: int) -> Array:
        """What a granule holds (granules of 16 bytes: both words, as one comparison)."""
        words = store.view(piece)
        if 1 << shadow.shift <= 8:
            return words[at]
        return np.stack([words[2 * at], words[2 * at + 1]], 1)

    # ------------------------------------------------------------------------------ atomics

    def atomic(
        self, pc: int, g: Array, addr: Array, values: Any, guard: Array | None, olds: Any
    ) -> Any:
        d: Access = self.described[pc]
        lanes, sel = g, None
        if guard is not None:
            sel = np.flatnonzero(guard)
            if not len(sel):
                return olds
            lanes, addr = g[sel], addr[sel]
            values = [v[sel] for v in values]
        out = np.empty(len(lanes), f"u{d.size}")
        for some, (space, where), part in self._spaces(pc, d, lanes, addr):
            given = values if part is None else [v[part] for v in values]
            store, shadow = self._writable(pc, d, some, space, where)
            if space == "shared":
                self._read_shared(pc, d.size, d.strength, some, where)
            else:
                self._check_written(pc, d, some, space, where)
            at = self._granules(shadow, where, d.size)
            try:
                self.order.write(shadow, at, some, self.order.stamp(some, pc, d.strength), None)
            except RaceFound as race:
                self._race(pc, some, space, shadow, race.conflict, "writes")
            before, changed = apply_atomic(d.op, d.kind, store.view(d.size), where // d.size, given)
            out[slice(None) if part is None else part] = before
            self.progress += int(changed)
            if (self.synchronises and not self.order.quiet(some)) or d.release:
                for lane, key in zip(some.tolist(), self._keys(space, where), strict=True):
                    self.order.strong_read(key, lane, d.strength, d.acquire)
                    self.order.strong_write(key, lane, d.strength, d.release, True)
        column = out.astype(f"u{d.widths[0] // 8}", copy=False)
        if sel is not None and olds is not None:
            merged = olds[0].copy()
            merged[sel] = column
            column = merged
        return (column,)

    def _keys(self, space: Any, where: Array) -> list[int]:
        if space == "shared":
            return (where + (1 << 60)).tolist()
        return (where + space.origin).tolist()

    def _after_strong_read(self, d: Access, lanes: Array, space: Any, where: Array) -> None:
        if not self.order.messages:
            return
        for lane, key in zip(lanes.tolist(), self._keys(space, where), strict=True):
            self.order.strong_read(key, lane, d.strength, d.acquire)

    def _after_store(self, d: Access, lanes: Array, space: Any, where: Array) -> None:
        if d.strength == 0:
            if self.order.messages:  # a weak store ends what the location carried
                for key in self._keys(space, where):
                    self.order.messages.pop(key, None)
            return
        if not d.release and self.order.quiet(lanes):
            return
        for lane, key in zip(lanes.tolist(), self._keys(space, where), strict=True):
            self.order.strong_write(key, lane, d.strength, d.release, False)

    # -------------------------------------------------------------------------------- races

    def _race(
        self, pc: int, lanes: Array, space: Any, shadow: Shadow, c: Conflict, does: str
    ) -> NoReturn:
        if isinstance(space, str):
            place = f"shared+{self._shared_offset(c.granule)}"
        else:
            address = (c.granule << shadow.shift) + space.origin
            place = space.place(max(address, space.start))
        block, thread = divmod(c.thread, self.order.tp)
        if c.flight:
            did = "a cp.async that nobody has waited for, issued by"
        else:
            did = "written by" if c.write else "read by"
        self.fault(
            Race, pc, int(lanes[c.row]),
            f"{does} {place}; {did} thread {thread} of block {block} at {self.site(c.pc)}, and "
            "nothing orders the two",
        )  # fmt: skip


def _near(a: Array, b: Array) -> Array:
    """fp32 words (or pairs of them) that a different rounding of one sum explains."""
    x, y = (np.ascontiguousarray(v).view(np.float32).astype(np.float64) for v in (a, b))
    near = np.abs(x - y) <= 1e-6 + 1e-3 * np.maximum(np.abs(x), np.abs(y))
    out: Array = near.reshape(*a.shape, -1).all(-1)
    return out


def _piece_of(new: Array, columns: Array, shadow: Shadow, piece: int, rows: Array) -> Array:
    if 1 << shadow.shift <= 8:
        return new[rows, columns]
    return np.stack([new[rows, 2 * columns], new[rows, 2 * columns + 1]], 1)
