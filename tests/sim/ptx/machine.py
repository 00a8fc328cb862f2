"""One launch: lanes, their program counters, who runs next, barriers.

All resident blocks run as one vector. Lanes wait in groups by program counter; the lowest goes
first, so that lanes that parted meet again where their paths join. A group whose loop may be
waiting for others steps back behind everybody else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .access import Accesses
from .barriers import Barriers, Waiting
from .copies import Copies, Copy
from .diagnosis import Diagnosis
from .emit import NUMPY, Translator
from .faults import BadLaunch, Trap, Unsupported
from .flow import Flow, Segment
from .memory import SHARED_BASE, Bytes, Memory
from .order import Order, Shadow
from .syntax import Imm, Reg
from .traffic import Traffic
from .warps import Warps

Array = NDArray[Any]
MAX_LANES = 8192


@dataclass(frozen=True)
class Schedule:
    """In which of the allowed orders to run.

    order: of blocks and warps: forward, reverse, or random (then groups of warps are also torn
    apart at random). resident_blocks: how many blocks run at a time; None: as many as fit a vector
    of 8192 lanes (cooperative launches: all). sums: order of mma's additions (tensor.py).
    redundant_stores: "allow" lets threads of a block store the same bytes by the same instruction,
    as Triton does; "near" also fp32 values that differ as roundings of one sum do (LLVM contracts
    a product into the first step of a butterfly reduction, so that lanes round differently);
    "fail" calls any of it a race. patience: steps without any progress before a launch
    counts as dead-locked. traffic: count bank conflicts and sectors (slower).
    """

    seed: int = 0
    order: str = "forward"
    resident_blocks: int | None = None
    sums: str = "exact"
    redundant_stores: str = "allow"
    patience: int = 50_000
    traffic: bool = False


@dataclass
class Report:
    """What a launch executed, in warps (an instruction of a warp counts 1)."""

    instructions: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    redundant_stores: int = 0
    near_stores: int = 0  # of those, with bits that differ
    blocks: int = 0
    traffic: list[Traffic] = field(default_factory=list)  # if the schedule asks for it

    def count(self, prefix: str) -> int:
        return sum(n for op, n in self.instructions.items() if op.startswith(prefix))


class Machine(Diagnosis, Barriers, Accesses, Copies, Warps):
    def __init__(
        self,
        flow: Flow,
        translator: Translator,
        files: dict[int, str],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        params: bytes,
        shared_bytes: int,
        local_bytes: int,
        memory: Memory,
        schedule: Schedule,
        cooperative: bool,
        shifts: tuple[int, int],
        traits: tuple[bool, bool],
    ) -> None:
        self.flow, self.translator, self.files = flow, translator, files
        self.described = translator.described
        self.grid, self.block = grid, block
        self.memory, self.schedule = memory, schedule
        self.traffic = {} if schedule.traffic else None
        self.sums, self.redundant_stores = schedule.sums, schedule.redundant_stores
        self.synchronises, self.stores_to_global = traits
        self.threads = block[0] * block[1] * block[2]
        self.tp = -(-self.threads // 32) * 32
        self.blocks = grid[0] * grid[1] * grid[2]
        self.random = np.random.default_rng(schedule.seed)
        self.slots = self._residents(cooperative)
        self.lanes = self.slots * self.tp
        self._allocate(params, shared_bytes, local_bytes, shifts)
        self.ready: dict[int, Array] = {}
        self.resting: dict[int, int] = {}
        self.barriers: dict[tuple[int, int], Waiting] = {}
        self.steps = self.progress = self.idle = 0
        self.queue = self._block_order()
        self.report = Report(blocks=self.blocks)
        for slot in range(self.slots):
            self._seat(slot)

    # -------------------------------------------------------------------------------- set-up

    def _residents(self, cooperative: bool) -> int:
        given = self.schedule.resident_blocks
        if cooperative:
            if given is not None and given < self.blocks:
                raise BadLaunch(
                    f"{self.flow.function.name}: a cooperative launch of {self.blocks} blocks "
                    f"where {given} fit"
                )
            return self.blocks
        fit = max(1, MAX_LANES // self.tp)
        return max(1, min(self.blocks, fit if given is None else given))

    def _allocate(
        self, params: bytes, shared_bytes: int, local_bytes: int, shifts: tuple[int, int]
    ) -> None:
        lanes = self.lanes
        self.order = Order(self.slots, self.tp, self.blocks)
        self.R = [np.zeros(lanes, NUMPY[w]) for w in self.flow.function.widths]
        self.all = np.arange(lanes)
        self.slot_of = self.all // self.tp
        self.tid = np.zeros((3, lanes), np.uint32)
        self.ctaid = np.zeros((3, lanes), np.uint32)
        self.block_of = np.full(self.slots, -1, np.int64)
        self.alive = np.zeros(lanes, bool)
        self.live_in_warp = np.zeros(lanes // 32, np.int64)
        self.live_in_slot = np.zeros(self.slots, np.int64)
        self.params = np.frombuffer(params, np.uint8).copy()
        self.params_at = self.params.ctypes.data
        if len(self.params):
            self.memory = self.memory.copy()
            self.memory.add(self.params_at, len(self.params), False, True, "parameters")
        self.shared_bytes = shared_bytes
        self.shared_stride = -(-max(shared_bytes, 16) // 16) * 16
        self.shared = Bytes(np.zeros(self.slots * self.shared_stride, np.uint8))
        self.shared_shadow = Shadow(self.slots * self.shared_stride, shifts[0], True)
        self.shared_at = self.slot_of * self.shared_stride - SHARED_BASE
        self.local_bytes = local_bytes
        stride = -(-max(local_bytes, 16) // 16) * 16
        self.local = Bytes(np.zeros(lanes * stride if local_bytes else 16, np.uint8))
        self.local_written = np.zeros(len(self.local.raw), bool)
        self.local_at = self.all * stride - SHARED_BASE
        self.local_stride = stride
        self.global_shift = shifts[1]
        self.shadows: dict[int, Shadow] = {}
        self.copies: list[Copy] = []
        self.committed = np.zeros(lanes, np.int64)

    def _block_order(self) -> list[int]:
        blocks = list(range(self.blocks))
        if self.schedule.order == "reverse":
            blocks.reverse()
        elif self.schedule.order == "random":
            self.random.shuffle(blocks)
        elif self.schedule.order != "forward":
            raise BadLaunch(f"order {self.schedule.order!r}: forward, reverse or random")
        blocks.reverse()  # taken from the end
        return blocks

    def _seat(self, slot: int) -> None:
        """The next block takes a slot, its warps in the order of the schedule."""
        rows = slice(slot * self.tp, (slot + 1) * self.tp)
        block = self.queue.pop()
        warps = np.arange(self.tp // 32)
        if self.schedule.order == "reverse":
            warps = warps[::-1]
        elif self.schedule.order == "random":
            warps = self.random.permutation(warps)
        thread = (warps[:, None] * 32 + np.arange(32)).reshape(-1)
        x, y, _ = self.block
        self.tid[:, rows] = thread % x, thread // x % y, thread // (x * y)
        gx, gy, _ = self.grid
        for axis, value in enumerate((block % gx, block // gx % gy, block // (gx * gy))):
            self.ctaid[axis, rows] = value
        self.block_of[slot] = block
        there = thread < self.threads
        self.alive[rows] = there
        self.live_in_warp[slot * self.tp // 32 : (slot + 1) * self.tp // 32] = there.reshape(
            -1, 32
        ).sum(1)
        self.live_in_slot[slot] = self.threads
        lanes = self.all[rows]
        self.order.seat(lanes, block * self.tp + thread, block)
        self.shared.raw[slot * self.shared_stride : (slot + 1) * self.shared_stride] = 0xFF
        shift = self.shared_shadow.shift
        granules = slice(
            slot * self.shared_stride >> shift, (slot + 1) * self.shared_stride >> shift
        )
        for records in (self.shared_shadow.w, self.shared_shadow.r1, self.shared_shadow.r2):
            records[granules] = 0
        if self.local_bytes:
            self.local_written[rows.start * self.local_stride : rows.stop * self.local_stride] = (
                False
            )
        self.committed[rows] = 0
        self._enqueue(0, lanes[there])

    # ----------------------------------------------------------------------------- scheduling

    def run(self) -> Report:
        watched = (0, 0)
        for segment in self.flow.segments.values():
            segment.runs = 0
        with np.errstate(all="ignore"):
            while self.ready or self.barriers:
                picked = self._pick()
                if picked is None:
                    self._stuck()
                self._execute(*picked)
                self.steps += 1
                if self.progress != watched[1]:
                    watched = (self.steps, self.progress)
                elif self.steps - watched[0] > self.schedule.patience or (
                    min(self.idle, self.steps - watched[0]) > self.schedule.patience // 5
                ):
                    self._starved()
        self.report.steps = self.steps
        self.report.traffic = list((self.traffic or {}).values())
        self.report.redundant_stores = self.order.redundant
        self.report.near_stores = self.order.near
        for segment in self.flow.segments.values():
            for instr in self.flow.function.body[segment.start : segment.end]:
                if segment.runs:
                    self.report.instructions[instr.op] += segment.runs
        return self.report

    def _enqueue(self, pc: int, lanes: Array) -> None:
        waiting = self.ready.get(pc)
        if waiting is not None:
            lanes = np.sort(np.concatenate([waiting, lanes]))
        self.ready[pc] = lanes

    def _pick(self) -> tuple[Segment, Array] | None:
        for pc in self._candidates():
            segment, lanes = self.flow.segments[pc], self.ready[pc]
            if segment.collective and len(lanes) != self.lanes:
                go = self._together(segment, lanes)
                if not go.any():
                    continue
                if not go.all():
                    self.ready[pc] = lanes[~go]
                    return segment, lanes[go]
            if self.schedule.order == "random" and self.random.random() < 0.25:
                chosen = self.random.random(self.lanes // 32)[lanes >> 5] < 0.5
                if chosen.any() and not chosen.all():
                    self.ready[pc] = lanes[~chosen]
                    return segment, lanes[chosen]
            del self.ready[pc]
            if self.resting.pop(pc, None) is None:
                self.idle = 0
            else:
                self.idle += 1
            return segment, lanes
        return None

    def _candidates(self) -> list[int]:
        if len(self.ready) == 1:
            return list(self.ready)
        awake = sorted(pc for pc in self.ready if pc not in self.resting)
        if self.schedule.order == "random" and len(awake) > 1 and self.random.random() < 0.1:
            self.random.shuffle(awake)
        elif self.steps % 256 == 255:  # nobody starves behind a loop that never rests
            awake.reverse()
        return awake + sorted(self.resting, key=self.resting.__getitem__)

    def _together(self, segment: Segment, lanes: Array) -> Array:
        """Lanes whose warp (or whose mask) is complete here."""
        warp = lanes >> 5
        if segment.collective != "mask":
            here = np.bincount(warp, minlength=self.lanes // 32)
            want = 32 if segment.collective == "all32" else self.live_in_warp
            return (here == want)[warp]
        bits = np.zeros(self.lanes // 32, np.int64)
        np.bitwise_or.at(bits, warp, np.int64(1) << (lanes & 31))
        live = np.zeros(self.lanes // 32, np.int64)
        alive = np.flatnonzero(self.alive)
        np.bitwise_or.at(live, alive >> 5, np.int64(1) << (alive & 31))
        instr = self.flow.function.body[segment.start]
        operand = instr.operands[0 if instr.parts[0] == "bar" else -1]
        if isinstance(operand, Reg):
            mask = self.R[operand.index][lanes].astype(np.int64)
        else:
            assert isinstance(operand, Imm)
            mask = np.full(len(lanes), operand.bits & 0xFFFFFFFF, np.int64)
        go: Array = (mask & live[warp] & ~bits[warp]) == 0
        if instr.guard is not None:  # lanes that the guard leaves out need nobody
            register, negated = instr.guard
            go |= ~(self.R[register][lanes] ^ negated)
        return go

    def _execute(self, segment: Segment, lanes: Array) -> None:
        n = len(lanes)
        if n == self.lanes:
            lanes = self.all
            if segment.full is None:
                segment.full = self.translator.compile(segment, True)
            result = segment.full(self, lanes, n, self.R)  # type: ignore[operator]
            segment.runs += n >> 5
        else:
            if segment.partial is None:
                segment.partial = self.translator.compile(segment, False)
            result = segment.partial(self, lanes, n, self.R)  # type: ignore[operator]
            warp = lanes >> 5
            segment.runs += 1 + int((warp[1:] != warp[:-1]).sum())
        kind = segment.terminator
        if kind == "next":
            self._enqueue(segment.end, lanes)
        elif kind == "bra":
            self._branch(segment, lanes, result)
        elif kind == "bar":
            self._arrive(segment, lanes, *result)
        else:
            if result is not None:
                stay = lanes[~result]
                lanes = lanes[result]
                if len(stay):
                    self._enqueue(segment.end, stay)
            if len(lanes):
                self._exit(lanes)

    def _branch(self, segment: Segment, lanes: Array, taken: Array | None) -> None:
        if taken is not None:
            if not taken.any():
                self._enqueue(segment.end, lanes)
                return
            if not taken.all():
                self._enqueue(segment.end, lanes[~taken])
                lanes = lanes[taken]
        self._enqueue(segment.target, lanes)
        if segment.spins:
            self.resting[segment.target] = self.steps

    def _exit(self, lanes: Array) -> None:
        self.progress += 1
        self.alive[lanes] = False
        self.live_in_warp -= np.bincount(lanes >> 5, minlength=self.lanes // 32)
        slots = self.slot_of[lanes]
        self.live_in_slot -= np.bincount(slots, minlength=self.slots)
        for slot in np.unique(slots).tolist():
            if self.live_in_slot[slot] == 0:
                if self.copies:
                    self._drop_copies(slot)
                if self.queue:
                    self._seat(slot)
            elif self.barriers:
                for key in [k for k in self.barriers if k[0] == slot]:
                    self._check(key)

    def _drop_copies(self, slot: int) -> None:
        left = []
        for copy in self.copies:
            keep = np.flatnonzero(self.slot_of[copy.lanes] != slot)
            if len(keep):
                copy.lanes, copy.group = copy.lanes[keep], copy.group[keep]
                copy.at, copy.words = copy.at[keep], copy.words[keep]
                left.append(copy)
        self.copies = left

    # -------------------------------------------------------------------------- small services

    def parameter(self, at: int, size: int, signed: bool, width: int) -> Any:
        raw = int.from_bytes(self.params[at : at + size].tobytes(), "little", signed=signed)
        return NUMPY[width](raw & ((1 << width) - 1))

    def special(self, name: str, g: Array) -> Array:
        base, _, axis = name[1:].partition(".")
        k = "xyz".index(axis) if axis else 0
        n = len(g)
        if base in ("tid", "ctaid"):
            table = (self.tid if base == "tid" else self.ctaid)[k]
            return table if g is self.all else table[g]
        u32 = np.uint32
        if base in ("ntid", "nctaid"):
            return np.full(n, (self.block if base == "ntid" else self.grid)[k], u32)
        lane = (g & 31).astype(u32)
        if base == "laneid":
            return lane
        if base == "warpid":
            return ((self.order.thread[g] % np.uint64(self.tp)) >> np.uint64(5)).astype(u32)
        if base.startswith("lanemask"):
            return _lane_mask(base[-2:], lane)
        if base == "dynamic_smem_size":
            return np.full(n, self.dynamic_bytes, u32)
        if base == "total_smem_size":
            return np.full(n, self.shared_bytes, u32)
        if base == "smid":
            return self.slot_of[g].astype(u32)
        fixed = {"nwarpid": 64, "nsmid": self.slots, "gridid": 1}
        if base in fixed:
            return np.full(n, fixed[base], u32)
        if base.startswith(("clock", "globaltimer")):
            wide = base in ("clock64", "globaltimer")
            return np.full(n, 0 if base.endswith("hi") else self.steps, np.uint64 if wide else u32)
        raise Unsupported(f"special register {name}")

    dynamic_bytes = 0

    def trap(self, pc: int, g: Array, guard: Array | None) -> None:
        lanes = g if guard is None else g[guard]
        if len(lanes):
            self.fault(Trap, pc, int(lanes[0]), "was executed")


def _lane_mask(which: str, lane: Array) -> Array:
    one = np.uint64(1)
    bit = one << lane.astype(np.uint64)
    below = bit - one
    found = {"eq": bit, "lt": below, "le": below | bit, "gt": ~(below | bit), "ge": ~below}[which]
    return (found & np.uint64(0xFFFFFFFF)).astype(np.uint32)
