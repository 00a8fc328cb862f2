"""From a kernel's machine code to cycles, seconds and the share of the tensor cores' peak.

One trip of the hot loop (the innermost loop with tensor-core instructions) takes an SM, by pipe,

    cycles[pipe] = warps of a block * work of a warp's plain trip / the pipe's rate

At best the busiest pipe alone counts (others hide behind it), at worst all in turn. The truth lies
between, and how far is the one fitted number:

    cycles = busiest + EXPOSED * (sum of all - busiest)

What lies outside the loop counts once a block. A trip is a tile; tiles that were peeled off the
loop are known by their products. Not in the model: latency that too few warps cannot hide, bank
conflicts, L2, clocks below the boost clock.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from bench.model import pipes
from bench.model.archs import Arch
from bench.model.occupancy import Occupancy, occupancy
from bench.model.sass import Block, Function, Instruction

# Fitted on the points that published.py marks so, by `python -m bench.model --fit`.
EXPOSED = 0.34


class ModelError(ValueError):
    """A kernel whose loop or tile the model cannot make sense of; the message says why."""


@dataclass(frozen=True)
class Problem:
    """q (B, H, Sq, D), k and v (B, H, Sk, D) of 16 bits; causal: the lower triangle."""

    B: int
    H: int
    Sq: int
    Sk: int
    D: int
    causal: bool = False

    def __post_init__(self) -> None:
        if self.causal and self.Sq != self.Sk:
            raise ModelError(f"a causal problem is square here, not {self.Sq} x {self.Sk}")

    @property
    def pairs(self) -> float:
        """That take part; half of a causal square, as the field counts."""
        return self.B * self.H * self.Sq * self.Sk * (0.5 if self.causal else 1.0)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and its launch."""

    name: str
    function: Function
    registers: int  # a thread
    threads: int  # a block
    shared: int  # bytes a block
    rows: int  # of a tile
    keys: int
    head_dim: int
    over: str  # what a block owns: "rows" or "keys" (it walks the others), or one "tile"
    products: int  # rows x keys x head_dim matrix products a tile
    over_q: int  # tensors of q's shape, 16 bits, that are read or written: q, o, do, dq
    over_k: int  # of k's: k, v, dk, dv
    weights: bool = False  # writes (Sq, Sk) weights of 16 bits


@dataclass(frozen=True)
class Code:
    """Work of one warp, from the SASS."""

    trip: Counter[str]
    outside: Counter[str]  # once a block: the way in, peeled tiles, the way out


@dataclass(frozen=True)
class Prediction:
    kernel: Kernel
    occupancy: Occupancy
    trip: Mapping[str, float] | None  # cycles of an SM by pipe; None: a rate is undocumented
    missing: list[str]  # those kinds of work
    trips: float  # of a block, on average
    done: float  # products that the tensor cores do for one that is needed
    block_cycles: float | None
    seconds: float | None
    dram_bytes: float  # each tensor once
    tile_bytes: float  # what blocks ask of L2: their own rows once, the others once a tile
    flops: float  # that the problem needs of this kernel
    by_dram: bool  # the tensors cannot be moved faster than this

    @property
    def binding(self) -> str | None:
        """The busiest pipe of a trip, or "dram"."""
        if self.trip is None or self.by_dram:
            return "dram" if self.by_dram else None
        return max(self.trip, key=self.trip.__getitem__)

    def share(self, arch: Arch) -> float | None:
        """Of the peak; useful FLOPs alone count."""
        if self.seconds is None or arch.peak is None:
            return None
        return self.flops / self.seconds / arch.peak

    @property
    def intensity(self) -> float:
        """FLOPs a byte of DRAM."""
        return self.flops / self.dram_bytes


@functools.lru_cache
def read(function: Function) -> Code:
    """The hot loop's plain trip and what runs once."""
    loops = function.innermost(_is_tensor)
    if not loops:
        # One tile, no loop: the whole run is its trip.
        return Code(pipes.total(function.plain_run(_worth)), Counter())
    # Of several (with masks and without) the one that does a product with the fewest instructions.
    loop = min(loops, key=lambda x: _price(function.plain_trip(x, _worth)))
    trip = function.plain_trip(loop, _worth)
    run = [b for b in function.plain_run(_worth) if b.index not in loop.blocks]
    return Code(pipes.total(trip), pipes.total(run))


