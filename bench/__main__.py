"""`make bench` = `python -m bench`: all sections, then plots and RESULTS.md.

Each section is a process of its own, and what it found is stored as it ends: --resume goes on with
those that are missing, --only measures some and keeps the rest. --quick takes few cases and rounds
and writes nowhere but bench/out. --case measures single rows while tuning, and stores nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import registry
from bench.harness import Setting, environment, run_case, run_memory
from bench.show import HEADER, line, memory_line

HERE = Path(__file__).parent
OUT = HERE / "out"
# Beside the lists of cases: peaks of memory, a random sample of shapes, what plots are made of.
MORE = ("memory", "sweep", "curves")


def _python(*args: str) -> None:
    subprocess.run([sys.executable, *args], check=True, cwd=HERE.parent)


def _cases(section: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a section, through pytest-benchmark."""
    path = OUT / f"pytest-{section}.json"
    _python(
        "-m", "pytest", str(HERE / "test_bench.py"), "-q", "-s", "--no-header", "-p", "no:warnings",
        "--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={path}",
        f"--fastattn-section={section}", f"--fastattn-backend={args.backend}",
        f"--fastattn-rounds={args.rounds}", f"--fastattn-seconds={args.seconds}",
        f"--fastattn-every={4 if args.quick else 1}",
        *(["--fastattn-no-peers"] if args.quick and section != "models" else []),
    )  # fmt: skip
    return [b["extra_info"]["row"] for b in json.loads(path.read_text())["benchmarks"]]


def _memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each row in a process of its own, whose heap no other case has shaped."""
    rows, path = [], OUT / "memory.json"
    for section in registry.SECTIONS:
        names = [c.name for c in registry.cases(section).values() if c.tag == "memory"]
        for name in names[:1] if args.quick else names:
            _python("-m", "bench", "--case", name, "--backend", args.backend, "--json", str(path))
            rows += json.loads(path.read_text())
    return rows


def measure(section: str, args: argparse.Namespace) -> dict[str, Any]:
    begin = time.monotonic()
    print(f"== {section}", flush=True)
    if section in registry.SECTIONS:
        found: Any = _cases(section, args)
    elif section == "memory":
        found = _memory(args)
    else:
        path = OUT / f"{section}.json"
        more = ["--shapes", str(args.shapes)] if section == "sweep" else []
        more += ["--quick"] if section == "curves" and args.quick else []
        _python("-m", f"bench.{section}", "--json", str(path), *more)
        found = json.loads(path.read_text())
    took = time.monotonic() - begin
    print(f"== {section}: {took:.0f} s", flush=True)
    return {"environment": environment(), "took": took, "rows": found}


def _one(args: argparse.Namespace) -> None:
    """--case: rows on the terminal."""
    if args.device != "cpu":  # a default by name is a mode, which torch's fast paths avoid
        torch.set_default_device(args.device)
    setting = Setting(args.backend, peers=args.peers)
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for name in args.case:
        case = registry.find(name)
        if case is None:
            sys.exit(f"bench: no case {name}; see --list")
        if case.tag == "memory":
            rows.append(run_memory(case, setting))
            print(memory_line(rows[-1]), flush=True)
            continue
        row = run_case(case, setting, rounds=args.rounds, max_seconds=args.seconds)
        rows.append(row.to_json())
        print(line(row), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows))


def _list() -> None:
    for section in registry.SECTIONS:
        for case in registry.cases(section).values():
            print(f"{section:14} {case.tag:7} {case.name:30} {case.what}")


def _run(args: argparse.Namespace) -> None:
    from bench import plots, report

    last = OUT / ("quick.json" if args.quick else "results.json")
    result: dict[str, Any] = json.loads(last.read_text()) if last.exists() else {}
    wanted = [] if args.report else [*(args.only or [*registry.SECTIONS, *MORE])]
    if args.resume:
        wanted = [name for name in wanted if name not in result]
    failed = []
    for name in wanted:
        try:
            result[name] = measure(name, args)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name} (exit code {error.returncode})")
            continue
        part = last.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1))
        os.replace(part, last)  # noqa: PTH105  a run that is cut off leaves the last whole one
    if not result:
        sys.exit("bench: nothing was ever measured here")
    folder = OUT if args.quick else HERE
    plots.draw(result, folder / "plots")
    report.write(result, folder / "RESULTS.md")
    if not args.quick:
        report.record(result, HERE / "recorded.json")
    print(report.summary(result))
    took = sum(part["took"] for part in result.values())
    print(f"wrote {folder / 'RESULTS.md'}; the sections in it took {took / 60:.1f} minutes")
    if failed:
        sys.exit(f"bench: failed: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=[*registry.SECTIONS, *MORE])
    parser.add_argument("--resume", action="store_true", help="the sections that are not stored")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="only RESULTS.md and plots, again")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=5.0, help="most for a row; 5 rounds least")
    parser.add_argument("--shapes", type=int, default=200, help="of the sweep")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="the cases")
    parser.add_argument("--case", action="append", help="measure this row alone; repeatable")
    parser.add_argument("--tag", action="append", help="attention's rows of a tag; repeatable")
    parser.add_argument("--peers", action="store_true", help="with --case: the compiled ones too")
    parser.add_argument("--device", default="cpu", help="with --case: cpu or cuda")
    parser.add_argument("--json", type=Path, help="with --case: write the rows here as well")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    OUT.mkdir(exist_ok=True)
    # What `fastattn tune` stored would make torch's ops ours in some rows.
    os.environ["FASTATTN_TUNE_CACHE"] = os.devnull
    if args.list:
        return _list()
    if args.tag:
        tagged = (c.name for c in registry.cases("attention").values() if c.tag in args.tag)
        args.case = [*(args.case or ()), *tagged]
    if args.case:
        return _one(args)
    if args.quick:
        args.rounds, args.seconds, args.shapes = 5, 1.0, 30
    return _run(args)


if __name__ == "__main__":
    main()
