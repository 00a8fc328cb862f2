"""`python -m sim ...` (with tests/ on the path): budgets, mutations, cubins. See `make help`."""

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def main() -> None:
    """Rungs of the proof of the CUDA kernels."""


@app.command()
def budgets(
    write: Annotated[bool, typer.Option(help="Make budgets.json what they take now.")] = False,
    arch: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
) -> None:
    """What each compiled variant takes on each architecture, against budgets.json."""
    from sim import budget

    found, old, bad = budget.budgets(), budget.budgets(), 0
    table = Table("arch", "variant", "registers", "spills", "mma", "shared", "blocks", "warps", "")
    for name in arch or budget.ARCHS:
        found[name] = budget.measure(name)
        for variant, now in found[name].items():
            wrong, allowed = budget.rules(name, variant, now), old.get(name, {}).get(variant)
            if not write:
                wrong += ["new"] if allowed is None else now.worse_than(allowed)
            bad += bool(wrong)
            figures = (now.registers, now.spills, now.mma, now.shared, now.blocks, now.warps)
            table.add_row(name, variant, *map(str, figures), "; ".join(wrong))
    Console(width=150).print(table)
    if write:
        budget.write(found)
        print(f"wrote {budget.FILE.name}: {sum(map(len, found.values()))} rows")
    raise typer.Exit(code=1 if bad else 0)


@app.command()
def mutations(
    name: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    write: Annotated[bool, typer.Option(help="The table, into MUTATIONS.md.")] = False,
) -> None:
    """Plant each bug of mutations.py and run the check named for it."""
    from sim import mutants as lab

    jobs = [x for x in lab.all_jobs() if not name or x[0] is None or x[0].name in name]
    wanted = {(m.by, m.only) for m, _, _ in jobs if m is not None}
    jobs = [x for x in jobs if x[0] is not None or x[1:] in wanted]
    out, bad = Table("mutant", "check", "verdict", "what it said"), 0
    for (mutation, by, _), outcome in zip(jobs, lab.run(jobs), strict=True):
        wrong = outcome.kind != (mutation.sees if mutation else "")
        bad += wrong
        verdict = outcome.kind or ("SURVIVES" if mutation else "-")
        shown = f"[red]{verdict}" if wrong else verdict
        out.add_row(mutation.name if mutation else "(no bug)", by, shown, outcome.text[:300])
    Console(width=150).print(out)
    if write and not name:
        lab.TABLE.write_text(lab.table())
        print(f"wrote {lab.TABLE.name}")
    raise typer.Exit(code=1 if bad else 0)


@app.command()
def cubins(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    arch: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
) -> None:
    """The compiled kernels and a list of them, for `python -m bench.model`."""
    from sim import cubins as export

    print(f"{export.write(out, arch or export.EVERY)} kernels in {out}")


if __name__ == "__main__":
    app()
