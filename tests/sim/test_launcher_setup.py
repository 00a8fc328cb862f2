"""When setup.py builds fastattn._C_cuda, for which architectures, and where it finds nvcc."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[2]


Setup = Callable[..., dict[str, Any]]


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Runs setup.py up to `setup(...)`; what it was given, and setup.py's own names."""

    def run(**environment: str) -> dict[str, Any]:
        for name in ("FASTATTN_CUDA", "FASTATTN_LOCAL_VERSION", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        given: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **kwargs: given.update(kwargs))
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "path", [*sys.path])
        return {**runpy.run_path("setup.py"), **given}

    return run


@pytest.fixture(scope="module")
def toolkit() -> ModuleType:
    """The module that setup.py imports."""
    path = ROOT / "csrc" / "cuda" / "toolkit.py"
    spec = importlib.util.spec_from_file_location("toolkit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toolkit"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_nvcc(toolkit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "_compilers", list)


def names(found: dict[str, Any]) -> list[str]:
    return [extension.name for extension in found["ext_modules"]]


@pytest.mark.usefixtures("toolkit")
def test_with_a_toolkit_it_is_built(setup_py: Setup) -> None:
    for environment in ({}, {"FASTATTN_CUDA": "1"}):
        found = setup_py(**environment)
        assert names(found) == ["fastattn._C", "fastattn._C_cuda"]
    cuda = found["ext_modules"][1]
    assert "-DUSE_CUDA" in str(cuda.extra_compile_args)
    assert "FASTATTN_STAND_IN" not in str(cuda.extra_compile_args)
    assert [Path(x).name for x in cuda.extra_objects] == ["libcudart_static.a"]
    assert "cudart" not in cuda.libraries


def test_it_can_be_left_out(setup_py: Setup) -> None:
    assert names(setup_py(FASTATTN_CUDA="0")) == ["fastattn._C"]


@pytest.mark.usefixtures("no_nvcc")
def test_without_nvcc_it_is_left_out_and_says_so(
    setup_py: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert names(setup_py()) == ["fastattn._C"]
    assert "without its CUDA kernels: no usable CUDA toolkit" in capsys.readouterr().out


@pytest.mark.usefixtures("no_nvcc")
def test_asked_for_without_nvcc_it_fails_loudly(setup_py: Setup) -> None:
    with pytest.raises(SystemExit, match="FASTATTN_CUDA=1, but no usable CUDA toolkit") as error:
        setup_py(FASTATTN_CUDA="1")
    # What it says to install is what the Makefile and cibuildwheel install.
    packages = set(re.findall(r"nvidia-[a-z-]+", str(error.value)))
    (makefile,) = re.findall(r"^NVCC := .*", (ROOT / "Makefile").read_text(), re.M)
    (manylinux,) = re.findall(r".*nvidia-cuda-nvcc.*", (ROOT / "pyproject.toml").read_text())
    for text in (makefile, manylinux):
        assert set(re.findall(r"nvidia-[a-z-]+", text)) == packages


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize(
    ("built_for", "why"), [(None, "is not built for CUDA"), ("99.1", "torch of CUDA 99.1")]
)
def test_another_torch(
    setup_py: Setup, monkeypatch: pytest.MonkeyPatch, built_for: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    assert names(setup_py()) == ["fastattn._C"]
    with pytest.raises(SystemExit, match=why):
        setup_py(FASTATTN_CUDA="1")


def test_another_value_is_refused(setup_py: Setup) -> None:
    with pytest.raises(SystemExit, match="FASTATTN_CUDA must be 0, 1 or unset, got 'yes'"):
        setup_py(FASTATTN_CUDA="yes")


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("8.0", "arch=compute_80,code=[sm_80]"),
        # One front-end pass, and the PTX is what the machine code is made from.
        (
            "8.0;9.0;10.0;12.0+PTX",
            "arch=compute_80,code=[sm_80,sm_90,sm_100,sm_120,compute_80]",
        ),
        ("12.0 9.0", "arch=compute_90,code=[sm_120,sm_90]"),
        ("8.0;9.0a,12.0", "arch=compute_80,code=[sm_80,sm_120] arch=compute_90a,code=[sm_90a]"),
        ("9.0a+PTX", "arch=compute_90a,code=[sm_90a,compute_90a]"),
        (
            "8.9;10.0f+PTX",
            "arch=compute_89,code=[sm_89] arch=compute_100f,code=[sm_100f,compute_100f]",
        ),
        ("7.5;8.6;8.6", "arch=compute_86,code=[sm_86]"),  # others build for 7.5 too
    ],
)
def test_architectures(toolkit: ModuleType, archs: str, flags: str) -> None:
    found = toolkit.Architectures.parse(archs).flags()
    assert found == [f"-gencode={f}" for f in flags.split()]


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize("archs", ["Ampere", "8", "7.0;7.5", "9.0+ptx"])
def test_architectures_that_are_refused(setup_py: Setup, archs: str) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: "):
        setup_py(TORCH_CUDA_ARCH_LIST=archs)


@pytest.mark.usefixtures("toolkit")
def test_the_binary_knows_its_architectures(setup_py: Setup) -> None:
    _, cuda = setup_py(TORCH_CUDA_ARCH_LIST="8.0;9.0a;12.0+PTX")["ext_modules"]
    assert "-DFASTATTN_CUBINS=80,90a,120" in cuda.extra_compile_args
    assert "-DFASTATTN_PTX=80" in cuda.extra_compile_args


def test_nvcc_reads_those_flags(toolkit: ModuleType) -> None:
    """One front-end pass for all, and every architecture of the wheel is one that nvcc knows."""
    flags = toolkit.Architectures.parse(toolkit.ARCHS).flags()
    command = [toolkit.find().nvcc, "--dryrun", *flags, "-x", "cu", "-c", "/dev/null"]
    plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert len(re.findall(r"^#\$ .*cicc.? ", plan, re.M)) == 1
    assert re.findall(r"ptxas.* -arch=(sm_\w+)", plan) == ["sm_80", "sm_90", "sm_100", "sm_120"]


@pytest.mark.usefixtures("toolkit")
def test_a_file_of_kernels_is_compiled_when_something_changed(
    setup_py: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not twice for the same, but for other architectures, and after a change of its sources."""
    builder = setup_py()["Build"]
    build = object.__new__(builder)
    build.build_temp = str(tmp_path)
    calls = []

    def nvcc(command: list[str], check: bool) -> None:
        assert check
        calls.append(command)
        Path(command[command.index("-o") + 1]).touch()

    monkeypatch.setattr(subprocess, "run", nvcc)
    out = build._nvcc("csrc/cuda/attention_fwd.cu", 1)
    assert "--threads=1" in calls[0]
    assert build._nvcc("csrc/cuda/attention_fwd.cu", 2) == out
    assert len(calls) == 1
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    build._nvcc("csrc/cuda/attention_fwd.cu", 1)
    assert len(calls) == 2
    os.utime(out, (0, 0))  # before any of the headers
    build._nvcc("csrc/cuda/attention_fwd.cu", 1)
    assert len(calls) == 3
    Path(out).unlink()
    build._nvcc("csrc/cuda/attention_fwd.cu", 1)
    assert len(calls) == 4


# ------------------------------------------------------------------------- the version of a wheel


@pytest.mark.usefixtures("toolkit")
def test_a_label_is_true(setup_py: Setup, toolkit: ModuleType) -> None:
    """FASTATTN_LOCAL_VERSION=cu130 and nothing but CUDA 13.0 in it."""
    version = "{}{}".format(*toolkit.find().version)

    def tag(**environment: str) -> str:
        options: dict[str, Any] = setup_py(**environment)["options"]
        return str(options["egg_info"]["tag_build"])

    assert tag() == ""
    assert tag(FASTATTN_LOCAL_VERSION=f"cu{version}") == f"+cu{version}"
    assert tag(FASTATTN_LOCAL_VERSION="site.1", FASTATTN_CUDA="0") == "+site.1"
    with pytest.raises(SystemExit, match=f"cu121, but this build is cu{version}"):
        tag(FASTATTN_LOCAL_VERSION="cu121")
    with pytest.raises(SystemExit, match=f"cu{version}, but this build is without CUDA"):
        tag(FASTATTN_LOCAL_VERSION=f"cu{version}", FASTATTN_CUDA="0")


def test_only_the_package_is_shipped(setup_py: Setup) -> None:
    """Neither the dev-only `_kernels` nor anything of the stand-in, by any name."""
    found = setup_py()
    assert {p.split(".")[0] for p in found["packages"]} == {"fastattn"}
    assert set(names(found)) <= {"fastattn._C", "fastattn._C_cuda"}
    sources = [s for extension in found["ext_modules"] for s in extension.sources]
    assert all(Path(s).resolve().is_relative_to(ROOT / "csrc") for s in sources)
    assert not list((ROOT / "fastattn").rglob("_kernels*"))


# ------------------------------------------------------------------------------- finding nvcc


def test_a_script_that_calls_nvcc_is_seen_through(
    toolkit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on PATH need not lie in the toolkit."""
    real = toolkit.find()
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {real.nvcc} "$@"\n')
    script.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = toolkit.find()
    assert found.nvcc == script
    assert (found.version, found.headers) == (real.version, real.headers)
    assert (found.static_runtime()).is_file()


def test_the_wheels_are_found(
    toolkit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = toolkit.find()
    folder = tmp_path / "nvidia" / "cu13"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "nvcc").symlink_to(real.nvcc)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    paths = {"purelib": str(tmp_path), "platlib": str(tmp_path)}
    monkeypatch.setattr(toolkit.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(toolkit, "_output", lambda command, *arguments: _as_if(folder, arguments))
    with pytest.raises(toolkit.ToolkitError, match="without cuda_runtime.h"):
        toolkit.find()
    for header in toolkit._HEADERS:
        (folder / "include" / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / "include" / header).touch()
    (folder / "lib").mkdir()
    (folder / "lib" / "libcudart_static.a").touch()
    found = toolkit.find()
    assert found.nvcc == folder / "bin" / "nvcc"
    assert found.static_runtime() == folder / "lib" / "libcudart_static.a"
    assert not found.includes  # its own headers, which it knows


def _as_if(folder: Path, arguments: tuple[str, ...]) -> str:
    """What nvcc says of itself, were it in `folder`."""
    if arguments == ("--version",):
        return "Cuda compilation tools, release 13.0, V13.0.88"
    return f"#$ TOP={folder}\n"


def test_an_nvcc_that_does_not_run_is_named(
    toolkit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(toolkit, "_wheels", list)
    with pytest.raises(toolkit.ToolkitError, match=r"nvcc \(does not run\)"):
        toolkit.find()
