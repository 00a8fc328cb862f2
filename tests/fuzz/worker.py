"""The cases of one family and seed, in order, in this process: what each came to, as it comes.

Hypothesis draws; nothing it sees fails, so it neither shrinks nor stops, and the same seed gives
the same cases whatever became of them.
"""

import json
import os
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import hypothesis
from hypothesis import HealthCheck, Phase, settings

from fuzz.case import Case, MismatchError
from fuzz.families import cases

Report = Callable[["Outcome"], None]


@dataclass(frozen=True)
class Outcome:
    """of: start (of a case: if nothing follows, the process died in it), accepted, rejected or
    mismatch."""

    family: str
    seed: int
    index: int
    kind: str
    of: str
    why: str = ""

    @property
    def name(self) -> str:
        return f"{self.family}:{self.seed}:{self.index}"


def run(family: str, seed: int, examples: int, report: Report, *, only: int | None = None,
        until: float = float("inf"), tell: bool = False) -> None:  # fmt: skip
    """only: the index of the one case to run. until: a time.monotonic() not to start a case after.
    tell: print what a case is before it runs."""
    index = -1

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=cases(family))
    def batch(case: Case) -> None:
        nonlocal index
        index += 1
        if time.monotonic() > until or only not in (None, index):
            return
        if tell:
            print(case.about(), flush=True)
        report(Outcome(family, seed, index, case.kind, "start"))
        report(Outcome(family, seed, index, case.kind, *_outcome(case)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch()


def _outcome(case: Case) -> tuple[str, str]:
    try:
        return case.run(), ""
    except MismatchError as wrong:
        return "mismatch", f"{wrong}\n{case.about()}"
    except Exception:  # of the fuzzer itself
        return "mismatch", f"{traceback.format_exc()}\n{case.about()}"


def into(fd: int) -> Report:
    """Lines of JSON, each written at once: they outlive the process."""
    return lambda outcome: _write(fd, outcome)


def _write(fd: int, outcome: Outcome) -> None:
    os.write(fd, (json.dumps(asdict(outcome)) + "\n").encode())
