"""A step of decoding over a KV cache (attention_kv_cache*): *model*, not run on hardware yet.

A call is one kernel over the splits of every kv head's keys and, where there are several splits, a
second one that merges them. What the first one takes is the largest of

  dram    every key and value once, q and o, at DRAM's rate
  chain   the tiles of a block one after the other, by what it waits for: a block of the CUDA
          kernel waits for k, then for v, of each tile (waits: 2); one of Triton's loop of s stages
          has s - 1 tiles under way. Blocks beyond those that an SM holds make more waves
  pipes   the machine code of an SM's blocks (predict.bound)
  port    an SM's share of the keys, through its port of L2

and before and behind it what nothing hides: the launch, the table of pages, the end of a block. The
merge is a chain of L2 round trips: one for each wait that its machine code has (waits()), and a
launch. `best` takes the near end of each range of latency.py and all of a trip's work behind its
loads, `worst` the far end and none of it. Splits, rows and launches are the library's own plan, in
the list that `python -m sim cubins` and `python -m rungs cubins` write (decode_list.py). Left out:
other architectures' clocks, a DRAM that has not come up to speed, L2 that holds the cache already.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.model import pipes
from bench.model.archs import Arch
from bench.model.latency import (
    DRAM_SHARE,
    KERNEL_S,
    L2_BYTES_OF_SM,
    LOADED,
    ROUND_TRIPS,
    SHARED,
    Pair,
)
from bench.model.occupancy import occupancy
from bench.model.predict import ModelError, bound
from bench.model.sass import Block, Function, Instruction

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MAX_SPLITS = 64  # what both launchers allow
BOUNDS = ("dram", "chain", "pipes", "port")
_BARRIERS = 3  # at the end of a block: parts, weights, sums


@dataclass(frozen=True)
class Call:
    """q (B, H, Sq, D) over caches (B, Hk, Sk, D), full to the last slot; page: keys of a page, 0 =
    contiguous."""

    dtype: str
    B: int
    H: int
    Hk: int
    Sq: int
    Sk: int
    D: int
    page: int = 0

    def __post_init__(self) -> None:
        if self.H % self.Hk:
            raise ModelError(f"{self}: heads are no multiple of kv heads")

    @property
    def packed(self) -> int:
        """Rows of a kv head."""
        return self.H // self.Hk * self.Sq

    @property
    def kv_bytes(self) -> float:
        return 2.0 * self.B * self.Hk * self.Sk * self.D * BYTES[self.dtype]

    @property
    def dram_bytes(self) -> float:
        """k, v, q, o; the parts of splits stay in L2."""
        return self.kv_bytes + 2.0 * self.B * self.H * self.Sq * self.D * BYTES[self.dtype]


@dataclass(frozen=True)
class Attend:
    """The kernel over a split's keys, and its launch."""

    name: str
    function: Function
    registers: int
    threads: int
    shared: int
    rows: int  # of a block
    keys: int  # of a tile
    stages: int | None  # of Triton's loop; None: the CUDA kernel's two waits a tile


@dataclass(frozen=True)
class Merge:
    function: Function
    at_once: int | None = None  # splits that a trip of its loop has; None: as many as its loads say


@dataclass(frozen=True)
class Code:
    trip: Counter[str]  # one warp, a tile of keys
    outside: Counter[str]  # the way in and out


@functools.lru_cache
def read(attend: Attend, head_dim: int) -> Code:
    """The loop over the cache's keys: of the outermost ones with products that with most of them.

    A loop inside it (the CUDA kernel's q k^T in fp32) runs as often as a tile's products want.
    """
    function = attend.function
    hot = _is_mma if any(map(_is_mma, function.instructions)) else _is_fma
    inner = [x for x in function.loops if any(_count(function.blocks[b], hot) for b in x.blocks)]
    loops = [x for x in inner if not any(x.blocks < y.blocks for y in inner)]
    if not loops:
        raise ModelError(f"{attend.name}: no loop with products")

    # As in predict._worth, but that loads into registers count where none are asynchronous.
    copies = any(x.op.startswith("LDGSTS") for x in function.instructions)
    load = "LDGSTS" if copies else "LDG.E.128"

    def worth(block: Block) -> tuple[float, ...]:
        loads = sum(x.op.startswith(load) for x in block.instructions)
        return _count(block, hot), loads, -len(block.instructions)

    trips = {x: function.plain_trip(x, worth) for x in loops}
    loop = max(loops, key=lambda x: sum(_count(b, hot) for b in trips[x]))
    trip = pipes.total(trips[loop])
    nested = [x for x in inner if x.blocks < loop.blocks]
    if len(nested) > 1:
        raise ModelError(f"{attend.name}: {len(nested)} loops with products in one trip")
    again = pipes.total(function.plain_trip(nested[0], worth)) if nested else Counter[str]()
    times = _times(attend, head_dim, trip, again)
    for kind, much in again.items():
        trip[kind] += (times - 1) * much
    apart = set().union(*(x.blocks for x in loops))
    return Code(trip, pipes.total(b for b in function.plain_run(worth) if b.index not in apart))


