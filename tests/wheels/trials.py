"""Wheels and the sdist installed into fresh environments, away from the checkout, and used there.

An environment gets the torch that is named (whichever build of it `pip install` finds: no index is
named here), another on top of it gets the wheel and runs tests/smoke.py from an empty folder.
Anything that does not happen, a download included, is red.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kit import ROOT, Wheel, check, output

# The oldest, one built for CPUs alone, the newest; what pip finds for the others is built for CUDA
# 12 and 13. PyTorch's index of CPU builds has the second: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS
# names it.
TORCHES = ("2.10.0", "2.13.0+cpu", "2.14.1")


@dataclass(frozen=True)
class Environment:
    python: Path
    empty: Path  # a folder to run in

    def install(self, *what: object, **environment: str) -> None:
        pip = (self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        # Most of torch's thousands of modules are never imported here: no bytecode beforehand.
        output(*pip, "--no-compile", *what, cwd=self.empty, **environment)

    def packages(self) -> Path:
        code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        return Path(output(self.python, "-c", code, cwd=self.empty).strip())

    def smoke(self, *arguments: str) -> str:
        """tests/smoke.py; its report."""
        copy = shutil.copy(ROOT / "tests" / "smoke.py", self.empty)
        said = output(self.python, copy, "--not-under", ROOT, *arguments, cwd=self.empty).strip()
        check(said.endswith("\nPASS"), f"smoke.py did not end in PASS:\n{said}")
        return said

    def doctor(self, **environment: str) -> dict[str, Any]:
        command = (self.python, "-m", "fastattn", "doctor", "--json")
        facts: dict[str, Any] = json.loads(output(*command, cwd=self.empty, **environment))
        return facts

    def doctor_with_driver(self, knows: int) -> dict[str, Any]:
        """On a machine whose driver knows that CUDA, 12020 for 12.2: the runtime that is linked in
        asks a library of the driver's name, which here can tell its version and nothing else."""
        folder = self.empty / f"driver-{knows}"
        folder.mkdir()
        source = folder / "libcuda.c"
        source.write_text(f"int cuDriverGetVersion(int* v) {{ *v = {knows}; return 0; }}\n")
        output("cc", "-shared", "-fPIC", source, "-o", folder / "libcuda.so.1")
        return self.doctor(LD_LIBRARY_PATH=str(folder))


@contextmanager
def fresh(below: Environment | None = None) -> Iterator[Environment]:
    """A virtual environment with pip alone, or with what is in `below`; removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="fastattn-trial-") as name:
        home, empty = Path(name) / "venv", Path(name) / "empty"
        empty.mkdir()
        venv.create(home, with_pip=True)
        environment = Environment(home / "bin" / "python", empty)
        if below is not None:
            (environment.packages() / "below.pth").write_text(f"{below.packages()}\n")
        yield environment


@contextmanager
def with_torch(version: str) -> Iterator[Environment]:
    """An environment with that torch: gigabytes, so every wheel's own is put on top of it."""
    with fresh() as environment:
        environment.install(f"torch=={version}", "numpy", "rich", "typer")
        yield environment


def try_wheel(wheel: Wheel, torch: str, below: Environment, smoke: tuple[str, ...]) -> str:
    """Installed beside that torch: import, smoke test, and what `doctor` says."""
    kernels = wheel.cuda and not torch.endswith("+cpu")
    with fresh(below) as environment:
        environment.install(wheel.path)
        said = environment.smoke("--cuda-kernels", "yes" if kernels else "no", *smoke)
        check(f"torch {torch}" in said.splitlines()[0], said)
        facts = environment.doctor()
        for knows, verdict in ((12020, "too old"), (13000, "new enough")) if kernels else ():
            judge_driver(environment.doctor_with_driver(knows), verdict)
    check(facts["fastattn"] == wheel.version, f"doctor shows version {facts['fastattn']}")
    check(facts["extension"]["loaded"], f"doctor: {facts['extension']}")
    if wheel.cuda:
        judge_cuda(facts, kernels)
    return said


def judge_cuda(facts: dict[str, Any], kernels: bool) -> None:
    """What `doctor` says of a CUDA wheel, on a machine without a driver as on one with."""
    extension = facts["extension_cuda"]
    (backend,) = (b for b in facts["backends"] if b["name"] == "cuda")
    if kernels:
        check(extension["loaded"], f"doctor: {extension}")
        check(extension["minimum_driver"] == "580", f"doctor: {extension}")
        check(extension["cuda_runtime"].startswith("13.0"), f"doctor: {extension}")
        check(extension["machine_code"] == "sm_80, sm_90, sm_100, sm_120", f"doctor: {extension}")
        check(extension["ptx"] == "compute_80", f"doctor: {extension}")
    else:
        check(not extension["loaded"], "doctor: _C_cuda is loaded beside a CPU build of torch")
        check("libtorch_cuda" in extension["why"], f"doctor: {extension}")
        check(not backend["usable"], f"doctor: {backend}")
        check("built for CPUs" in backend["why"], f"doctor: {backend}")


def judge_driver(facts: dict[str, Any], verdict: str) -> None:
    driver = facts["extension_cuda"]["driver"]
    check(driver.endswith(verdict), f"doctor says of the driver: {driver}, which is {verdict}")
    (backend,) = (b for b in facts["backends"] if b["name"] == "cuda")
    named = "needs driver 580 or later" in backend["why"]
    check(named == (verdict == "too old"), f"doctor: {backend}")


def try_sdist(path: Path, smoke: tuple[str, ...]) -> str:
    """It holds every source, and pip makes a working package of it with nothing else at hand: in an
    isolated build, for which it fetches torch itself."""
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "kernels", "fastattn", "tests", "bench"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout.split()  # fmt: skip
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    lacks = [name for name in tracked if name not in held and (ROOT / name).exists()]
    check(not lacks, f"the sdist lacks {lacks}")
    kernels = sum(name.endswith((".cu", ".cuh")) for name in held)
    with fresh() as environment:
        environment.install(path.resolve(), FASTATTN_CUDA="0")
        said = environment.smoke("--cuda-kernels", "no", *smoke)
    return f"{len(held)} files, {kernels} of them .cu and .cuh\n{said}"
