"""A case, how it is run, and what its figures are held against.

A case is a baseline (`stock`) and a candidate (`fused`) on the same tensors. Both are timed
interleaved, and so is a 2048³ GEMM (or a copy) of the same dtype in the same rounds: "share" is the
candidate's rate over the rate that machine gave in that very run. FLOPs are the useful ones, i.e.
of the (query, key) pairs that take part; `pairs_dense` says how many there would be without masks.
"""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn.measure import Spread, interleave, peak_extra_bytes, ratios, settle_heap, spread

Thunk = Callable[[], object]


def synchronised(fn: Thunk) -> Thunk:
    """On a GPU a call returns before its kernels have run: wait, or nothing would be timed."""
    if torch.get_default_device().type != "cuda":
        return fn

    def call() -> object:
        result = fn()
        torch.cuda.synchronize()
        return result

    return call


GEMM_N = 2048
COPY_BYTES = 256 << 20

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Pair:
    """The two contestants on their tensors."""

    stock: Thunk
    fused: Thunk
    flops: float = 0.0  # useful: pairs that take part
    flops_dense: float = 0.0  # of the full Sq x Sk, what a baseline without skipping computes
    bytes: float = 0.0  # least bytes that must move
    operands: float = 0.0  # bytes of q + k + v + o, for the memory row


@dataclass(frozen=True)
class Case:
    """One row of the table: `make(backend)` builds the tensors; targets come from the issue."""

    name: str
    what: str
    dtype: str
    make: Callable[[str], Pair]
    ratio: float | None = None  # at least this many times the baseline
    share: float | None = None  # or at least this share of the roof
    roof: str = "gemm"  # "gemm" | "copy": what bounds it
    max_overhead: float | None = None  # seconds over the baseline, for calls below 200 us
    memory: float | None = None  # peak extra memory at most this many times q + k + v + o
    tags: frozenset[str] = field(default_factory=frozenset)


@dataclass
class Row:
    """A measured case."""

    name: str
    what: str
    dtype: str
    stock_backend: str
    stock_s: Spread
    fused_s: Spread
    speedup: Spread
    roof: str
    roof_rate: float  # FLOP/s or bytes/s in this run
    rate: float
    share: float
    stock_share: float
    flops: float
    flops_dense: float
    target_ratio: float | None
    target_share: float | None
    max_overhead: float | None
    verdict: str
    load: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def overhead(self) -> float:
        return self.fused_s.median - self.stock_s.median


# The default takes the flash kernel where it can; math is forced to see whether it would be faster.
BACKENDS = {"default": None, "math": SDPBackend.MATH}


@contextmanager
def sdpa_backend(name: str) -> Iterator[None]:
    choice = BACKENDS[name]
    if choice is None:
        yield
        return
    with sdpa_kernel(choice):
        yield


def _in_backend(fn: Thunk, name: str) -> Thunk:
    if name == "default":
        return fn

    def call() -> object:
        with sdpa_backend(name):
            return fn()

    return call


def best_stock(stock: Thunk, tries: int = 3) -> tuple[str, Thunk]:
    """SDPA's best backend for this case: the default unless math is 10 % faster."""
    best: dict[str, float] = {}
    for name in BACKENDS:
        fn = _in_backend(stock, name)
        fn()
        best[name] = min(_once(fn) for _ in range(tries))
    winner = min(best, key=best.__getitem__)
    if best[winner] > 0.9 * best["default"]:
        winner = "default"
    return winner, _in_backend(stock, winner)


def _once(fn: Thunk) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


_ROOFS: dict[str, tuple[Thunk, float]] = {}


