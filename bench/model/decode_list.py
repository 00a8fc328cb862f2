"""The calls to model, and what the launchers make of them: lists that tests/ writes.

`python -m sim cubins` (CUDA C++) and `python -m rungs cubins` (Triton) ask the library's own plan
for every call of CASES on every architecture and put into their kernels.json

    {"cache_kernels": [{"id": "attention_kv_few_kernel bf16 d128", "arch": "sm_80",
                        "cubin": "a.cubin", "function": "<mangled>", "threads": 128,
                        "shared": 38464, "rows": 16, "keys": 64, "stages": null, "at_once": null}],
     "cache_plans": [{"arch": "sm_80", "call": {"dtype": "bf16", ...}, "splits": 23,
                      "attend": "<id>", "merge": "<id>"}]}

stages: of Triton's loop; at_once: splits that a trip of Triton's merge has.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench.model import tools
from bench.model.decode import Attend, Call, Merge
from bench.model.kernels import KernelError
from bench.model.sass import functions

PAGE = 16  # vLLM's
# sm_100: no rate of mma.sync is documented.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
CASES = tuple(
    Call(dtype, B, H, Hk, Sq, Sk, D, page)
    for Sq, page, (H, Hk), D, dtype, B, Sk in product(
        (1, 4), (0, PAGE), ((32, 8), (12, 12)), (128, 64), ("bf16", "fp32"), (1, 16),
        (1024, 4096, 16384),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A call as a launcher serves it."""

    arch: str
    call: Call
    splits: int
    attend: Attend
    merge: Merge


def plan(arch: str, call: Call, splits: int, attend: str, merge: str) -> dict[str, Any]:
    """An entry of cache_plans."""
    return {
        "arch": arch, "call": asdict(call), "splits": splits, "attend": attend, "merge": merge,
    }  # fmt: skip


def load(folder: Path) -> list[Planned]:
    """Empty where the folder's list has no plans."""
    listed = json.loads((folder / "kernels.json").read_text())
    entries = {(e["arch"], e["id"]): e for e in listed.get("cache_kernels", ())}
    code: dict[str, Any] = {}

    def entry(arch: str, name: str) -> tuple[dict[str, Any], Any, int]:
        if (arch, name) not in entries:
            raise KernelError(f"{folder}: a plan names {name} of {arch}, which is not listed")
        found = entries[arch, name]
        at = folder / found["cubin"]
        if found["cubin"] not in code:
            code[found["cubin"]] = functions(tools.disassemble(at)), tools.registers(at)
        texts, registers = code[found["cubin"]]
        if found["function"] not in texts:
            raise KernelError(f"{name}: {found['cubin']} has no function {found['function']}")
        return found, texts[found["function"]], registers[found["function"]]

    found = []
    for planned in listed.get("cache_plans", ()):
        arch = planned["arch"]
        e, function, registers = entry(arch, planned["attend"])
        sizes = {key: e[key] for key in ("threads", "shared", "rows", "keys", "stages")}
        m, merge, _ = entry(arch, planned["merge"])
        found.append(
            Planned(
                arch, Call(**planned["call"]), planned["splits"],
                Attend(planned["attend"], function, registers, **sizes),
                Merge(merge, m["at_once"]),
            )
        )  # fmt: skip
    return found
