"""Two contestants in turns, beside them the bare matrix products and torch.compile: what the tables
of bench/layernorm_ffn.py and bench/recurrent.py share."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import Thunk, environment, load_average
from fastattn.measure import Spread, interleave, ratios, spread

SHARE = 0.9
Compiler = Callable[[Any], Any]  # of a function: torch.compile, or one that gives None


@dataclass(frozen=True)
class Contest:
    """Thunks on the same tensors; gemm: the bare products, None where there are none."""

    stock: Thunk
    fused: Thunk
    gemm: Thunk | None = None
    compiled: Thunk | None = None  # stock under torch.compile, where that was asked for


@dataclass(frozen=True)
class Case:
    """share: of the bare products' rate that passes too; None = the ratio alone. least: seconds of
    the baseline below which there is no verdict."""

    name: str
    what: str
    make: Callable[[Compiler], Contest]
    ratio: float
    share: float | None = SHARE
    least: float = 0.0


@dataclass
class Row:
    name: str
    what: str
    stock_s: Spread
    fused_s: Spread
    speedup: Spread
    share: Spread | None
    compiled: Spread | None  # torch.compile's time over ours
    target: float
    verdict: str
    load: float


def step(fn: Callable[..., Any] | None, leaves: list[Tensor], do: list[Tensor], train: bool) -> Any:
    """A thunk: forward and the gradients of all leaves, or the forward alone."""
    if fn is None:
        return None
    if train:
        return lambda: torch.autograd.grad(fn(*leaves), leaves, do)

    def inference() -> object:
        with torch.no_grad():
            return fn(*leaves)

    return inference


def run_case(case: Case, rounds: int, max_seconds: float, compile_stock: bool) -> Row:
    torch.manual_seed(0)
    torch.compiler.reset()
    contest = case.make(torch.compile if compile_stock else lambda fn: None)
    fns = {"stock": contest.stock, "fused": contest.fused}
    for name in ("gemm", "compiled"):
        if getattr(contest, name) is not None:
            fns[name] = getattr(contest, name)
    samples = interleave(fns, rounds=rounds, max_seconds=max_seconds, min_rounds=5)
    speedup = ratios(samples["stock"], samples["fused"])
    share = ratios(samples["gemm"], samples["fused"]) if "gemm" in samples else None
    compiled = ratios(samples["compiled"], samples["fused"]) if "compiled" in samples else None
    by_share = case.share is not None and share is not None and share.median >= case.share
    verdict = "PASS" if speedup.median >= case.ratio or by_share else "SHORT"
    stock_s = spread(samples["stock"])
    if stock_s.median < case.least:
        verdict = "-"
    return Row(
        case.name, case.what, stock_s, spread(samples["fused"]), speedup, share, compiled,
        case.ratio, verdict, load_average(),
    )  # fmt: skip


def line(row: Row) -> str:
    share = "      -" if row.share is None else f"{row.share.median:7.0%}"
    peer = "      -" if row.compiled is None else f"{row.compiled.median:7.2f}"
    return (
        f"{row.name:26} {row.stock_s.median * 1e3:9.3f}ms {row.fused_s.median * 1e3:9.3f}ms "
        f"{row.speedup:.2f} {row.target:5.2f}x {share} {peer}  {row.verdict}  [load {row.load:.1f}]"
    )


def parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--case", action="append", help="a case by name; repeatable; default: all")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max-seconds", type=float, default=20.0, help="a case; at least 5 rounds")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile of stock beside it")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    return parser


def run(cases: dict[str, Case], args: argparse.Namespace) -> None:
    """What the command line says, on these cases."""
    if args.list:
        for case in cases.values():
            print(f"{case.name:26} {case.what}")
        return
    missing = [name for name in args.case or () if name not in cases]
    if missing:
        sys.exit(f"bench: no case {', '.join(missing)}; see --list")
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"{'case':26} {'stock':>11} {'fused':>11} {'ratio [q1, q3]':>17} {'target':>6} of gemm peer"
    )
    rows = []
    for name in args.case or cases:
        rows.append(run_case(cases[name], args.rounds, args.max_seconds, args.compile))
        print(line(rows[-1]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        shown = [asdict(row) for row in rows]
        args.json.write_text(json.dumps({"environment": environment(), "rows": shown}, indent=1))
