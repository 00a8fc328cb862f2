"""Threads: torch's setting is honoured, results repeat bit for bit, callers may be concurrent."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tools import DTYPES, featured, judge, packed, padded, run

# Prints how many threads of the process spent CPU time inside the call.
_COUNT = """
import sys, torch, fastattn
from pathlib import Path
torch.set_num_threads(int(sys.argv[1]))
b, h, sq, sk = (int(x) for x in sys.argv[2].split(","))
q = torch.randn(b, h, sq, 64, requires_grad=True)
k = torch.randn(b, h, sk, 64, requires_grad=True)
def ticks():
    return {t.name: int(Path(t, "schedstat").read_text().split()[0])
            for t in Path("/proc/self/task").iterdir()}
before = ticks()
for _ in range(int(sys.argv[3])):
    o = fastattn.attention(q, k, k, backend="cpu")
    if sys.argv[4] == "backward":
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(o.sum(), (q, k))
after = ticks()
print(sum(ns - before.get(t, 0) > 3_000_000 for t, ns in after.items()))
"""


def busy_threads(setting: int, shape: str, repeats: int, what: str) -> int:
    command = [sys.executable, "-c", _COUNT, str(setting), shape, str(repeats), what]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(out.stdout)


SHAPES = {"many_heads": "2,8,256,256", "one_head": "1,1,2048,2048", "decode": "1,1,1,65536"}


@pytest.mark.parametrize("what", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", [1, 2])
def test_set_num_threads_is_honoured(setting: int, shape: str, what: str) -> None:
    """One thread means one; two means two, also where batch x heads is 1."""
    repeats = 40 if shape == "decode" else 8
    assert busy_threads(setting, SHAPES[shape], repeats, what) == setting


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_on_any_number_of_threads(threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    judge(featured("all", b=3, h=2, hk=1, sq=67, sk=131, d=40, dtype=dtype), "cpu")
    judge(padded(b=1, h=1, sq=5, sk=1500, d=32, dtype=dtype), "cpu")
    judge(packed((3, 200, 1), h=1, d=32, dtype=dtype, causal=True), "cpu")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(2, 4, 150, 150), (1, 1, 700, 300), (1, 2, 1, 3000)], ids=str)
def test_bitwise_equal_run_to_run(shape: tuple[int, ...], threads: int) -> None:
    b, h, sq, sk = shape
    torch.set_num_threads(threads)
    problem = padded(b=b, h=h, sq=sq, sk=sk, bias=torch.randn(1, h, 1, sk), sinks=torch.randn(h))
    first = run(problem, "cpu").all()
    for _ in range(5):
        for name, x in run(problem, "cpu").all().items():
            assert torch.equal(x, first[name]), name


def test_concurrent_callers(kernel: str) -> None:
    """Eight Python threads with problems of their own get what they get alone, bit for bit."""
    features = ("plain", "causal", "bias", "dropout", "sinks", "weights", "k_lens", "all")
    problems = [
        featured(f, b=2, h=2, sq=60 + 11 * i, sk=90 + 7 * i, d=32, dtype=DTYPES[i % 3])
        for i, f in enumerate(features)
    ]
    alone = [run(p, kernel).all() for p in problems]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            for got, want in zip(
                pool.map(lambda p: run(p, kernel).all(), problems), alone, strict=True
            ):
                for name, x in want.items():
                    assert torch.equal(got[name], x), name
