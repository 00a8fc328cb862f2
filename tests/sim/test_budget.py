"""The compiled CUDA kernels against their budget."""

import pytest

from sim import budget


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=[] if arch in budget.SAMPLE else [pytest.mark.full])
        for arch in budget.ARCHS
    ],
)
def test_within_budget(arch: str) -> None:
    assert budget.verdicts(arch) == []


def test_every_architecture_has_the_same_variants() -> None:
    found = budget.budgets()
    assert set(found) == set(budget.ARCHS)
    assert len({frozenset(lines) for lines in found.values()}) == 1


def test_rules_hold_without_a_budget() -> None:
    good = budget.Figures(255, 0, 8, 65536, 2, 8)
    assert budget.rules("sm_80", "attention_fwd_kernel bf16 d128 plain", good) == []
    for changed, word in (
        ({"spills": 1}, "spill"),
        ({"shared": 164 << 10}, "shared"),
        ({"mma": 0}, "tensor-core"),
        ({"blocks": 1, "warps": 4}, "warps an SM"),
    ):
        now = budget.Figures(**{**good.__dict__, **changed})
        (wrong,) = budget.rules("sm_80", "attention_fwd_kernel bf16 d128 plain", now)
        assert word in wrong
        assert now.worse_than(good) or changed == {"mma": 0} or "warps" in changed


def test_occupancy() -> None:
    """Figures of CUDA's occupancy calculator."""
    assert budget._blocks("sm_80", 255, 128, 65536) == 2
    assert budget._blocks("sm_80", 168, 128, 0) == 3
    assert budget._blocks("sm_80", 32, 1024, 0) == 2
    assert budget._blocks("sm_120", 64, 128, 49152) == 2
    assert budget._blocks("sm_80", 64, 128, 164 << 10) == 0
