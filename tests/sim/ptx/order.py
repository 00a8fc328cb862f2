"""Happens-before, after PTX's memory model (PTX ISA chapter 8), and the races it leaves.

Every thread has a clock. A barrier of the whole block sets the clocks of its threads to a value
above all they had; what was stamped below that value (the block's base) is ordered before
everything after. bar.warp.sync does the same for a warp. What else orders (release and acquire
patterns, fences, barriers of a part of the block) is kept per thread as what it knows of others:
of every warp a clock, and of every thread that ever released alone a clock (a vector clock, whose
entries exist only where needed). Kernels without such instructions have none.

A record packs who touched a granule last and when:
    clock 20 bits | thread of the grid 24 bits | instruction 16 bits | flags 4 bits
The model is taken by its letter: a release pattern begins with a fence of the thread that writes
the flag. Fences of all threads before a barrier, and then one thread's relaxed flag, are a race
here (only the total order of fence.sc could excuse it).

Per granule the last write is kept and the last reads of two different warps. That is exact where
only whole-block barriers and warp barriers order; otherwise an older third reader may be forgotten
(a race missed, never one invented). Granules are as fine as the narrowest access of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import Unsupported
from .memory import untouched

Array = NDArray[Any]
U64 = np.uint64

CLOCK, THREAD, PC = 44, 20, 4
STRENGTH, MULTI, FLIGHT = U64(3), U64(4), U64(8)
_LANE = U64(31 << THREAD)
_WARP = U64(((1 << 24) - 32) << THREAD)
_THREADS = U64((1 << 24) - 1)
_END_OF_TIME = (1 << 20) - 1  # the clock of a copy in flight


class Shadow:
    """Records of an address range; `local` to a block (shared memory) or not."""

    def __init__(self, nbytes: int, shift: int, local: bool) -> None:
        self.shift, self.local = shift, local
        n = (nbytes >> shift) + 1
        self.w, self.r1, self.r2 = (untouched(n, U64) for _ in range(3))


@dataclass
class Message:
    """What an acquirer of a location learns."""

    scope: int
    block: int
    warps: Array
    threads: Array
    thread: int = -1  # who released last


@dataclass
class Moment:
    """What some lanes knew at a fence or release: rows of the arrays of `Order`. It becomes a
    message only for the lane that goes on to write a flag."""

    scope: int
    lanes: Array
    clock: Array
    of_block: Array  # clock below which the lane's block had met
    of_warp: Array
    warps: Array
    threads: Array


@dataclass
class Conflict:
    """The earlier access of a race; `row` is the later one's place in its group of lanes."""

    row: int
    granule: int
    thread: int
    pc: int
    write: bool
    flight: bool


class RaceFound(Exception):  # noqa: N818 - becomes a Race with names and lines
    def __init__(self, conflict: Conflict) -> None:
        super().__init__("race")
        self.conflict = conflict


