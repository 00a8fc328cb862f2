"""Runs test files against mutants of an op, one after the other.

    python tests/mutant_op.py OUT.json MUTANT ... -- PYTEST'S ARGUMENTS

A mutant is a library, whose ops torch puts in the place of those of fastattn, or NAME=FILE, a file
in the place of that module of fastattn. Each runs in a process of its own (a mutant that crashes
takes nothing with it), a fork of this one, which has imported what takes long. OUT.json: of each
what pytest returned, -N where signal N killed it, and the tests that failed.
"""

import importlib.abc
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy  # noqa: F401
import pytest
import torch


class InItsPlace(importlib.abc.MetaPathFinder):
    """Finds one module in another file."""

    def __init__(self, name: str, file: str) -> None:
        self.name, self.file = name, file

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return (
            importlib.util.spec_from_file_location(name, self.file) if name == self.name else None
        )


def _is_library(mutant: str) -> bool:
    return "=" not in mutant


def install(mutant: str) -> None:
    if not _is_library(mutant):
        sys.meta_path.insert(0, InItsPlace(*mutant.split("=", 1)))
    import fastattn  # noqa: F401

    if _is_library(mutant):
        torch.ops.load_library(mutant)


def run(mutant: str, arguments: Sequence[str], out: Path) -> int:
    child = os.fork()
    if not child:
        with out.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code: int = pytest.ExitCode.INTERNAL_ERROR
        try:
            install(mutant)
            code = pytest.main([*arguments])
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    out, *rest = sys.argv[1:]
    at = rest.index("--")
    mutants, arguments = rest[:at], rest[at + 1 :]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for mutant in sorted(mutants, key=_is_library):
            if _is_library(mutant) and "fastattn" not in sys.modules:
                pytest.main([*arguments, "--collect-only"])  # imports all that the tests import
            log = Path(folder) / "log"
            code = run(mutant, arguments, log)
            text = log.read_text(errors="replace")
            failed = re.findall(r"^FAILED \S+?::(.*?)(?: - .*)?$", text, re.MULTILINE)
            found[mutant] = {"code": code, "failed": failed, "text": text[-3000:]}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