def predict(
    kernel: Kernel, arch: Arch, problem: Problem, exposed: float | None = None
) -> Prediction:
    """exposed: instead of EXPOSED."""
    if kernel.head_dim != problem.D:
        raise ModelError(f"{kernel.name} is compiled for head_dim {kernel.head_dim}, not {problem}")
    code = read(kernel.function)
    warps = kernel.threads // 32
    fits = occupancy(arch, kernel.registers, kernel.shared, kernel.threads)
    missing = sorted({*pipes.undocumented(code.trip + code.outside, arch)})
    trip, trips, done, block = None, math.nan, math.nan, None
    blocks, tiles = _grid(kernel, problem)
    if not missing and fits.blocks:
        trips, done = _trips(kernel, code, tiles)
        trip = _times(warps, pipes.cycles(code.trip, arch))
        outside = _times(warps, pipes.cycles(code.outside, arch))
        how = EXPOSED if exposed is None else exposed
        block = trips * bound(trip, how) + bound(outside, how)
    seconds, by_dram = None, False
    dram = _dram_bytes(kernel, problem)
    if block is not None and arch.clock is not None:
        # Blocks of a causal problem differ: short ones fill up what long ones leave.
        of_an_sm = blocks / arch.sms if problem.causal else math.ceil(blocks / arch.sms)
        seconds = max(of_an_sm * block / arch.clock, dram / arch.dram)
        by_dram = seconds == dram / arch.dram
    flops = kernel.products * 2.0 * problem.pairs * problem.D
    return Prediction(
        kernel, fits, trip, missing, trips, done, block, seconds, dram,
        _tile_bytes(kernel, blocks, tiles), flops, by_dram,
    )  # fmt: skip


def bound(cycles: Mapping[str, float], exposed: float) -> float:
    """Issue slots are no pipe of their own: they limit, and do not add."""
    work = [much for pipe, much in cycles.items() if pipe != "issue"]
    busiest = max(work)
    return max(busiest + exposed * (sum(work) - busiest), cycles["issue"])


def _grid(kernel: Kernel, p: Problem) -> tuple[int, float]:
    """Blocks, and tiles a block on average."""
    rows, keys = -(-p.Sq // kernel.rows), -(-p.Sk // kernel.keys)
    if kernel.over == "tile":
        return p.B * p.H * rows * keys, 1.0
    if kernel.over == "rows":
        last = [min(-(-(i + 1) * kernel.rows // kernel.keys), keys) for i in range(rows)]
        return p.B * p.H * rows, sum(last) / rows if p.causal else keys
    first = [j * kernel.keys // kernel.rows for j in range(keys)]
    return p.B * p.H * keys, rows - sum(first) / keys if p.causal else rows


def _trips(kernel: Kernel, code: Code, tiles: float) -> tuple[float, float]:
    """Trips of a block's loop, and products that the tensor cores do for one that the tile needs:
    more than 1 where warps repeat each other's. A trip is taken to be one tile."""
    warps = kernel.threads // 32
    needed = kernel.products * 2.0 * kernel.rows * kernel.keys * kernel.head_dim
    in_loop, outside = (warps * pipes.tensor_flops(work) for work in (code.trip, code.outside))
    done = in_loop / needed
    if not 1 <= done < 2:
        raise ModelError(
            f"{kernel.name}: a trip of its loop does {done:.3f} times the "
            f"{kernel.products} products of a tile {kernel.rows} x {kernel.keys} x "
            f"{kernel.head_dim}; the model takes it for one tile"
        )
    peeled = outside / in_loop
    if peeled % 1:
        raise ModelError(f"{kernel.name}: {peeled:.3f} tiles outside of its loop, not whole ones")
    return max(tiles - peeled, 0.0), done


def _dram_bytes(kernel: Kernel, p: Problem) -> float:
    found = 2.0 * p.B * p.H * p.D * (kernel.over_q * p.Sq + kernel.over_k * p.Sk)
    return found + (2.0 * p.B * p.H * p.Sq * p.Sk if kernel.weights else 0.0)


def _tile_bytes(kernel: Kernel, blocks: int, tiles: float) -> float:
    """A block's own rows (or keys) once, and two tensors of the others a tile: k and v, q and do.
    Of one tile alone the weights are most."""
    if kernel.over == "tile":
        shapes = kernel.over_q * kernel.rows + kernel.over_k * kernel.keys
        return 2.0 * blocks * (kernel.head_dim * shapes + kernel.rows * kernel.keys)
    if kernel.over == "rows":
        own, walked = kernel.over_q * kernel.rows, 2 * kernel.keys
    else:
        own, walked = kernel.over_k * kernel.keys, 2 * kernel.rows
    return 2.0 * blocks * kernel.head_dim * (own + tiles * walked)


def _times(warps: int, cycles: Mapping[str, float] | None) -> dict[str, float]:
    assert cycles is not None  # nothing is undocumented
    return {pipe: warps * much for pipe, much in cycles.items()}


def _is_tensor(x: Instruction) -> bool:
    return x.op.split(".")[0] in ("HMMA", "HGMMA", "UTCHMMA")


def _worth(block: Block) -> tuple[float, ...]:
    """Products first, then the next tile's loads, then as few instructions as possible."""
    tensor = sum(map(_is_tensor, block.instructions))
    # Asynchronous ones alone: a kernel's other way, for rows that are not aligned, has plain LDG.
    loads = sum(x.op.startswith(("LDGSTS", "UTMALDG")) for x in block.instructions)
    return (tensor, loads, -len(block.instructions))


def _price(trip: list[Block]) -> float:
    tensor = sum(_is_tensor(x) for block in trip for x in block.instructions)
    return sum(len(block.instructions) for block in trip) / tensor
