"""Any shape: a fixed random sample of S 1…4096, D 32…128, several B and H, both dtypes, both ways.

Held against two floors: 0.95 × where SDPA takes 200 µs or more, at most 40 µs more where it takes
less. Shapes near or below their floor are measured a second time, longer, and the second figures
count: one look at hundreds of shapes finds outliers that the machine made.
"""

import argparse
import functools
import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.attention import Shape, plain
from bench.harness import Case, Row, Setting, run_case

LENGTHS = (1, 2, 7, 16, 33, 64, 100, 128, 197, 256, 384, 512, 777, 1024, 1536, 2048, 3000, 4096)
CROSS = ((1, 128), (1, 1024), (1, 4096), (5, 300), (64, 1000), (128, 4096), (1024, 77))
DIMS = (32, 40, 64, 80, 96, 128)
BATCHES = ((1, 1), (1, 12), (2, 8), (8, 12), (4, 32))
SMALL = 200e-6
RATIO, OVERHEAD = 0.95, 40e-6
MAX_FLOPS = 60e9  # fractions of a second: the sweep has hundreds of shapes


def shapes(count: int) -> list[Shape]:
    """The first `count` of all combinations in a fixed random order, too large ones left out."""
    sizes = [(S, S, causal) for S in LENGTHS for causal in (False, True)]
    sizes += [(rows, keys, False) for rows, keys in CROSS]
    every = []
    for (Sq, Sk, causal), D, (B, H), dtype, train in itertools.product(
        sizes, DIMS, BATCHES, ("fp32", "bf16"), (False, True)
    ):
        if B * H * Sq * Sk * D * (14 if train else 4) <= MAX_FLOPS:
            every.append(Shape(B=B, H=H, S=Sk, D=D, dtype=dtype, train=train, causal=causal, Sq=Sq))
    random.Random(0).shuffle(every)
    return every[:count]


def describe(s: Shape) -> str:
    keys = "" if s.Sq == s.S else f" Sk{s.S}"
    return (
        f"B{s.B} H{s.H} S{s.Sq}{keys} D{s.D} {s.dtype}{' causal' if s.causal else ''} "
        f"{'fwd+bwd' if s.train else 'fwd'}"
    )


def measure_shape(s: Shape, backend: str, rounds: int, seconds: float) -> Row:
    name = describe(s)
    case = Case(name, name, s.dtype, functools.partial(plain, s), max_overhead=OVERHEAD)
    return run_case(case, Setting(backend, peers=False), rounds=rounds, max_seconds=seconds)


def verdict(row: Row) -> Row:
    """Which floor a shape stands on depends on what SDPA took."""
    if row.stock_s < SMALL:
        return replace(row, verdict="PASS" if row.overhead <= OVERHEAD else "SHORT")
    ok = row.speedup.median >= RATIO
    return replace(row, target=RATIO, max_overhead=None, verdict="PASS" if ok else "SHORT")


def suspicious(row: Row) -> bool:
    if row.stock_s < SMALL:
        return row.overhead > 0.75 * OVERHEAD
    return row.speedup.median < 1.05


def sweep(count: int, backend: str = "auto") -> dict[str, Any]:
    """Measure, look twice at what seems slow, and sum up."""
    rows: list[Row] = []
    for i, s in enumerate(shapes(count)):
        row = measure_shape(s, backend, rounds=3, seconds=0.3)
        if suspicious(row):
            row = measure_shape(s, backend, rounds=8, seconds=1.5)
        rows.append(verdict(row))
        if (i + 1) % 50 == 0:
            short = sum(r.verdict == "SHORT" for r in rows)
            print(f"sweep: {i + 1} of {count} shapes, {short} short", flush=True)
    large = sorted((r for r in rows if r.stock_s >= SMALL), key=lambda r: r.speedup.median)
    small = sorted((r for r in rows if r.stock_s < SMALL), key=lambda r: -r.overhead)
    return {"large": [asdict(r) for r in large], "small": [asdict(r) for r in small]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    args.json.write_text(json.dumps(sweep(args.shapes, args.backend)))


if __name__ == "__main__":
    main()
