"""`make bench` = `python -m bench`: every row, the sweep, the memory rows, then RESULTS.md.

10 to 25 minutes; `--quick` takes few rounds and few shapes and writes nowhere but bench/out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.cases import tagged
from bench.harness import environment
from bench.sweep import sweep

HERE = Path(__file__).parent
OUT = HERE / "out"
CONTESTS = ("layernorm_ffn", "recurrent")


def timed(backend: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of bench/test_attention.py, through pytest-benchmark."""
    path = OUT / "pytest-benchmark.json"
    code = pytest.main(
        [
            str(HERE / "test_attention.py"),
            "-q",
            "--benchmark-disable-gc",
            f"--benchmark-json={path}",
            f"--fastattn-backend={backend}",
            f"--fastattn-rounds={rounds}",
        ]
    )
    if code != 0:
        sys.exit(f"bench: a case failed (pytest exit code {int(code)})")
    return [b["extra_info"]["row"] for b in json.loads(path.read_text())["benchmarks"]]


def memory(backend: str) -> list[dict[str, Any]]:
    """Each memory row in a process of its own, whose heap no other case has shaped."""
    rows = []
    for case in tagged("memory"):
        path = OUT / f"{case.name}.json"
        command = ["--case", case.name, "--backend", backend, "--json", str(path)]
        subprocess.run(
            [sys.executable, "-m", "bench.attention", *command], check=True, cwd=HERE.parent
        )
        rows += json.loads(path.read_text())["rows"]
    return rows


def contests(name: str, rounds: int) -> dict[str, Any]:
    """The rows of bench/layernorm_ffn.py or bench/recurrent.py, torch.compile beside them."""
    path = OUT / f"{name}.json"
    command = ["--compile", f"--rounds={rounds}", "--json", str(path)]
    subprocess.run([sys.executable, "-m", f"bench.{name}", *command], check=True, cwd=HERE.parent)
    return {"environment": environment(), "rows": json.loads(path.read_text())["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shapes", type=int, default=400, help="of the sweep")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="only rewrite RESULTS.md")
    parser.add_argument("--only", choices=["attention", *CONTESTS], help="measure one, keep what "
                        "the last run found of the others")  # fmt: skip
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    if args.quick:
        args.rounds, args.shapes = 5, 30
    last = OUT / "results.json"
    keep = args.report or args.only
    result: dict[str, Any] = json.loads(last.read_text()) if keep and last.exists() else {}
    if not args.report and args.only not in CONTESTS:
        result |= {
            "environment": environment(),
            "timed": timed(args.backend, args.rounds),
            "memory": memory(args.backend),
            "sweep": sweep(args.shapes, args.backend),
        }
    for name in CONTESTS:
        if not args.report and args.only in (None, name):
            result[name] = contests(name, args.rounds)
    missing = [name for name in ("timed", *CONTESTS) if name not in result]
    if missing:
        sys.exit(f"bench: {', '.join(missing)} never measured here; run without --only first")
    last.write_text(json.dumps(result, indent=1))
    target = OUT / "RESULTS.md" if args.quick else HERE / "RESULTS.md"
    report.write(result, target)
    print(report.summary(result))
    print(
        f"Wrote {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}"
    )


if __name__ == "__main__":
    main()
