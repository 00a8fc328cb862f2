"""Rung (e): every planted bug is caught by the check that is named for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rungs.mutants import COLUMNS, ROOT, TABLE, mutate
from rungs.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_has_its_place(mutation: Mutation) -> None:
    text = (ROOT / "kernels" / mutation.file).read_text()
    assert mutate(text, mutation) != text


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 15


def test_the_table_lists_every_mutation() -> None:
    """`make mutations` writes it; a row and its check must be of today."""
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(c[0], c[1], c[-1].strip("`")) for c in cells] == [
        (m.name, m.breaks, m.by) for m in MUTATIONS
    ]
    for c in cells:
        assert any(c[2 + i] not in ("–", "crash", "error") for i in range(len(COLUMNS))), c


def rungs(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "rungs", "mutants", *args],
        capture_output=True, text=True, cwd=ROOT, env=env, check=False,
    )  # fmt: skip


def sample() -> list[str]:
    """What `make verify` plants: the first bug of each file and kind of check, and every fourth."""
    first: dict[tuple[str, str], str] = {}
    for m in MUTATIONS:
        first.setdefault((m.file, m.by.partition(":")[0]), m.name)
    return sorted({*first.values(), *(m.name for m in MUTATIONS[::4])})


def test_a_sample_is_caught() -> None:
    caught(*sample())


@pytest.mark.full
def test_every_mutation_is_caught() -> None:
    caught()


def caught(*names: str) -> None:
    done = rungs(*(f"--name={n}" for n in names))
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
