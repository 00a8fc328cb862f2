"""Rung (d) on the attention kernels: every figure within its budget."""

import pytest

from rungs import budget
from rungs.aot import Figures


@pytest.fixture(scope="module")
def sample() -> list[budget.Row]:
    return budget.sample()


def test_the_sample_names_every_architecture(sample: list[budget.Row]) -> None:
    assert {row.arch for row in sample} == set(budget.ARCHS)
    kernels = {row.launch.name for row in sample}
    assert kernels >= {"forward_kernel", "by_keys_kernel", "by_rows_kernel"}


def test_sample_is_within_budget(sample: list[budget.Row]) -> None:
    wrong = budget.verdicts(sample)
    assert not wrong, "\n".join(f"{name}: {'; '.join(why)}" for name, why in wrong.items())


@pytest.mark.full
def test_everything_is_within_budget() -> None:
    wrong = budget.verdicts(budget.full())
    assert not wrong, "\n".join(f"{name}: {'; '.join(why)}" for name, why in wrong.items())


@pytest.mark.full
def test_no_row_is_stale() -> None:
    names = {(row.arch, row.name) for row in [*budget.sample(), *budget.full()]}
    stale = [(a, n) for a, lines in budget.read().items() for n in lines if (a, n) not in names]
    assert stale == []


def test_rules_hold_without_a_budget(sample: list[budget.Row]) -> None:
    row = next(x for x in sample if x.arch == "sm_86" and x.launch.name == "forward_kernel")
    assert budget.rules(row, Figures(255, 0, 99 << 10, 8)) == []
    wrong = budget.rules(row, Figures(255, 3, (99 << 10) + 1, 0))
    assert len(wrong) == 3
