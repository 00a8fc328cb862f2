"""Every example in a docstring and in README.md runs."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastattn

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"fastattn.cli": ("rich", "typer"), "fastattn.kernels": ("triton",)}


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


def test_readme_example() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    scope: dict[str, object] = {"model": torch.nn.TransformerEncoderLayer(32, 4)}
    for block in blocks:
        exec(block, scope)
    bias = scope["bias"]
    assert bias.grad.shape == bias.shape
