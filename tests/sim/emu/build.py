"""Compiles kernels for the host: one program a set of sources and sanitizer, kept by content."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from sim.build import cuda_includes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CACHE = ROOT / "build" / "emu"
RUNTIME = tuple(sorted(HERE.glob("*.cpp")))

SANITIZERS = ("plain", "asan", "tsan")
# Kernels cast between vector and element types, as nvcc lets them: no strict aliasing. nvcc's
# default contraction to FMA has no counterpart here: off.
COMMON = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fno-var-tracking",
    "-fno-omit-frame-pointer",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DFASTATTN_EMULATE",
]
# Undefined behaviour is checked beside AddressSanitizer: what an index or a cast can get wrong. The
# rest of -fsanitize=undefined doubles the time that g++ takes.
UNDEFINED = [
    "-fsanitize=alignment,signed-integer-overflow,shift,bounds,integer-divide-by-zero",
    "-fsanitize=float-cast-overflow",
    "-fno-sanitize-recover=all",
]
DEVICE_FLAGS = {
    "plain": ["-fsanitize=alignment", "-fno-sanitize-recover=all"],
    "asan": ["-fsanitize=address", *UNDEFINED],
    "tsan": ["-fsanitize=thread"],
}
# The runtime is never instrumented (sanitizer.h), only told which sanitizer it is to speak to.
RUNTIME_FLAGS = {
    "plain": ["-O2"],
    "asan": ["-O2", "-DFASTATTN_EMU_ASAN"],
    "tsan": ["-O2", "-DFASTATTN_EMU_TSAN"],
}


class BuildError(RuntimeError):
    """g++ refused a source, or is not there."""


@lru_cache
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        raise BuildError("the source emulator needs g++ (with libasan, libubsan and libtsan)")
    return found


@lru_cache
def compiler_version() -> str:
    return subprocess.run(
        [compiler(), "--version"], check=True, capture_output=True, text=True
    ).stdout


@lru_cache
def digest_of(source: Path) -> str:
    """Of a source and of every header of ours that it includes, however far down."""
    digest, seen, left = hashlib.sha256(), {source}, [source]
    while left:
        path = left.pop()
        text = path.read_bytes()
        digest.update(path.name.encode() + b"\0" + text)
        for name in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            folders = (path.parent, HERE, ROOT / "csrc" / "cuda")
            places = [(f / name.decode()).resolve() for f in folders]
            header = next((p for p in places if p.exists()), None)
            if header and header not in seen:
                seen.add(header)
                left.append(header)
    return digest.hexdigest()


def object_of(source: Path, sanitizer: str, defines: Sequence[str] = ()) -> Path:
    """The object file of one source, compiled if it is not kept."""
    flags = [*COMMON, *(f"-D{d}" for d in defines)]
    if source.parent == HERE:
        flags += RUNTIME_FLAGS[sanitizer]
    else:
        flags += DEVICE_FLAGS[sanitizer]
    parts = (str(flags), compiler_version(), digest_of(source.resolve()), str(cuda_includes()))
    digest = hashlib.sha256("\n".join(parts).encode())
    CACHE.mkdir(parents=True, exist_ok=True)
    out = CACHE / f"{source.stem}-{sanitizer}-{digest.hexdigest()[:20]}.o"
    if out.exists():
        return out
    temporary = out.with_suffix(f".{os.getpid()}.tmp")
    includes = [f"-I{HERE}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    includes += cuda_includes()
    command = [compiler(), "-x", "c++", *flags, *includes, "-c", str(source), "-o", str(temporary)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"{source.name} ({sanitizer}):\n{run.stderr[-6000:]}")
    temporary.replace(out)
    return out


def program(sources: Sequence[Path], sanitizer: str, defines: Sequence[str] = ()) -> Path:
    """An executable of the driver, the runtime and `sources`; `defines` are for the latter."""
    if sanitizer not in SANITIZERS:
        raise ValueError(f"sanitizer must be one of {SANITIZERS}, got {sanitizer!r}")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        own = pool.map(lambda s: object_of(s, sanitizer, defines), sources)
        runtime = pool.map(lambda s: object_of(s, sanitizer), RUNTIME)
        objects = [str(o) for o in (*own, *runtime)]
    name = hashlib.sha256("\n".join(objects).encode()).hexdigest()[:20]
    out = CACHE / f"{sources[0].stem}-{sanitizer}-{name}"
    if out.exists():
        return out
    temporary = out.with_suffix(f".{os.getpid()}.tmp")
    link = [compiler(), *DEVICE_FLAGS[sanitizer], *objects, "-o", str(temporary)]
    run = subprocess.run(link, capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"linking {out.name}:\n{run.stderr[-4000:]}")
    temporary.replace(out)
    return out
