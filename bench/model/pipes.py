"""What an instruction asks of an SM: its pipe and how much of it, by opcode.

Pipes are Nsight Compute's (Profiling Guide, "Pipelines"): integer adds, logic, comparisons, min and
max and the packing of fp32 into 16 bits run on ALU, IMAD on FMA, conversions beside
transcendentals on XU. What an architecture does per cycle is in archs.py. An opcode that is not
listed is an error: one left out would make a kernel look faster than it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from bench.model.archs import Arch
from bench.model.sass import Block, Instruction

PIPES = ("tensor", "fma", "alu", "xu", "fp64", "lsu", "issue")
# A kind of work -> the pipe that does it. Units: FLOPs (tensor), bytes (lsu), else thread lanes.
PIPE_OF = {
    "mma": "tensor",  # mma.sync, 16-bit operands, fp32 sums
    "mma_tf32": "tensor",
    "wgmma": "tensor",
    "tcgen05": "tensor",
    "fp32": "fma",
    "half2": "fma",
    "imad": "fma",
    "iadd": "alu",
    "alu": "alu",
    "xu": "xu",
    "fp64": "fp64",
    "lsu": "lsu",
    "issue": "issue",
}
_LANES: dict[str, str] = {
    op: kind
    for kind, ops in {
        "fp32": "FADD FMUL FFMA FSWZADD",
        "half2": "HADD2 HMUL2 HFMA2 HSET2 HSETP2 HMNMX2",
        "imad": "IMAD IMUL IDP",
        "iadd": "IADD IADD3 VIADD",
        "alu": "IABS ISETP ISCADD LEA LOP3 PLOP3 SHF SEL FSEL FSETP FSET FMNMX FMNMX3 FCHK IMNMX "
        "VIMNMX VIMNMX3 VIADDMNMX PRMT SGXT BMSK MOV P2R R2P CS2R F2FP I2FP VOTE",
        "xu": "MUFU I2F F2I F2F FRND I2I POPC FLO BREV",
        "fp64": "DADD DMUL DFMA DSETP DMNMX",
    }.items()
    for op in ops.split()
}
# Two results an instruction (sm_100).
_PAIRS = {"FADD2": "fp32", "FMUL2": "fp32", "FFMA2": "fp32"}
# Issued, and otherwise on parts of the SM whose rate NVIDIA does not document: the uniform
# datapath, the constant cache, barriers, branches, TMA. Warps run few of them.
_ISSUE_ONLY = frozenset(
    op
    for line in (
        "BAR BRA BRX BSSY BSYNC BREAK BMOV CALL CCTL CCTLL DEPBAR LEPC ELECT ENDCOLLECTIVE ERRBAR",
        "EXIT FENCE JMP LDC LDCU LDGDEPBAR LDGMC MEMBAR NANOSLEEP NOP PREEXIT RET S2R S2UR R2UR",
        "R2B B2R SYNCS ACQBULK ACQSHMINIT UCGABAR_ARV UCGABAR_WAIT USETMAXREG WARPGROUP WARPSYNC",
        "YIELD UBLKCP UBLKPF UTMALDG UTMASTG UTMACCTL UTMACMDFLUSH UTMAPF",
        "UBMSK UCLEA UF2FP UFLO UIABS UIADD3 UIMAD UIMNMX UISETP ULDC ULEA ULEPC ULOP3 UMOV UP2UR",
        "UPLOP3 UPOPC UPRMT UPSETP UR2UP USEL USGXT USHF UVIADD UVIMNMX UVOTE VOTEU REDUX CREDUX",
        "MATCH BPT UI2F UF2I UF2F UVIRTCOUNT",
    )
    for op in line.split()
)
_TCGEN05 = ("UTCHMMA", "UTCQMMA", "UTCOMMA", "UTCBAR", "UTCATOMSWS", "UTCCP", "LDTM", "STTM")
# Through the load/store unit; shared memory and L1 are one array with one data path.
_MEMORY = (
    *("LD", "LDG", "LDL", "LDS", "ST", "STG", "STL", "STS", "LDGSTS", "STAS"),
    *("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDAS"),
)
_TENSOR_SHAPE = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}


class PipeError(ValueError):
    """An opcode or a form of one that the table does not know."""


def work(x: Instruction) -> dict[str, float]:
    """Kind of work -> how much of it one warp's execution of the instruction is."""
    if x.never:
        return {"issue": 1}
    base, *modifiers = x.op.split(".")
    if base in _LANES:
        return {"issue": 1, _LANES[base]: 32}
    if base in _PAIRS:
        return {"issue": 1, _PAIRS[base]: 64}
    if base in _ISSUE_ONLY:
        return {"issue": 1}
    if base in _TCGEN05:
        return {"issue": 1, "tcgen05": 1}
    if base in ("HMMA", "HGMMA"):
        kind, flops = _tensor(x.op, modifiers)
        return {"issue": 1, kind: flops}
    bytes_ = _bytes(base, modifiers)
    if bytes_ is None:
        raise PipeError(f"opcode {x.op} at {x.at:#x}: in no pipe, give it one in pipes.py")
    return {"issue": 1, "lsu": bytes_}


def _tensor(op: str, modifiers: list[str]) -> tuple[str, float]:
    shape = modifiers[0]
    if m := re.fullmatch(r"64x(\d+)x(\d+)", shape):  # of a warpgroup: a quarter a warp
        if "F32" not in modifiers or "TF32" in modifiers:
            raise PipeError(f"opcode {op}: a wgmma whose rate is not in the table")
        return "wgmma", 2.0 * 64 * int(m[1]) * int(m[2]) / 4
    if shape not in _TENSOR_SHAPE or "F32" not in modifiers:
        raise PipeError(f"opcode {op}: a shape or type of sums that is not in the table")
    m_, n, k = _TENSOR_SHAPE[shape]
    return ("mma_tf32" if "TF32" in modifiers else "mma"), 2.0 * m_ * n * k


def _bytes(base: str, modifiers: list[str]) -> float | None:
    """Bytes that a warp moves through the load/store unit, without bank conflicts."""
    if base in _MEMORY:
        width = next((int(m) for m in modifiers if m in ("64", "128")), 32)
        # 8 and 16 bits still take a lane's word.
        return 32 * width / 8
    if base in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits
        return 128.0 * next((int(m) for m in modifiers if m in ("2", "4")), 1)
    if base == "SHFL":  # 32 lanes a cycle: as long as a word a lane
        return 128.0
    return None


def total(blocks: Iterable[Block]) -> Counter[str]:
    """Work of one warp that runs each block once."""
    found: Counter[str] = Counter()
    for block in blocks:
        for x in block.instructions:
            found.update(work(x))
    return found


def cycles(amount: Mapping[str, float], arch: Arch) -> dict[str, float] | None:
    """Cycles of an SM by pipe; None where a rate that this takes is not documented."""
    found = dict.fromkeys(PIPES, 0.0)
    for kind, much in amount.items():
        rate = arch.rates.get(kind)
        if much and rate is None:
            return None
        if much and rate is not None:
            found[PIPE_OF[kind]] += much / rate
    return found


def undocumented(amount: Mapping[str, float], arch: Arch) -> list[str]:
    """Kinds of work whose rate the table lacks for this architecture."""
    return sorted(k for k, much in amount.items() if much and arch.rates.get(k) is None)


def tensor_flops(amount: Mapping[str, float]) -> float:
    """FLOPs of the tensor cores as far as opcodes tell (tcgen05 hides its shape in a register)."""
    return sum(amount.get(kind, 0.0) for kind in ("mma", "mma_tf32", "wgmma"))
