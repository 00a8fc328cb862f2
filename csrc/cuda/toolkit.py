"""Where nvcc is, and what it lacks: for setup.py and for the tests that compile kernels.

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


class ToolkitError(RuntimeError):
    """No CUDA toolkit that could compile the kernels; the text says what was looked for."""


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
