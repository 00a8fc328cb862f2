"""The commands and their options. Each imports what it needs when it runs: help costs no torch."""

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import rich  # noqa: F401  # typer shows help without it, the commands nothing
import typer

from fastattn import __version__, _program
from fastattn.cli._mistakes import Mistake, missing

EXIT_CODES = (
    "Exit codes: 0 = done; 1 = done, and what was checked does not hold; 2 = a mistake in the "
    "arguments, or a package that the command needs is not installed."
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Fused attention, LayerNorm + FFN, LSTM and GRU for PyTorch.",
    epilog=EXIT_CODES,
)


class Backend(str, Enum):
    auto = "auto"
    cpu = "cpu"
    triton = "triton"
    cuda = "cuda"
    reference = "reference"


class Kernels(str, Enum):
    cpu = "cpu"
    triton = "triton"
    cuda = "cuda"


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]
_MOST_THREADS = 4096
Threads = Annotated[
    int | None, typer.Option(min=1, max=_MOST_THREADS, help="CPU threads; default: torch's.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda where torch sees a GPU.")
]


@contextlib.contextmanager
def _command(name: str) -> Iterator[Any]:
    """The module of a command, and with it torch; a user's mistake is a line and exit code 2."""
    try:
        _program.load()
        yield importlib.import_module(f"fastattn.cli.{name}")
    except Mistake as error:
        why = str(error)
    except ModuleNotFoundError as error:
        why = missing(error)
    else:
        return
    print(f"fastattn {name}: {why}", file=sys.stderr)
    raise typer.Exit(2)


def _show(command: Any, result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        command.render(result)


def _version(asked: bool) -> None:
    if asked:
        print(f"fastattn {__version__}")
        raise typer.Exit


@app.callback()
def program(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    pass


@app.command(epilog=EXIT_CODES)
def doctor(as_json: Json = False) -> None:
    """What this machine can use, and why not the rest."""
    with _command("doctor") as command:
        _show(command, command.examine(), as_json)


@app.command(epilog=EXIT_CODES)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path(
        "demo-out"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Few cases, under 20 seconds.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The main job: a real BERT, swapped, compared with the stock model, and timed.

    Fails (1) where the swapped model does not compute what the stock model does.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"fastattn demo: --out {out}: {error.strerror}", file=sys.stderr)
        raise typer.Exit(2) from None
    with _command("demo") as command:
        result = command.run(out, quick=quick, threads=threads, quiet=as_json)
        if as_json:
            print(json.dumps(result, indent=1))
    if not result["parity_holds"]:
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def swap(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder (with config.json), or MODULE:NAME or FILE.py:NAME, where "
            "NAME is an nn.Module or a function without arguments that returns one.",
            show_default=False,
        ),
    ],
    time: Annotated[
        bool, typer.Option("--time", help="Also run it before and after, compare and time.")
    ] = False,
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME",
            help="For --time: what the model is called with, a tensor, a tuple or a dict, or a "
            "function that returns one. A Hugging Face model of token ids needs none.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="For --time: sequences, without --inputs; default: 1.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="For --time: length of each; default: 128, or the most that there may be.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="For --time; default: the model's own.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="For --time: cpu, cuda, cuda:1; default: cuda where torch sees a GPU."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Swap these: globs on names.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave these: globs on names.")] = None,
    backend: Annotated[Backend, typer.Option(help="Backend of every op.")] = Backend.auto,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_THREADS, help="For --time: CPU threads; default: torch's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What fastattn.swap would replace in a model, what not, and why; with --time, what it gains.

    Changes nothing on disk. Without --time a Hugging Face model is built without its weights.
    Fails (1) where nothing would be replaced or the outputs differ.
    """
    with _command("swap") as command:
        result = command.run(
            model, timed=time, inputs=inputs, batch=batch, tokens=tokens,
            dtype=dtype.value if dtype else None, device=device, only=only, skip=skip,
            backend=backend.value, threads=threads,
        )  # fmt: skip
        _show(command, result, as_json)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def bench(
    only: Annotated[list[str] | None, typer.Option(help="Ops to time; default: all.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Default: fp32 and bf16.")] = None,
    device: Device = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.05, max=3600, help="Most for a row.")] = 1.5,
    as_json: Json = False,
) -> None:
    """Each op against torch's on this machine: a table of a minute or two.

    The package is enough for it. The whole suite (every case with its target, memory, a sweep over
    shapes) is part of a checkout: make bench.
    """
    with _command("bench") as command:
        result = command.run(
            only=only, dtypes=[d.value for d in dtype] if dtype else None, device=device,
            threads=threads, seconds=seconds,
        )  # fmt: skip
        _show(command, result, as_json)


@app.command(epilog=EXIT_CODES)
def verify(
    only: Annotated[list[str] | None, typer.Option(help="Ops to check; default: all.")] = None,
    backend: Annotated[
        list[Kernels] | None, typer.Option(help="Backends to check; default: all usable ones.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Each op on each backend of this machine against the reference in fp64, gradients too.

    Small fixed inputs in every dtype, on the CPU with every instruction set it has; some seconds.
    Fails (1) where one is off by more than four times the error of plain PyTorch in that dtype and
    one rounding.
    """
    with _command("verify") as command:
        result = command.run(only=only, backends=[b.value for b in backend] if backend else None)
        _show(command, result, as_json)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def tune(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE",
            help="A Hugging Face folder; MODULE:NAME or FILE.py:NAME of a model or of a function "
            "that returns one, alone or as (model, inputs); or a JSON file, a list of calls such "
            'as {"op": "attention", "B": 8, "H": 12, "S": 128, "D": 64, "dtype": "bf16"}.',
            show_default=False,
        ),
    ],
    inputs: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="The model's inputs, or a function for them."),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="Forward and gradients; default: inference.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MOST_THREADS, help="CPU threads; choices hold for this count alone."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.01, max=3600, help="Most for one class of calls.")
    ] = 1.0,
    dry: Annotated[bool, typer.Option("--dry-run", help="Measure, store nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Which backend is fastest here for a model's calls, torch's own among them; auto takes it.

    A model that is not swapped is swapped first. Choices are stored in FASTATTN_TUNE_CACHE or the
    user's cache folder, for this machine, thread count and versions.
    """
    with _command("tune") as command:
        result = command.run(what, inputs, training, threads, seconds, dry)
        _show(command, result, as_json)
