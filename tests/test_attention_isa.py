"""Every instruction set of the CPU kernels on one machine, each against the oracle."""

import subprocess
import sys

import pytest
import torch
from tools import DTYPES, FEATURES, featured, judge, packed, padded

from fastattn.backends import cpu_isa, cpu_isas, force_cpu_isa

# A parametrisation by what this machine can run: what it cannot is no test here, not a skipped one.
ISAS = cpu_isas()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("isa", ISAS)
def test_features(isa: str, feature: str, dtype: torch.dtype) -> None:
    problem = featured(feature, b=2, h=2, hk=1, sq=45, sk=71, d=40, dtype=dtype)
    with force_cpu_isa(isa):
        judge(problem, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "dv"), [(1, 3), (17, 64), (64, 64), (100, 33), (128, 128), (256, 250)]
)
@pytest.mark.parametrize("isa", ISAS)
def test_head_dims(isa: str, d: int, dv: int, dtype: torch.dtype) -> None:
    with force_cpu_isa(isa):
        judge(padded(b=1, h=2, sq=35, sk=67, d=d, dv=dv, dtype=dtype, causal=True), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sq", [1, 16, 33, 130])
@pytest.mark.parametrize("sk", [1, 31, 64, 259])
@pytest.mark.parametrize("isa", ISAS)
def test_lengths(isa: str, sq: int, sk: int, dtype: torch.dtype) -> None:
    with force_cpu_isa(isa):
        judge(padded(b=1, h=2, sq=sq, sk=sk, d=32, dtype=dtype), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_packed(isa: str, dtype: torch.dtype) -> None:
    problem = packed((17, 0, 64, 1), (33, 5, 0, 70), h=4, hk=2, d=24, dtype=dtype, causal=True)
    with force_cpu_isa(isa):
        judge(problem, "cpu")


@pytest.mark.parametrize("kind", ["offset", "tiny", "huge", "outliers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_kinds(isa: str, kind: str, dtype: torch.dtype) -> None:
    with force_cpu_isa(isa):
        judge(padded(b=1, h=2, sq=70, sk=90, d=64, dtype=dtype, kind=kind), "cpu")


def test_portable_is_always_there_and_the_best_is_the_default() -> None:
    assert ISAS[0] == "portable"
    assert cpu_isa() == ISAS[-1]


def test_forcing_ends_with_the_block_even_after_an_error() -> None:
    before = cpu_isa()

    def fail_inside() -> None:
        with force_cpu_isa("portable"):
            assert cpu_isa() == "portable"
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert cpu_isa() == before


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'sse9'.*portable"), force_cpu_isa("sse9"):
        pass


def test_forced_path_is_the_one_that_runs() -> None:
    """Portable code must be slower than the best by far, or the switch does nothing."""
    code = """
import time, torch, fastattn
from fastattn.backends import cpu_isas, force_cpu_isa
torch.set_num_threads(1)
q = torch.randn(1, 1, 768, 64)
def best(isa):
    with force_cpu_isa(isa):
        times = []
        for _ in range(5):
            start = time.process_time()
            fastattn.attention(q, q, q, backend="cpu")
            times.append(time.process_time() - start)
    return min(times)
isas = cpu_isas()
print(best(isas[0]) / best(isas[-1]) if len(isas) > 1 else 9.0)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(out.stdout) > 1.5
