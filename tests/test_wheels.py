"""The checks of `make verify-wheels` on a wheel that is made wrong: each sees its fault, and it
alone. Whether the real wheels pass is for `make verify-wheels` itself."""

import re
import shutil
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest
from wheels import contents
from wheels.kit import ROOT, CheckError, Wheel

PLATFORM = "manylinux_2_34_x86_64"
TAG = f"cp310-abi3-{PLATFORM}"
BINARY = "fastattn/_C.abi3.so"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A module that exports its entry and nothing else."""
    folder = tmp_path_factory.mktemp("library")
    return compiled(folder, "int hidden() { return 0; }")


def compiled(folder: Path, body: str, *flags: str) -> bytes:
    source = folder / "module.cpp"
    entry = '__attribute__((visibility("default")))'
    source.write_text(f'{body}\nextern "C" {entry} void* PyInit__C() {{ return 0; }}\n')
    out = folder / "module.so"
    command = ["c++", "-shared", "-fPIC", "-fvisibility=hidden", "-s", source, "-o", out, *flags]
    subprocess.run(command, check=True, cwd="/")
    return out.read_bytes()


def made(
    folder: Path,
    files: dict[str, bytes],
    *,
    name: str = f"fastattn-0.1.0-{TAG}.whl",
    version: str = "0.1.0",
    tag: str = TAG,
) -> Wheel:
    """A wheel of the package as it is here, with these files besides."""
    info = f"fastattn-{version}.dist-info"
    held = {p.relative_to(ROOT).as_posix(): b"" for p in (ROOT / "fastattn").rglob("*.py")}
    held |= {f"fastattn/{p.relative_to(ROOT).as_posix()}": b"" for p in ROOT.glob("kernels/*.py")}
    held[f"{info}/METADATA"] = f"Name: fastattn\nVersion: {version}\n\n".encode()
    held[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nTag: {tag}\n".encode()
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in (held | files).items():
            archive.writestr(path, text)
    return Wheel.of(folder / name)


def test_a_wheel_without_a_fault(tmp_path: Path, library: bytes) -> None:
    wheel = made(tmp_path, {BINARY: library})
    assert (wheel.version, wheel.local, wheel.cuda) == ("0.1.0", "", False)
    for check in (contents.name, contents.size, contents.files, contents.paths):
        assert check(wheel)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("fastattn-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl", "not cp310-abi3"),
        ("fastattn-0.1.0-cp310-abi3-linux_x86_64.whl", "linux_x86_64"),
        ("fastattn-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl", "does not say"),
        ("fastattn-0.1.0+gpu-cp310-abi3-manylinux_2_34_x86_64.whl", "local version 'gpu'"),
    ],
)
def test_names(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(CheckError, match=what):
        contents.name(made(tmp_path, {}, name=name))


def test_versions_that_differ(tmp_path: Path) -> None:
    metadata = {"fastattn-0.1.0.dist-info/METADATA": b"Name: fastattn\nVersion: 0.1.1\n"}
    with pytest.raises(CheckError, match="not of 0.1.0"):
        contents.name(made(tmp_path, metadata))


def test_other_names() -> None:
    with pytest.raises(CheckError, match="not the name of a wheel"):
        Wheel.of(Path("other-1.0-py3-none-any.whl"))
    wheel = Wheel.of(Path("fastattn-0.1.0+cu130-cp310-abi3-manylinux_2_34_x86_64.whl"))
    assert (wheel.local, wheel.cuda) == ("cu130", True)


def test_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "LIMIT", 1000)
    with pytest.raises(CheckError, match="more than"):
        contents.size(made(tmp_path, {BINARY: bytes(2000)}))


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"fastattn.libs/libtorch_cpu-1234.so": b""}, "it has"),
        ({"fastattn/libcudart.so.13": b""}, "the binaries"),
        ({"fastattn/_C_cuda.abi3.so": b""}, "the binaries"),
        ({"fastattn/attention_fwd.cu": b""}, "attention_fwd.cu"),
        ({"fastattn/deleted_long_ago.py": b""}, "deleted_long_ago.py"),
        ({"tests/smoke.py": b""}, "tests"),
    ],
)
def test_files(tmp_path: Path, library: bytes, files: dict[str, bytes], what: str) -> None:
    with pytest.raises(CheckError, match=what):
        contents.files(made(tmp_path, {BINARY: library, **files}))


@pytest.mark.parametrize("folder", [ROOT, Path.home(), Path(sysconfig.get_paths()["purelib"])])
def test_paths(tmp_path: Path, folder: Path) -> None:
    text = f"\0{folder}/csrc/bindings/attention.cpp\0".encode()
    with pytest.raises(CheckError, match=re.escape(f"_C.abi3.so: {folder}/")):
        contents.paths(made(tmp_path, {BINARY: text}))


@pytest.mark.parametrize(
    ("body", "flags", "what"),
    [
        ("", ["-Wl,-rpath,/opt/torch"], "RPATH"),
        ("", ["-Wl,--no-as-needed", "-lz"], "needs"),
        ('extern "C" __attribute__((visibility("default"))) int cudaMalloc() { return 0; }', [],
         "exports .'cudaMalloc'"),
    ],
)  # fmt: skip
def test_libraries(tmp_path: Path, body: str, flags: list[str], what: str) -> None:
    if "-lz" in flags:  # not of those that every Linux has
        other = tmp_path / "libz.so"
        subprocess.run(["c++", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", other], check=True)
        flags = [*flags, f"-L{tmp_path}"]
    assert shutil.which("readelf")
    with pytest.raises(CheckError, match=what):
        contents.libraries(made(tmp_path, {BINARY: compiled(tmp_path, body, *flags)}))


def test_newest() -> None:
    found = contents.newest(["GLIBC_2.4", "GLIBC_2.34", "GLIBC_2.5", "GLIBCXX_3.4.9"])
    assert found == ["GLIBC_2.34", "GLIBCXX_3.4.9"]
