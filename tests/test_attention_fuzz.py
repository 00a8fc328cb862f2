"""Random combinations of everything, forward and backward, against the oracle.

The seed is fixed: the same examples every run. `FASTATTN_FUZZ=n` takes n new ones, and shrinks what
fails; `make fuzz` has every op, wrong calls too.
"""

import os

from fuzz.attention import describe, problems
from hypothesis import HealthCheck, given, settings
from tools import Problem, judge

FUZZ = int(os.environ.get("FASTATTN_FUZZ", "0"))
BOUNDED = settings(
    max_examples=FUZZ or 150,
    derandomize=not FUZZ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@BOUNDED
@given(problem=problems())
def test_any_combination(problem: Problem) -> None:
    try:
        judge(problem, "cpu")
    except AssertionError as error:
        error.add_note(describe(problem))
        raise
