"""The commands and their options. Each imports what it needs when it runs."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Fused attention for PyTorch.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")]


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can use, and why not the rest."""
    from fastattn.cli import doctor as command

    facts = command.examine()
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        command.render(facts)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path(
        "demo-out"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Few cases, under 20 seconds.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The main job: a real BERT, swapped, compared with the stock model, and timed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"fastattn demo: --out {out}: {error.strerror}", file=sys.stderr)
        raise typer.Exit(2) from None
    from fastattn.cli import demo as command

    try:
        result = command.run(out, quick=quick, threads=threads, quiet=as_json)
    except command.DemoError as error:
        print(f"fastattn demo: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(result, indent=1))
    if not result["parity_holds"]:
        raise typer.Exit(1)
