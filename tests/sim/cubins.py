"""The CUDA kernels as a folder of cubins with a list, which bench/model reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rungs.aot import TOOLS

from . import build
from .budget import ARCHS, BudgetError, variant, variants
from .cache_plans import plans

# The wheel has no code of these: they run that of the same major version.
_RUNS = {"sm_86": "sm_80", "sm_89": "sm_80"}
EVERY = tuple(sorted((*ARCHS, *_RUNS), key=lambda arch: int(arch.removeprefix("sm_"))))
_OF_STEPS = ("sm_80", "sm_90")
_WANTED = re.compile(r" bf16 d(64|128) ")
_CACHE = re.compile(
    r"^attention_kv_((few|many)_kernel (bf16|fp32) d(64|128)|merge_kernel (bf16|fp32) d256) "
)
_RARE = re.compile(r"^(?!attention)|attention_kv|bwd_(shared|weights)_|atomics")


def write(folder: Path, archs: Iterable[str]) -> int:
    """Attention's bf16 kernels of the usual head dims without features, and those over a cache and
    of recurrent layers, with the former's plans; their number."""
    folder.mkdir(parents=True, exist_ok=True)
    every = variants()
    table = {n: v for n, v in every.items() if _WANTED.search(n) and not _RARE.search(n)}
    with_plain = {v["kernel"] for v in table.values() if not v["laden"]}
    table = {n: v for n, v in table.items() if not (v["laden"] and v["kernel"] in with_plain)}
    archs = tuple(archs)
    entries = [entry for arch in archs for entry in _entries(folder, arch, table)]
    steps = [entry for arch in archs if arch in _OF_STEPS for entry in _recurrent(folder, arch)]
    over = {n: v for n, v in every.items() if _CACHE.search(n)}
    cache = [_of_cache(e) for arch in archs for e in _entries(folder, arch, over)]
    listed = {"kernels": entries, "recurrent": steps, "cache_kernels": cache,
              "cache_plans": plans(archs)}  # fmt: skip
    (folder / "kernels.json").write_text(json.dumps(listed, indent=1) + "\n")
    return len(entries) + len(steps) + len(cache)


def _entries(folder: Path, arch: str, table: dict[str, Any]) -> list[dict[str, Any]]:
    found, built = {}, _RUNS.get(arch, arch)
    for source in sorted((build.CSRC / "cuda").glob("attention*.cu")):
        cubin = f"{source.stem}.{built}.cubin"
        shutil.copyfile(build.cubin(source, built), folder / cubin)
        for function in _functions(folder / cubin):
            name = variant(function)
            if name in table:
                found[name] = _entry(arch, cubin, function, name, table[name])
    if missing := table.keys() - found.keys():
        raise BudgetError(f"{arch}: in a launcher's table, in no cubin: {', '.join(missing)}")
    return list(found.values())


def _of_cache(entry: dict[str, Any]) -> dict[str, Any]:
    """As bench/model/decode_list.py has it."""
    kept = {key: entry[key] for key in entry.keys() - {"name", "head_dim", "causal"}}
    return {"id": entry["name"], **kept, "stages": None, "at_once": None}


def _recurrent(folder: Path, arch: str) -> list[dict[str, Any]]:
    """The kernels that keep W_hh: bench/model/recurrent.py models these architectures alone."""
    found = []
    for name in ("gru", "lstm", "rnn"):
        cubin = f"{name}.{arch}.cubin"
        shutil.copyfile(build.cubin(build.CSRC / "cuda" / f"{name}.cu", arch), folder / cubin)
        for function in _functions(folder / cubin):
            kernel = variant(function).rsplit(" ", 1)[0]
            found.append({"name": kernel, "arch": arch, "cubin": cubin, "function": function})
    return sorted(found, key=lambda entry: entry["name"])


def _entry(arch: str, cubin: str, function: str, name: str, v: dict[str, Any]) -> dict[str, Any]:
    sizes = {key: v[key] for key in ("threads", "shared", "rows", "keys", "head_dim")}
    where = {"arch": arch, "cubin": cubin, "function": function}
    return {"name": name.rsplit(" ", 1)[0], **where, **sizes, "causal": None}


def _functions(cubin: Path) -> list[str]:
    command = [str(TOOLS / "cuobjdump"), "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"Function (\S+):", usage)
