"""sentryward on the emulator's toys: proofs where it can decide, its words where it cannot."""

from pathlib import Path

import pytest

from sim.build import ptx_of
from sim.emu import HERE
from sim.sentry import LaunchShape, NotProved, prove_race_free

GEMM = LaunchShape((1, 1, 1), (128, 1, 1), 16384)
REDUCE = LaunchShape((2, 1, 1), (128, 1, 1))
GRID = LaunchShape((2, 1, 1), (64, 1, 1))
ARGUMENTS: dict[str, tuple[str | int, ...]] = {
    "gemm": ("a", "b", "c", 40, 64, 40),  # two steps over K: no stage is used twice
    "gemm of three steps": ("a", "b", "c", 64, 64, 72),
    "reduce": ("x", "out", "reversed", "flag", 200),
    "grid": ("w", "h", "arrived", 100, 3),
}
SHAPES = {"gemm": GEMM, "reduce": REDUCE, "grid": GRID}


def prove(name: str, bug: int) -> None:
    toy = name.split()[0]
    ptx: Path = ptx_of(HERE / "toys" / f"{toy}.cu")
    prove_race_free(ptx, f"BugE{bug}E", SHAPES[toy], ARGUMENTS[name])


@pytest.mark.parametrize("name", [pytest.param("gemm", marks=pytest.mark.full), "reduce"])
def test_correct_kernels_are_proved(name: str) -> None:
    prove(name, 0)


# kNoBarrierBefore, kNoBarrierAfter, kNoSyncWarp, kNoGridBarrier
@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("gemm", 3),
        pytest.param("gemm of three steps", 4, marks=pytest.mark.full),
        ("reduce", 2),
        ("grid", 2),
    ],
)
def test_races_are_not(name: str, bug: int) -> None:
    with pytest.raises(NotProved) as caught:
        prove(name, bug)
    assert caught.value.result == "potential_race", caught.value


# A loop that ends when memory says so is no control that it can decide: grid barriers and spinning.
@pytest.mark.parametrize(("name", "bug"), [("grid", 0), ("reduce", 5)])
def test_what_it_cannot_decide_is_no_proof(name: str, bug: int) -> None:
    with pytest.raises(NotProved, match="control_predicate_not_static") as caught:
        prove(name, bug)
    assert caught.value.result == "unsupported"
