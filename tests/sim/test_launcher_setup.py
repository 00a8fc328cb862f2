"""When setup.py builds fastattn._C_cuda, for which architectures, and where it finds nvcc."""

import importlib.util
import os
import runpy
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
        for name in ("FASTATTN_CUDA", "TORCH_CUDA_ARCH_LIST"):
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
    with pytest.raises(SystemExit, match="FASTATTN_CUDA=1, but no usable CUDA toolkit"):
        setup_py(FASTATTN_CUDA="1")


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
        ("8.0", "arch=compute_80,code=sm_80"),
        (
            "8.0;9.0a 12.0+PTX",
            "arch=compute_80,code=sm_80 arch=compute_90a,code=sm_90a "
            "arch=compute_120,code=sm_120 arch=compute_120,code=compute_120",
        ),
        ("7.5;8.6", "arch=compute_86,code=sm_86"),  # others build for it too
    ],
)
def test_architectures(setup_py: Setup, archs: str, flags: str) -> None:
    found = setup_py(FASTATTN_CUDA="0")["gencode"](archs)
    assert found == [f"-gencode={f}" for f in flags.split()]


@pytest.mark.parametrize("archs", ["Ampere", "8", "7.0;7.5"])
def test_architectures_that_are_refused(setup_py: Setup, archs: str) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        setup_py(FASTATTN_CUDA="0")["gencode"](archs)


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
