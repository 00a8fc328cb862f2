"""One row of the table, quickly: `python -m bench.attention --case bf16_fwd_2048 --rounds 20`."""

import argparse
import json
import sys
from pathlib import Path

import torch

from bench.cases import CASES, tagged
from bench.harness import Case, Row, environment, run_case, run_memory

HEADER = (
    f"{'case':30} {'sdpa':>9} {'fused':>9} {'ratio [q1, q3]':>19} {'target':>7} "
    f"{'rate':>14} {'share':>6} {'(sdpa)':>7}  verdict"
)


def _seconds(s: float) -> str:
    return f"{s * 1e6:7.1f}us" if s < 1e-3 else f"{s * 1e3:7.2f}ms"


def line(row: Row) -> str:
    rate = f"{row.rate / 1e9:8.1f} " + ("GFLOP/s" if row.roof == "gemm" else "GB/s   ")
    target = f"{row.target_ratio:.2f}x" if row.target_ratio else "-"
    if row.max_overhead is not None:
        target = f"+{row.max_overhead * 1e6:.0f}us"
    share = f"{row.share:6.1%} {row.stock_share:6.1%}"
    if row.target_share:
        share += f" (or {row.target_share:.0%})"
    note = f" over {row.overhead * 1e6:+.1f}us" if row.max_overhead is not None else ""
    return (
        f"{row.name:30} {_seconds(row.stock_s.median)} {_seconds(row.fused_s.median)} "
        f"{row.speedup:>.2f} {target:>7} {rate} {share}  {row.verdict}{note}"
        f"  [{row.stock_backend}, load {row.load:.1f}]"
    )


def memory_line(result: dict[str, object]) -> str:
    return (
        f"{result['name']:30} sdpa {result['stock_times']:.2f}x fused {result['fused_times']:.2f}x "
        f"of q+k+v+o ({float(str(result['operand_bytes'])) / 2**20:.0f} MiB), "
        f"target {result['target']}x  {result['verdict']}"
    )


def select(args: argparse.Namespace) -> list[Case]:
    if args.all:
        return list(CASES.values())
    if args.tag:
        return [case for tag in args.tag for case in tagged(tag)]
    missing = [name for name in args.case if name not in CASES]
    if missing:
        sys.exit(f"bench.attention: no case {', '.join(missing)}; see --list")
    return [CASES[name] for name in args.case]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="a case by name; repeatable")
    parser.add_argument("--tag", action="append", help="table, beside, small or memory; repeatable")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max-seconds", type=float, default=30.0, help="a case; at least 5 rounds")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu", help="where the tensors are: cpu or cuda")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args(argv)
    if args.list:
        for case in CASES.values():
            print(f"{case.name:30} {next(iter(case.tags)):8} {case.what}")
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    cases = select(args)
    if not cases:
        parser.error("name a --case or a --tag, or give --all (--list shows them)")
    rows: list[dict[str, object]] = []
    print(HEADER)
    for case in cases:
        if case.memory is not None:
            result = run_memory(case, backend=args.backend)
            rows.append(result)
            print(memory_line(result), flush=True)
            continue
        row = run_case(case, backend=args.backend, rounds=args.rounds, max_seconds=args.max_seconds)
        rows.append(row.to_json())
        print(line(row), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
