"""Commands, results and the parts of a wheel's name."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class CheckError(AssertionError):
    """What is wrong with a wheel."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise CheckError(what)


def run(
    *command: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command's result with its output captured; a Python path of ours would hide the wheel."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=env | environment
    )


def output(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """What a command printed; one that fails is an error with the end of what it said."""
    done = run(*command, cwd=cwd, **environment)
    if done.returncode != 0:
        end = (done.stdout + done.stderr).strip().splitlines()[-25:]
        raise CheckError("\n".join([f"{' '.join(map(str, command))} failed:", *end]))
    return done.stdout


@dataclass(frozen=True)
class Wheel:
    """One file. Its name is read here once, by PEP 427."""

    path: Path
    version: str
    python: str
    abi: str
    platform: str

    @classmethod
    def of(cls, path: Path) -> Wheel:
        found = re.fullmatch(r"fastattn-([^-]+)-([^-]+)-([^-]+)-([^-]+)\.whl", path.name)
        if found is None:
            raise CheckError(f"{path.name} is not the name of a wheel of fastattn")
        return cls(path.resolve(), *found.groups())

    @property
    def local(self) -> str:
        """What follows the version: "cu130", or nothing."""
        return self.version.partition("+")[2]

    @property
    def cuda(self) -> bool:
        return self.local.startswith("cu")
