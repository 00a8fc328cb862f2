"""A case, how it is run, and what its figures are held against: the frame of every bench.

A case is a baseline (``stock``: what its user has now), the candidate (``fused``) and its peers, on
the same tensors. Stock and fused take turns in one process, in alternating order, and afterwards
the peers with fused: what a peer leaves in the heap and the caches is no part of stock's time. A
ratio is the median of a contestant's time over fused's in the same round. In the same rounds as
stock runs what bounds the case: a 2048³ GEMM of its dtype, a copy or a read; its rate is the
ceiling. Where a case has ``products``, the bare GEMMs of its own shapes, they take turns too.

FLOPs and bytes are the useful ones: of the (query, key) pairs that take part, of operands that must
be read and results that must be written once.
"""

import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn.backends import cpu_isa
from fastattn.measure import (
    Spread,
    interleave,
    load_average,
    peak_extra_bytes,
    ratios,
    settle_heap,
    spread,
)

Thunk = Callable[[], object]

GEMM_N = 2048
COPY_BYTES = 256 << 20
SHORT = 2e-3  # seconds: a probe of milliseconds between such calls would evict what they work on

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """What a case is built for."""

    backend: str = "auto"
    peers: bool = True  # build the slow ones too: torch.compile, flex_attention, ONNX Runtime


@dataclass
class Contest:
    """The contestants on their tensors."""

    stock: Thunk
    fused: Thunk
    peers: dict[str, Thunk] = field(default_factory=dict)
    products: Thunk | None = None  # the bare GEMMs of the same shapes
    flops: float = 0.0
    flops_dense: float = 0.0  # of the full Sq x Sk, what a baseline without skipping computes
    bytes: float = 0.0  # least bytes that must move
    operands: float = 0.0  # what memory is counted in: q + k + v + o
    sdpa: bool = False  # stock is SDPA, which has backends to choose from


@dataclass(frozen=True)
class Case:
    """One row: ``make`` builds the tensors; targets come from the project's issues.

    ratio or share: either passes the row unless both are asked for; share is of the products where
    there are some, else of the ceiling. max_overhead instead: seconds over the baseline. least:
    seconds of the baseline below which there is no verdict. memory: peak extra memory in operands.
    """

    name: str
    what: str
    dtype: str
    make: Callable[[Setting], Contest]
    ratio: float | None = None
    share: float | None = None
    both: bool = False  # the ratio and the share
    roof: str = "gemm"  # "gemm" | "copy" | "read"
    max_overhead: float | None = None
    least: float = 0.0
    memory: float | None = None
    tag: str = "table"


@dataclass
class Row:
    """A measured case. over: times of stock and peers, divided by fused's."""

    name: str
    what: str
    dtype: str
    tag: str
    stock_backend: str
    seconds: dict[str, Spread]
    over: dict[str, Spread]
    products: Spread | None
    roof: str
    roof_rate: float  # FLOP/s or bytes/s in this run; 0: no work was counted
    flops: float
    bytes: float
    share: float  # of the ceiling
    stock_share: float
    target: float | None
    target_share: float | None
    max_overhead: float | None
    verdict: str
    load: float
    both: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def stock_s(self) -> float:
        return self.seconds["stock"].median

    @property
    def fused_s(self) -> float:
        return self.seconds["fused"].median

    @property
    def speedup(self) -> Spread:
        return self.over["stock"]

    @property
    def overhead(self) -> float:
        return self.fused_s - self.stock_s

    @property
    def best_peer(self) -> str:
        """The fastest of stock and peers."""
        return min(self.over, key=lambda name: self.over[name].median)


def step(fn: Callable[..., Any], leaves: list[Tensor], do: list[Tensor], train: bool) -> Thunk:
    """A thunk of fn(*leaves): forward and the gradients of all leaves, or the forward alone."""
    if train:
        return lambda: torch.autograd.grad(fn(*leaves), leaves, do)

    def inference() -> object:
        with torch.no_grad():
            return fn(*leaves)

    return inference


def synchronised(fn: Thunk) -> Thunk:
    """On a GPU a call returns before its kernels have run: wait, or nothing would be timed."""
    if torch.get_default_device().type != "cuda":
        return fn

    def call() -> object:
        result = fn()
        torch.cuda.synchronize()
        return result

    return call


@contextmanager
def sdpa_math() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def best_stock(stock: Thunk, tries: int = 3) -> tuple[str, Thunk]:
    """SDPA's best backend for this case: the default unless math is 10 % faster."""

    def in_math() -> object:
        with sdpa_math():
            return stock()

    times = []
    for fn in (stock, in_math):
        fn()
        times.append(min(_once(fn) for _ in range(tries)))
    return ("math", in_math) if times[1] < 0.9 * times[0] else ("default", stock)


