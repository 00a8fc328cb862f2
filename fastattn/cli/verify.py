"""``fastattn verify``: each op on each backend of this machine against the reference in fp64.

The cases are `verify_cases.CASES`; forward and the gradient of every floating point input. Wrong is
an error, by norm, of more than four times that of plain PyTorch (the reference in the same dtype)
and one rounding of that dtype, which a sum of few elements may be off by where plain PyTorch is
lucky.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.backends import PerformanceWarning, can_serve, cpu_isas, force_cpu_isa
from fastattn.cli._mistakes import Mistake
from fastattn.cli.doctor import make_console
from fastattn.cli.verify_cases import CASES, Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPS = tuple(dict.fromkeys(case.op for case in CASES))
# The table of backends knows a cell by its layer.
_LAYER = {f"{name}_cell": name for name in ("lstm", "gru", "rnn")}


def run(*, only: list[str] | None, backends: list[str] | None) -> dict[str, Any]:
    """Check every case on every backend asked for, or on every usable one."""
    unknown = sorted(set(only or ()) - set(OPS))
    if unknown:
        raise Mistake(f"--only {unknown[0]}: no such op; there are {', '.join(OPS)}")
    start = time.perf_counter()
    targets, left_out = _targets(backends)
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if only and case.op not in only:
            continue
        for dtype in DTYPES:
            rows += _check(case, dtype, targets)
    wrong = [row for row in rows if row["verdict"] == "wrong"]
    return {
        "ok": bool(rows) and not wrong and any(row["verdict"] == "right" for row in rows),
        "rows": rows,
        "not_run": left_out,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _targets(asked: list[str] | None) -> tuple[list[tuple[str, str]], list[dict[str, str]]]:
    """(backend, instruction set or ""), and the backends that cannot run here, with the reason."""
    targets, left_out = [], []
    for backend in fastattn.backends():
        if backend.name == "reference" or (asked and backend.name not in asked):
            continue
        if not backend.usable:
            if asked:
                raise Mistake(f"--backend {backend.name} cannot run here: {backend.why}")
            left_out.append({"backend": backend.name, "why": backend.why})
        elif backend.name == "cpu":
            targets += [("cpu", isa) for isa in cpu_isas()]
        else:
            targets.append((backend.name, ""))
    if not targets:
        raise Mistake("no backend with kernels is usable here: see `fastattn doctor`")
    return targets, left_out


def _check(case: Case, dtype: str, targets: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """A row for each target; the reference is computed once."""
    on_cpu = case.inputs(torch.device("cpu"), DTYPES[dtype])
    truth = getattr(reference, case.op)
    right = _results(case, truth, {n: x.double() for n, x in on_cpu.items()}, {})
    plain = _results(case, truth, on_cpu, {})
    for backend, isa in targets:
        row = {"op": case.op, "case": case.what, "dtype": dtype, "backend": backend, "isa": isa}
        device = "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"
        table = _LAYER.get(case.op, case.op)
        if not can_serve(table, backend, device, DTYPES[dtype], case.head_dim):
            yield row | {"verdict": "no kernel", "detail": "", "error": None, "milliseconds": None}
            continue
        inputs = {n: x.to(device) for n, x in on_cpu.items()}
        begin = time.perf_counter()
        error: float | None
        try:
            with force_cpu_isa(isa) if isa else contextlib.nullcontext():
                found = _results(case, getattr(fastattn, case.op), inputs, {"backend": backend})
            detail, error = _judge(found, right, plain, torch.finfo(DTYPES[dtype]).eps)
        except (RuntimeError, ValueError) as problem:  # such as a kernel that was found wrong here
            detail, error = f"{type(problem).__name__}: {problem}".splitlines()[0], None
        took = round((time.perf_counter() - begin) * 1e3, 1)
        verdict = "wrong" if detail else "right"
        yield row | {"verdict": verdict, "detail": detail, "error": error, "milliseconds": took}


def _results(
    case: Case, op: Callable[..., Any], inputs: dict[str, Tensor], backend: dict[str, Any]
) -> dict[str, Tensor]:
    """Outputs, and the gradient of each input for fixed upstream gradients."""
    if not case.gradients:
        with torch.no_grad():
            return {n: x.cpu() for n, x in case.call(op, inputs, backend).items()}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)
        outputs = case.call(op, leaves, backend)
    gen = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=gen).to(x) for x in outputs.values()]
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), upstream, materialize_grads=True
    )
    named = {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {n: x.detach().cpu() for n, x in (outputs | named).items()}


def _judge(
    found: dict[str, Tensor], right: dict[str, Tensor], plain: dict[str, Tensor], rounding: float
) -> tuple[str, float]:
    """What is wrong, or "", and the largest relative error of an output or a gradient."""
    complaints, errors = [], []
    for name, r in right.items():
        finite = r.isfinite()
        if not torch.equal(found[name].isfinite(), finite):
            complaints.append(f"{name} is not finite where it should be, or the reverse")
            continue
        size = float(r[finite].norm()) + 1e-30
        error, low = (float((x[name].double() - r)[finite].norm()) / size for x in (found, plain))
        errors.append(error)
        if error > 4 * low + rounding:
            complaints.append(f"{name} is off by {error:.1e}, {4 * low + rounding:.1e} allowed")
    return "; ".join(complaints), max(errors, default=0.0)


def render(result: dict[str, Any]) -> None:
    """A line an op and backend, every wrong case by itself."""
    console = make_console()
    table = Table(title="Against the reference in fp64, gradients too", title_justify="left")
    for name in ("op", "backend", *DTYPES):
        table.add_column(name)
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in result["rows"]:
        key = (row["op"], row["backend"] + (f" ({row['isa']})" if row["isa"] else ""))
        groups.setdefault(key, {}).setdefault(row["dtype"], []).append(row)
    last = ""
    for (op, backend), dtypes in groups.items():
        if last not in ("", op):
            table.add_section()
        table.add_row("" if op == last else op, backend, *(_cell(dtypes[d]) for d in DTYPES))
        last = op
    console.print(table)
    for row in result["rows"]:
        if row["verdict"] == "wrong":
            where = " ".join(filter(None, (row["op"], row["backend"], row["isa"], row["dtype"])))
            console.print(f"[red]WRONG[/] {where}, {row['case']}: {escape(row['detail'])}")
    for left in result["not_run"]:
        console.print(f"not run: {left['backend']}: {escape(left['why'])}")
    checked = [row for row in result["rows"] if row["verdict"] != "no kernel"]
    bad = sum(row["verdict"] == "wrong" for row in checked)
    console.print(
        f"{len(checked)} checks in {result['seconds']} s: {f'{bad} WRONG' if bad else 'all right'}."
        " Figures: the largest relative error."
    )


def _cell(rows: list[dict[str, Any]]) -> str:
    if any(row["verdict"] == "wrong" for row in rows):
        return "[red]WRONG[/]"
    errors = [row["error"] for row in rows if row["error"] is not None]
    return f"[green]right[/] {max(errors):.0e}" if errors else "[dim]no kernel[/]"
