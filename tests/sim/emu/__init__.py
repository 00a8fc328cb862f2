"""CUDA kernels on the host: the `.cu` compiled by g++, a fiber a thread, under the sanitizers.

    program = Program([attention_fwd_cu], "tsan")
    outputs = run(program, Case("attention_forward", numbers, tensors, outputs), schedule="reverse")

| sees                                                            | by                             |
|-----------------------------------------------------------------|--------------------------------|
| races in a block, between blocks, with cp.async in flight       | tsan, whatever the schedule    |
| overruns of tensors and shared memory; undefined behaviour      | asan                           |
| misaligned vectors, cp.async, ldmatrix                          | plain, asan; cp.async: all     |
| diverged warps, barriers apart, dead-lock, spinning for nothing | all, with who waits where     |
| shared memory read before written; copies used before they land | `agreeing`: runs that vary the |
|                                                                 | poison, landing and schedule   |

It does not see the text of asm statements (emulate_ptx.h stands for them), approximate instructions
(they are exact here), bank conflicts, or what nvcc and ptxas make of the source.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .build import HERE, ROOT, SANITIZERS, BuildError, program
from .case import Case

__all__ = [
    "HERE",
    "ROOT",
    "SANITIZERS",
    "SCHEDULES",
    "BuildError",
    "Case",
    "EmulatorFault",
    "LaunchError",
    "Program",
    "agreeing",
    "run",
]

# forward, reverse: the lowest (highest) thread runs until it waits, so that warps are as far apart
# as barriers let them; cyclic: all advance together; random:SEED.
SCHEDULES = ("forward", "reverse", "cyclic", "random:1")
POISONS = (0xFFFFFFFF, 0x3C003C00)  # NaN, and small finite numbers, in every float type


class EmulatorFault(AssertionError):  # noqa: N818, what is at fault is the kernel
    """The program found a fault of the kernel. `kind` names it, `report` is all it said."""

    def __init__(self, kind: str, report: str):
        super().__init__(f"{kind}\n{report}")
        self.kind = kind
        self.report = report


class LaunchError(RuntimeError):
    """The launcher returned a cudaError_t; `code` is its number."""

    def __init__(self, code: int):
        super().__init__(f"cudaError_t {code}")
        self.code = code


@dataclass(frozen=True)
class Program:
    """Sources compiled together, once a sanitizer."""

    sources: tuple[Path, ...]
    defines: tuple[str, ...] = ()

    def executable(self, sanitizer: str) -> Path:
        return program(self.sources, sanitizer, self.defines)


# How reports begin, most telling first; what fits none is a "crash", which no test expects.
_KINDS = (
    (r"^emulator: (diverged|barrier|deadlock|misaligned|out of bounds|launch|trap|timeout):", None),
    (r"ThreadSanitizer: data race", "race"),
    (r"runtime error: .*misaligned address", "misaligned"),
    (r"AddressSanitizer: (heap-buffer-overflow|heap-use-after-free|SEGV)", "out of bounds"),
    (r"runtime error: ", "undefined"),
)
_SANITIZER_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:history_size=4:atexit_sleep_ms=0",
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=67:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=68",
}
_ADDR_NO_RANDOMIZE = 0x0040000
_libc = ctypes.CDLL(None)


def _same_addresses() -> None:
    """In the child: old ThreadSanitizers do not know the layouts that much randomisation makes."""
    _libc.personality(_ADDR_NO_RANDOMIZE)


# How a kernel is called is the same in every report and hides the rest.
_NOISE = re.compile(
    r"^ +#\d+ .*(std::(__)?(invoke|apply)|_M_invoke|launch_kernel|launcher_|_main|__libc_).*\n"
    r"|^ +#\d+ .*/emu/(sanitizer\.h|scheduler\.cpp|order\.cpp|async\.cpp|driver\.cpp):.*\n"
    r"|^ +#\d+ 0x[0-9a-f]+ +\(.*\n"
    r"|^Shadow bytes around(.*\n)*?(?==)"
    r"| \([\w.-]+\+0x[0-9a-f]+\)",
    re.MULTILINE,
)


def _kind(report: str) -> str:
    for pattern, kind in _KINDS:
        if found := re.search(pattern, report, re.MULTILINE):
            return kind or found.group(1)
    return "crash"


def run(
    program: Program,
    case: Case,
    sanitizer: str = "plain",
    *,
    schedule: str = "forward",
    cp_async: str = "eager",
    poison: int = POISONS[0],
    resident: int = 3,
    shared_limit: int = 163 << 10,
    seconds: int = 120,
) -> dict[str, torch.Tensor]:
    """The case's outputs. EmulatorFault where the kernel is at fault, LaunchError for its launch.

    resident: blocks that run at once (a cooperative launch: all). shared_limit: opt-in bytes of
    shared memory a block. seconds: after which the program says where its threads are ("timeout").
    """
    name, _, seed = schedule.partition(":")
    with tempfile.TemporaryDirectory(prefix="fastattn-emu-") as folder:
        paths = Path(folder, "case"), Path(folder, "result")
        case.write(paths[0])
        options = {
            "schedule": name,
            "seed": seed or "0",
            "cp-async": cp_async,
            "poison": hex(poison),
            "resident": str(resident),
            "shared-limit": str(shared_limit),
            "seconds": str(seconds),
        }
        done = subprocess.run(
            [program.executable(sanitizer), *paths, *(f"--{k}={v}" for k, v in options.items())],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **_SANITIZER_OPTIONS},
            preexec_fn=_same_addresses,
            timeout=seconds + 60,
        )
        if done.returncode:
            said = _NOISE.sub("", done.stderr)[:20000]
            report = f"exit {done.returncode}, {sanitizer}, {options}\n{said}"
            raise EmulatorFault(_kind(done.stderr), report)
        error, results = case.read(paths[1])
    if error:
        raise LaunchError(error)
    return results


def agreeing(
    program: Program,
    case: Case,
    sanitizer: str = "plain",
    *,
    schedules: Sequence[str] = SCHEDULES,
    resident: int = 3,
) -> dict[str, torch.Tensor]:
    """The outputs, after every schedule, landing of copies and poison gave the same bits.

    Differing bits are an EmulatorFault of kind "unstable".
    """
    first: dict[str, torch.Tensor] | None = None
    landings, poisons = itertools.cycle(("lazy", "eager")), itertools.cycle(POISONS)
    for schedule, cp_async, poison in zip(schedules, landings, poisons, strict=False):
        way = {"schedule": schedule, "cp_async": cp_async, "poison": poison}
        got = run(program, case, sanitizer, resident=resident, **way)
        first = first or got
        for name, value in got.items():
            if not torch.equal(_bits(value), _bits(first[name])):
                raise EmulatorFault("unstable", f"'{name}' has other bits with {way}")
    assert first is not None
    return first


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)
