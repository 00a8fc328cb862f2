"""FlashAttention-2 as the installed torch ships it: machine code whose speed is published.

torch's CUDA builds hold FlashAttention-2's kernels for several architectures. They are taken out of
libtorch_cuda.so and modelled like ours; published.py has what others measured. They are not quite
the measured ones: torch builds them without fast math, from a later version of the source.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.model import tools
from bench.model.predict import Kernel
from bench.model.sass import functions

KEPT = Path(__file__).resolve().parents[1] / "out" / "model"
ARCHS = ("sm_80", "sm_86", "sm_90", "sm_120")  # of torch's, those that the model has rates for


@dataclass(frozen=True)
class Tile:
    rows: int
    keys: int
    warps: int
    shared: int  # bytes a block


def forward_tile(arch: str, head_dim: int, causal: bool) -> Tile:
    """What the library's dispatch takes (its sm_86 and sm_89 have less shared memory)."""
    if head_dim == 64:
        rows, keys = 128, 128
    elif arch not in ("sm_86", "sm_89"):
        rows, keys = 128, 64
    else:
        rows, keys = (64, 64) if causal else (128, 32)
    return Tile(rows, keys, 4, 2 * head_dim * (rows + 2 * keys))


def backward_tile(head_dim: int) -> Tile:
    """On sm_80 and sm_90."""
    return Tile(128 if head_dim == 64 else 64, 128, 8, 144 * 1024)


class NoTorchKernelsError(RuntimeError):
    """The installed torch has no CUDA kernels to read; the message says so."""


def library() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "lib" / "libtorch_cuda.so"
    if not path.exists():
        raise NoTorchKernelsError(f"torch {torch.__version__} has no libtorch_cuda.so: a CPU build")
    return path


def forward(arch: str, head_dim: int, causal: bool) -> Kernel:
    tile = forward_tile(arch, head_dim, causal)
    # dropout, causal, local, alibi, even M and N, even K, softcap, return softmax
    flags = _flags(0, causal, 0, 0, 1, 1, 0, 0)
    traits = f"Li{head_dim}ELi{tile.rows}ELi{tile.keys}ELi{tile.warps}E"
    pattern = rf"flash_fwd_kernelI23Flash_fwd_kernel_traitsI{traits}Lb0ELb0EN7cutlass10bfloat16_t"
    return _kernel(arch, f"{pattern}.*ES3_EE{flags}EE", tile, head_dim, "forward", causal)


def backward(arch: str, head_dim: int, causal: bool) -> Kernel:
    """The main kernel; two small ones beside it stream, see published.py."""
    tile = backward_tile(head_dim)
    # dropout, causal, local, alibi, even M and N, even K, softcap
    flags = _flags(0, causal, 0, 0, 1, 1, 0)
    traits = f"Li{head_dim}ELi{tile.rows}ELi{tile.keys}ELi{tile.warps}E"
    pattern = rf"loop_seqk_parallel_kernelI23Flash_bwd_kernel_traitsI{traits}(?:Li\dE){{3}}Lb0ELb0E"
    return _kernel(
        arch, f"{pattern}N7cutlass10bfloat16_t.*ES3_EE{flags}EE", tile, head_dim, "backward", causal
    )


def _flags(*values: int) -> str:
    return "".join(f"Lb{int(value)}E" for value in values)


def _kernel(arch: str, pattern: str, tile: Tile, head_dim: int, what: str, causal: bool) -> Kernel:
    found = [path for path in _kept(arch).glob("*.sass") if _matches(path, pattern)]
    if len(found) != 1:
        raise NoTorchKernelsError(
            f"torch {torch.__version__}: {len(found)} kernels for {arch} match {pattern}"
        )
    text = found[0].read_text()
    (function,) = functions(text).values()
    backward = what == "backward"
    return Kernel(
        name=f"torch's FlashAttention-2 {what} d{head_dim}" + (" causal" if causal else ""),
        function=function,
        registers=int(text.splitlines()[1].split()[-1]),
        threads=32 * tile.warps,
        shared=tile.shared,
        rows=tile.rows,
        keys=tile.keys,
        head_dim=head_dim,
        over="keys" if backward else "rows",
        products=5 if backward else 2,
        over_q=4 if backward else 2,  # q, do and dq as fp32; q and o
        over_k=4 if backward else 2,
    )


def _matches(path: Path, pattern: str) -> bool:
    with path.open() as file:
        return re.search(pattern, file.readline()) is not None


# Of the functions in a cubin, those that forward() and backward() may ask for.
_KERNELS = re.compile(
    r"(?:flash_fwd_kernelI23Flash_fwd|loop_seqk_parallel_kernelI23Flash_bwd)_kernel_traits"
    r"ILi(?:64|128)E\w*10bfloat16_t\w*EELb0ELb[01]ELb0ELb0ELb1ELb1ELb0E(?:Lb0E)?EEv"
)
_IN_A_CUBIN = re.compile(rb"\.text\.(_ZN13pytorch_flash[\w]+)")


def _kept(arch: str) -> Path:
    """A folder with a .sass file a kernel (its name, its registers, its code), made if need be."""
    path = library()
    stat = path.stat()
    key = f"{path} {stat.st_size} {stat.st_mtime_ns} {_KERNELS.pattern}"
    folder = KEPT / f"torch-{hashlib.sha256(key.encode()).hexdigest()[:12]}-{arch}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # 0.7 GB of cubins for a moment. Renamed into place: an interrupted run leaves no half a folder.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        cubins, out = Path(scratch) / "cubins", Path(scratch) / "sass"
        cubins.mkdir()
        out.mkdir()
        tools.run("cuobjdump", "-arch", arch, "-xelf", "all", str(path), cwd=cubins)
        for cubin in sorted(cubins.glob("*.cubin")):
            names = {n.decode() for n in _IN_A_CUBIN.findall(cubin.read_bytes())}
            if wanted := {name for name in names if _KERNELS.search(name)}:
                _write(cubin, wanted, out)
        out.rename(folder)
    return folder


def _write(cubin: Path, wanted: set[str], out: Path) -> None:
    registers = tools.registers(cubin)
    for part in re.split(r"^(?=\s*\.section\s+\.text\.)", tools.disassemble(cubin), flags=re.M)[1:]:
        name = part.split(".text.", 1)[1].split(",", 1)[0]
        if name in wanted:
            at = out / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.sass"
            at.write_text(f"// {name}\n// registers {registers[name]}\n{part}")
