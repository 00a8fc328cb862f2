"""A file of budgets: architecture -> what was compiled -> its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any


def read(file: Path, figures: Any) -> dict[str, dict[str, Any]]:
    """figures: the dataclass of a line. Empty where there is no file yet."""
    raw = json.loads(file.read_text()) if file.exists() else {}
    return {a: {n: figures(**f) for n, f in lines.items()} for a, lines in raw.items()}


def write(file: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a row, sorted: a change reads as a diff."""
    parts = []
    for arch in sorted(found):
        lines = [
            f"  {json.dumps(n)}: {json.dumps(asdict(f))}" for n, f in sorted(found[arch].items())
        ]
        parts.append(f" {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n }")
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")
