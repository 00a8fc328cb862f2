"""`python -m fuzz` (with tests/ on the path): see fuzz/__init__.py and `make help`."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

FIGURES = Path(__file__).with_name("FIGURES.md")
_COLUMNS = ("calls", "valid", "invalid", "raw", "accepted", "rejected", "mismatches", "crashes")
_BATCH = 60  # cases a seed
_TURN = 12.0  # seconds that a family may take before the next one
_MEMORY = 12 << 30  # bytes of address space of a worker
_SILENCE = 180.0  # seconds without a word: a hang


@dataclass
class Tally:
    """What came of each family's cases, and the cases to look at."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)  # case, why

    def add(self, line: dict[str, object]) -> None:
        family, of = str(line["family"]), str(line["of"])
        counts = self.counts.setdefault(family, Counter())
        if of == "start":
            counts["calls"] += 1
            counts[str(line["kind"])] += 1
            return
        counts["mismatches" if of == "mismatch" else of] += 1
        if of == "mismatch":
            self.bad.append((_name(line), str(line["why"])))

    def crash(self, line: dict[str, object] | None, family: str, seed: int, why: str) -> None:
        self.counts.setdefault(family, Counter())["crashes"] += 1
        name = f"{family}:{seed}" if line is None else _name(line)
        self.bad.append((name, why))

    def rows(self) -> list[tuple[str, ...]]:
        rows = [(f, *(str(c[n]) for n in _COLUMNS)) for f, c in self.counts.items()]
        total = sum(self.counts.values(), Counter())
        return [*rows, ("all", *(str(total[n]) for n in _COLUMNS))]


def _name(line: dict[str, object]) -> str:
    return f"{line['family']}:{line['seed']}:{line['index']}"


class Worker:
    """One process on one family and seed after the other; its outcomes lie in a file."""

    def __init__(self, families: list[str], seed: int, until: float) -> None:
        self.journal = tempfile.NamedTemporaryFile("r", suffix=".jsonl")  # noqa: SIM115
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.last: dict[str, object] | None = None
        self.silent, self.looked = 0.0, time.monotonic()
        command = [sys.executable, "-m", "fuzz", "--work", self.journal.name, "--seed", str(seed)]
        command += ["--until", str(until)]
        for family in families:
            command += ["--op", family]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.errors)

    def read(self, tally: Tally) -> None:
        # Who was stopped or suspended with the worker did not hear it be silent.
        now = time.monotonic()
        self.silent += min(now - self.looked, 1.0)
        self.looked = now
        while line := _whole_line(self.journal):  # type: ignore[arg-type]
            outcome = json.loads(line)
            self.silent = 0.0
            self.last = outcome if outcome["of"] == "start" else None
            tally.add(outcome)

    def died(self) -> str | None:
        """None while it runs; "" where it ended as it should; else how it died."""
        if self.process.poll() is None:
            if self.silent < _SILENCE:
                return None
            self.process.kill()
            self.process.wait()
            return f"no word in {_SILENCE:.0f} s"
        if self.process.returncode == 0:
            return ""
        self.errors.seek(0)
        return f"exit code {self.process.returncode}\n{_telling(self.errors.read())}"


def _whole_line(file: TextIO) -> str:
    at = file.tell()
    line = file.readline()
    if line.endswith("\n"):
        return line
    file.seek(at)
    return ""


def _telling(text: str) -> str:
    """Where a sanitizer begins to speak, else the end."""
    for word in ("runtime error:", "ERROR: AddressSanitizer"):
        if word in text:
            return text[max(0, text.find(word) - 200) :][:4000]
    return text[-2000:]


def fuzz(families: list[str], seed: int, minutes: float) -> Tally:
    tally, until = Tally(), time.time() + 60 * minutes
    while time.time() < until:
        worker = Worker(_least_first(families, tally), seed, until)
        while (end := worker.died()) is None:
            worker.read(tally)
            time.sleep(0.2)
        worker.read(tally)
        if end:
            where = worker.last or {}
            family = str(where.get("family", families[0]))
            tally.crash(worker.last, family, int(str(where.get("seed", seed))), end)
        seed = _next_seed(tally, seed)
    return tally


def _least_first(families: list[str], tally: Tally) -> list[str]:
    """A worker that follows a crash begins with those that had the fewest cases."""
    return sorted(families, key=lambda f: tally.counts[f]["calls"] if f in tally.counts else 0)


