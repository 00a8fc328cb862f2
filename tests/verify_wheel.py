"""`make verify-full`: one wheel, audited, then imported and tried under several torches.

The wheel is built against the torch of the current environment. For each torch of the list a fresh
virtual environment outside the checkout gets that torch (whichever build of it `pip install` finds:
no index is named here) and the wheel, and runs tests/smoke.py from an empty folder. Anything that
does not happen, a download included, is red.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHES = ("2.10.0", "2.13.0", "2.14.1")


@dataclass
class Result:
    what: str
    ok: bool
    detail: str
    seconds: float


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command's result with its output captured; a Python path of ours would hide the wheel."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=env
    )


def tail(done: subprocess.CompletedProcess[str], lines: int = 12) -> str:
    return "\n".join((done.stdout + done.stderr).strip().splitlines()[-lines:])


def build(folder: Path) -> tuple[Result, Path | None]:
    """One wheel, and its name says that it serves every Python from 3.10 on."""
    start = time.perf_counter()
    for stale in (ROOT / "build").glob("lib*"):  # else modules deleted long ago would be packed
        shutil.rmtree(stale)
    done = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"),
        *("--wheel-dir", folder, ROOT),
    )
    wheels = sorted(folder.glob("*.whl"))
    seconds = time.perf_counter() - start
    if done.returncode != 0 or len(wheels) != 1:
        return Result("build the wheel", False, tail(done), seconds), None
    wheel = wheels[0]
    ok = "-cp310-abi3-" in wheel.name
    detail = f"{wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB"
    return Result("build the wheel", ok, detail if ok else f"not abi3: {detail}", seconds), wheel


def audit(wheel: Path) -> Result:
    """Does the extension use only what CPython's limited API promises?"""
    start = time.perf_counter()
    done = run(sys.executable, "-m", "abi3audit", "--strict", "--verbose", wheel)
    ok = done.returncode == 0
    return Result("abi3audit", ok, tail(done, 1 if ok else 12), time.perf_counter() - start)


def try_torch(version: str, wheel: Path, scratch: Path, smoke_args: list[str]) -> Result:
    """A fresh environment with that torch and the wheel; removed afterwards."""
    start = time.perf_counter()
    home = scratch / f"torch-{version}"
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    empty = scratch / "empty"
    empty.mkdir(exist_ok=True)
    smoke = shutil.copy(ROOT / "tests" / "smoke.py", empty)
    try:
        venv.create(home, with_pip=True)
        for package in (f"torch=={version}", "numpy", wheel):
            done = run(python, "-m", "pip", "install", "--disable-pip-version-check", package)
            if done.returncode != 0:
                detail = f"pip install {package} failed:\n{tail(done)}"
                return Result(f"torch {version}", False, detail, time.perf_counter() - start)
        installed = time.perf_counter() - start
        done = run(python, smoke, "--not-under", ROOT, *smoke_args, cwd=empty)
        lines = done.stdout.strip().splitlines()
        ok = done.returncode == 0 and bool(lines) and lines[-1] == "PASS"
        ok = ok and f"torch {version}" in lines[0]
        detail = f"{done.stdout.strip()}" if ok else tail(done, 25)
        detail += f"\n(installed in {installed:.0f} s)"
        return Result(f"torch {version}", ok, detail, time.perf_counter() - start)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def table(results: list[Result]) -> str:
    lines = ["", f"{'what':18} {'result':7} {'seconds':>8}", "-" * 36]
    lines += [f"{r.what:18} {'PASS' if r.ok else 'FAIL':7} {r.seconds:8.0f}" for r in results]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", action="append", help=f"default: {', '.join(TORCHES)}")
    parser.add_argument("--wheel", type=Path, help="try this wheel instead of building one")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="fastattn-verify-") as name:
        scratch = Path(name)
        wheel = args.wheel
        if wheel is None:
            built, wheel = build(scratch / "wheel")
            results.append(built)
            print(f"{built.what}: {built.detail}", flush=True)
        if wheel is not None:
            results.append(audit(wheel))
            print(f"abi3audit: {results[-1].detail}", flush=True)
            for version in args.torch or TORCHES:
                smoke_args = ["--no-compile"] if args.no_compile else []
                results.append(try_torch(version, wheel.resolve(), scratch, smoke_args))
                print(f"{results[-1].what}: {results[-1].detail}", flush=True)
    print(table(results))
    sys.exit(0 if all(r.ok for r in results) else 1)


if __name__ == "__main__":
    main()
