"""The CPU kernels stand without torch: a plain C++ program links them and checks them itself."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("attention_portable.cpp", "scratch.cpp", "isa.cpp")


def test_portable_kernels_in_a_program_of_their_own(tmp_path: Path) -> None:
    program = tmp_path / "portable_check"
    flags = [
        "-std=c++20",
        "-O2",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-w",
    ]
    sources = [str(ROOT / "tests/portable_check.cpp")]
    sources += [str(ROOT / "csrc/cpu" / name) for name in SOURCES]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, *sources, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("\n") == 5 * 4 + 1