def _next_seed(tally: Tally, seed: int) -> int:
    """Behind every seed that a worker can have come to."""
    return seed + 100_000 * (1 + sum(c["crashes"] for c in tally.counts.values()))


def work(journal: Path, families: list[str], seed: int, until: float) -> None:
    """What a worker does: seed after seed, the family next that has had the least time."""
    from fuzz import worker

    # A hostile size must fail to allocate, not take the machine; ASan reserves terabytes and has a
    # limit of its own (Makefile).
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    left = until - time.time()
    end = time.monotonic() + left
    spent = dict.fromkeys(families, 0.0)
    turns = Counter[str]()
    with journal.open("ab", buffering=0) as out:
        report = worker.into(out.fileno())
        while (start := time.monotonic()) < end:
            family = min(families, key=lambda f: spent[f])
            turn = min(end, start + _TURN)
            worker.run(family, seed + turns[family], _BATCH, report, until=turn)
            turns[family] += 1
            spent[family] += time.monotonic() - start


def replay(case: str) -> bool:
    """One case again, in this process; whether it went well."""
    from fuzz import worker

    family, seed, index = case.rsplit(":", 2)
    seen = []
    worker.run(family, int(seed), _BATCH, seen.append, only=int(index), tell=True)
    for outcome in seen[1:]:
        print(f"{outcome.kind}: {outcome.of}\n{outcome.why}")
    return bool(seen) and seen[-1].of != "mismatch"


def table(tally: Tally) -> Table:
    made = Table("family", *_COLUMNS)
    for row in tally.rows():
        made.add_row(*row)
    return made


def write(tally: Tally, build: str, seed: int, minutes: float) -> None:
    """This build's section of FIGURES.md, the others as they are."""
    head = (
        "# Fuzzing\n\nMade by `make fuzz`, `make fuzz-asan` and `make fuzz-ubsan`; "
        "`tests/fuzz/__init__.py` says what the columns count.\n"
    )
    sections = {}
    if FIGURES.exists():
        for part in FIGURES.read_text().split("\n## ")[1:]:
            sections[part.partition("\n")[0]] = part.partition("\n")[2].strip("\n")
    lines = [f"{minutes:g} minutes, seed {seed}.", "", f"| family | {' | '.join(_COLUMNS)} |"]
    lines += ["| --- |" + " ---: |" * len(_COLUMNS)]
    lines += [f"| {' | '.join(row)} |" for row in tally.rows()]
    sections[build] = "\n".join(lines)
    FIGURES.write_text(head + "".join(f"\n## {n}\n\n{s}\n" for n, s in sorted(sections.items())))


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Where the seeds begin; 0: by the clock.")] = 0,
    op: Annotated[list[str] | None, typer.Option(help="Only these families.")] = None,
    replay_: Annotated[str, typer.Option("--replay", help="FAMILY:SEED:INDEX again.")] = "",
    record: Annotated[str, typer.Option(help="A section of FIGURES.md to write.")] = "",
    work_: Annotated[Path | None, typer.Option("--work", hidden=True)] = None,
    until: Annotated[float, typer.Option(hidden=True)] = 0.0,
) -> None:
    """Random calls of everything; exit code 1 where one went wrong."""
    import fastattn
    from fuzz.families import FAMILIES

    families = op or list(FAMILIES)
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise typer.BadParameter(f"no family {unknown}; there are {list(FAMILIES)}")
    if replay_:
        raise typer.Exit(0 if replay(replay_) else 1)
    seed = seed or int(time.time()) % 10**6 * 1000
    if work_ is not None:
        return work(work_, families, seed, until)
    built = sys.modules.get("fastattn._C")
    assert built is not None, "fastattn._C is not built"
    if record not in ("", "plain"):
        assert f"sanitize-{record}" in built.__file__, f"{built.__file__} is not that build"
    print(f"{built.__file__}, fastattn {fastattn.__version__}, pid {os.getpid()}, seed {seed}")
    tally = fuzz(families, seed, minutes)
    console = Console(width=140)
    console.print(table(tally))
    for case, why in tally.bad:
        console.print(f"[bold]{case}[/bold]: {escape(why)}")
        console.print(f"again, in tests/: python -m fuzz --replay {case}")
    if record:
        write(tally, record, seed, minutes)
    raise typer.Exit(1 if tally.bad else 0)


if __name__ == "__main__":
    typer.run(main)
