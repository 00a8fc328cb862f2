"""Where nvcc is, what it lacks and what it is told: for setup.py and for the tests that compile
kernels.

A toolkit is looked for in $CUDA_HOME, $CUDA_PATH, beside the nvcc on PATH, and in the wheels that
PyPI has of it (nvidia-cuda-nvcc, -crt, -runtime, -cccl, nvidia-nvvm). Headers that one of them
lacks may come from the wheels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# What the kernels include, directly or through these.
_HEADERS = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "crt/host_config.h", "nv/target")
# What PyPI has of a toolkit, in the Makefile's NVCC with its version.
_PACKAGES = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-nvvm"

# What a wheel holds: machine code, and the PTX that it was made from for whatever comes later.
ARCHS = "8.0;9.0;10.0;12.0+PTX"
FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")


class ToolkitError(RuntimeError):
    """No CUDA toolkit that could compile the kernels; the text says what was looked for."""


@dataclass(frozen=True)
class Architectures:
    """A list in the form of TORCH_CUDA_ARCH_LIST, "8.0;9.0a;12.0+PTX", as nvcc is told it.

    Of the plain ones the lowest is the virtual architecture of all: one PTX, translated for each.
    The kernels use nothing newer, four front-end passes took most of a build, and the PTX that the
    simulator executes is then what every cubin comes from. Those with a suffix are not compatible
    with others and get a pass of their own.
    """

    cubins: tuple[str, ...]  # "80", "90a"
    ptx: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Architectures:
        """Raises: ToolkitError: the list cannot be read, or names nothing from 8.0 on."""
        cubins, ptx = [], set()
        for arch in re.split(r"[;,\s]+", text.strip()):
            found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
            if found is None:
                raise ToolkitError(f"{arch!r} is not of the form 8.0 or 12.0+PTX")
            if int(found[1]) < 8:  # such lists are set for other packages too
                print(f"fastattn has no kernels for {arch} of TORCH_CUDA_ARCH_LIST: they need 8.0")
                continue
            cubins.append(found[1] + found[2] + found[3])
            if found[4]:
                ptx.add(cubins[-1])
        if not cubins:
            raise ToolkitError(f"{text!r} names nothing from 8.0 on")
        plain = set(filter(str.isdigit, cubins))
        virtual = {min(plain, key=int)} if ptx & plain else set()
        return cls(tuple(dict.fromkeys(cubins)), tuple(sorted(virtual | (ptx - plain))))

    def virtual(self, cubin: str) -> str:
        """What the machine code for `cubin` is made from."""
        return min(filter(str.isdigit, self.cubins), key=int) if cubin.isdigit() else cubin

    def flags(self) -> list[str]:
        codes: dict[str, list[str]] = {}
        for cubin in self.cubins:
            codes.setdefault(self.virtual(cubin), []).append(f"sm_{cubin}")
        for virtual in self.ptx:
            codes[virtual].append(f"compute_{virtual}")
        return [f"-gencode=arch=compute_{v},code=[{','.join(c)}]" for v, c in codes.items()]


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    version: tuple[int, int]
    headers: tuple[Path, ...]  # every folder of them, for the host compiler
    includes: tuple[Path, ...]  # those that nvcc does not know
    libraries: tuple[Path, ...]  # folders that may hold libcudart_static.a

    def flags(self) -> list[str]:
        return [flag for folder in self.includes for flag in ("-isystem", str(folder))]

    def static_runtime(self) -> Path:
        for folder in self.libraries:
            if (folder / "libcudart_static.a").exists():
                return folder / "libcudart_static.a"
        raise ToolkitError(f"no libcudart_static.a in {', '.join(map(str, self.libraries))}")


def find() -> Toolkit:
    """The first toolkit that has all that is needed.

    Raises:
        ToolkitError: there is none.
    """
    looked = []
    for nvcc in _compilers():
        version, root = _ask(nvcc)
        if version is None or root is None:
            looked.append(f"{nvcc} (does not run)")
            continue
        own = _with_cccl([root / "include", *root.glob("targets/*/include")])  # nvcc knows them
        wheels = _wheels()
        more = [
            p
            for p in _with_cccl([p / "include" for p in wheels])
            if any((p / h).exists() and not _has(own, h) for h in _HEADERS)
        ]
        lacks = [h for h in _HEADERS if not _has([*own, *more], h)]
        if lacks:
            looked.append(f"{nvcc} (without {lacks[0]})")
            continue
        libraries = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
        libraries += [p / "lib" for p in wheels]
        libraries = [p for p in libraries if p.is_dir()]
        return Toolkit(nvcc, version, (*own, *more), tuple(more), tuple(libraries))
    raise ToolkitError(
        "no usable CUDA toolkit: "
        + (", ".join(looked) or "nvcc is neither in $CUDA_HOME, on PATH nor in Python's packages")
        + f" (pip install {_PACKAGES}, each of torch's CUDA version, is one)"
    )


def _has(folders: list[Path], header: str) -> bool:
    return any((folder / header).exists() for folder in folders)


def _with_cccl(folders: list[Path]) -> list[Path]:
    """CUDA's own C++ library moved into include/cccl in CUDA 13."""
    return [p for folder in folders for p in (folder, folder / "cccl") if p.is_dir()]


def _compilers() -> list[Path]:
    roots = [Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    found = [root / "bin" / "nvcc" for root in (*roots, *_wheels())]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        found.insert(len(roots), Path(on_path))
    return [p for p in found if p.exists()]


def _wheels() -> list[Path]:
    """CUDA 13's wheels share a folder, nvidia/cu13; CUDA 12's have one each."""
    found: list[Path] = []
    for name in ("purelib", "platlib"):
        nvidia = Path(sysconfig.get_paths()[name]) / "nvidia"
        found += [p for pattern in ("cu[0-9]*", "cuda_*") for p in sorted(nvidia.glob(pattern))]
    return list(dict.fromkeys(found))


def _ask(nvcc: Path) -> tuple[tuple[int, int] | None, Path | None]:
    """Its version and its toolkit's folder, which a script on PATH may hide."""
    version = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    top = re.search(
        r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", "-E", "/dev/null"), re.M
    )
    return (
        (int(version[1]), int(version[2])) if version else None,
        Path(top[1].strip()).resolve() if top else None,
    )


def _output(*command: object) -> str:
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


if __name__ == "__main__":
    try:
        print(find().nvcc)
    except ToolkitError as why:
        raise SystemExit(str(why)) from None
