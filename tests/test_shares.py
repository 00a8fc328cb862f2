"""Who does which item: Shares of csrc/cpu/parallel.h."""

import subprocess
from pathlib import Path

import pytest
from mutation_lab import build_check
from mutations import Mutation

MUTATIONS = (
    Mutation("last_item_lost", "parallel.h", "return n_ * share / shares_;",
             "return (n_ - 1) * share / shares_;"),
    Mutation("every_share_from_the_start", "parallel.h", "next_[i].item = begin(i);",
             "next_[i].item = 0;"),
    Mutation("everybody_begins_with_the_first", "parallel.h", "(worker + i) % shares_",
             "i % shares_"),
    Mutation("nobody_helps", "parallel.h", "i < shares_; ++i) { const int share",
             "i < 1; ++i) { const int share"),
)  # fmt: skip


def build(folder: Path, mutation: Mutation | None = None) -> Path:
    return build_check(folder, "shares_check.cpp", "parallel.h", mutation, ("-O1", "-pthread"))


def handed_out(program: Path, n: int, workers: int, threads: bool, slow: bool) -> list[list[int]]:
    """By worker."""
    arguments = [str(int(x)) for x in (n, workers, threads, slow)]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return [[int(item) for item in line.split()] for line in done.stdout.splitlines()]


def wrong(program: Path) -> str:
    """What is not as it should be, or nothing."""
    for n in (0, 1, 2, 7, 64, 1000):
        for workers in (1, 2, 3, 32, 33, 70):
            for threads in (False, True):
                try:
                    had = handed_out(program, n, workers, threads, slow=False)
                except subprocess.CalledProcessError as death:
                    return f"died: {death.returncode}"
                if sorted(x for items in had for x in items) != [*range(n)]:
                    return f"not every one of {n} items once"
                if not threads and had[0] != [*range(n)]:
                    return "the first of workers in a row does not do all"
    first, second = handed_out(program, 10, 2, threads=True, slow=True)
    if second[:5] != [5, 6, 7, 8, 9]:
        return "not its own share first"
    if first[:1] != [0] or len(first) > 4:
        return "the slow one is not helped"
    return ""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shares"))


def test_every_item_once_and_the_own_share_first(program: Path) -> None:
    assert wrong(program) == ""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_planted_bugs_are_found(mutation: Mutation, tmp_path: Path) -> None:
    assert wrong(build(tmp_path, mutation)) != ""