def _times(attend: Attend, head_dim: int, trip: Counter[str], again: Counter[str]) -> int:
    """How often the loop inside a trip runs, by a tile's two products; fp32 on tensor cores has
    three of tf32 for each. FMAs are counted with those of the softmax."""
    warps = attend.threads // 32
    needed = 2 * 2.0 * attend.rows * attend.keys * head_dim * (3 if trip["mma_tf32"] else 1)
    if not (done := warps * pipes.tensor_flops(trip)):
        done = warps * trip["fp32"] * 2
        if not 1 <= done / needed < 1.2:
            raise ModelError(f"{attend.name}: a trip has {done / needed:.3f} tiles' FMAs, not one")
        return 1
    each = warps * pipes.tensor_flops(again)
    times = 1 + (needed - done) / each if each else 1.0
    if times != int(times) or times < 1 or (not each and done != needed):
        raise ModelError(f"{attend.name}: a trip has {done / needed:.3f} tiles' products, not one")
    return int(times)


def _count(block: Block, what: Callable[[Instruction], bool]) -> int:
    return sum(map(what, block.instructions))


def _is_mma(x: Instruction) -> bool:
    return x.op.split(".")[0] in ("HMMA", "HGMMA")


def _is_fma(x: Instruction) -> bool:
    return x.op.split(".")[0] in ("FFMA", "FFMA2")


@functools.lru_cache
def waits(merge: Merge) -> tuple[int, int, int]:
    """Of a trip of the merge's loop: waits for parts (16 bytes a lane), for sums alone; splits.

    Instructions start in order, so one that reads a register of a load under way waits for it; for
    asynchronous copies a barrier stands.
    """
    loops = merge.function.innermost(_is_wide)
    if not loops:
        raise ModelError(f"{merge.function.name}: no loop over splits that loads 16 bytes a lane")

    def worth(block: Block) -> tuple[float, ...]:
        return sum(x.op.startswith("LDG") for x in block.instructions), -len(block.instructions)

    trips = (merge.function.plain_trip(loop, worth) for loop in loops)
    trip = max(trips, key=lambda t: sum(_count(block, _is_wide) for block in t))
    code = [x for block in trip for x in block.instructions]
    wide, narrow = _waits(code)
    return wide, narrow, merge.at_once or _splits_of(code)


def _is_wide(x: Instruction) -> bool:
    return x.op.startswith("LDG") and ".128" in x.op