class Order:
    def __init__(self, slots: int, threads: int, blocks: int) -> None:
        """threads: of a block, rounded up to whole warps; slots: blocks that run at a time."""
        self.slots, self.tp, self.blocks = slots, threads, blocks
        lanes = slots * threads
        if blocks * threads > 1 << 24:
            raise Unsupported(f"{blocks} blocks of {threads} threads: more than 2^24 threads")
        self.clock = np.ones(lanes, np.int64)
        self.thread = np.zeros(lanes, U64)
        self.tag = np.zeros(lanes, U64)  # thread << THREAD
        self.base_block = np.ones(blocks, np.int64)
        self.base_warp = np.ones(blocks * threads // 32, np.int64)
        self.floor = np.full(lanes, 1 << CLOCK, U64)
        # Knowledge beyond barriers, allocated by the first who needs it.
        self.of_warps: Array | None = None
        self.of_threads = np.zeros((lanes, 0), np.int64)
        self.column: dict[int, int] = {}
        self.columns = np.zeros(0, np.int64)
        self.messages: dict[int, Message] = {}
        self.fences: dict[int, Moment] = {}
        self.pending: dict[int, list[Message]] = {}
        self.redundant = 0  # stores of a value by several threads of one instruction
        self.near = 0  # of those, not the same bits (redundant_stores="near")

    def seat(self, lanes: Array, threads: Array, block: int) -> None:
        """A block takes a slot."""
        self.thread[lanes] = threads
        self.tag[lanes] = threads.astype(U64) << U64(THREAD)
        self.clock[lanes] = 1
        self.floor[lanes] = U64(1 << CLOCK)
        if self.of_warps is not None:
            self.of_warps[lanes] = 0
            self.of_threads[lanes] = 0
        if self.fences or self.pending:
            for lane in lanes.tolist():
                self.fences.pop(lane, None)
                self.pending.pop(lane, None)

    def stamp(self, lanes: Array, pc: int, strength: int) -> Array:
        now = self.clock[lanes].astype(U64) << U64(CLOCK)
        return now | self.tag[lanes] | U64(pc << PC | strength)

    # ----------------------------------------------------------------------------- accesses

    def read(self, shadow: Shadow, at: Array, lanes: Array, rec: Array, keep: bool = True) -> Array:
        """at: (n, k) granules; rec: (n,). Returns the records of the last writes."""
        w = shadow.w[at]
        cand = w >= self.floor[lanes][:, None] if shadow.local else w != 0
        if cand.any():
            self._judge(w, cand, at, lanes, rec, True)
        if keep:
            self._remember(shadow, at, rec)
        return w

    def _remember(self, shadow: Shadow, at: Array, rec: Array) -> None:
        old = shadow.r1[at]
        new = np.broadcast_to(rec[:, None], at.shape)
        diff = old ^ new
        other = ((diff & _WARP) != 0) & (old != 0)
        if other.any():
            shadow.r2[at[other]] = old[other]
        # Same warp, nothing in between: remember that it was more than one lane.
        several = ((diff & _LANE) | (old & MULTI)) != 0
        if self.of_warps is None:  # the lanes of a warp have one clock
            several &= (diff >> U64(THREAD + 5)) == 0
        else:
            warp = (self._of(rec) >> U64(5)).astype(np.int64)
            since = np.maximum(self.base_warp[warp], self.base_block[warp * 32 // self.tp])
            several &= ~other & (old >= (since.astype(U64) << U64(CLOCK))[:, None])
        if several.any():
            new = np.where(several, new | MULTI, new)
        shadow.r1[at] = new
        lost = shadow.r1[at] != new
        if lost.any():
            where, mine = at[lost], new[lost]
            won = shadow.r1[where]
            apart = ((won ^ mine) & _WARP) != 0
            shadow.r2[where[apart]] = mine[apart]
            shadow.r1[where[~apart]] |= MULTI

    def write(
        self,
        shadow: Shadow,
        at: Array,
        lanes: Array,
        rec: Array,
        same_before: Callable[[Array, Array], Array] | None,
        flight: bool = False,
    ) -> Array:
        """Returns the mask of granules that another lane of this instruction wrote as well.

        same_before(rows, columns): whether those granules held the new bytes already; None where
        equal values excuse nobody.
        """
        floor = self.floor[lanes][:, None]
        for which, records in ((True, shadow.w), (False, shadow.r1), (False, shadow.r2)):
            found = records[at]
            cand = found >= floor if shadow.local else found != 0
            if cand.any():
                self._judge(found, cand, at, lanes, rec, which, same_before)
        if flight:
            rec = rec | FLIGHT | U64(_END_OF_TIME << CLOCK)
        new = np.broadcast_to(rec[:, None], at.shape)
        shadow.w[at] = new
        twice: Array = shadow.w[at] != new
        if not shadow.local and twice.any():
            self._several_blocks(shadow, at, new, twice)
        return twice

    def _several_blocks(self, shadow: Shadow, at: Array, new: Array, twice: Array) -> None:
        """Blocks that run this instruction at once and hit the same granule: equal values are no
        excuse between blocks, only strength is."""
        rows, columns = np.nonzero(twice)
        won, mine = shadow.w[at[rows, columns]], new[rows, columns]
        apart = self._of(won) // U64(self.tp) != self._of(mine) // U64(self.tp)
        bad = np.flatnonzero(apart & (np.minimum(won & STRENGTH, mine & STRENGTH) < 2))
        if len(bad):
            i = int(bad[0])
            word = int(won[i])
            raise RaceFound(
                Conflict(
                    int(rows[i]), int(at[rows[i], columns[i]]),
                    word >> THREAD & (1 << 24) - 1, word >> PC & (1 << 16) - 1, True, False,
                )
            )  # fmt: skip

    def _judge(
        self,
        found: Array,
        cand: Array,
        at: Array,
        lanes: Array,
        rec: Array,
        was_write: bool,
        same_before: Callable[[Array, Array], Array] | None = None,
    ) -> None:
        rows, columns = np.nonzero(cand)
        before, who = found[rows, columns], lanes[rows]
        bad = self.unordered(before, who)
        if not bad.any():
            return
        rows, columns, before, who = rows[bad], columns[bad], before[bad], who[bad]
        mine = rec[rows]
        # Morally strong: both strong, each scope includes the other thread.
        weaker = np.minimum(before & STRENGTH, mine & STRENGTH)
        same_block = (self._of(before) // U64(self.tp)) == (self.thread[who] // U64(self.tp))
        bad = ~((weaker > 0) & (same_block | (weaker > 1))) | ((before & FLIGHT) != 0)
        if was_write and same_before is not None and bad.any():
            # The same instruction storing the same bytes from several threads of a block.
            pcs = U64(((1 << 16) - 1) << PC)
            twin = bad & ((before & pcs) == (mine & pcs)) & same_block & ((before & FLIGHT) == 0)
            if twin.any():
                twin &= same_before(rows, columns)
                self.redundant += int(twin.sum())
                bad &= ~twin
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            word = int(before[i])
            raise RaceFound(
                Conflict(
                    int(rows[i]), int(at[rows[i], columns[i]]),
                    word >> THREAD & (1 << 24) - 1, word >> PC & (1 << 16) - 1,
                    was_write, bool(word & int(FLIGHT)),
                )
            )  # fmt: skip

    def _of(self, records: Array) -> Array:
        return (records >> U64(THREAD)) & _THREADS

    def unordered(self, records: Array, lanes: Array) -> Array:
        """Whether nothing orders each recorded access before what its lane does now."""
        t = self._of(records)
        c = (records >> U64(CLOCK)).astype(np.int64)
        u = self.thread[lanes]
        single = (records & MULTI) == 0
        ok = (t == u) & single
        block = (u // U64(self.tp)).astype(np.int64)
        ok |= ((t // U64(self.tp)).astype(np.int64) == block) & (c < self.base_block[block])
        warp = (u >> U64(5)).astype(np.int64)
        ok |= ((t >> U64(5)).astype(np.int64) == warp) & (c < self.base_warp[warp])
        if self.of_warps is not None:
            ok |= self.of_warps[lanes, (t >> U64(5)).astype(np.int64)] > c
            if self.column:
                column = self.columns[t.astype(np.int64)]
                ok |= (column >= 0) & single & (self.of_threads[lanes, column] > c)
        return ~(ok & ((records & FLIGHT) == 0))

    # ----------------------------------------------------------------------------- barriers

    def block_barrier(self, slots: Array, blocks: Array) -> None:
        """All live threads of these slots have met."""
        clock = self.clock.reshape(self.slots, self.tp)
        now = clock[slots].max(1) + 1
        if now.max() >= _END_OF_TIME:
            raise Unsupported("more than a million synchronisations in a block")
        clock[slots] = now[:, None]
        self.base_block[blocks] = now
        self.floor.reshape(self.slots, self.tp)[slots] = (now.astype(U64) << U64(CLOCK))[:, None]
        if self.of_warps is not None:
            for slot in slots.tolist():
                rows = slice(slot * self.tp, (slot + 1) * self.tp)
                self.of_warps[rows] = self.of_warps[rows].max(0)
                self.of_threads[rows] = self.of_threads[rows].max(0)

    def warp_barrier(self, lanes: Array, whole: bool) -> None:
        """Lanes of one warp have met; whole: all that have not exited."""
        now = int(self.clock[lanes].max()) + 1
        if whole:
            self.clock[lanes] = now
            self.base_warp[int(self.thread[lanes[0]]) >> 5] = now
            if self.of_warps is not None:
                self.of_warps[lanes] = self.of_warps[lanes].max(0)
                self.of_threads[lanes] = self.of_threads[lanes].max(0)
        else:
            self.meet(lanes, lanes)

    def warp_barriers(self, lanes: Array) -> None:
        """Whole warps, all 32 lanes each, in order."""
        rows = lanes.reshape(-1, 32)
        now = self.clock[rows].max(1) + 1
        self.clock[rows] = now[:, None]
        self.base_warp[(self.thread[rows[:, 0]] >> U64(5)).astype(np.int64)] = now
        if self.of_warps is not None:
            for row in rows:
                self.of_warps[row] = self.of_warps[row].max(0)
                self.of_threads[row] = self.of_threads[row].max(0)

    def meet(self, arrived: Array, leaving: Array, sent: list[Message] | None = None) -> None:
        """What `arrived` did and knew is known to `leaving` (a barrier of a part of a block), and
        what those who only arrived had sent by then."""
        self._enable()
        messages = [self.snapshot(lane, 1) for lane in arrived.tolist()] + (sent or [])
        width = self.of_threads.shape[1]
        assert self.of_warps is not None
        warps = np.max([m.warps for m in messages], axis=0)
        threads = np.zeros(width, np.int64)
        for m in messages:
            np.maximum(threads[: len(m.threads)], m.threads, out=threads[: len(m.threads)])
        self.of_warps[leaving] = np.maximum(self.of_warps[leaving], warps)
        self.of_threads[leaving] = np.maximum(self.of_threads[leaving], threads)

    # ------------------------------------------------------------ release, acquire and fences

    def _enable(self) -> None:
        if self.of_warps is None:
            self.of_warps = np.zeros((len(self.clock), len(self.base_warp)), np.int64)
            self.columns = np.full(self.blocks * self.tp, -1, np.int64)

    def _column(self, thread: int) -> int:
        """Of a thread that releases alone."""
        column = self.column.get(thread)
        if column is None:
            column = self.column[thread] = len(self.column)
            self.columns[thread] = column
            if column >= self.of_threads.shape[1]:
                more = np.zeros((len(self.clock), max(8, column)), np.int64)
                self.of_threads = np.hstack([self.of_threads, more])
        return column

    def _moment(self, lanes: Array, scope: int) -> Moment:
        """What is ordered before now for these threads; their clocks move on."""
        self._enable()
        assert self.of_warps is not None
        thread = self.thread[lanes].astype(np.int64)
        moment = Moment(
            scope, lanes, self.clock[lanes], self.base_block[thread // self.tp],
            self.base_warp[thread >> 5], self.of_warps[lanes], self.of_threads[lanes],
        )  # fmt: skip
        self.clock[lanes] += 1
        return moment

    def _message(self, moment: Moment, lane: int, scope: int) -> Message:
        row = int(np.searchsorted(moment.lanes, lane))
        thread = int(self.thread[lane])
        column = self._column(thread)
        block, per = thread // self.tp, self.tp // 32
        warps = moment.warps[row].copy()
        own = slice(block * per, (block + 1) * per)
        warps[own] = np.maximum(warps[own], moment.of_block[row])
        warps[thread >> 5] = max(warps[thread >> 5], moment.of_warp[row])
        threads = np.zeros(self.of_threads.shape[1], np.int64)
        threads[: moment.threads.shape[1]] = moment.threads[row]
        threads[column] = moment.clock[row] + 1
        return Message(min(scope, moment.scope), block, warps, threads, thread)

    def snapshot(self, lane: int, scope: int) -> Message:
        return self._message(self._moment(np.array([lane]), scope), lane, scope)

    def fence(self, lanes: Array, scope: int) -> None:
        """Later strong writes release what is known now; earlier strong reads acquire."""
        if self.pending:
            for lane in lanes.tolist():
                for message in self.pending.pop(lane, ()):
                    if self._reaches(message, scope, lane):
                        self._learn(lane, message)
        self.fences.update(dict.fromkeys(lanes.tolist(), self._moment(lanes, scope)))

    def _reaches(self, message: Message, scope: int, lane: int) -> bool:
        weaker = min(message.scope, scope)
        return weaker > 1 or (weaker == 1 and int(self.thread[lane]) // self.tp == message.block)

    def _learn(self, lane: int, message: Message) -> None:
        assert self.of_warps is not None
        np.maximum(self.of_warps[lane], message.warps, out=self.of_warps[lane])
        row = self.of_threads[lane, : len(message.threads)]
        np.maximum(row, message.threads, out=row)

    def quiet(self, lanes: Array) -> bool:
        """Whether strong accesses of these lanes can carry nothing."""
        return not self.messages and not any(lane in self.fences for lane in lanes.tolist())

    def strong_read(self, key: int, lane: int, strength: int, acquire: bool) -> None:
        message = self.messages.get(key)
        if message is None or not self._reaches(message, strength, lane):
            return
        if acquire:
            self._learn(lane, message)
        else:
            weaker = min(strength, message.scope)
            self.pending.setdefault(lane, []).append(
                Message(weaker, message.block, message.warps, message.threads)
            )

    def strong_write(self, key: int, lane: int, strength: int, release: bool, rmw: bool) -> None:
        """An atomic hands on what it read (a release sequence). A plain store does not, unless its
        own thread has released this location before (the second form of a release pattern)."""
        message = None
        if release:
            message = self.snapshot(lane, strength)
        elif lane in self.fences:
            message = self._message(self.fences[lane], lane, strength)
        before = self.messages.get(key) if rmw else None
        if message is None and before is None:
            held = self.messages.get(key)
            if held is not None and held.thread != int(self.thread[lane]):
                del self.messages[key]
        elif message is None or before is None:
            self.messages[key] = message or before  # type: ignore[assignment]
        else:
            self.messages[key] = _joined(before, message)


def _joined(a: Message, b: Message) -> Message:
    """The weaker scope of the two only where they come from different blocks would lose order:
    messages of one block keep the wider one."""
    width = max(len(a.threads), len(b.threads))
    threads = np.zeros(width, np.int64)
    threads[: len(a.threads)] = a.threads
    np.maximum(threads[: len(b.threads)], b.threads, out=threads[: len(b.threads)])
    return Message(min(a.scope, b.scope), b.block, np.maximum(a.warps, b.warps), threads, b.thread)
