"""`make verify-wheels`: everything in dist/ looked into, then installed and tried.

`python -m wheels [options] dist/*` with PYTHONPATH=tests. --quick only looks into them.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from .contents import checks
from .kit import CheckError, Wheel
from .trials import TORCHES, Environment, try_sdist, try_wheel, with_torch

Row = tuple[str, bool, float]


def attempt(what: str, step: Callable[[], str]) -> Row:
    start = time.perf_counter()
    try:
        detail, ok = step(), True
    except CheckError as error:
        detail, ok = str(error), False
    seconds = time.perf_counter() - start
    print(f"{what}: {'' if ok else 'FAILED: '}{detail}", flush=True)
    return what, ok, seconds


def kind(wheel: Wheel) -> str:
    return wheel.local or "cpu"


def trials(wheels: list[Wheel], torch: str, smoke: tuple[str, ...]) -> list[Row]:
    """Every wheel beside one torch."""
    rows: list[Row] = []
    with ExitStack() as stack:
        below: list[Environment] = []

        def install() -> str:
            below.append(stack.enter_context(with_torch(torch)))
            return "installed"

        rows.append(attempt(f"torch {torch}", install))
        for wheel in wheels if below else ():
            step = partial(try_wheel, wheel, torch, below[0], smoke)
            rows.append(attempt(f"{kind(wheel)} torch {torch}", step))
    return rows


def table(rows: list[Row]) -> str:
    lines = ["", f"{'what':28} {'result':7} {'seconds':>8}", "-" * 45]
    lines += [f"{what:28} {'PASS' if ok else 'FAIL':7} {s:8.0f}" for what, ok, s in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="wheels, sdists")
    parser.add_argument("--torch", action="append", help="try the wheels beside these alone")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="install nothing")
    args = parser.parse_args()
    smoke = ("--no-compile",) if args.no_compile else ()
    wheels = [Wheel.of(path) for path in args.files if path.suffix == ".whl"]
    sdists = [path for path in args.files if path.suffix != ".whl"]
    rows = [attempt(f"{kind(w)} {f.__name__}", partial(f, w)) for w in wheels for f in checks(w)]
    if not args.quick:
        for torch in args.torch or TORCHES:
            rows += trials(wheels, torch, smoke) if wheels else []
        rows += [attempt("sdist", partial(try_sdist, path, smoke)) for path in sdists]
    print(table(rows))
    sys.exit(0 if all(ok for _, ok, _ in rows) else 1)


if __name__ == "__main__":
    main()
