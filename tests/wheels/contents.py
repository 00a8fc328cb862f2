"""What a wheel holds, looked at without installing it. Each check returns what it found, in a line,
or raises CheckError."""

from __future__ import annotations

import re
import sys
import sysconfig
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import triton.backends.nvidia
from sim.build import toolkit_module

from .kit import ROOT, Wheel, check, output

# Triton carries it; PyPI's nvcc comes without.
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
LIMIT = 40 * 10**6  # bytes
# Every Linux that the tag names has these (PEP 600); torch's come with torch.
SYSTEM = {"libc.so.6", "libdl.so.2", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "librt.so.1"}
SYSTEM |= {"libstdc++.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
TORCH = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
TORCH_CUDA = {"libtorch_cuda.so", "libc10_cuda.so"}


def name(wheel: Wheel) -> str:
    """cp310-abi3 and a manylinux tag, and its metadata says the same."""
    check((wheel.python, wheel.abi) == ("cp310", "abi3"), f"{wheel.path.name} is not cp310-abi3")
    check(re.fullmatch(r"manylinux_2_\d+_\w+", wheel.platform) is not None, wheel.platform)
    check(re.fullmatch(r"|cu\d+", wheel.local) is not None, f"local version {wheel.local!r}")
    with zipfile.ZipFile(wheel.path) as archive:
        folder = f"fastattn-{wheel.version}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        tags = archive.read(f"{folder}/WHEEL").decode()
    check(f"\nVersion: {wheel.version}\n" in metadata, f"METADATA is not of {wheel.version}")
    tag = f"{wheel.python}-{wheel.abi}-{wheel.platform}"
    check(re.findall(r"^Tag: (.+)$", tags, re.M) == [tag], f"WHEEL does not say {tag} alone")
    return wheel.path.name


def size(wheel: Wheel) -> str:
    found = wheel.path.stat().st_size
    check(found <= LIMIT, f"{found / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}")
    return f"{found / 1e6:.2f} MB"


def files(wheel: Wheel) -> str:
    """The package and nothing else: no library of others, no source, no test."""
    with zipfile.ZipFile(wheel.path) as archive:
        names = archive.namelist()
    folders = {n.split("/")[0] for n in names}
    check(folders == {"fastattn", f"fastattn-{wheel.version}.dist-info"}, f"it has {folders}")
    wanted = {"fastattn/_C.abi3.so"} | ({"fastattn/_C_cuda.abi3.so"} if wheel.cuda else set())
    binaries = {n for n in names if ".so" in Path(n).name}
    check(binaries == wanted, f"it has the binaries {sorted(binaries)}, not {sorted(wanted)}")
    package = [n for n in names if n.startswith("fastattn/") and n not in binaries]
    odd = [n for n in package if not n.endswith((".py", ".txt", "/py.typed", "/"))]
    check(not odd, f"it has {odd}")
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastattn").rglob("*.py")}
    sources |= {f"fastattn/{p.relative_to(ROOT).as_posix()}" for p in ROOT.glob("kernels/*.py")}
    modules = {n for n in package if n.endswith(".py")}
    check(modules == sources, f"modules: {sorted(modules ^ sources)} are on one side alone")
    return f"{len(package)} files, {', '.join(sorted(binaries))}"


def libraries(wheel: Wheel) -> str:
    """auditwheel agrees with the tag; nothing is asked for but the system's libraries and torch's,
    from nowhere in particular; nothing is exported but Python's entry."""
    needed = set()
    with unpacked(wheel) as folder:
        for binary in binaries(folder):
            dynamic = output("readelf", "--dynamic", "--wide", binary)
            needs = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
            allowed = SYSTEM | TORCH | (TORCH_CUDA if "_cuda" in binary.name else set())
            check(needs <= allowed, f"{binary.name} needs {sorted(needs - allowed)}")
            check("PATH)" not in dynamic, f"{binary.name} has a RPATH or RUNPATH")
            symbols = output("readelf", "--dyn-syms", "--wide", binary)
            exported = re.findall(r"(?:GLOBAL|WEAK)\s+DEFAULT\s+\d+\s+(\w+)", symbols)
            entry = f"PyInit_{binary.name.split('.')[0]}"
            # Weak instances of the standard library's templates are everybody's.
            own = [s for s in exported if not re.match(r"_Z[A-Z]*[KN]*S[ts]|_ZGVZNS", s)]
            check(own == [entry], f"{binary.name} exports {own[:5]}, not {entry} alone")
            needed |= needs
    shown = " ".join(output(sys.executable, "-m", "auditwheel", "show", wheel.path).split())
    # Its verdict on the whole is "linux": torch's libraries are not on its list.
    tag = re.search(r'constrains the platform tag to "(\w+)"', shown)
    check(tag is not None and tag[1] == wheel.platform, shown)
    torch = sorted(needed & (TORCH | TORCH_CUDA))
    versions = re.findall(r"\b(?:GLIBC|GLIBCXX|CXXABI)_[\d.]*\d", shown)
    return f"asks for {', '.join(newest(versions))}; of others, {', '.join(torch)}"


def newest(versions: list[str]) -> list[str]:
    """GLIBC_2.14, GLIBC_2.34 -> GLIBC_2.34, for each library."""
    key = {v: tuple(map(int, v.partition("_")[2].split("."))) for v in versions}
    names = sorted({v.partition("_")[0] for v in versions})
    return [max((v for v in key if v.startswith(f"{n}_")), key=key.__getitem__) for n in names]


def limited_api(wheel: Wheel) -> str:
    """Only what CPython's limited API promises."""
    output(sys.executable, "-m", "abi3audit", "--strict", "--verbose", wheel.path)
    return "abi3audit --strict: no violation"


def paths(wheel: Wheel) -> str:
    """No file, and no cubin or PTX packed in one, names a folder of the machine that built it."""
    seen = 0
    with unpacked(wheel) as folder:
        for binary in binaries(folder):
            if "_cuda" in binary.name:
                extract(binary, folder)
        found = []
        for path in folder.rglob("*"):
            if path.is_file():
                seen += 1
                text = path.read_bytes()
                found += [f"{path.relative_to(folder)}: {w}" for w in leaks(text, private())]
    check(not found, "; ".join(found[:10]))
    return f"{seen} files and embedded images name none of {', '.join(private())}"


def private() -> list[str]:
    """Folders of this machine that nobody else has."""
    words = [ROOT, Path.home(), sys.prefix, sysconfig.get_paths()["purelib"], "/home"]
    words += [tempfile.gettempdir(), "/tmp"]
    return list(dict.fromkeys(f"{str(w).rstrip('/')}/" for w in words))


def leaks(text: bytes, words: Iterable[str]) -> list[str]:
    found = []
    for word in words:
        at = text.find(word.encode())
        if at >= 0:
            context = re.split(rb"[^ -~]", text[at : at + 100])[0]
            found.append(context.decode())
    return found


def images(wheel: Wheel) -> str:
    """Machine code for every architecture, and PTX, of each file of kernels."""
    archs = toolkit_module().Architectures.parse(toolkit_module().ARCHS)
    sources = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    wanted = {f"sm_{a}.cubin": sources for a in archs.cubins}
    wanted |= {f"sm_{a}.ptx": sources for a in archs.ptx}
    with unpacked(wheel) as folder:
        (binary,) = (b for b in binaries(folder) if "_cuda" in b.name)
        listed = "".join(output(CUOBJDUMP, option, binary) for option in ("-lelf", "-lptx"))
    found = Counter(re.findall(r"\b(sm_\w+\.(?:cubin|ptx))", listed))
    check(found == wanted, f"it holds {dict(found)}, not {wanted}")
    return ", ".join(f"{n} × {name}" for name, n in sorted(found.items()))


CHECKS: tuple[Callable[[Wheel], str], ...] = (name, size, files, libraries, limited_api, paths)


def checks(wheel: Wheel) -> tuple[Callable[[Wheel], str], ...]:
    return (*CHECKS, images) if wheel.cuda else CHECKS


@contextmanager
def unpacked(wheel: Wheel) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        with zipfile.ZipFile(wheel.path) as archive:
            archive.extractall(name)
        yield Path(name)


def binaries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.so"))


def extract(binary: Path, folder: Path) -> None:
    """Every cubin and PTX of a binary beside it: they are compressed in there."""
    for option in ("-xelf", "-xptx"):
        output(CUOBJDUMP, option, "all", binary, cwd=folder)
