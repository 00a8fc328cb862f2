"""`make test-gpu` and `make bench-gpu`: the tests and benches on this machine's GPU, one report.

The same test files run as on the CPU: FASTATTN_TEST_DEVICE=cuda makes tests/conftest.py put their
tensors on the device and test the backends that serve it. Both targets write their part into
build/gpu-report.json and all that is there into build/gpu-report.md: attach that one to an issue.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
# What is said of every backend; the other files are about CPU kernels, or need no device.
TESTS = (
    "test_attention", "test_attention_backward", "test_attention_dropout", "test_attention_edge",
    "test_attention_varlen", "test_attention_weights",
)  # fmt: skip
BENCH_TAGS = ("table", "beside")


def why_not() -> str | None:
    """None where a GPU can be used, else the reason in a sentence."""
    import torch

    if torch.cuda.is_available():
        return None
    return (
        f"needs a GPU, and torch {torch.__version__} finds none here "
        "(torch.cuda.is_available() is False); without one, `make verify` proves what can be."
    )


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} from nvidia-smi)"
    return done.stdout.split("\n")[0].strip()


def environment() -> dict[str, str]:
    import torch
    import triton

    import fastattn

    major, minor = torch.cuda.get_device_capability()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {
        "GPU": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "driver": driver_version(),
        "CUDA or ROCm of torch": str(torch.version.cuda or torch.version.hip),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "fastattn": f"{fastattn.__version__} {commit.stdout.strip()[:12]}".strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run_tests(extra: list[str]) -> dict[str, Any]:
    path = BUILD / "gpu-tests.xml"
    path.unlink(missing_ok=True)
    files = [f"tests/{name}.py" for name in TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files, f"--junitxml={path}",
         "--basetemp=build/pytest-tmp", *extra],
        cwd=ROOT, env={**os.environ, "FASTATTN_TEST_DEVICE": "cuda"}, check=False,
    )  # fmt: skip
    return {"exit_status": done.returncode, **read_junit(path)}


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, and the failures with the first line of what they say."""
    if not path.exists():
        return {"passed": 0, "failed": [], "skipped": 0, "seconds": 0.0}
    failed, skipped, total, seconds = [], 0, 0, 0.0
    for case in ET.parse(path).getroot().iter("testcase"):
        total += 1
        seconds += float(case.get("time", 0))
        wrong = [x for x in case if x.tag in ("failure", "error")]
        skipped += any(x.tag == "skipped" for x in case)
        if wrong:
            name = f"{case.get('classname')}::{case.get('name')}"
            lines = (wrong[0].get("message") or "").splitlines()
            failed.append([name, lines[0] if lines else ""])
    passed = total - skipped - len(failed)
    return {"passed": passed, "failed": failed, "skipped": skipped, "seconds": round(seconds)}


def run_bench(extra: list[str]) -> dict[str, Any]:
    path = BUILD / "gpu-bench.json"
    path.unlink(missing_ok=True)
    cases = [x for tag in BENCH_TAGS for x in ("--tag", tag)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--device", "cuda", *cases, "--json", str(path), *extra],
        cwd=ROOT, check=False,
    )  # fmt: skip
    rows = json.loads(path.read_text()) if path.exists() else []
    return {"exit_status": done.returncode, "rows": rows}


def markdown(report: dict[str, Any]) -> str:
    lines = ["# fastattn on a GPU", ""]
    lines += [f"- {key}: {value}" for key, value in report["environment"].items()]
    tests = report.get("tests")
    lines += ["", "## Tests", ""]
    if tests is None:
        lines.append("Not run: `make test-gpu`.")
    else:
        lines.append(
            f"{tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped "
            f"in {tests['seconds']} s (pytest's exit status {tests['exit_status']})."
        )
        lines += ["", *(f"- `{name}`: {text}" for name, text in tests["failed"])]
    bench = report.get("bench")
    lines += ["", "## Bench", ""]
    if bench is None:
        lines.append("Not run: `make bench-gpu`.")
    else:
        lines += [
            "Against torch's own in the same process, interleaved, with the device's work waited",
            f"for (exit status {bench['exit_status']}).",
            "",
            "| case | stock, ms | fastattn, ms | ratio | TFLOP/s, GB/s | share of roof |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for row in bench["rows"]:
            stock, fused = (row["seconds"][name]["median"] for name in ("stock", "fused"))
            work = row["flops"] / 1e12 if row["roof"] == "gemm" else row["bytes"] / 1e9
            cells = (
                row["what"], f"{stock * 1e3:.3f}", f"{fused * 1e3:.3f}",
                f"{row['over']['stock']['median']:.2f}", f"{work / fused:.1f}",
                f"{row['share']:.0%} of {row['roof']}",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("test", "bench"))
    args, extra = parser.parse_known_args()  # the rest goes to pytest or the bench
    why = why_not()
    if why is not None:
        sys.exit(f"make {args.what}-gpu {why}")
    BUILD.mkdir(exist_ok=True)
    path = BUILD / "gpu-report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    here = environment()
    # What another GPU or another version left is not mixed with this run.
    if report.get("environment") != here:
        report = {"environment": here}
    part = run_tests(extra) if args.what == "test" else run_bench(extra)
    report["tests" if args.what == "test" else "bench"] = part
    path.write_text(json.dumps(report, indent=1))
    path.with_suffix(".md").write_text(markdown(report))
    print(f"wrote {path.with_suffix('.md').relative_to(ROOT)} and {path.name}")
    sys.exit(part["exit_status"])


if __name__ == "__main__":
    main()