def _splits_of(code: list[Instruction]) -> int:
    """Of the CUDA kernel: a split's loads have one base and differ in columns, by predicate; there
    are kMaxHeadDim / 128 = 2 of them."""
    return max(1, sum(map(_is_wide, code)) // 2)


_WORDS = {"64": 2, "128": 4}


def _waits(code: Iterable[Instruction]) -> tuple[int, int]:
    """Times that an instruction stands for a load: those of 16 bytes, others alone."""
    under_way: dict[int, bool] = {}  # register -> wide
    wide = narrow = 0
    copies = False
    for x in code:
        if x.op.startswith("LDGSTS"):
            copies = True
        elif x.op.startswith("DEPBAR") and copies:
            wide, copies = wide + 1, False
        first, _, rest = x.operands.partition(",")
        written = re.fullmatch(r"R(\d+)", first.strip())  # stores and predicates begin otherwise
        read = re.findall(r"\bR(\d+)\b", rest if written else x.operands)
        if any(int(r) in under_way for r in read):
            for_wide = any(under_way.values())
            wide, narrow = wide + for_wide, narrow + (not for_wide)
            under_way.clear()
        if x.op.startswith("LDG.") and written:
            width = next((_WORDS[m] for m in x.op.split(".") if m in _WORDS), 1)
            under_way |= {int(written[1]) + i: width == 4 for i in range(width)}
    return wide, narrow


@dataclass(frozen=True)
class Step:
    """Seconds, (best, worst)."""

    call: Call
    splits: int
    blocks: int  # with keys
    resident: int  # of an SM
    limit: str
    waves: int
    trips: int  # of the block that has most
    bounds: dict[str, Pair]
    around: Pair  # the launch and what a block does before and behind its tiles
    merge: Pair  # with its launch
    roof: float  # DRAM's whole rate

    @property
    def attend(self) -> Pair:
        return _both(lambda i: self.around[i] + max(b[i] for b in self.bounds.values()))

    @property
    def seconds(self) -> Pair:
        return _both(lambda i: self.attend[i] + self.merge[i])

    @property
    def binding(self) -> tuple[str, str]:
        """What wins, at best and at worst."""
        first, last = (
            max(self.bounds, key=lambda name, i=i: self.bounds[name][i])  # type: ignore[misc]
            for i in (0, 1)
        )
        return first, last

    @property
    def share(self) -> Pair:
        """Of DRAM's rate, (best, worst)."""
        return _both(lambda i: self.roof / self.seconds[i])


def step(call: Call, arch: Arch, attend: Attend, merge: Merge, splits: int) -> Step:
    """splits: the plan's, or another number that is to be compared."""
    if arch.clock is None:
        raise ModelError(f"{arch.name}: no clock")
    if not 1 <= splits <= MAX_SPLITS:
        raise ModelError(f"splits must be 1 to {MAX_SPLITS}, got {splits}")
    code = read(attend, call.D)
    if missing := pipes.undocumented(code.trip + code.outside, arch):
        raise ModelError(f"{arch.name}: no rate for {', '.join(missing)}")
    fits = occupancy(arch, attend.registers, attend.shared, attend.threads)
    if not fits.blocks:
        raise ModelError(f"{attend.name}: no block fits {arch.name}, {fits.limit}")
    tiles = -(-call.Sk // attend.keys)
    trips = -(-tiles // splits)  # a split's share, as the kernels cut it
    row_blocks = -(-call.packed // attend.rows)
    blocks = call.B * call.Hk * row_blocks * -(-tiles // trips)
    waves = -(-blocks // (fits.blocks * arch.sms))
    of_an_sm = -(-blocks // arch.sms)
    warps = attend.threads // 32
    trip = _cycles(code.trip, warps, arch)
    outside = _cycles(code.outside, warps, arch)
    tile_bytes = 2.0 * attend.keys * call.D * BYTES[call.dtype]
    seconds = {
        "dram": _both(lambda i: call.dram_bytes / arch.dram / DRAM_SHARE[i]),
        "chain": _both(lambda i: waves * trips * _trip(attend, trip, arch)[i] / _clock(arch)),
        "pipes": _both(lambda i: of_an_sm * trips * bound(trip, float(i)) / _clock(arch)),
        "port": _both(lambda i: of_an_sm * trips * tile_bytes / L2_BYTES_OF_SM[i] / _clock(arch)),
    }
    return Step(
        call, splits, blocks, fits.blocks, fits.limit, waves, trips, seconds,
        _around(call, outside, waves, arch),
        (0.0, 0.0) if splits == 1 else _merging(merge, splits, arch),
        call.dram_bytes / arch.dram,
    )  # fmt: skip


def _both(f: Callable[[int], float]) -> Pair:
    return f(0), f(1)


def _clock(arch: Arch) -> float:
    assert arch.clock is not None
    return arch.clock


def _cycles(work: Counter[str], warps: int, arch: Arch) -> dict[str, float]:
    found = pipes.cycles({k: n * warps for k, n in work.items()}, arch)
    assert found is not None  # nothing is undocumented
    return found


def _trip(attend: Attend, trip: dict[str, float], arch: Arch) -> Pair:
    """Cycles from one tile of a block to the next. One stage: k and v are asked for together or one
    after the other, and nothing is under way while they are worked on."""
    dram = ROUND_TRIPS[arch.name].dram
    alone = _both(lambda i: bound(trip, float(i)))
    if attend.stages == 1:
        return _both(lambda i: (1 + i) * dram[i] * LOADED[i] + alone[i])
    each = 2.0 if attend.stages is None else 1 / (attend.stages - 1)
    return max(each * dram[0], alone[0]), each * dram[1] * LOADED[1] + alone[1]


def _around(call: Call, outside: dict[str, float], waves: int, arch: Arch) -> Pair:
    """The smallest kernel has a round trip of its own: here the one for the lengths."""
    there = ROUND_TRIPS[arch.name]
    pages = (there.l2[0], there.dram[1]) if call.page else (0.0, 0.0)
    return _both(
        lambda i: (
            KERNEL_S[i]
            + waves * (pages[i] + bound(outside, float(i)) + _BARRIERS * SHARED[i]) / _clock(arch)
        )
    )


def _merging(merge: Merge, splits: int, arch: Arch) -> Pair:
    """Sums first, which a loop may read once more, from L1 at best; then the parts."""
    wide, narrow, at_once = waits(merge)
    there = ROUND_TRIPS[arch.name]
    trips = -(-splits // at_once)
    sums = (there.l1, there.l2[1])
    return _both(
        lambda i: (
            KERNEL_S[i]
            + (there.l2[i] + trips * (wide * there.l2[i] + narrow * sums[i])) / _clock(arch)
        )
    )


def best_splits(call: Call, arch: Arch, attend: Attend, merge: Merge) -> Step:
    """Of all numbers of splits the one that is fastest in the mean of best and worst."""
    found = (step(call, arch, attend, merge, n) for n in range(1, MAX_SPLITS + 1))
    return min(found, key=lambda s: sum(s.seconds))
