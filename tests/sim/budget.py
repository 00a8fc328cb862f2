"""The budget of the CUDA kernels: what each compiled variant may take on each architecture.

The .cu files are compiled for an architecture as the wheel has it (setup.py's flags, the PTX of the
lowest architecture translated for this one), and the cubin is read, kernel by kernel:
registers, spill instructions, tensor-core instructions in loops; blocks an SM follow from registers
and shared memory. `budgets.json` has one line a variant (`python -m sim budgets --write`). A figure
worse than its line fails, and whatever the file says: no spills, shared memory below the
architecture's limit, tensor cores in the loop, and where `rules` asks for it 2 blocks or 8 warps.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rungs import budget_file
from rungs.aot import TOOLS, mma_in_loops

from . import build

FILE = Path(__file__).with_name("budgets.json")
SAMPLE = ("sm_80",)  # what `make verify` compiles
_KB = 1024
# Bytes of shared memory: of an SM, and the most a block may ask for. The system keeps 1 KB a block.
_SHARED = {
    "sm_80": (164 * _KB, 163 * _KB),
    "sm_90": (228 * _KB, 227 * _KB),
    "sm_100": (228 * _KB, 227 * _KB),
    "sm_120": (100 * _KB, 99 * _KB),
}
_REGISTERS = 65536  # an SM, all architectures here
_WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}

_ELEMENTS = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
_DTYPES = {0: "fp32", 1: "bf16", 2: "fp16"}  # csrc/operands.h
# Of a Config<element, head dim[, laden[, atomics]]>, of an element, or no template. The head dim of
# a step of a recurrence is the gates.
_KERNEL = re.compile(
    r"\d((?:attention|layernorm_ffn|recurrent_step)_\w+?_kernel)"
    r"(?:INS\w*?_6ConfigI(\w+?)Li(\d+)E(?:Lb(\d)E)?(?:Lb(\d)E)?|I(f|6__half|13__nv_bfloat16)E)?"
)
# Of a RecurrentConfig<cell, element, hidden units of a block>, which are the head dim.
_RECURRENCE = re.compile(
    r"\drecurrent_(fwd|bwd)_kernelINS\w*?_15RecurrentConfigINS\w*?_\d(Lstm|Gru|Rnn)CellE"
    r"(f|6__half|13__nv_bfloat16)Li(\d+)E"
)
_NO_PRODUCT = ("prepare", "dsinks", "dq", "end", "sum", "append", "merge")


def shipped() -> Any:
    """The architectures of a wheel, as csrc/cuda/toolkit.py has them."""
    module = build.toolkit_module()
    return module.Architectures.parse(module.ARCHS)


ARCHS = tuple(f"sm_{cubin}" for cubin in shipped().cubins)


@dataclass(frozen=True)
class Figures:
    """Of one variant on one architecture."""

    registers: int  # a thread
    spills: int  # instructions that store to or load from local memory
    mma: int  # tensor-core instructions inside loops, as written
    shared: int  # bytes a block, dynamic
    blocks: int  # that fit an SM at once
    warps: int  # those blocks have

    def worse_than(self, allowed: Figures) -> list[str]:
        wrong = []
        for name in ("registers", "spills", "shared"):
            if getattr(self, name) > getattr(allowed, name):
                wrong.append(f"{name} {getattr(self, name)} > {getattr(allowed, name)}")
        for name in ("mma", "blocks"):
            if getattr(self, name) < getattr(allowed, name):
                wrong.append(f"{name} {getattr(self, name)} < {getattr(allowed, name)}")
        return wrong


class BudgetError(AssertionError):
    """A kernel takes more than it may, or does not compile."""


def measure(arch: str) -> dict[str, Figures]:
    """Figures by variant, e.g. "attention_fwd_kernel bf16 d64 plain"."""
    read = _read(arch)
    found = {}
    for name, v in variants().items():
        if name not in read:
            raise BudgetError(f"{arch}: {name} is in the launcher's table, not in the cubin")
        registers, spills, mma = read.pop(name)
        blocks = _blocks(arch, registers, v["threads"], v["shared"])
        found[name] = Figures(
            registers, spills, mma, v["shared"], blocks, blocks * v["threads"] // 32
        )
    if read:
        raise BudgetError(f"{arch}: compiled, but in no launcher's table: {', '.join(read)}")
    return found


def variants() -> dict[str, dict[str, Any]]:
    """The launchers' tables, by the name of a variant: tile, threads, shared memory."""
    from .kernels import module

    cuda = module().cuda
    tables = ("attention_forward", "attention_weights", "attention_backward", "attention_kv_cache",
              "layernorm_ffn_forward", "layernorm_ffn_backward", "recurrent",
              "recurrent_step")  # fmt: skip
    found = {}
    for v in (x for table in tables for x in getattr(cuda, f"{table}_variants")()):
        name = _name(v["kernel"], _DTYPES[v["dtype"]], v["head_dim"], v["laden"], v["atomics"])
        found[name] = v
    return found


