"""`python -m bench.model`: what the GPU kernels would reach, from their code. See `make model`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.model import (
    archs,
    decode_list,
    decode_report,
    kernels,
    predict,
    published,
    recurrent,
    recurrent_report,
    report,
)
from bench.model.torch_flash import NoTorchKernelsError

ROOT = Path(__file__).resolve().parents[2]
BUILT = (ROOT / "build" / "model" / "cuda", ROOT / "build" / "model" / "triton")


def main(
    arch: Annotated[list[str] | None, typer.Option(help="Only these (sm_80 ...).")] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option("--kernels", help="Folders of cubins with a kernels.json (kernels.py)."),
    ] = None,
    only: Annotated[str, typer.Option(help="Only kernels whose name has this.")] = "",
    to: Annotated[Path | None, typer.Option("--json", help="Every row, into this file.")] = None,
    write: Annotated[bool, typer.Option(help="Make bench/model/REPORT.md.")] = False,
    fit: Annotated[bool, typer.Option(help="Only fit the model's one number again.")] = False,
) -> None:
    """Cycles by pipe, occupancy, bytes and share of peak of each kernel; every figure is model."""
    console = Console(width=230)
    if fit:
        console.print(f"predict.EXPOSED = {predict.EXPOSED:g}; fitted now: {published.fit():.3f}")
        return
    chosen = arch or list(archs.ARCHS)
    if unknown := set(chosen) - archs.ARCHS.keys():
        raise typer.BadParameter(f"no such architecture: {', '.join(sorted(unknown))}")
    listed = [item for path in folder or BUILT for item in kernels.load(path)]
    rows = report.predictions(listed, chosen)
    points: list[report.Row] | str
    try:
        rows += report.flash_predictions(chosen)
        points = report.validation()
    except NoTorchKernelsError as error:
        points = f"{error}. Install a CUDA build of torch to run it."
    rows = [row for row in rows if only in row["kernel"]]
    for name in chosen:
        if mine := [row for row in rows if row["arch"] == name]:
            _show(console, f"{name} {archs.ARCHS[name].product}: model", report.kernel_table(mine))
    if isinstance(points, str):
        console.print(f"Not validated: {points}")
    else:
        _show(console, "TFLOP/s, published / model", report.validation_table(points))
        _show(console, "errors of the model", report.summary_table(points))
    if to is None and not write:
        return
    folders = dict(zip(decode_report.BACKENDS, BUILT, strict=True))
    decoding = decode_report.cases({name: decode_list.load(at) for name, at in folders.items()})
    if to is not None:
        every = {"kernels": rows, "validation": points, "decoding": decode_report.rows(decoding)}
        to.write_text(json.dumps(every, indent=1) + "\n")
    if write:
        more = decode_report.section(decoding, report.markdown)
        more += recurrent_report.section(recurrent.load(BUILT[0]), report.markdown)
        report.write(Path(__file__).with_name("REPORT.md"), rows, points, more)
        console.print("wrote bench/model/REPORT.md")


def _show(console: Console, title: str, table: report.Table) -> None:
    head, body = table
    out = Table(*head, title=title, title_justify="left")
    for cells in body:
        out.add_row(*cells)
    console.print(out)


if __name__ == "__main__":
    typer.run(main)
