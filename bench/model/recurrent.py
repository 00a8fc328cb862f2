"""A step of the recurrent kernels (csrc/cuda/recurrent*): *model*, not run on hardware yet.

Steps wait for each other, so a step is a chain of latencies, and throughput matters only where a
link of the chain asks for more than a latency. Of the tier that shares W_hh between blocks (grid):

  load     h of all blocks comes from L2: a round trip, and its bytes at L2's rate
  product  the block's share of W_hh h: the kernel's machine code by pipes (predict.bound), or the
           chain of dependent mma of one warp where that is longer
  cell     sums of the warps through shared memory, gates, state: machine code, or the chain
  barrier  h is on its way to L2 and acknowledged, the arrival is, a poll sees the last one

The inputs' gx comes from DRAM while load and product run. A block that has all of W_hh (block) has
no load and no barrier. Where W_hh does not fit (step) a GEMM and a kernel follow each other. `best`
and `worst` take the ends of each latency's range; both leave out what nobody here has seen:
contention of polls, clocks, launch.

Latencies and their sources are in latency.py; the links of the chain behind the product (CELL) are
counted by hand in recurrent_cells.cuh, 4 cycles an arithmetic instruction and 20 to 30 a MUFU,
which is an assumption.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.model import pipes, tools
from bench.model.archs import ARCHS, Arch
from bench.model.latency import (
    KERNEL_S,
    L2_BYTES,
    L2_BYTES_OF_SM,
    MMA,
    ROUND_TRIPS,
    SHARED,
    Pair,
)
from bench.model.predict import EXPOSED, ModelError, bound
from bench.model.sass import Block, Function, Instruction, functions

# A barrier: stores acknowledged, arrival seen; then half a poll on average, or a whole one.
BARRIER_TRIPS = (2.0, 3.0)
CELL = (40 * 4.0 + 6 * 20.0, 60 * 4.0 + 8 * 30.0)
NOTHING = (0.0, 0.0)
WARPS, UNITS, CHUNK_BYTES = 8, 16, 64  # of recurrent_product.cuh
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
REGISTERS = 96  # of a thread, for weights


@dataclass(frozen=True)
class Call:
    """One layer, all its directions."""

    cell: str
    dtype: str
    T: int
    B: int
    H: int
    D: int = 1
    backward: bool = False

    @property
    def columns(self) -> int:
        """Of a row of the product."""
        return self.H * (GATES[self.cell] if self.backward else 1)

    @property
    def tiles(self) -> int:
        """m tiles of 16 units."""
        return 1 if self.backward else GATES[self.cell]

    @property
    def chunks(self) -> int:
        return -(-self.columns * BYTES[self.dtype] // CHUNK_BYTES)

    @property
    def pitch(self) -> int:
        return (self.chunks | 1) * CHUNK_BYTES


@dataclass(frozen=True)
class Plan:
    """recurrent_plan() of csrc/cuda/recurrent.cu."""

    tier: str
    slices: int = 1
    directions: int = 1
    rows: int = 0
    groups: int = 1


def plan(call: Call, arch: Arch) -> Plan:
    """One block a multiprocessor: the grid tier's kernels take every register of it."""
    if call.H <= 128 and _shared(call, alone=True) <= arch.shared_block:
        return Plan("block", 1, call.D, 8, -(-call.B // 8))
    slices = -(-call.H // UNITS)
    if slices > arch.sms or _shared(call, alone=False) > arch.shared_block:
        return Plan("step")
    directions = call.D if call.D * slices <= arch.sms else 1
    most = arch.sms // (slices * directions)
    rows = math.ceil(math.ceil(call.B / most) / 8) * 8
    return Plan("grid", slices, directions, rows, -(-call.B // rows))


def _shared(call: Call, alone: bool) -> int:
    """shared_bytes() there."""
    wide = call.dtype == "fp32"
    batch = 8 if alone or wide else 16
    held = REGISTERS // (12 if alone and wide else 8) // call.tiles
    split = 1 if alone else WARPS
    rest = max(0, call.chunks - split * held)
    unit_tiles = -(-call.H // UNITS) if alone else 1
    parts = WARPS * call.tiles * batch * 20 * 4
    weights = unit_tiles * rest * call.tiles * 2 * 512
    return parts + weights + (2 * batch * call.pitch if alone else 0)


@dataclass(frozen=True)
class Code:
    """Work of one warp, from the SASS of a tile of sequences."""

    product: Counter[str]  # blocks with tensor-core instructions
    rest: Counter[str]  # the others: gx, sums, cell, results


@functools.lru_cache
def read(function: Function) -> Code:
    """The loop over tiles of sequences: the one around the loop over what is in shared memory."""
    hot = [x for x in function.loops if any(_tensor(function.blocks[b]) for b in x.blocks)]
    if len(hot) < 2:
        raise ModelError(f"{function.name}: no loop over tiles around one over chunks")
    trip = function.plain_trip(hot[1], _worth)
    return Code(
        pipes.total(b for b in trip if _tensor(b)), pipes.total(b for b in trip if not _tensor(b))
    )


def _tensor(block: Block) -> int:
    return sum(x.op.startswith("HMMA") for x in block.instructions)


def _worth(block: Block) -> tuple[float, ...]:
    """Products, then the cell: a sequence that is not there has neither gates nor stores."""

    def count(*ops: str) -> int:
        return sum(_is(x, *ops) for x in block.instructions)

    return _tensor(block), count("MUFU"), count("STG", "ST"), -len(block.instructions)


def _is(x: Instruction, *ops: str) -> bool:
    return x.op.split(".")[0] in ops


def mma_of_chunk(dtype: str) -> int:
    """Of 8 sequences and a tile of units: two k steps; fp32 as three products of tf32 parts."""
    return 6 if dtype == "fp32" else 2


@dataclass(frozen=True)
class Step:
    """Cycles of a step, (best, worst), by link; of the step tier seconds alone."""

    call: Call
    plan: Plan
    load: tuple[float, float]
    product: tuple[float, float]
    cell: tuple[float, float]
    barrier: tuple[float, float]
    bytes: float  # through L2 a step: h for all blocks (step tier: W_hh)
    seconds: tuple[float, float]  # a step of all directions

    @property
    def of_call(self) -> tuple[float, float]:
        """The recurrence: without the GEMMs around it, without launches."""
        return self.seconds[0] * self.call.T, self.seconds[1] * self.call.T


def step(call: Call, arch: Arch, code: Code | None) -> Step:
    """code: of the kernel that the plan takes; None for the step tier."""
    found = plan(call, arch)
    if found.tier == "step":
        return _step_tier(call, found, arch)
    if code is None or arch.clock is None:
        raise ModelError(f"{call}: the {found.tier} tier's machine code is needed")
    alone = found.tier == "block"
    sequences = min(found.rows, call.B)
    blocks = found.slices * found.directions * found.groups
    moved = 0.0 if alone else float(blocks * sequences * call.pitch)
    trip = ROUND_TRIPS[arch.name]
    load = NOTHING if alone else _load(call, sequences, moved, blocks, trip.l2)
    product = _product(call, alone, sequences, code, arch)
    cell = _cell(call, alone, sequences, code, arch)
    barrier = NOTHING if alone else _both(lambda i: BARRIER_TRIPS[i] * trip.l2[i] + 2 * SHARED[i])
    # Both directions at once, or in turn.
    rate = arch.clock / (call.D // found.directions)
    seconds = _both(
        lambda i: (max(trip.dram[i], load[i] + product[i]) + cell[i] + barrier[i]) / rate
    )
    return Step(call, found, load, product, cell, barrier, moved, seconds)


def _both(f: Callable[[int], float]) -> tuple[float, float]:
    return f(0), f(1)


def _width(call: Call, alone: bool) -> int:
    """Sequences of a tile: Geometry::kBatch."""
    return 8 if alone or call.dtype == "fp32" else 16


def _load(call: Call, sequences: int, moved: float, blocks: int, l2: Pair) -> Pair:
    """A round trip a tile; at worst one for each few chunks that a warp asks for at once. All
    blocks load at once, each through its own port."""
    tiles = -(-sequences // _width(call, alone=False))
    held = REGISTERS // 8 // call.tiles
    ahead = 1 if call.dtype == "fp32" and call.tiles == 4 else min(held, 4)
    trips = (tiles, tiles * -(-call.chunks // WARPS // ahead))
    own = moved / blocks
    rest = _both(lambda i: max(moved / L2_BYTES[i], own / L2_BYTES_OF_SM[i]))
    return _both(lambda i: trips[i] * l2[i] + rest[i])


def _product(
    call: Call, alone: bool, sequences: int, code: Code, arch: Arch
) -> tuple[float, float]:
    """All tiles of sequences, one after the other; a block alone has a warp per 16 units."""
    warps = min(WARPS, -(-call.H // UNITS)) if alone else WARPS
    chunks = call.chunks if alone else -(-call.chunks // WARPS)  # of the warp that has most
    eights = -(-sequences // 8)
    mma = chunks * call.tiles * mma_of_chunk(call.dtype) * eights
    each = 16 * 8 * (8 if call.dtype == "fp32" else 16) * 2.0
    scale = mma * each / pipes.tensor_flops(code.product)
    cycles = pipes.cycles({k: n * scale * warps for k, n in code.product.items()}, arch)
    if cycles is None:
        raise ModelError(f"{arch.name}: no rate for {pipes.undocumented(code.product, arch)}")
    wide = _width(call, alone) // 8  # eights that a warp has at once
    # Sums of 16 bits are one chain over the chunks, those of fp32 begin anew in each.
    links = chunks * 2 if call.dtype != "fp32" else chunks + mma_of_chunk(call.dtype) - 1
    return _both(lambda i: max(bound(cycles, EXPOSED), -(-eights // wide) * links * MMA[i]))


def _cell(call: Call, alone: bool, sequences: int, code: Code, arch: Arch) -> tuple[float, float]:
    """A warp has 16 units of two sequences. One of a block that is alone has 32 units, of which its
    code goes through four pairs of sequences; what is not there is skipped."""
    tiles = -(-sequences // _width(call, alone))
    warps = sequences if alone else -(-sequences // 2)
    cycles = pipes.cycles({k: n * warps for k, n in code.rest.items()}, arch)
    if cycles is None:
        raise ModelError(f"{arch.name}: no rate for {pipes.undocumented(code.rest, arch)}")
    work = bound(cycles, EXPOSED)
    return _both(lambda i: max(work, tiles * (3 * SHARED[i] + CELL[i])))


def _step_tier(call: Call, found: Plan, arch: Arch) -> Step:
    """A GEMM a direction and a kernel: as short kernels cost at least, or as W_hh takes from L2
    (from DRAM where it does not fit there: half of L2 is taken to be the weights')."""
    weights = float(call.D * GATES[call.cell] * call.H * call.H * BYTES[call.dtype])
    clock = arch.clock or 1.0
    rate = _both(lambda i: L2_BYTES[i] * clock if weights < 20e6 else arch.dram)
    seconds = _both(lambda i: (call.D + 1) * KERNEL_S[i] + weights / rate[i])
    return Step(call, found, NOTHING, NOTHING, NOTHING, NOTHING, weights, seconds)


# ---------------------------------------------------------------------------- cases, compiled code

# name, cell, dtype, T, B, H, directions
CASES = (
    ("one block", "lstm", "bf16", 256, 1, 128, 1),
    ("one block", "gru", "fp32", 256, 1, 96, 1),
    ("bf16 beyond H = 192", "lstm", "bf16", 64, 8, 256, 1),
    ("bf16 beyond H = 192", "lstm", "bf16", 128, 32, 512, 1),
    ("bf16 beyond H = 192", "lstm", "bf16", 1024, 16, 768, 1),
    ("fp32 beyond H = 192", "lstm", "fp32", 128, 32, 512, 1),
    ("fp32 beyond H = 192", "lstm", "fp32", 1024, 16, 768, 1),
    ("GRU", "gru", "bf16", 128, 32, 512, 1),
    ("GRU", "gru", "fp32", 128, 32, 512, 1),
    ("bidirectional", "gru", "bf16", 80, 8, 320, 2),
    ("bidirectional", "lstm", "bf16", 128, 32, 512, 2),
    ("large", "lstm", "bf16", 512, 64, 1024, 1),
    ("beyond the chip", "lstm", "bf16", 512, 64, 2560, 1),
)
# Milliseconds of a whole layer, forward and both: arXiv 2412.07752, H100, B 16, T 1024, H 768.
PUBLISHED = (
    ("cuDNN (torch's nn.LSTM), fp16, persistent", 2.01, 5.19),
    ("FlashRNN, fused, bf16", 4.87, 13.61),
    ("Haste, fp32", 18.4, 43.9),
    ("plain PyTorch", 147.0, 484.0),
)
ARCHITECTURES = ("sm_80", "sm_90")


def load(folder: Path) -> dict[tuple[str, str], Code]:
    """(arch, variant) -> code, e.g. ("sm_80", "lstm_fwd_kernel bf16 d16"), of a folder that
    `python -m sim cubins` wrote; empty where its list has no recurrent kernels."""
    listed = json.loads((folder / "kernels.json").read_text()).get("recurrent", ())
    texts: dict[str, dict[str, Function]] = {}
    found = {}
    for entry in listed:
        cubin = entry["cubin"]
        if cubin not in texts:
            texts[cubin] = functions(tools.disassemble(folder / cubin))
        found[entry["arch"], entry["name"]] = read(texts[cubin][entry["function"]])
    return found


def predictions(codes: dict[tuple[str, str], Code]) -> list[tuple[str, str, Step]]:
    """(architecture, what the case is, a step), forward and backward."""
    out = []
    for name in ARCHITECTURES:
        arch = ARCHS[name]
        for what, cell, dtype, T, B, H, D in CASES:
            for backward in (False, True):
                call = Call(cell, dtype, T, B, H, D, backward)
                tier = plan(call, arch).tier
                units = 128 if tier == "block" else UNITS
                variant = f"{cell}_{'bwd' if backward else 'fwd'}_kernel {dtype} d{units}"
                code = codes[name, variant] if tier != "step" else None
                out.append((name, what, step(call, arch, code)))
    return out
