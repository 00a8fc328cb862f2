"""Compiled kernels are kept under build/, by the hash of their source: the second run is quick."""

import os
from pathlib import Path

# Before torch is imported: tensors are small, and threads of a busy machine wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

os.environ.setdefault(
    "TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[2] / "build" / "triton")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the part of make verify-full as well")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: minutes; only with --full (make verify-full)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full", default=False):
        return
    full = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=full)
    items[:] = [item for item in items if not item.get_closest_marker("full")]
