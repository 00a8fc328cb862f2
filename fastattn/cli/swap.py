"""``fastattn swap``: the report on a model of the user's, and what the swap gains on an example."""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import fastattn
from fastattn import measure
from fastattn.cli._mistakes import Mistake
from fastattn.cli.devices import chosen_device, synchronized
from fastattn.cli.doctor import make_console
from fastattn.cli.swap_model import (
    DTYPES,
    Inputs,
    load_inputs,
    load_model,
    token_inputs,
    users_code,
)

# The most that outputs may differ by, as the norm of the difference over the norm: roundings of
# some dozens of layers, not of one.
MOST = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2, torch.float64: 1e-10}


def run(
    spec: str,
    *,
    timed: bool,
    inputs: str | None,
    batch: int | None,
    tokens: int | None,
    dtype: str | None,
    device: str | None,
    only: list[str] | None,
    skip: list[str] | None,
    backend: str,
    threads: int | None,
) -> dict[str, Any]:
    """Swap the model that `spec` names; with `timed`, run it before and after."""
    of_time = {"--inputs": inputs, "--batch": batch, "--tokens": tokens, "--dtype": dtype,
               "--device": device, "--threads": threads}  # fmt: skip
    for name, value in of_time.items():
        if value is not None and not timed:
            raise Mistake(f"{name} goes with --time")
    if inputs is not None and (batch, tokens) != (None, None):
        raise Mistake("--batch and --tokens are for a model without --inputs")
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(spec, weights=timed)
    how = {"only": only or None, "skip": skip or None, "backend": backend}
    if not timed:
        report = _swapped(model, how)
        return _plain(report) | {"ok": bool(report or report.fused_before), "time": None}
    where = chosen_device(device)
    model = model.eval().to(where, DTYPES[dtype] if dtype else None)
    fused = copy.deepcopy(model)
    report = _swapped(fused, how)
    given = load_inputs(inputs) if inputs else token_inputs(model, batch or 1, tokens)
    result = _time(model, fused, _moved(given, where, DTYPES[dtype] if dtype else None))
    ok = bool(report or report.fused_before) and result["agrees"]
    return _plain(report) | {"ok": ok, "time": result | {"device": str(where)}}


def _swapped(model: nn.Module, how: dict[str, Any]) -> fastattn.SwapReport:
    with warnings.catch_warnings():  # the report says so too
        warnings.filterwarnings("ignore", "fastattn.swap replaced", UserWarning)
        return fastattn.swap(model, **how)


def _plain(report: fastattn.SwapReport) -> dict[str, Any]:
    return {
        "model": report.model,
        "replaced": [asdict(r) for r in report.replaced],
        "skipped": [asdict(s) for s in report.skipped],
        "notes": report.notes,
        "text": str(report),
    }


def _moved(inputs: Inputs, device: torch.device, dtype: torch.dtype | None) -> Inputs:
    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype if x.is_floating_point() else None)

    args, kwargs = inputs
    return tuple(map(move, args)), {name: move(x) for name, x in kwargs.items()}


def _time(stock: nn.Module, fused: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Outputs compared, then both timed in turns, in inference."""
    args, kwargs = inputs

    def call(model: nn.Module) -> Callable[[], Any]:
        def forward() -> Any:
            with torch.inference_mode():
                return model(*args, **kwargs)

        return synchronized(forward, next(_tensors((args, kwargs)), torch.empty(0)).device)

    with users_code("the model"):
        before = list(_tensors(call(stock)()))
    with users_code("the swapped model"):
        after = list(_tensors(call(fused)()))
    error, most = _distance(before, after)
    with users_code("the model"):
        samples = measure.interleave(
            {"stock": call(stock), "fused": call(fused)}, rounds=25, max_seconds=10.0
        )
    return {
        "inputs": [f"{str(x.dtype)[6:]} {tuple(x.shape)}" for x in _tensors((args, kwargs))],
        "dtype": str(next((p.dtype for p in stock.parameters()), torch.float32))[6:],
        "threads": torch.get_num_threads(),
        "relative_error": error,
        "allowed_error": most,
        "agrees": error <= most,
        "stock_s": asdict(measure.spread(samples["stock"])),
        "fused_s": asdict(measure.spread(samples["fused"])),
        "speedup": asdict(measure.ratios(samples["stock"], samples["fused"])),
    }


def _tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor in what a model takes or returns."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):  # ModelOutput of transformers too
        for value in x.values():
            yield from _tensors(value)
    elif isinstance(x, (list, tuple)):
        for value in x:
            yield from _tensors(value)


def _distance(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """The largest relative error of an output, and what its dtype allows."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.is_floating_point()]
    if not pairs:
        raise Mistake("the model returns no floating point tensor to compare")
    errors = []
    for a, b in pairs:
        if a.shape != b.shape:
            raise Mistake(f"the outputs differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
        error = (a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30)
        errors.append(float(error.nan_to_num(nan=float("inf"))))
    return max(errors), max(MOST[a.dtype] for a, _ in pairs)


def render(result: dict[str, Any]) -> None:
    """The report as `print(report)` shows it, then the figures."""
    print(result["text"])
    time = result["time"]
    if time is None:
        return
    console = make_console()
    table = Table(title=f"One call in inference: {', '.join(time['inputs'])}", title_justify="left")
    for name in ("dtype", "device", "threads", "stock ms", "fused ms", "speedup \\[quartiles]"):
        table.add_column(name)
    table.add_column("relative error")
    stock, fused = (time[f"{name}_s"]["median"] * 1e3 for name in ("stock", "fused"))
    s = time["speedup"]
    mark = "" if time["agrees"] else f" [red]OFF[/], {time['allowed_error']:.0e} allowed"
    table.add_row(
        time["dtype"], time["device"], str(time["threads"]), f"{stock:.2f}", f"{fused:.2f}",
        f"{s['median']:.2f} \\[{s['q1']:.2f}, {s['q3']:.2f}]",
        f"{time['relative_error']:.1e}{mark}",
    )  # fmt: skip
    console.print(table)
