"""The kernels to model: a folder of cubins and its kernels.json, whoever compiled them.

    {"kernels": [{"name": "attention_fwd_kernel bf16 d64", "arch": "sm_80", "cubin": "a.cubin",
                  "function": "<mangled>", "threads": 128, "shared": 33000,
                  "rows": 128, "keys": 64, "head_dim": 64, "causal": null}]}

The first word of a name says what the kernel does (KINDS). shared: bytes a block; rows and keys: of
a tile; causal: null for a kernel that serves both. `python -m sim cubins` and `python -m rungs
cubins` (tests/) write such folders for the CUDA C++ and the Triton kernels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.model import tools
from bench.model.predict import Kernel
from bench.model.sass import functions


class KernelError(ValueError):
    """A list of kernels that cannot be read; the message says which entry and why."""


@dataclass(frozen=True)
class Kind:
    over: str  # what a block owns: see predict.Kernel
    products: int
    over_q: int
    over_k: int
    weights: bool = False


KINDS = {
    # S, P v; q, o; k, v
    "attention_fwd_kernel": Kind("rows", 2, 2, 2),
    "forward_kernel": Kind("rows", 2, 2, 2),
    # S, dP, dq; q, do, dq; k, v
    "attention_bwd_rows_kernel": Kind("rows", 3, 3, 2),
    "by_rows_kernel": Kind("rows", 3, 3, 2),
    # S, dP, dv, dk; q, do; k, v, dk, dv
    "attention_bwd_keys_kernel": Kind("keys", 4, 2, 4),
    "by_keys_kernel": Kind("keys", 4, 2, 4),
    # S alone
    "attention_weights_kernel": Kind("tile", 1, 1, 1, weights=True),
    "weights_kernel": Kind("tile", 1, 1, 1, weights=True),
}


@dataclass(frozen=True)
class Listed:
    kernel: Kernel
    arch: str
    causal: bool | None  # None: serves both


def load(folder: Path) -> list[Listed]:
    """Every kernel of the folder's list."""
    path = folder / "kernels.json"
    if not path.exists():
        raise KernelError(f"{path} is not there: see {Path(__file__).name} for who writes it")
    entries = json.loads(path.read_text())["kernels"]
    texts: dict[str, Any] = {}
    found = []
    for entry in entries:
        cubin = entry["cubin"]
        if cubin not in texts:
            at = folder / cubin
            texts[cubin] = functions(tools.disassemble(at)), tools.registers(at)
        found.append(listed(entry, *texts[cubin]))
    return found


def listed(entry: dict[str, Any], code: dict[str, Any], registers: dict[str, int]) -> Listed:
    """One entry of a list, with the functions and registers of its cubin."""
    name, function = entry["name"], entry["function"]
    kind = KINDS.get(name.split()[0])
    if kind is None:
        raise KernelError(f"{name}: no kind of kernel that the model knows, give it one in KINDS")
    if function not in code or function not in registers:
        raise KernelError(f"{name}: {entry['cubin']} has no function {function}")
    kernel = Kernel(
        name=name,
        function=code[function],
        registers=registers[function],
        **{key: int(entry[key]) for key in ("threads", "shared", "rows", "keys", "head_dim")},
        over=kind.over,
        products=kind.products,
        over_q=kind.over_q,
        over_k=kind.over_k,
        weights=kind.weights,
    )
    return Listed(kernel, entry["arch"], entry["causal"])
