"""The Triton kernels as a folder of cubins with a list, which bench/model reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

from .budget import NO_DOT, Row, rows
from .driver import SHARED_LIMIT
from .launches import specialise, target

EVERY = tuple(arch for arch in SHARED_LIMIT if arch.startswith("sm_"))


def write(folder: Path, archs: Iterable[str]) -> int:
    """The bf16 kernels of the usual head dims, with and without the causal mask; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = rows(list(archs), ["bf16"], [64, 128], ["plain", "causal"])
    entries = [_entry(folder, row) for row in wanted if row.launch.name not in NO_DOT]
    (folder / "kernels.json").write_text(json.dumps({"kernels": entries}, indent=1) + "\n")
    return len(entries)


def _entry(folder: Path, row: Row) -> dict[str, Any]:
    to = target(row.arch)
    special = specialise(row.launch, to)
    compiled = triton.compile(special.source, target=to, options=special.options.__dict__)
    cubin = f"{row.launch.name}.{row.dtype}.d{row.head_dim}.{row.feature}.{row.arch}.cubin"
    (folder / cubin).write_bytes(compiled.kernel)
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
