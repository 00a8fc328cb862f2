"""Static proofs of race freedom on nvcc's PTX, by sentryward.

A proof holds for every schedule, but for one launch shape and its scalar arguments, with every
memory operation seen at once by all (no weak memory), and with what the verifier takes for granted
(its `semantic_assumptions`). Its exit code is 0 for findings and for what it could not decide, too:
only the result "race_free" with both checks passed, a search that ended and no warnings is a proof.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

VERSION = "0.1.1"  # alpha: what it decides, and how it says so, is that of one version


class NotProved(AssertionError):  # noqa: N818, a verdict
    """`result` is the verifier's word: potential_race, not_wellsynced, unsupported, timeout ..."""

    def __init__(self, result: str, report: Mapping[str, Any]):
        keys = ("code", "message", "stage")
        told = [{k: d[k] for k in keys if k in d} for d in report.get("diagnostics", [])[:5]]
        super().__init__(f"{result}: {report.get('checks')} {json.dumps(told)[:2000]}")
        self.result = result


@dataclass(frozen=True)
class LaunchShape:
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0  # dynamic bytes


def entry_of(ptx: str, pattern: str) -> str:
    """The one kernel whose mangled name matches."""
    found = [e for e in re.findall(r"\.entry\s+(\w+)", ptx) if re.search(pattern, e)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels match {pattern!r}")
    return found[0]


def prove_race_free(
    ptx: Path, pattern: str, shape: LaunchShape, arguments: Sequence[str | int], seconds: float = 60
) -> None:
    """Raises NotProved unless the kernel is proved. arguments: a name for a pointer to an object of
    its own, an int for a 32-bit scalar, in the kernel's order."""
    try:
        installed = metadata.version("sentryward")
    except metadata.PackageNotFoundError:
        installed = "absent"
    if installed != VERSION:
        raise RuntimeError(f"needs sentryward {VERSION}, which is {installed}")
    from sentryward import verify  # not typed, and only verify installs it

    config = {
        "schema": "spverify.kernel-input/v1",
        "entry": entry_of(ptx.read_text(), pattern),
        "launch": {
            "grid_dim": list(shape.grid),
            "block_dim": list(shape.block),
            "dynamic_shared_bytes": shape.shared,
        },
        "declarations": [
            {"parameter": i, "type": "pointer", "space": "global", "object": a}
            for i, a in enumerate(arguments)
            if isinstance(a, str)
        ],
        "arguments": [
            {"parameter": i, "type": "u32", "value": a}
            for i, a in enumerate(arguments)
            if isinstance(a, int)
        ],
    }
    with tempfile.TemporaryDirectory(prefix="fastattn-sentry-") as folder:
        path = Path(folder, "input.json")
        path.write_text(json.dumps(config))
        report = verify(ptx, input=path, timeout_seconds=seconds)
    checks = report.get("checks", {})
    passed = all(checks.get(c) == "passed" for c in ("synchronization", "memory"))
    complete = all(report.get(k) is True for k in ("memory_analysis_complete", "search_complete"))
    # Warnings are races excused by an assumption; a missing count is not zero.
    none = all(report.get(k) == 0 for k in ("race_count", "unresolved_count", "warning_count"))
    if report.get("result") != "race_free" or not (passed and complete and none):
        raise NotProved(str(report.get("result")), report)
