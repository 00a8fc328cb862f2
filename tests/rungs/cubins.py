"""The Triton kernels as a folder of cubins with a list, which bench/model reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import cache_plans
from .budget import NO_DOT, Row, rows
from .driver import SHARED_LIMIT

EVERY = tuple(arch for arch in SHARED_LIMIT if arch.startswith("sm_"))


def write(folder: Path, archs: Iterable[str]) -> int:
    """The bf16 kernels of the usual head dims, with and without the causal mask, and those over a
    cache with the plans of decoding; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    archs = list(archs)
    wanted = rows(archs, ["bf16"], [64, 128], ["plain", "causal"])
    entries = [_entry(folder, row) for row in wanted if row.launch.name not in NO_DOT]
    kernels, plans = cache_plans.write(folder, archs)
    listed = {"kernels": entries, "cache_kernels": kernels, "cache_plans": plans}
    (folder / "kernels.json").write_text(json.dumps(listed, indent=1) + "\n")
    return len(entries) + len(kernels)


def _entry(folder: Path, row: Row) -> dict[str, Any]:
    cubin = f"{row.launch.name}.{row.dtype}.d{row.head_dim}.{row.feature}.{row.arch}.cubin"
    compiled = cache_plans.compiled(row.launch, row.arch, folder / cubin)
    return {
        "name": f"{row.launch.name} {row.dtype} d{row.head_dim}",
        "arch": row.arch,
        "cubin": cubin,
        "function": compiled.metadata.name,
        "threads": compiled.metadata.num_warps * 32,
        "shared": compiled.metadata.shared,
        "rows": row.launch.bound["BLOCK_M"],
        "keys": row.launch.bound["BLOCK_N"],
        "head_dim": row.head_dim,
        "causal": row.feature == "causal",
    }