def _once(fn: Thunk) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _reader(size: int) -> Thunk:
    """Reads `size` bytes as fast as any of these does, which is found out here, once."""
    rows = torch.ones(size // 4).view(-1, 4096)
    ones, whole = torch.ones(4096), rows.view(torch.int64)
    loops: dict[str, Thunk] = {
        "sum": lambda: rows.sum(),
        "sum of rows": lambda: rows.sum(-1),
        "max": lambda: whole.max(),
        "dot": lambda: torch.dot(rows.view(-1), rows.view(-1)),
        "mv": lambda: torch.mv(rows, ones),
    }
    times = interleave(loops, rounds=5, max_seconds=5.0, min_rounds=3)
    return loops[min(times, key=lambda name: spread(times[name]).median)]


_ROOFS: dict[str, tuple[Thunk, float]] = {}


def roof_probe(kind: str, dtype: str) -> tuple[Thunk, float]:
    """The function whose rate is the ceiling, and the work of one call (FLOPs or bytes)."""
    key = kind if kind != "gemm" else f"{kind}-{dtype}"
    if key not in _ROOFS:
        if kind == "copy":
            src, dst = torch.ones(COPY_BYTES // 4), torch.empty(COPY_BYTES // 4)
            _ROOFS[key] = (lambda: dst.copy_(src)), 2.0 * COPY_BYTES
        elif kind == "read":
            _ROOFS[key] = _reader(COPY_BYTES), float(COPY_BYTES)
        else:
            a = torch.randn(GEMM_N, GEMM_N).to(DTYPES[dtype])
            b, out = a.clone(), torch.empty_like(a)
            _ROOFS[key] = (lambda: torch.mm(a, b, out=out)), 2.0 * GEMM_N**3
    return _ROOFS[key]


def _verdict(case: Case, row: Row) -> str:
    if case.max_overhead is not None:
        return "PASS" if row.overhead <= case.max_overhead else "SHORT"
    if (case.ratio is None and case.share is None) or row.stock_s < case.least:
        return "-"
    share = row.share if row.products is None else row.products.median
    by_ratio = case.ratio is not None and row.speedup.median >= case.ratio
    by_share = case.share is not None and share >= case.share
    held = by_ratio and by_share if case.both else by_ratio or by_share
    return "PASS" if held else "SHORT"


def run_case(
    case: Case, setting: Setting, *, rounds: int = 15, max_seconds: float | None = 10.0
) -> Row:
    """Measure one case."""
    torch.manual_seed(0)
    torch.compiler.reset()
    contest = case.make(setting)
    stock_backend, stock = "default", synchronised(contest.stock)
    if contest.sdpa:
        stock_backend, stock = best_stock(stock)
    short = min(_once(stock) for _ in range(2)) < SHORT
    fused = synchronised(contest.fused)
    contestants = {"stock": stock, "fused": fused}
    if contest.products is not None:
        contestants["products"] = synchronised(contest.products)
    work = contest.flops if case.roof == "gemm" else contest.bytes
    roof: list[float] = []
    probe, of_probe = roof_probe(case.roof, case.dtype)
    if work and short:
        roof = interleave({"roof": synchronised(probe)}, rounds=3)["roof"]
    elif work:
        contestants["roof"] = synchronised(probe)
    samples = interleave(
        contestants, rounds=4 * rounds if case.max_overhead is not None else rounds,
        max_seconds=max_seconds, min_rounds=5,
    )  # fmt: skip
    roof = samples.pop("roof", roof)
    products = samples.pop("products", None)
    seconds = {name: spread(times) for name, times in samples.items()}
    over = {"stock": ratios(samples["stock"], samples["fused"])}
    if contest.peers:
        peers = {name: synchronised(fn) for name, fn in contest.peers.items()}
        turns = interleave(
            {"fused": fused, **peers}, rounds=rounds,
            max_seconds=max_seconds and max_seconds / 2, min_rounds=5,
        )  # fmt: skip
        seconds |= {name: spread(turns[name]) for name in peers}
        over |= {name: ratios(turns[name], turns["fused"]) for name in peers}
    rate = of_probe / spread(roof).median if work else 0.0
    row = Row(
        name=case.name, what=case.what, dtype=case.dtype, tag=case.tag,
        stock_backend=stock_backend, seconds=seconds,
        over=over, products=None if products is None else ratios(products, samples["fused"]),
        roof=case.roof, roof_rate=rate, flops=contest.flops, bytes=contest.bytes,
        share=work / seconds["fused"].median / rate if work else 0.0,
        stock_share=work / seconds["stock"].median / rate if work else 0.0,
        target=case.ratio, target_share=case.share, max_overhead=case.max_overhead, verdict="",
        load=load_average(), both=case.both,
    )  # fmt: skip
    row.verdict = _verdict(case, row)
    return row


def run_memory(case: Case, setting: Setting) -> dict[str, Any]:
    """Peak extra resident memory of stock and fused. Run it in a fresh process: what earlier cases
    left in the heap would hide what this one takes."""
    torch.manual_seed(0)
    settle_heap()
    contest = case.make(setting)
    fused = peak_extra_bytes(contest.fused)
    stock = peak_extra_bytes(contest.stock)
    if fused is None or stock is None or not contest.operands:
        raise RuntimeError(f"{case.name}: peaks cannot be measured here")
    verdict = "-"
    if case.memory is not None:
        verdict = "PASS" if fused <= case.memory * contest.operands else "SHORT"
    return {
        "name": case.name, "what": case.what, "dtype": case.dtype, "tag": case.tag,
        "operand_bytes": contest.operands, "fused_bytes": fused, "stock_bytes": stock,
        "fused_times": fused / contest.operands, "stock_times": stock / contest.operands,
        "target": case.memory, "verdict": verdict, "load": load_average(),
    }  # fmt: skip


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of fn, its complaints about what it does not fuse kept to itself."""
    inner = torch.compile(fn)

    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return inner(*args, **kwargs)

    return call


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
        "isa": cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }
