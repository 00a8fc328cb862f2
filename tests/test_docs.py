"""Every example in a docstring, in README.md and on the site runs; what the code decides of the
site is what the code says; every public name has its place there."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastattn

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"fastattn.cli": ("rich", "typer"), "fastattn.kernels": ("triton",)}
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def modules() -> list[str]:
    names = [m.name for m in pkgutil.walk_packages(fastattn.__path__, "fastattn.")]
    return [n for n in names if not n.endswith(("__main__", "_C", "_C_cuda"))]


@pytest.mark.parametrize("name", ["fastattn", *modules()])
def test_docstring_examples(name: str) -> None:
    for package, needed in NEEDS.items():
        if name.startswith(package) and not all(map(importlib.util.find_spec, needed)):
            pytest.fail(f"{name} needs {needed}")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def examples(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def test_readme_example() -> None:
    blocks = examples(ROOT / "README.md", "python")
    assert len(blocks) == 2
    scope: dict[str, object] = {"model": torch.nn.TransformerEncoderLayer(32, 4)}
    for block in blocks:
        exec(block, scope)
    bias = scope["bias"]
    assert bias.grad.shape == bias.shape


WITH_EXAMPLES = [p for p in PAGES if examples(p, "python")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda p: str(p.relative_to(ROOT)))
def test_site_examples(path: Path) -> None:
    """The examples of a page, in order, in one scope."""
    scope: dict[str, object] = {}
    for block in examples(path, "python"):
        exec(compile(block, str(path), "exec"), scope)


def test_every_guide_and_op_has_an_example() -> None:
    named = {str(p.relative_to(ROOT / "docs")) for p in WITH_EXAMPLES}
    wanted = {str(p.relative_to(ROOT / "docs")) for p in PAGES if p.parent.name != "docs"}
    assert len(wanted) >= 9
    assert wanted | {"index.md", "swap.md", "modules.md", "contract.md", "backends.md"} <= named


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    former = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = former
    return module


def test_generated_pages_are_current() -> None:
    pages = list(generator().pages())
    assert {"cli.md", "backends.md", "attention.svg"} <= {path.name for path, _ in pages}
    for path, text in pages:
        assert path.read_text() == text, f"{path.name} is old: run python docs/generate.py"


def test_the_table_of_backends_sees_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order in backends.py is another table."""
    module = generator()
    before = module.backend_table()
    monkeypatch.setitem(module.backends._AUTO, "cuda", ("triton", "cuda", "reference"))
    after = module.backend_table()
    assert "| A100 (8.0), fp32 | CUDA C++, Triton" in before
    assert "| A100 (8.0), fp32 | Triton, CUDA C++" in after


def test_every_public_name_is_on_the_site() -> None:
    text = "\n".join(p.read_text() for p in PAGES)
    shown = set(re.findall(r"^::: [\w.]*?(\w+)$", text, re.MULTILINE))
    shown |= set(re.findall(r"^        - (\w+)$", text, re.MULTILINE))
    missing = (set(fastattn.__all__) | set(fastattn.nn.__all__)) - shown - {"nn", "reference"}
    assert not missing, f"no page has the API of {sorted(missing)}"


def commands() -> list[tuple[str, str]]:
    """(file, command) of every `fastattn ...` in a block of shell or between backticks."""
    found = []
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        text = path.read_text()
        lines = [line for block in examples(path, "sh") for line in block.splitlines()]
        lines += re.findall(r"`(fastattn [a-z][^`]*)`", text)
        found += [
            (str(path.relative_to(ROOT)), line.split("#")[0].strip())
            for line in lines
            if line.startswith("fastattn ")
        ]
    return found


def test_commands_exist_with_their_options() -> None:
    import typer.main

    from fastattn.cli.app import app

    root: Any = typer.main.get_command(app)
    assert len(commands()) > 10
    for where, line in commands():
        _, name, *rest = shlex.split(line)
        assert name in root.commands, f"{where}: {line}"
        options = {o for p in root.commands[name].params for o in p.opts} | {"--help"}
        unknown = {word for word in rest if word.startswith("--")} - options
        assert not unknown, f"{where}: {line}"


def test_readme_is_a_screen_before_its_tables() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("## What runs where") <= 60
