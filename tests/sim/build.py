"""Compiles what the simulators run, kept under build/sim by the hash of all that goes into it.

Kernels are compiled to sm_80 PTX by nvcc, host code included, and linked with the stand-in for the
CUDA runtime. The same objects serve the binding (`operators`) and the dev-only module (`kernels`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .cudart import fatbin

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TOOLKIT = CSRC / "cuda" / "toolkit.py"
KEPT = ROOT / "build" / "sim"
HERE = Path(__file__).parent
TORCH = torch.__path__[0]
JOBS = 2

# Uncompressed PTX and nothing else in the fatbin.
EMBEDDING = ("-gencode=arch=compute_80,code=compute_80", "--no-compress")
# As setup.py's: a micro-benchmark of `_kernels` measures what ships.
CXX_FLAGS = (
    "-std=c++20",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)


_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class BuildError(RuntimeError):
    """A compiler said no; its words follow."""


def operators() -> Path:
    """The shared library that registers the CUDA ops' kernels under torch's CPU key."""
    libraries = [f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-ltorch_cpu"]
    return _link("operators", [*bindings(), *cuda_objects(), stand_in()], libraries)


def bindings(op: str = "*") -> list[Path]:
    """The CUDA ops' bindings, or that of one op, for CPU tensors."""
    flags = ("-DFASTATTN_STAND_IN", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    sources = sorted((CSRC / "bindings").glob(f"{op}_cuda.cpp"))
    return [_object(source, (*flags, f"-isystem{TORCH}/include")) for source in sources]


def kernels() -> Path:
    """The module `_kernels`: the torch-free launchers, for tests and micro-benchmarks."""
    flags = (
        f"-isystem{TORCH}/include",  # pybind11 comes with torch
        f"-I{sysconfig.get_paths()['include']}",
    )
    module = _object(HERE / "kernels_module.cpp", flags)
    return _link("_kernels", [module, *_cpu_objects(), *cuda_objects(), stand_in()], [])


def _cpu_objects() -> list[Path]:
    """The CPU's kernels: those that setup.py compiled last, unless a source is newer. Compiling
    every instruction set anew takes a minute."""
    sources = sorted((CSRC / "cpu").glob("*.cpp"))
    newest = max(p.stat().st_mtime for s in sources for p in (s, *headers(s)))
    for folder in (ROOT / "build").glob("temp.*/fastattn._C/csrc/cpu"):
        objects = [folder / f"{source.stem}.o" for source in sources]
        if all(p.exists() and p.stat().st_mtime > newest for p in objects):
            return objects
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(_object, sources))


def toys(embedding: Sequence[str] = EMBEDDING) -> Path:
    """The kernels that the stand-in's own tests launch."""
    return _link("toys", [cuda_object(HERE / "cudart" / "toys.cu", embedding), stand_in()], [])


def cuda_objects() -> list[Path]:
    """Every .cu file of csrc/cuda, host code and sm_80 PTX; -lineinfo: a fault names the line."""
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(cuda_object, sorted((CSRC / "cuda").glob("*.cu"))))


def cuda_object(source: Path, embedding: Sequence[str] = EMBEDDING) -> Path:
    command = [str(toolkit().nvcc), *nvcc_flags(), "-lineinfo", *embedding, *toolkit().flags()]
    return _compile(command, source, ("-c", str(source)), ".o", nvcc_version=toolkit().version)


def ptx_of(source: Path, arch: int = 80, defines: Sequence[str] = ()) -> Path:
    """The PTX of one .cu file; with -lineinfo, so that faults name the lines of the source."""
    tools = toolkit()
    command = [str(tools.nvcc), "-std=c++20", "-lineinfo", "-ptx", f"-arch=compute_{arch}"]
    command += [f"-I{CSRC / 'cuda'}", *(f"-D{d}" for d in defines), *tools.flags()]
    return _compile(command, source, (str(source),), ".ptx", nvcc_version=tools.version)


def cubin(source: Path, arch: str) -> Path:
    """Machine code of one .cu file for "sm_80" or another, from the PTX that the simulator runs:
    a wheel's is made from one PTX too (csrc/cuda/toolkit.py)."""
    made = cuda_object(source)
    ptx = made.with_suffix(".ptx")
    if not ptx.exists():
        (text,) = fatbin.of_object(made)
        ptx.write_text(text.ptx)
    command = [str(toolkit().nvcc.with_name("ptxas")), f"-arch={arch}", "-m64"]
    version = toolkit().version
    return _compile(command, None, (str(ptx),), ".cubin", name=source.stem, version=version)


def stand_in() -> Path:
    """The stand-in for libcudart, as an object to link with."""
    return _object(HERE / "cudart" / "cudart.cpp")


@functools.cache
def toolkit() -> Any:
    """csrc/cuda/toolkit.py's verdict on this machine; an error that names itself without nvcc."""
    return toolkit_module().find()


@functools.cache
def toolkit_module() -> Any:
    """csrc/cuda/toolkit.py: no package has it."""
    spec = importlib.util.spec_from_file_location("fastattn_toolkit", TOOLKIT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def nvcc_flags() -> tuple[str, ...]:
    """setup.py's, but for the architectures."""
    flags: tuple[str, ...] = toolkit_module().FLAGS
    return flags


def _object(source: Path, flags: Iterable[str] = ()) -> Path:
    command = [os.environ.get("CXX", "c++"), *CXX_FLAGS, *cuda_includes(), *flags]
    return _compile(command, source, ("-c", str(source)), ".o", torch=torch.__version__)


def cuda_includes() -> list[str]:
    """Flags for the host's compiler."""
    return [f"-isystem{path}" for path in toolkit().headers]


def _link(name: str, objects: Sequence[Path], libraries: Sequence[str]) -> Path:
    # Symbols bind inside: torch's own libcudart is in the process already.
    command = [os.environ.get("CXX", "c++"), "-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined"]
    if name == "_kernels":  # a Python module finds the interpreter's symbols in the process
        command.remove("-Wl,--no-undefined")
    arguments = (*map(str, objects), *libraries)
    contents = [hashlib.sha256(p.read_bytes()).hexdigest() for p in objects]
    return _compile(command, None, arguments, ".so", name=name, contents=contents)


def _compile(
    command: Sequence[str], source: Path | None, inputs: Sequence[str], suffix: str, **more: object
) -> Path:
    """`command inputs -o kept`, unless a file of that hash is there."""
    digest = hashlib.sha256(repr((command, inputs, sorted(more.items()))).encode())
    if source is not None:
        for path in (source, *headers(source)):
            digest.update(path.read_bytes())
    name = source.stem if source is not None else str(more["name"])
    kept = KEPT / digest.hexdigest()[:16] / f"{name}{suffix}"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a run that was interrupted leaves no half a file.
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        out = Path(folder) / kept.name
        done = subprocess.run([*command, *inputs, "-o", str(out)], capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)} {' '.join(inputs)}\n{done.stdout}{done.stderr}")
        out.replace(kept)
    return kept


def headers(source: Path) -> list[Path]:
    """What a kernel's source includes, however far down; others include anything of csrc.
    tests/test_architecture.py holds the kernels to their own folder and what lies above."""
    if source.parent.name not in ("cpu", "cuda"):
        return sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh"))
    found: set[Path] = set()
    left = [source]
    while left:
        path = left.pop()
        for name in _INCLUDE.findall(path.read_text()):
            header = (path.parent / name).resolve()
            if header.exists() and header not in found:
                found.add(header)
                left.append(header)
    return sorted(found)
