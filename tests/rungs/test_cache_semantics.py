"""Rung (b) on attention over a KV cache: bounds, races of append and readers, reads, values."""

import pytest
import torch

from rungs import cache_cases
from rungs.mutations import MUTATIONS
from rungs.semantics import semantics

# These run in every `make verify` as it is: test_mutants.py holds the kernels without a bug to
# every check that it names.
NAMED = {m.by.partition(":")[2] for m in MUTATIONS}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.full] if n in NAMED else [])
        for n in (*cache_cases.CASES, *cache_cases.FAR, *cache_cases.WILD)
    ],
)
def test_case(name: str) -> None:
    with semantics() as session:
        cache_cases.check(name)
    assert session.launches


def test_repeatable() -> None:
    call = cache_cases.case_named("cache_decode")
    with semantics() as session:
        first, second = call.run("triton"), call.run("triton")
    assert session.launches == 4  # both are split
    for name, x in first.items():
        assert torch.equal(x.nan_to_num(7), second[name].nan_to_num(7)), name


@pytest.mark.full
@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize("name", cache_cases.CASES)
def test_after_pipelining(name: str, cc: int) -> None:
    with semantics("ttgir", cc):
        cache_cases.check(name)
