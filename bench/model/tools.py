"""nvdisasm and cuobjdump, which Triton's package carries."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path


class ToolError(RuntimeError):
    """A tool is missing or failed; the message says which."""


def _tool(name: str) -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise ToolError(f"{name} comes with triton, which is not installed here")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise ToolError(f"this triton has no {name} (looked for {path})")
    return path


def run(name: str, *arguments: str, cwd: Path | None = None) -> str:
    command = [str(_tool(name)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode:
        raise ToolError(f"{name} {' '.join(arguments)}: {done.stderr[-500:]}")
    return done.stdout


def disassemble(cubin: Path) -> str:
    return run("nvdisasm", "-c", str(cubin))


def registers(cubin: Path) -> dict[str, int]:
    """Of a thread, by function."""
    usage = run("cuobjdump", "-res-usage", str(cubin))
    return {f: int(n) for f, n in re.findall(r"Function (\S+):\s*\n\s*REG:(\d+)", usage)}
