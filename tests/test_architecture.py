"""Who may import whom, read from the sources; and what `import fastattn` may pull in.

`nn → ops → {kernels, bindings}`, `bindings → csrc/cpu | csrc/cuda`, `swap → nn`; nothing below
`fastattn/ops` knows torch's C++ headers; nothing shipped imports tests or bench.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module of the package -> the parts of the package that it may import.
ALLOWED = {
    "fastattn._debug": (),
    "fastattn._program": (),
    "fastattn.measure": (),
    "fastattn.first_use": (),
    "fastattn.reference": ("fastattn.reference",),
    "fastattn.backends": ("fastattn._C", "fastattn._C_cuda", "fastattn.kernels.launch"),
    "fastattn.kernels": ("fastattn.kernels",),
    "fastattn.choices": ("fastattn.backends",),
    "fastattn.ops": (
        "fastattn.ops",
        "fastattn.choices",
        "fastattn.kernels",
        "fastattn.backends",
        "fastattn.first_use",
        "fastattn.reference",
        "fastattn._debug",
    ),
    "fastattn.nn": ("fastattn.nn", "fastattn.ops"),
    "fastattn.swap": ("fastattn.swap", "fastattn.nn", "fastattn.ops"),
    "fastattn.tune": ("fastattn.ops", "fastattn.choices", "fastattn.backends", "fastattn.measure"),
}
# bench measures the public functions; it borrows the demo's stopwatch.
# bench.models times the model that the demo loads.
BENCH = (
    "fastattn",
    "fastattn.backends",
    "fastattn.cli.demo_model",
    "fastattn.measure",
    "fastattn.reference",
    "bench",
)

SHIPPED_LAYERS = {
    "attention": (
        "csrc/cpu/attention.cpp",
        "csrc/cuda/attention_fwd.cu",
        "csrc/bindings/attention.cpp",
        "csrc/bindings/attention_cuda.cpp",
        "kernels/attention.py",
        "fastattn/ops/attention.py",
        "tests/test_attention.py",
        "bench/attention.py",
    ),
    "attention_kv_cache": (
        "csrc/cpu/attention_kv_cache.cpp",
        "csrc/cuda/attention_kv_cache.cu",
        "csrc/bindings/attention_kv_cache.cpp",
        "csrc/bindings/attention_kv_cache_cuda.cpp",
        "kernels/attention_kv_cache.py",
        "fastattn/ops/attention_kv_cache.py",
        "fastattn/nn/kv_cache.py",
        "fastattn/reference/attention_kv_cache.py",
        "tests/test_attention_kv_cache.py",
        "bench/kv_cache.py",
    ),
    "embedding": (
        "csrc/cpu/embedding.cpp",
        "csrc/bindings/embedding.cpp",
        "fastattn/ops/embedding.py",
        "fastattn/nn/embedding.py",
        "fastattn/reference/embedding.py",
        "tests/test_embedding.py",
        "bench/embedding.py",
    ),
    "gru": (
        "csrc/cpu/gru.h",
        "fastattn/ops/gru.py",
        "fastattn/nn/gru.py",
        "fastattn/reference/gru.py",
        "tests/test_gru.py",
    ),
    "lstm": (
        "csrc/cpu/lstm.h",
        "fastattn/ops/lstm.py",
        "fastattn/nn/lstm.py",
        "fastattn/reference/lstm.py",
        "tests/test_lstm.py",
    ),
    # What LSTM, GRU and RNN share.
    "recurrent": (
        "csrc/cpu/recurrent.cpp",
        "csrc/bindings/recurrent.cpp",
        "fastattn/ops/recurrent.py",
        "fastattn/ops/recurrent_op.py",
        "fastattn/reference/recurrent.py",
        "tests/test_recurrent.py",
        "bench/recurrent.py",
    ),
    "layernorm_ffn": (
        "csrc/cpu/layernorm_ffn.cpp",
        "csrc/cuda/layernorm_ffn_fwd.cu",
        "csrc/bindings/layernorm_ffn.cpp",
        "csrc/bindings/layernorm_ffn_cuda.cpp",
        "kernels/layernorm_ffn.py",
        "fastattn/ops/layernorm_ffn.py",
        "fastattn/nn/layernorm_ffn.py",
        "fastattn/reference/layernorm_ffn.py",
        "tests/test_layernorm_ffn.py",
        "bench/layernorm_ffn.py",
    ),
}


def python_files(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def native_files(folder: str) -> list[Path]:
    suffixes = {".h", ".hpp", ".cpp", ".cu", ".cuh"}
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fastattn")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that the file imports, wherever in it, relative ones resolved.

    `from fastattn import reference` counts as fastattn.reference, where that is a module.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            subs = {f"{name}.{alias.name}" for alias in node.names}
            modules = {s for s in subs if is_module(s)}
            found |= modules
            if modules != subs:
                found.add(name)
    return found


def is_module(name: str) -> bool:
    path = ROOT / "/".join(name.split("."))
    extension = name in ("fastattn._C", "fastattn._C_cuda")
    return extension or path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def ours(names: set[str]) -> set[str]:
    return {n for n in names if n.split(".")[0] in ("fastattn", "bench", "tests", "kernels")}


PACKAGE = python_files("fastattn") + python_files("kernels")


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_package_imports_run_downwards(path: Path) -> None:
    name = module_name(path)
    if name in ("fastattn", "fastattn.__main__") or within(name, ("fastattn.cli",)):
        allowed: tuple[str, ...] = ("fastattn",)  # everything that is shipped
    else:
        layer = ".".join(name.split(".")[:2])
        assert layer in ALLOWED, f"{name} is in no layer: give it one in {Path(__file__).name}"
        allowed = ALLOWED[layer]
    wrong = {n for n in ours(imports(path)) if not within(n, allowed)}
    assert not wrong, f"{name} may import {allowed or 'nothing of the package'}, not {wrong}"


@pytest.mark.parametrize("path", python_files("bench"), ids=module_name)
def test_bench_uses_the_public_api(path: Path) -> None:
    for name in ours(imports(path)):
        ok = name in BENCH or name.startswith("bench.")
        assert ok, f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", python_files("examples"), ids=module_name)
def test_examples_use_what_users_have(path: Path) -> None:
    assert ours(imports(path)) <= {"fastattn"}


def test_kernels_register_no_ops() -> None:
    for path in python_files("kernels"):
        assert "torch.library" not in path.read_text(), path


def test_no_triton_at_the_top_of_a_module() -> None:
    """Inside a function, yes; at import time of a module outside kernels/, no."""
    for path in python_files("fastattn"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names]
                names.append(getattr(node, "module", None) or "")
                assert not any(n.split(".")[0] == "triton" for n in names), path


@pytest.mark.parametrize("path", native_files("csrc"), ids=lambda p: str(p.relative_to(ROOT)))
def test_native_includes(path: Path) -> None:
    layer = path.relative_to(ROOT / "csrc").parts[0]
    includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
    for include in includes:
        if layer != "bindings":
            assert not include.startswith(("torch/", "ATen/", "c10/", "pybind11/")), include
            assert include != "Python.h", include
        else:
            # The stable ABI only: one binary for every torch.
            unstable = include.startswith(("ATen/", "c10/", "pybind11/")) or (
                include.startswith("torch/")
                and not include.startswith(("torch/csrc/stable/", "torch/headeronly/"))
                and not include.startswith("torch/csrc/inductor/aoti_torch/c/")
            )
            assert not unstable, include
        target = (path.parent / include).resolve()
        if target.exists() and target.is_relative_to(ROOT / "csrc"):
            other = target.relative_to(ROOT / "csrc").parts
            # What lies at the top is everybody's: how launchers are told where tensors lie.
            shared = len(other) == 1
            assert shared or layer in (other[0], "bindings"), f"{path} includes {include}"


def test_one_implementation_a_dispatch_key() -> None:
    """`TORCH_LIBRARY_IMPL(fastattn, KEY, m) { m.impl("op", ...) }`, each (op, KEY) once."""
    pairs: Counter[tuple[str, str]] = Counter()
    for path in native_files("csrc/bindings"):
        text = path.read_text()
        for block in re.split(r"TORCH_LIBRARY_IMPL\s*\(", text)[1:]:
            key = block.split(",")[1].strip()
            pairs.update((op, key) for op in re.findall(r'\.impl\(\s*"(\w+)"', block))
    assert pairs, "no implementation found: has the macro changed?"
    assert all(count == 1 for count in pairs.values()), pairs


@pytest.mark.parametrize("op", SHIPPED_LAYERS)
def test_an_op_stands_once_in_every_layer(op: str) -> None:
    missing = [name for name in SHIPPED_LAYERS[op] if not (ROOT / name).exists()]
    assert not missing


def test_top_level() -> None:
    """The folders whose names are fixed, and the files that tell people what this is."""
    wanted = "setup.py csrc fastattn kernels tests bench pyproject.toml Makefile README.md"
    wanted += " CONTRIBUTING.md CHANGELOG.md LICENSE .clang-format .pre-commit-config.yaml .ci/run"
    missing = [name for name in wanted.split() if not (ROOT / name).exists()]
    assert not missing


def test_import_is_lean() -> None:
    """What `import fastattn` adds to `import torch`: none of the optional or heavy packages."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastattn; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    added = set(done.stdout.split())
    assert "fastattn" in added
    heavy = {"triton", "transformers", "numpy", "rich", "typer", "matplotlib", "pytest", "psutil"}
    assert not added & heavy