def roof_probe(kind: str, dtype: str) -> tuple[Thunk, float]:
    """The function whose rate is the ceiling, and the work of one call (FLOPs or bytes)."""
    key = kind if kind == "copy" else f"{kind}-{dtype}"
    if key not in _ROOFS:
        if kind == "copy":
            src, dst = torch.ones(COPY_BYTES // 4), torch.empty(COPY_BYTES // 4)
            _ROOFS[key] = (lambda: dst.copy_(src)), 2.0 * COPY_BYTES
        else:
            a = torch.randn(GEMM_N, GEMM_N).to(DTYPES[dtype])
            b, out = a.clone(), torch.empty_like(a)
            _ROOFS[key] = (lambda: torch.mm(a, b, out=out)), 2.0 * GEMM_N**3
    return _ROOFS[key]


def _verdict(case: Case, speedup: float, share: float, overhead: float) -> str:
    if case.max_overhead is not None:
        return "PASS" if overhead <= case.max_overhead else "SHORT"
    if case.ratio is None and case.share is None:
        return "-"
    met = []
    if case.ratio is not None:
        met.append(speedup >= case.ratio)
    if case.share is not None:
        met.append(share >= case.share)
    return "PASS" if any(met) else "SHORT"


def run_case(
    case: Case, *, backend: str = "auto", rounds: int = 15, max_seconds: float | None = 30.0
) -> Row:
    """Measure one case; the issue's "or" between ratio and share is an or here too."""
    torch.manual_seed(0)
    pair = case.make(backend)
    stock_backend, stock = best_stock(synchronised(pair.stock))
    probe, work = roof_probe(case.roof, case.dtype)
    probe = synchronised(probe)
    small = case.max_overhead is not None
    contestants = {"stock": stock, "fused": synchronised(pair.fused)}
    if small:  # a probe of milliseconds would evict what these calls find in the caches
        roof = interleave({"roof": probe}, rounds=3)["roof"]
    else:
        contestants["roof"] = probe
        roof = []
    samples = interleave(
        contestants,
        rounds=4 * rounds if small else rounds,
        max_seconds=max_seconds,
        min_rounds=5,
    )
    stock_s, fused_s = spread(samples["stock"]), spread(samples["fused"])
    speedup = ratios(samples["stock"], samples["fused"])
    roof_rate = work / spread(roof or samples["roof"]).median
    amount = pair.flops if case.roof == "gemm" else pair.bytes
    share = amount / fused_s.median / roof_rate
    return Row(
        name=case.name,
        what=case.what,
        dtype=case.dtype,
        stock_backend=stock_backend,
        stock_s=stock_s,
        fused_s=fused_s,
        speedup=speedup,
        roof=case.roof,
        roof_rate=roof_rate,
        rate=amount / fused_s.median,
        share=share,
        stock_share=amount / stock_s.median / roof_rate,
        flops=pair.flops,
        flops_dense=pair.flops_dense,
        target_ratio=case.ratio,
        target_share=case.share,
        max_overhead=case.max_overhead,
        verdict=_verdict(case, speedup.median, share, fused_s.median - stock_s.median),
        load=load_average(),
    )


def run_memory(case: Case, *, backend: str = "auto") -> dict[str, Any]:
    """Peak extra resident memory of stock and fused, over q + k + v + o. Run it in a fresh process:
    what earlier cases left in the heap would hide what this one takes."""
    torch.manual_seed(0)
    settle_heap()
    pair = case.make(backend)
    fused = peak_extra_bytes(pair.fused)
    stock = peak_extra_bytes(pair.stock)
    if case.memory is None or fused is None or stock is None:
        raise RuntimeError(f"{case.name}: no memory target, or peaks cannot be measured here")
    return {
        "name": case.name,
        "what": case.what,
        "dtype": case.dtype,
        "operand_bytes": pair.operands,
        "fused_bytes": fused,
        "stock_bytes": stock,
        "fused_times": fused / pair.operands,
        "stock_times": stock / pair.operands,
        "target": case.memory,
        "verdict": "PASS" if fused <= case.memory * pair.operands else "SHORT",
    }


def load_average() -> float:
    """Runnable processes over the last minute: above the thread count the figures are suspect."""
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except OSError:
        return -1.0


def environment() -> dict[str, Any]:
    """What a figure depends on and a reader needs to know."""
    cpu = platform.processor() or platform.machine()
    with_info = Path("/proc/cpuinfo")
    if with_info.exists():
        for line in with_info.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    gpu = {}
    if torch.get_default_device().type == "cuda":
        gpu = {"gpu": torch.cuda.get_device_name()}
    return {
        **gpu,
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }
