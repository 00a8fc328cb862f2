"""bar and barrier: named barriers of a block, for all of its live threads or a given number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .emit_warp import Barrier
from .faults import BadLaunch, Deadlock, Fault
from .flow import Flow, Segment
from .order import Message, Order
from .syntax import Reg

Array = NDArray[Any]


@dataclass
class Waiting:
    """Lanes at a named barrier of a block."""

    expected: int | None = None  # None: all live threads
    arrived: int = 0
    groups: list[tuple[Segment, Array, Array | None]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)  # of bar.arrive
    votes: list[Array] = field(default_factory=list)


class Barriers:
    """The block-barrier part of the machine."""

    order: Order
    flow: Flow
    described: dict[int, Any]
    barriers: dict[tuple[int, int], Waiting]
    all: Array
    slots: int
    slot_of: Array
    block_of: Array
    live_in_slot: Array
    progress: int
    R: list[Array]

    def fault(self, kind: type[Fault], pc: int, lane: int, text: str) -> NoReturn:
        raise NotImplementedError

    def _enqueue(self, pc: int, lanes: Array) -> None:
        raise NotImplementedError

    def _arrive(
        self, segment: Segment, lanes: Array, ids: Array, counts: Array | None,
        votes: Array | None, guard: Array | None,
    ) -> None:  # fmt: skip
        if guard is not None:
            if not guard.all():
                self._enqueue(segment.end, lanes[~guard])
            lanes, ids = lanes[guard], ids[guard]
            counts = None if counts is None else counts[guard]
            votes = None if votes is None else votes[guard]
            if not len(lanes):
                return
        d: Barrier = self.described[segment.end - 1]
        slots = self.slot_of[lanes]
        if d.what == "sync" and counts is None and not self.barriers and (ids == ids[0]).all():
            here = np.bincount(slots, minlength=self.slots)
            whole = (here == self.live_in_slot) & (here > 0)
            go = whole[slots]
            if go.any():
                done = np.flatnonzero(whole)
                self.order.block_barrier(done, self.block_of[done])
                self.progress += 1
                self._enqueue(segment.end, lanes[go])
                if go.all():
                    return
                lanes, ids, slots = lanes[~go], ids[~go], slots[~go]
        key = slots * 16 + ids.astype(np.int64)
        if int(ids.max()) > 15:
            self.fault(BadLaunch, segment.end - 1, int(lanes[0]), "barrier number above 15")
        for one in np.unique(key).tolist():
            mine = key == one
            self._wait(
                (one // 16, one % 16), segment, d, lanes[mine],
                None if counts is None else counts[mine], None if votes is None else votes[mine],
            )  # fmt: skip

    def _wait(
        self, key: tuple[int, int], segment: Segment, d: Barrier, lanes: Array,
        counts: Array | None, votes: Array | None,
    ) -> None:  # fmt: skip
        pc = segment.end - 1
        waiting = self.barriers.setdefault(key, Waiting())
        expected = None if counts is None else int(counts[0])
        if expected is not None and (expected % 32 or (counts != expected).any()):
            self.fault(BadLaunch, pc, int(lanes[0]), f"thread count {expected}")
        if waiting.arrived and waiting.expected != expected:
            self.fault(
                Deadlock, pc, int(lanes[0]),
                f"barrier {key[1]} with {expected} threads, where others wait for "
                f"{waiting.expected}",
            )  # fmt: skip
        waiting.expected = expected
        waiting.arrived += len(lanes)
        if d.what == "arrive":
            waiting.messages += [self.order.snapshot(lane, 1) for lane in lanes.tolist()]
            self._enqueue(segment.end, lanes)
        else:
            waiting.groups.append((segment, lanes, votes))
        self._check(key)

    def _check(self, key: tuple[int, int]) -> None:
        waiting = self.barriers[key]
        need = self.live_in_slot[key[0]] if waiting.expected is None else waiting.expected
        if waiting.arrived < need:
            return
        del self.barriers[key]
        self.progress += 1
        lanes = np.sort(np.concatenate([g for _, g, _ in waiting.groups] or [self.all[:0]]))
        if len(lanes) == self.live_in_slot[key[0]]:
            slot = np.array([key[0]])
            self.order.block_barrier(slot, self.block_of[slot])
        elif len(lanes):
            self.order.meet(lanes, lanes, waiting.messages)
        cast = [v for _, _, v in waiting.groups if v is not None]
        total = np.concatenate(cast) if cast else None
        for segment, group, _ in waiting.groups:
            d: Barrier = self.described[segment.end - 1]
            if d.what == "red":
                self._reduced(segment, d, group, total)
            self._enqueue(segment.end, group)

    def _reduced(self, segment: Segment, d: Barrier, lanes: Array, votes: Any) -> None:
        value = {"popc": votes.sum(), "and": votes.all(), "or": votes.any()}[d.op]
        target = self.flow.function.body[segment.end - 1].operands[0]
        assert isinstance(target, Reg)
        register = self.R[target.index].copy()
        register[lanes] = value
        self.R[target.index] = register