def _blocks(arch: str, registers: int, threads: int, shared: int) -> int:
    """CUDA's occupancy arithmetic: registers are given by warp, in units of 256."""
    of_a_warp = -(-registers * 32 // 256) * 256
    warps = threads // 32
    total, limit = _SHARED[arch]
    if shared > limit:
        return 0
    by_registers = _REGISTERS // of_a_warp // warps
    return min(by_registers, total // (shared + _KB), _WARPS[arch] // warps)


def _read(arch: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spills and tensor-core instructions in loops, by variant."""
    sources = sorted((build.CSRC / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(build.JOBS) as pool:
        parts = pool.map(lambda source: of_source(source, arch), sources)
    return {name: tuple(figures) for part in parts for name, figures in part.items()}


def of_source(source: Path, arch: str) -> dict[str, list[int]]:
    digest = hashlib.sha256(Path(__file__).read_bytes() + arch.encode())
    for path in (source, *build.headers(source), build.TOOLKIT):
        digest.update(path.read_bytes())
    kept = build.KEPT / f"{digest.hexdigest()[:16]}-{source.stem}-{arch}.json"
    if kept.exists():
        found: dict[str, list[int]] = json.loads(kept.read_text())
        return found
    try:
        found = _figures(build.cubin(source, arch))
    except build.BuildError as error:
        raise BudgetError(f"{source.name} for {arch}: {str(error)[-500:]}") from error
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


def _figures(cubin: Path) -> dict[str, list[int]]:
    def tool(name: str, option: str) -> str:
        command = [str(TOOLS / name), option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"Function (\S+):\s*\n\s*REG:(\d+)", tool("cuobjdump", "-res-usage")))
    found = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", tool("nvdisasm", "-c"), flags=re.M)[1:]:
        function = part.split(",", 1)[0]
        spills = len(re.findall(r"\b(?:STL|LDL)\b", part))
        found[variant(function)] = [int(usage[function]), spills, mma_in_loops(part)]
    return found


def variant(function: str) -> str:
    """The variant's name, from the mangled one."""
    if match := _RECURRENCE.search(function):
        way, cell, element, units = match.groups()
        return _name(f"{cell.lower()}_{way}_kernel", _ELEMENTS[element], int(units), True, False)
    match = _KERNEL.search(function)
    if match is None:
        raise BudgetError(f"no variant of a kernel that the budget knows: {function}")
    kernel, element, head_dim, laden, atomics, alone = match.groups()
    dtype = _ELEMENTS[element or alone or "f"]
    # A kernel without a choice serves every feature, one without a head dim every head dim.
    return _name(kernel, dtype, int(head_dim or 256), laden != "0", atomics == "1")


def _name(kernel: str, dtype: str, head_dim: int, laden: bool, atomics: bool) -> str:
    name = f"{kernel} {dtype} d{head_dim} {'laden' if laden else 'plain'}"
    return f"{name} atomics" if atomics else name


def rules(arch: str, name: str, now: Figures) -> list[str]:
    """What holds whatever the budget says."""
    wrong = []
    if now.spills:
        wrong.append(f"{now.spills} spill instructions")
    if now.shared > _SHARED[arch][1]:
        wrong.append(f"shared {now.shared} > the limit {_SHARED[arch][1]}")
    # A step of the recurrence is around a product, of torch's.
    around = name.startswith("recurrent_step")
    without = around or name.split("_kernel")[0].rpartition("_")[2] in _NO_PRODUCT
    if now.mma == 0 and not without:
        wrong.append("no tensor-core instruction in a loop")
    usual = re.search(r"(bf16|fp16) d(64|128) ", name) is not None
    if arch == "sm_80" and usual and now.blocks < 2 and now.warps < 8:
        wrong.append(f"{now.blocks} blocks and {now.warps} warps an SM")
    return wrong


def budgets() -> dict[str, dict[str, Figures]]:
    return budget_file.read(FILE, Figures)


def write(found: dict[str, dict[str, Figures]]) -> None:
    budget_file.write(FILE, found)


def verdicts(arch: str) -> list[str]:
    """What is wrong, a line each; empty if all is well."""
    allowed = budgets().get(arch, {})
    found = measure(arch)
    wrong = [f"{n}: in budgets.json, no longer compiled" for n in allowed if n not in found]
    for name, now in found.items():
        problems = rules(arch, name, now)
        line = allowed.get(name)
        problems += ["is not in budgets.json"] if line is None else now.worse_than(line)
        wrong += [f"{name}: {problem}" for problem in problems]
    return wrong
