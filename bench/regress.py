"""`make bench-check` = `python -m bench.regress`: is anything slower against stock than it was?

Rows of bench/recorded.json (the last recorded `make bench`) are measured again, those with a target
unless --all or --only says otherwise. A row has regressed if its ratio to stock is more than 10 %
below the recorded one and outside the noise: the upper quartile of now below the lower one of then.
What looks like that is measured once more, longer, and fails only if it is so again. Exit code 1
then, and 2 where the record is of another machine, whose ratios say nothing here.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from bench import registry
from bench.harness import Setting, environment, run_case
from fastattn.measure import Spread

RECORD = Path(__file__).parent / "recorded.json"
LOSS = 0.10
MACHINE = ("cpu", "capability", "isa", "threads", "platform", "gpu")


def regressed(then: list[float], now: Spread) -> bool:
    """then: median and quartiles of the recorded ratio."""
    median, lower, _ = then
    return now.median < (1 - LOSS) * median and now.q3 < lower


def other_machine(record: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """In what this machine differs from the record's."""
    return [
        f"{key} {record.get(key)} there, {here.get(key)} here"
        for key in MACHINE
        if record.get(key) != here.get(key)
    ]


def chosen(rows: dict[str, Any], only: list[str] | None, every: bool) -> list[str]:
    """Names of the rows to measure again; only: sections, or rows by their names."""
    if only:
        return [n for n in rows if n in only or n.partition("/")[0] in only]
    return [n for n, row in rows.items() if every or row["tag"] == "table"]


def _ratio(name: str, rounds: int, seconds: float) -> Spread | None:
    case = registry.find(name)
    if case is None:
        return None
    return run_case(case, Setting(peers=False), rounds=rounds, max_seconds=seconds).speedup


def check(names: list[str], rows: dict[str, Any], seconds: float) -> list[str]:
    """Names of the rows that regressed, or are not there any more."""
    lost = []
    for name in names:
        then = rows[name]["ratio"]
        now = _ratio(name, 15, seconds)
        if now is not None and regressed(then, now):
            now = _ratio(name, 45, 3 * seconds)
        word = "gone" if now is None else "REGRESSED" if regressed(then, now) else "ok"
        if word != "ok":
            lost.append(name)
        shown = "-" if now is None else f"{now:.2f}"
        print(f"{name:44} {then[0]:.2f} [{then[1]:.2f}, {then[2]:.2f}] -> {shown}  {word}",
              flush=True)  # fmt: skip
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.regress", description=__doc__)
    parser.add_argument("--only", action="append", help="a section, or a row; repeatable")
    parser.add_argument("--all", action="store_true", help="rows without a target too")
    parser.add_argument("--seconds", type=float, default=3.0, help="most for a row")
    parser.add_argument("--record", type=Path, default=RECORD)
    args = parser.parse_args()
    os.environ["FASTATTN_TUNE_CACHE"] = os.devnull
    if not args.record.exists():
        print(f"bench.regress: {args.record} is not there; `make bench` writes it", file=sys.stderr)
        sys.exit(2)
    record = json.loads(args.record.read_text())
    differences = other_machine(record["environment"], environment())
    if differences:
        print(f"bench.regress: the record is of another machine ({'; '.join(differences)}); record "
              "one here with `make bench`", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    names = chosen(record["rows"], args.only, args.all)
    if not names:
        print("bench.regress: no such row in the record", file=sys.stderr)
        sys.exit(2)
    lost = check(names, record["rows"], args.seconds)
    print(f"{len(names) - len(lost)} of {len(names)} rows hold")
    if lost:
        sys.exit(f"bench.regress: more than {LOSS:.0%} slower than recorded: {', '.join(lost)}")


if __name__ == "__main__":
    main()
