"""The fuzzer itself, and a small sample of its cases: `make fuzz` has more, and new ones."""

import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import __main__ as driver
from fuzz import worker
from fuzz.families import FAMILIES

import fastattn

SEED = 11


def run(family: str, examples: int, **more: Any) -> list[worker.Outcome]:
    """Starts and outcomes."""
    seen: list[worker.Outcome] = []
    worker.run(family, SEED, examples, seen.append, **more)
    return seen


def ends(outcomes: list[worker.Outcome]) -> list[worker.Outcome]:
    return [o for o in outcomes if o.of != "start"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sample(family: str) -> None:
    found = ends(run(family, 12))
    assert len(found) == 12
    assert [f"{o.name}: {o.why}" for o in found if o.of == "mismatch"] == []


def test_a_case_again() -> None:
    """The same seed gives the same cases, run or not."""
    first, second = run("bias_act", 10), run("bias_act", 10)
    assert first == second
    assert run("bias_act", 10, only=6) == [o for o in first if o.index == 6]


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
def test_wrong_values_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastattn.bias_act
    monkeypatch.setattr(fastattn, "bias_act", lambda *a, **k: right(*a, **k) * 1.01)
    found = ends(run("bias_act", 12))
    wrong = [o for o in found if o.kind == "valid" and o.of == "mismatch"]
    assert len(wrong) > len([o for o in found if o.kind == "valid"]) / 2
    assert "of the error" in wrong[0].why


def test_a_wrong_call_that_is_accepted_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def polite(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())

    monkeypatch.setattr(fastattn, "bias_act", polite)
    invalid = [o for o in ends(run("bias_act", 24)) if o.kind == "invalid"]
    assert invalid
    assert all(o.of == "mismatch" and "was accepted" in o.why for o in invalid)


def test_a_refusal_that_does_not_name_the_argument_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def rude(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(fastattn, "bias_act", rude)
    found = ends(run("bias_act", 24))
    assert {o.of for o in found} == {"mismatch"}
    assert all("does not name it" in o.why for o in found if o.kind == "invalid")


def test_a_crash_is_recorded_with_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies in a case: the driver says in which, and goes on behind it."""
    seeds = tmp_path / "seeds"
    stand_in = tmp_path / "python"
    case = '{"family": "norms", "seed": 5, "index": %d, "kind": "raw", "of": "%s", "why": ""}'
    done, begun = case % (0, "accepted"), case % (1, "start")
    stand_in.write_text(
        f"#!/bin/sh\necho \"$6\" >> {seeds}\necho '{case % (0, 'start')}' >> $4\n"
        f"echo '{done}' >> $4\necho '{begun}' >> $4\n"
        f"echo 'ERROR: AddressSanitizer: heap-buffer-overflow' >&2\nkill -ABRT $$\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    tally = driver.fuzz(["norms"], 5, 0.02)
    assert len(seeds.read_text().split()) == len(set(seeds.read_text().split())) > 1
    counts = tally.counts["norms"]
    assert counts["crashes"] == len(tally.bad) >= 2
    assert counts["calls"] == 2 * counts["accepted"] == 2 * counts["crashes"]
    assert tally.bad[0][0] == "norms:5:1"
    assert f"exit code {-signal.SIGABRT}" in tally.bad[0][1]
    assert "heap-buffer-overflow" in tally.bad[0][1]


def test_every_family_has_its_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = {"slow": 0.05, "quick": 0.005, "last": 0.005}
    calls: list[tuple[str, int]] = []

    def cases_of(family: str, seed: int, *_: Any, **__: Any) -> None:
        calls.append((family, seed))
        time.sleep(spent[family])

    monkeypatch.setattr(worker, "run", cases_of)
    monkeypatch.setattr(driver.resource, "setrlimit", lambda *_: None)  # of this process
    driver.work(tmp_path / "journal", list(spent), 7, time.time() + 0.4)
    assert [f for f, _ in calls[:3]] == list(spent)
    had = {f: spent[f] * sum(family == f for family, _ in calls) for f in spent}
    assert max(had.values()) < min(had.values()) + 0.15
    assert len(set(calls)) == len(calls)  # no seed twice


def test_behind_a_crash_begins_who_had_least() -> None:
    tally = driver.Tally()
    for family in ("norms", "norms", "bias_act"):
        tally.counts.setdefault(family, Counter())["calls"] += 1
    order = driver._least_first(["norms", "bias_act", "embedding"], tally)
    assert order == ["embedding", "bias_act", "norms"]


def test_a_silent_worker_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\nexec sleep 60\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(driver, "_SILENCE", 0.5)
    tally = driver.fuzz(["norms"], 5, 0.005)
    assert tally.counts["norms"]["crashes"] == 1
    assert "no word in" in tally.bad[0][1]


def test_time_in_which_the_driver_was_stopped_is_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\nexec sleep 60\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    asleep = driver.Worker(["norms"], 5, 0.0)
    asleep.looked -= 1000.0
    asleep.read(driver.Tally())
    assert asleep.died() is None
    asleep.silent = driver._SILENCE
    assert "no word" in str(asleep.died())


def test_a_family_ends_up_in_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "FIGURES", tmp_path / "FIGURES.md")
    tally = driver.Tally()
    for of in ("start", "rejected", "start", "mismatch"):
        tally.add(
            {"family": "norms", "seed": 1, "index": 0, "kind": "invalid", "of": of, "why": "?"}
        )
    driver.write(tally, "plain", 1, 2.0)
    driver.write(tally, "address", 3, 4.0)
    text = (tmp_path / "FIGURES.md").read_text()
    assert text.count("## ") == 2
    assert "| norms | 2 | 0 | 2 | 0 | 0 | 1 | 1 | 0 |" in text
    driver.write(driver.Tally(), "plain", 9, 9.0)
    assert "9 minutes, seed 9." in (tmp_path / "FIGURES.md").read_text()
    assert (tmp_path / "FIGURES.md").stat().st_size < len(text)
