"""Faults in words: where, who, and what the others were doing."""

from __future__ import annotations

from typing import Any, NoReturn

from numpy.typing import NDArray

from .barriers import Waiting
from .faults import Deadlock, Diverged, Fault
from .flow import Flow
from .order import Order

Array = NDArray[Any]


class Diagnosis:
    """The complaining part of the machine."""

    order: Order
    flow: Flow
    files: dict[int, str]
    tp: int
    tid: Array
    ctaid: Array
    alive: Array
    block_of: Array
    live_in_slot: Array
    queue: list[int]
    ready: dict[int, Array]
    barriers: dict[tuple[int, int], Waiting]

    def site(self, pc: int) -> str:
        instr = self.flow.function.body[pc]
        text = f"PTX line {instr.line} `{instr.text}`"
        if instr.loc:
            where = [f"{self.files.get(f, f'file {f}')}:{line}" for f, line, _ in instr.loc if line]
            if where:
                text += f" ({', called at '.join(where)})"
        return text

    def who(self, lane: int) -> str:
        block = tuple(int(x) for x in self.ctaid[:, lane])
        warp = int(self.order.thread[lane]) % self.tp >> 5
        thread = tuple(int(x) for x in self.tid[:, lane])
        return f"block {block}, warp {warp}, lane {lane & 31} (thread {thread})"

    def fault(self, kind: type[Fault], pc: int, lane: int, text: str) -> NoReturn:
        raise kind(
            f"{kind.__name__} in {self.flow.function.name} at {self.site(pc)}, "
            f"{self.who(lane)}: {text}"
        )

    def _stuck(self) -> NoReturn:
        """Nobody can go on: lanes wait for their warp, or at barriers."""
        for pc, lanes in sorted(self.ready.items()):
            warp = int(lanes[0]) >> 5
            here = lanes[lanes >> 5 == warp]
            missing = [k for k in range(32) if warp * 32 + k not in here]
            exited = [k for k in missing if not self.alive[warp * 32 + k]]
            elsewhere = self._whereabouts(warp, [k for k in missing if k not in exited])
            self.fault(
                Diverged, pc, int(lanes[0]),
                f"needs the whole warp or mask; lanes {missing} do not come (exited: {exited}"
                f"{elsewhere})",
            )  # fmt: skip
        key, waiting = next(iter(self.barriers.items()))
        lines = [
            f"{len(lanes)} threads at {self.site(s.end - 1)}" for s, lanes, _ in waiting.groups
        ]
        raise Deadlock(
            f"Deadlock in {self.flow.function.name}: block {int(self.block_of[key[0]])} waits at "
            f"barrier {key[1]} with {waiting.arrived} of "
            f"{waiting.expected or int(self.live_in_slot[key[0]])} threads: {'; '.join(lines)}"
        )

    def _whereabouts(self, warp: int, lanes: list[int]) -> str:
        places = dict(self.ready)
        for waiting in self.barriers.values():
            for segment, group, _ in waiting.groups:
                places[segment.end - 1] = group
        for k in lanes:
            for pc, group in places.items():
                if warp * 32 + k in group:
                    return f"; lane {k} waits at {self.site(pc)}"
        return ""

    def _starved(self) -> NoReturn:
        spots = [f"{len(lanes)} threads at {self.site(pc)}" for pc, lanes in self.ready.items()]
        queue = f"; {len(self.queue)} blocks have not started" if self.queue else ""
        raise Deadlock(
            f"Deadlock in {self.flow.function.name}: no memory changed, no barrier completed and "
            f"no thread ended for a long time{queue}. Running: {'; '.join(spots[:4])}"
        )
