"""``fastattn tune``: measure the backends for a model's calls, or for those in a file."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.cli._mistakes import Mistake
from fastattn.cli.swap_model import as_inputs, called, load_model, token_inputs, users_code
from fastattn.cli.tune_calls import make


def run(
    what: str, inputs: str | None, training: bool, threads: int | None, seconds: float, dry: bool
) -> dict[str, Any]:
    """Measure and store; the report as plain data."""
    if threads is not None:
        torch.set_num_threads(threads)
    if what.endswith(".json"):
        if inputs is not None:
            raise Mistake("--inputs belong to a model, not to a file of calls")
        model, examples = _calls(Path(what), training)
    else:
        model, examples = _model(what, inputs, training)
    with _bar() as progress:
        try:
            report = fastattn.tune(
                model, examples, training=training, seconds=seconds, store=not dry,
                progress=progress,
            )  # fmt: skip
        except (ValueError, OSError, RuntimeError) as error:  # of memory too
            raise Mistake(_line(error)) from None
    rows = [
        {"class": r.name, "chosen": r.chosen, "usual": r.usual, "gain": r.gain,
         "seconds": r.seconds} for r in report.rows
    ]  # fmt: skip
    return {"path": str(report.path) if report.path else None, "rows": rows}


def _line(error: Exception) -> str:
    """What is wrong, without the frames that torch adds."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error.args[0] if error.args else error).strip().partition("\n")[0]


# By our ops, and by torch: no such device, no memory, a size beyond 64 bits.
_REFUSED = (TypeError, ValueError, RuntimeError, AssertionError, OverflowError)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    hidden = not console.is_terminal  # it would leave an empty line
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("looking for calls", total=None)

        def progress(done: int, of: int, name: str) -> None:
            bar.update(task, completed=done, total=of, description=name[:60])

        yield progress


def render(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("calls", "auto takes", "us a call", "times the usual"):
        table.add_column(name, justify="left" if name in ("calls", "auto takes") else "right")
    for row in result["rows"]:
        changed = row["chosen"] != row["usual"]
        times = ", ".join(f"{b} {s * 1e6:.1f}" for b, s in row["seconds"].items())
        chosen = f"[bold]{row['chosen']}[/]" if changed else row["chosen"]
        table.add_row(row["class"], chosen, times, f"{row['gain']:.2f}" if changed else "")
    console = Console()
    console.print(table)
    console.print(f"stored in {result['path']}" if result["path"] else "nothing stored (--dry-run)")


def _model(what: str, inputs: str | None, training: bool) -> tuple[Any, Any]:
    """A call of the swapped model, and what it is called with."""
    given: Any = None
    if Path(what).is_dir():
        found: Any = load_model(what, weights=True)
    else:
        found = called(what)
    if isinstance(found, tuple) and len(found) == 2:
        found, given = found
    if not isinstance(found, torch.nn.Module):
        raise Mistake(f"{what} is no torch.nn.Module, alone or in front of its inputs")
    if inputs is not None:
        given = called(inputs)
    if given is None:
        given = token_inputs(found, 1, 128)[1]
    for example in given if isinstance(given, list) else [given]:
        as_inputs("what the model is called with" if inputs is None else inputs, example)
    found.train(training)
    fastattn.swap(found)

    def call(*args: Any, **kwargs: Any) -> Any:
        with users_code(what):
            return found(*args, **kwargs)

    return call, given


def _calls(path: Path, training: bool) -> tuple[Any, Any]:
    """A function that makes the calls in a file, one example a call."""
    try:
        calls = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise Mistake(f"{path} is not JSON") from None
    if not isinstance(calls, list) or not calls:
        raise Mistake(f"{path} must hold a list of calls, and is none or empty")
    thunks = []
    for i, call in enumerate(calls):
        try:
            thunks.append(make(call, training))
        except _REFUSED as error:
            raise Mistake(f"{path}, call {i}: {_line(error)}") from None
    return (lambda thunk: thunk()), [(thunk,) for thunk in thunks]
