"""`python -m rungs ...` (with tests/ on the path): budgets, mutants, cubins. See `make help`."""

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[2] / "build" / "triton")
)

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def main() -> None:
    """Rungs of the proof of the Triton kernels."""


@app.command()
def budgets(
    write: Annotated[bool, typer.Option(help="Make budgets.json what they take now.")] = False,
    full: Annotated[bool, typer.Option(help="Every row, or the sample of make verify.")] = True,
    arch: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    new: Annotated[bool, typer.Option(help="Only rows that budgets.json has not.")] = False,
) -> None:
    """What each kernel takes on each architecture, against budgets.json."""
    from rungs import budget
    from rungs.aot import Figures

    rows = budget.sample() + (budget.full() if full else [])
    old, bad = budget.read(), 0
    rows = [row for row in rows if not arch or row.arch in arch]
    rows = [row for row in rows if not new or row.name not in old.get(row.arch, {})]
    found: dict[str, dict[str, Figures]] = {}
    table = Table("arch", "kernel", "registers", "spills", "shared", "mma", "what is wrong")
    for row, now in zip(rows, budget.measure(rows), strict=True):
        if row.name in found.get(row.arch, {}):
            continue
        if not isinstance(now, Figures):
            table.add_row(row.arch, row.name, *"----", str(now))
            bad += 1
            continue
        found.setdefault(row.arch, {})[row.name] = now
        wrong, allowed = budget.rules(row, now), old.get(row.arch, {}).get(row.name)
        if not write:
            wrong += ["new"] if allowed is None else now.worse_than(allowed)
        bad += bool(wrong)
        figures = (now.registers, now.spills, now.shared, now.mma)
        table.add_row(row.arch, row.name, *map(str, figures), "; ".join(wrong))
    Console(width=150).print(table)
    if write:
        if arch or new or not full:  # the other rows stay as they are
            found = {a: {**old.get(a, {}), **found.get(a, {})} for a in {*old, *found}}
        budget.write(found)
        print(f"wrote {budget.FILE.name}: {sum(map(len, found.values()))} rows")
    raise typer.Exit(code=1 if bad else 0)


@app.command()
def mutants(
    name: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    write: Annotated[bool, typer.Option(help="Every rung on all, into MUTATIONS.md.")] = False,
) -> None:
    """Plant each bug of mutations.py and run the check named for it."""
    from rungs import mutants as lab

    chosen = [m for m in lab.MUTATIONS if not name or m.name in name]
    jobs = [(m, lab.panel(m) if write else [m.by]) for m in chosen]
    # The kernels as they are must pass every check: else it is no wonder that mutants fail.
    sound = sorted({check for _, checks in jobs for check in checks})
    found = lab.run([(None, sound), *jobs])
    bad = 0
    out = Table("mutant", "check", "verdict", "what it said")
    for check, outcome in found["none"].items():
        if outcome.kind:
            out.add_row("(no bug)", check, f"[red]{outcome.kind}", outcome.text[:300])
            bad += 1
    for m in chosen:
        for check, outcome in found[m.name].items():
            wrong = outcome.kind == "error" or (check == m.by and not outcome.caught)
            bad += wrong
            verdict = outcome.kind or ("SURVIVES" if check == m.by else "-")
            out.add_row(m.name, check, f"[red]{verdict}" if wrong else verdict, outcome.text[:300])
    Console(width=150).print(out)
    if write and not name:
        lab.TABLE.write_text(lab.table(found))
        print(f"wrote {lab.TABLE.name}")
    raise typer.Exit(code=1 if bad else 0)


@app.command()
def cubins(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    arch: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
) -> None:
    """The compiled kernels and a list of them, for `python -m bench.model`."""
    from rungs import cubins as export

    print(f"{export.write(out, arch or export.EVERY)} kernels in {out}")


if __name__ == "__main__":
    app()
