"""Rung (b) on the kernels of LSTM, GRU and RNN: bounds, races, reads, values."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from recurrence_calls import run

from rungs import recurrent_cases
from rungs.mutations import MUTATIONS
from rungs.semantics import semantics

pytestmark = pytest.mark.sampled(2)

FEW = ("rec_lstm_steps", "rec_gru_sequence")
# These run in every `make verify` as it is: test_mutants.py holds the kernels without a bug to
# every check that it names.
NAMED = {m.by.partition(":")[2] for m in MUTATIONS}


def once(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.full] if n in NAMED else []) for n in names]


@pytest.mark.parametrize("name", once(recurrent_cases.CASES))
def test_case(name: str) -> None:
    with semantics() as session:
        recurrent_cases.check(name)
    assert session.launches


@pytest.mark.parametrize("name", once(recurrent_cases.FAR))
def test_rows_beyond_32_bit_offsets(name: str) -> None:
    with semantics():
        recurrent_cases.check(name)


WILD = {
    "beyond_sequence": ([0, 3, 900], None),
    "before_steps": ([-7, 3, 6], None),
    "falling_sequence": ([5, 2, 5], None),
    "lengths_steps": (None, [2**30, -3, 2]),
}


@pytest.mark.parametrize("name", WILD)
def test_what_nobody_checked_stays_inside(name: str) -> None:
    """On a GPU offsets and lengths are not read before the kernels do."""
    with semantics():
        recurrent_cases.wild(name, *WILD[name])


@pytest.mark.parametrize("name", FEW)
def test_repeatable(name: str) -> None:
    call = recurrent_cases.case_named(name)
    with semantics(), recurrent_cases.tier_of(name):
        first, second = run(call), run(call)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.full
@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize("name", recurrent_cases.CASES)
def test_after_pipelining(name: str, cc: int) -> None:
    with semantics("ttgir", cc):
        recurrent_cases.check(name)
