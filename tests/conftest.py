"""Fixtures of the whole suite: one generator, one thread setting, the backends under test."""

import importlib.util
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

# torch.compile keeps compiled graphs on disk, keyed by graph and torch but not by what our fake
# kernels return: a graph compiled with an older fake would be served to the test of a newer one.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # read when torch is imported

# What `fastattn tune` stored for this user is none of a test's business.
os.environ["FASTATTN_TUNE_CACHE"] = os.devnull  # no folder: nothing to read

import torch

# With several workers (pytest-xdist) each has its share of the cores, and so do its own processes.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    _THREADS = max(1, (os.cpu_count() or 1) // _WORKERS)
    torch.set_num_threads(_THREADS)
    os.environ["OMP_NUM_THREADS"] = str(_THREADS)

# `make test-gpu` says "cuda": the same tests then make their tensors there (gpu_report.py).
DEVICE = os.environ.get("FASTATTN_TEST_DEVICE", "cpu")
# The fused backends by device. A new one joins every feature test by its name.
# On a GPU CUDA C++ is one of them where nvcc was there to build it.
_BUILT = ("cuda",) if importlib.util.find_spec("fastattn._C_cuda") else ()
KERNEL_BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", *_BUILT)}[DEVICE]


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from the same generator state and leaves the thread count as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    with torch.device(DEVICE) if DEVICE != "cpu" else nullcontext():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=KERNEL_BACKENDS)
def kernel(request: pytest.FixtureRequest) -> str:
    """A fused backend: what is measured against the oracle."""
    return request.param


@pytest.fixture(params=("reference", *KERNEL_BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    """Any backend: for the contract that all of them hold (edge cases, errors, semantics)."""
    return request.param


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the part of make verify-full as well")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: minutes; only with --full (make verify-full)")
    config.addinivalue_line(
        "markers",
        "sampled(n): of a test's parameters every n-th, without --full (make verify-full)",
    )


# .ci/run has a clock: it takes every second case of what `make verify` samples.
SAMPLE = int(os.environ.get("FASTATTN_SAMPLE", "1"))


def _left_out(item: pytest.Item, index: int) -> bool:
    """Whether only --full runs the item, which is number `index` of its function's."""
    if item.get_closest_marker("full") is not None:
        return True
    sampled = item.get_closest_marker("sampled")
    if sampled is None or index == 0:
        return False
    # Not the same of every function: lists of cases are shared.
    every = sampled.args[0] * SAMPLE
    return (index + zlib.crc32(_function(item).encode())) % every != 0


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full", default=False):
        return
    seen: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        name = _function(item)
        (left_out if _left_out(item, seen[name]) else kept).append(item)
        seen[name] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
