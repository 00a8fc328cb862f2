"""Rung (d): what the compilers make of a launch, for architectures that are not here.

A recorded launch (the real signature, constants and attributes) is compiled down to machine code,
and that is read: registers, spill instructions, shared memory, tensor-core instructions in loops.
Figures are kept under build/aot by everything they depend on: a second run compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
import triton.backends.nvidia

from .driver import SHARED_LIMIT
from .launches import Launch, specialise, target

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "aot"
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
ARCHS = tuple(SHARED_LIMIT)  # sm_80 ... gfx942
JOBS = 2


@dataclass(frozen=True)
class Figures:
    """Of one kernel on one architecture."""

    registers: int  # a thread (NVIDIA), VGPRs a lane (AMD)
    spills: int  # instructions that store to or load from local (AMD: scratch) memory
    shared: int  # bytes a block
    mma: int  # tensor-core instructions inside loops, as written (not as executed)

    def worse_than(self, budget: Figures) -> list[str]:
        found = []
        for name in ("registers", "spills", "shared"):
            now, allowed = getattr(self, name), getattr(budget, name)
            if now > allowed:
                found.append(f"{name} {now} > {allowed}")
        if self.mma < budget.mma:
            found.append(f"mma {self.mma} < {budget.mma}")
        return found


class CompileError(AssertionError):
    """A launch that does not compile for an architecture."""


def figures(launch: Launch, arch: str) -> Figures:
    """Compile (unless that was done before) and read the machine code."""
    (found,) = all_figures([(launch, arch)])
    if isinstance(found, CompileError):
        raise found
    return found


def all_figures(jobs: Iterable[tuple[Launch, str]]) -> list[Figures | CompileError]:
    """In the order of `jobs`, two at a time.

    In child processes, for two reasons: a compile to machine code resets the switch of the printer
    that ttsem needs (semantics.py), and CPython 3.11's ast.parse is not safe in threads where the
    garbage collector may run Python code ("AST constructor recursion depth mismatch"). Forked,
    since launches hold kernels and tensors.
    """
    global _jobs
    _jobs = list(jobs)
    with ProcessPoolExecutor(JOBS, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_job, range(len(_jobs))))


_jobs: list[tuple[Launch, str]] = []


def _job(i: int) -> Figures | CompileError:
    try:
        return _figures(*_jobs[i])
    except CompileError as error:
        return error


def _figures(launch: Launch, arch: str) -> Figures:
    to = target(arch)
    special = specialise(launch, to)
    everything = f"{special.key} {arch} {triton.__version__} {_own_source()}"
    kept = KEPT / f"{hashlib.sha256(everything.encode()).hexdigest()[:32]}.json"
    if kept.exists():
        return Figures(**json.loads(kept.read_text()))
    try:
        compiled = triton.compile(special.source, target=to, options=special.options.__dict__)
    except Exception as error:
        raise CompileError(f"{launch.name} for {arch}: {str(error)[-500:]}") from error
    if arch.startswith("gfx"):
        found = read_gcn(compiled.asm["amdgcn"], compiled.metadata.shared)
    else:
        found = read_cubin(compiled.kernel, compiled.metadata.shared)
    KEPT.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a run that was interrupted leaves no half a file.
    with tempfile.NamedTemporaryFile("w", dir=KEPT, delete=False) as file:
        json.dump(asdict(found), file)
    Path(file.name).replace(kept)
    return found


@functools.cache
def _own_source() -> str:
    """A change of how machine code is read invalidates what was kept."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------- reading

_BRANCH = re.compile(r"\bBRA[.\w]*\s.*?`\((\.L[\w]+)\)")
_LABEL = re.compile(r"^\s*(\.L[\w]+):")
_SPILL = re.compile(r"\b(STL|LDL)\b")
_MMA = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|IMMA|DMMA|QGMMA|UTCQMMA|OMMA|QMMA)\b")
_GCN_BRANCH = re.compile(r"\bs_c?branch\w*\s+(\.L\w+)")


def _tool(name: str, *args: str) -> str:
    done = subprocess.run(
        [str(TOOLS / name), *args], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def read_cubin(cubin: bytes, shared: int) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    registers = max(int(n) for n in re.findall(r"\bREG:(\d+)", usage))
    spills = sum(bool(_SPILL.search(line)) for line in sass.splitlines())
    return Figures(registers, spills, shared, mma_in_loops(sass))


def read_gcn(text: str, shared: int) -> Figures:
    """SGPRs that spill into lanes of VGPRs reach no memory and do not count."""
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
    spills = len(re.findall(r"\bscratch_(?:load|store)", text))
    mma = _in_loops(text, _GCN_BRANCH, re.compile(r"\bv_s?mfmac?_"))
    return Figures(registers, spills, shared, mma)


def mma_in_loops(sass: str) -> int:
    """Tensor-core instructions in the loops of one function."""
    return _in_loops(sass, _BRANCH, _MMA)


def _in_loops(text: str, branch: re.Pattern[str], wanted: re.Pattern[str]) -> int:
    """Lines with `wanted` between a label and a branch back to it."""
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    inside = [False] * len(lines)
    for i, line in enumerate(lines):
        if (m := branch.search(line)) and labels.get(m[1], i) < i:
            inside[labels[m[1]] : i] = [True] * (i - labels[m[1]])
    return sum(on and bool(wanted.search(line)) for on, line in zip(inside, lines, strict=True))
