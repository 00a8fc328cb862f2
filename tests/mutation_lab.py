"""Bugs planted in the CPU kernels, one at a time: how a mutant is built, run and judged.

A mutant is a library of one instruction set made from a shim (mutant_*_shim.cpp), which takes
seconds to compile against a copy of csrc/cpu with the bug in it; a program of the shim's name
(mutant.py) runs it. Some case must find its results wrong, or it must die of them.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mutant
import numpy as np
from mutations import Mutation

HERE = Path(__file__).parent
CPU = HERE.parent / "csrc" / "cpu"
JOBS = 2
# -O0: compiling is nine tenths of the time. The floating-point flags are those of setup.py.
FLAGS = (
    "-std=c++20", "-O0", "-g0", "-w", "-fvisibility=hidden", "-ffp-contract=fast",
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
SHARED = ("-fPIC", "-shared")
STANDARD = (
    "algorithm", "atomic", "cmath", "cstdint", "cstdlib", "cstring", "limits", "memory", "new",
    "thread", "type_traits", "utility", "vector",
)  # fmt: skip


def pattern(code: str) -> str:
    """A regular expression for the code however it is broken into lines."""
    tokens = re.findall(r"\w+|[^\w\s]", code)
    gaps = [
        r"\s+" if a[-1].isalnum() and b[0].isalnum() else r"\s*"
        for a, b in itertools.pairwise(tokens)
    ]
    return "".join(re.escape(t) + g for t, g in zip(tokens, [*gaps, ""], strict=True))


def mutate(text: str, mutation: Mutation) -> str:
    found = list(re.finditer(pattern(mutation.find), text))
    assert len(found) == 1, (
        f"{mutation.name}: {len(found)} places in {mutation.file}, wanted 1: {mutation.find}"
    )
    return text[: found[0].start()] + mutation.replace + text[found[0].end() :]


def check_place(mutation: Mutation) -> None:
    text = (CPU / mutation.file).read_text()
    assert mutate(text, mutation) != text


def check_names(mutations: Sequence[Mutation]) -> None:
    assert len({m.name for m in mutations}) == len(mutations)


def compiler() -> list[str]:
    return (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()


def with_headers(
    folder: Path, flags: tuple[str, ...], headers: Sequence[str], form: tuple[str, ...] = SHARED
) -> tuple[str, ...]:
    """The flags with headers compiled beforehand: half of what a mutant takes."""
    header = folder / "before.h"
    header.write_text("".join(f"#include <{n}>\n" for n in headers))
    command = [*compiler(), *FLAGS, *form, *flags, "-x", "c++-header", header]
    subprocess.run([*command, "-o", f"{header}.gch"], check=True)
    return ("-include", str(header), *flags)


def build(
    folder: Path,
    mutation: Mutation | None,
    shim: str,
    source: str,
    beside: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    edits: tuple[Mutation, ...] = (),
    form: tuple[str, ...] = SHARED,
) -> Path:
    """The library of the kernels in `source`, which the shim includes, and in files compiled
    `beside` it, with the mutation where there is one, and with what every library has `edits`."""
    home = folder / "cpu"  # in a folder of its own: mutants are built at the same time
    shutil.rmtree(home, ignore_errors=True)  # of the sample, before all
    home.mkdir(parents=True)
    own = ("scratch.cpp", "embedding.cpp", "huge_pages.cpp")
    for file in (*CPU.glob("*.h"), *(CPU / name for name in (source, *beside, *own))):
        shutil.copy(file, home)
    shutil.copy(CPU.parent / "operands.h", folder)  # "../operands.h"
    for edit in (*edits, *([] if mutation is None else [mutation])):
        file = home / edit.file
        file.write_text(mutate(file.read_text(), edit))
    library = folder / "mutant.so"
    sources = [str(HERE / shim), *(str(home / name) for name in beside)]
    command = [*compiler(), *FLAGS, *form, *flags, f"-I{home}", *sources, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{folder.name} does not compile:\n{done.stderr}"
    return library


def build_check(
    folder: Path, check: str, included: str, mutation: Mutation | None, flags: tuple[str, ...] = ()
) -> Path:
    """The program of tests/`check` beside a copy of the files of csrc/cpu that it includes, one of
    them with the mutation where there is one."""
    source, home = folder / "tests" / check, folder / "csrc" / "cpu"
    source.parent.mkdir(), home.mkdir(parents=True)
    shutil.copy(HERE / check, source)
    for file in CPU.glob(included):
        text = file.read_text()
        if mutation is not None and file.name == mutation.file:
            text = mutate(text, mutation)
        (home / file.name).write_text(text)
    out = folder / "check"
    subprocess.run([*compiler(), "-std=c++20", "-w", *flags, source, "-o", out], check=True)
    return out


def outcome(program: str, library: Path, inputs: Path) -> dict[str, mutant.Arrays] | str:
    """The results by case, or how the mutant died."""
    out = library.with_name("out.npz")
    command = [sys.executable, str(HERE / program), str(library), str(inputs), str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode < 0:
        return f"died of signal {-done.returncode}"
    assert done.returncode == 0, done.stderr
    with np.load(out) as file:
        return mutant.nested(dict(file))


class Case(Protocol):
    arrays: Mapping[str, np.ndarray]  # as the program takes them

    def verdict(self, results: mutant.Arrays) -> str | None:
        """None where the results are right, else what is wrong with them."""
        ...


@dataclass
class Lab:
    """Cases, and a folder to build mutants in. op: of mutant_OP.py and mutant_OP_shim.cpp; recipe:
    the rest of what `build` takes; headers: what it includes beside the standard's."""

    folder: Path
    op: str
    mutations: tuple[Mutation, ...]
    cases: Mapping[str, Case]
    recipe: dict[str, Any]
    headers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        flags = with_headers(self.folder, self.recipe.get("flags", ()), (*STANDARD, *self.headers))
        self.recipe = {**self.recipe, "flags": flags}
        self.inputs = self.folder / "in.npz"
        np.savez(self.inputs, **mutant.flat({n: case.arrays for n, case in self.cases.items()}))

    def build(self, mutation: Mutation | None) -> Path:
        folder = self.folder / (mutation.name if mutation else "none")
        return build(folder, mutation, f"mutant_{self.op}_shim.cpp", **self.recipe)

    def failures(self, mutation: Mutation | None) -> dict[str, str]:
        """What each case finds wrong, by case; a death is found by all."""
        found = outcome(f"mutant_{self.op}.py", self.build(mutation), self.inputs)
        if isinstance(found, str):
            return {"(all)": found}
        verdicts = {n: case.verdict(found[n]) for n, case in self.cases.items()}
        return {n: wrong for n, wrong in verdicts.items() if wrong is not None}

    def survivors(self, mutations: Sequence[Mutation]) -> list[str]:
        with ThreadPoolExecutor(JOBS) as pool:
            found = [*pool.map(self.failures, mutations)]
        caught = {m.name: failures for m, failures in zip(mutations, found, strict=True)}
        for name, failures in caught.items():
            print(f"{name:34} {len(failures):2}  {' '.join(failures) or 'SURVIVES'}")
        idle = [c for c in self.cases if not any(c in failures for failures in caught.values())]
        print(f"cases that caught nothing: {' '.join(idle) or 'none'}")
        return [name for name, failures in caught.items() if not failures]
