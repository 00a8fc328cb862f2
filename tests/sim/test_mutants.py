"""Every planted bug is caught by the check named for it, with the verdict that is written down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sim import build
from sim.mutants import MUTATIONS, TABLE, mutate, table
from sim.mutations import Mutation
from sim.mutations_ffn import FFN
from sim.mutations_kv_cache import KV_CACHE
from sim.mutations_recurrent import RECURRENT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_has_its_place(mutation: Mutation) -> None:
    text = (build.CSRC / "cuda" / mutation.file).read_text()
    assert mutate(text, mutation) != text
    assert mutation.sees not in ("", "error", "no answer", "crash")


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 20


def test_the_table_is_of_today() -> None:
    assert TABLE.read_text() == table()


def sample() -> list[str]:
    """What `make verify` plants: of attention one bug of each file, check and verdict; of
    layernorm_ffn, whose checks are the same, one of each file, in one case where there is one; of
    the recurrence, whose kernels are a compiler's minute, one of each verdict of one case; of
    attention over a cache one of the kernel that compiles soonest."""
    first: dict[tuple[str, ...], str] = {}
    for m in sorted(MUTATIONS, key=lambda m: m.by != "ptx:ffn"):
        if m in RECURRENT:
            if m.by.endswith(":rnn_grid") and not m.by.startswith("tsan"):
                first.setdefault(("recurrent", m.sees), m.name)
            continue
        if m in KV_CACHE:
            first.setdefault(("kv_cache",), m.name)
            continue
        kind = () if m in FFN else (m.by.partition(":")[0], m.sees)
        first.setdefault((m.file, *kind), m.name)
    return list(first.values())


def caught(*names: str) -> None:
    """In a process that has loaded no kernels: mutants are forked from it."""
    done = subprocess.run(
        [sys.executable, "-m", "sim", "mutations", *(f"--name={n}" for n in names)],
        capture_output=True, text=True, cwd=build.ROOT,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_a_sample_is_caught() -> None:
    others = [m for m in MUTATIONS if m not in RECURRENT + KV_CACHE]
    assert {m.file for m in others if m.name in sample()} == {m.file for m in others}
    caught(*sample())


@pytest.mark.full
def test_every_mutation_is_caught() -> None:
    caught()
