"""``fastattn demo``: swap a real BERT, compare it with the stock model, and time both.

Stock is the model as transformers loads it (F.scaled_dot_product_attention); fused is a copy after
``fastattn.swap``. Both live in this process and take turns; see fastattn/measure.py for the clock
and the memory meter. Losses are printed as plainly as wins.
"""

import copy
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import fastattn
from fastattn import measure
from fastattn.cli import demo_report
from fastattn.cli._mistakes import Mistake
from fastattn.cli.demo_model import (
    Batch,
    Text,
    contrastive_loss,
    embed,
    freeze,
    load,
)
from fastattn.cli.doctor import examine_cpu, make_console
from fastattn.swap import swap

# Least cosine between a sentence's embeddings, stock and fused, below which the demo fails.
MIN_COSINE = {"fp32": 0.999999, "bf16": 0.999}
MAX_ERROR = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class Plan:
    """What is run. A full run takes about three minutes on two cores, a quick one some seconds."""

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    tokens: int  # larger batches are left out: seconds a call, and no other ratio than the next
    training: tuple[tuple[int, int], ...]  # (S, B), of training steps and of fine-tuning
    parity_sentences: int
    rounds: int
    min_rounds: int
    seconds: float  # a case is cut off after this, once min_rounds are done


FULL = Plan((16, 128, 512), (1, 8, 32), 4096, ((128, 8), (512, 4)), 200, 25, 3, 1.2)
QUICK = Plan((16, 128), (1, 4), 512, ((64, 4),), 32, 7, 2, 0.2)

KINDS = ("attention", "feed-forward", "residual + norm", "embedding", "norm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    kind: str  # "forward" | "training step" | "fine-tuning"
    S: int
    B: int
    dtype: str
    padded: bool


class Models:
    """Stock and fused in each dtype; training starts from fresh copies."""

    def __init__(self) -> None:
        self.stock32, tokenizer = load()
        self.text = Text(tokenizer)
        fused = copy.deepcopy(self.stock32)
        self.report = swap(fused)
        if not self.report.replaced:
            raise Mistake(f"the swap replaced nothing:\n{self.report}")
        self.pairs: dict[str, tuple[nn.Module, nn.Module]] = {"fp32": (self.stock32, fused)}
        self.pairs["bf16"] = tuple(  # type: ignore[assignment]
            copy.deepcopy(m).to(torch.bfloat16) for m in self.pairs["fp32"]
        )

    def calls(self, case: Case) -> dict[str, Callable[[], object]]:
        """The two contestants of a case, on the same batch."""
        build = self.text.padded if case.padded else self.text.full
        batch = build(case.B, case.S)
        if case.kind == "forward":
            stock, fused = self.pairs[case.dtype]
            return {"stock": _forward(stock, batch), "fused": _forward(fused, batch)}
        copies = [copy.deepcopy(m) for m in self.pairs["fp32"]]
        if case.kind == "fine-tuning":
            for model in copies:
                freeze(model)
        return dict(
            zip(("stock", "fused"), (_step(m, batch, case.dtype) for m in copies), strict=True)
        )


def _forward(model: nn.Module, batch: Batch) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return embed(model, batch)

    return call


def _autocast(dtype: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()


def _step(model: nn.Module, batch: Batch, dtype: str) -> Callable[[], object]:
    """One training step, dropout on: loss, backward, AdamW. bf16 = autocast over fp32 weights."""
    model.train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-5)

    def call() -> object:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(dtype):
            loss = contrastive_loss(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    return call


def cases(plan: Plan) -> Iterator[Case]:
    for dtype in DTYPES:
        for padded in (False, True):
            for S in plan.lengths:
                for B in plan.batches:
                    # A batch of one has nothing to pad.
                    if (B > 1 or not padded) and plan.tokens >= B * S:
                        yield Case("forward", S, B, dtype, padded)
    for kind in ("training step", "fine-tuning"):
        for dtype in DTYPES:
            for S, B in plan.training:
                yield Case(kind, S, B, dtype, True)


def parity(models: Models, plan: Plan) -> dict[str, Any]:
    """Embeddings of real sentences, padded as they come, and of texts up to the model's 512."""
    limit = max(plan.lengths)
    count = plan.parity_sentences
    batches = [models.text.natural(slice(i, min(i + 32, count)), 512) for i in range(0, count, 32)]
    batches += [models.text.padded(4, limit), models.text.full(2, limit)]

    def embeddings(model: nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([embed(model, batch) for batch in batches])

    truth = embeddings(models.stock32)
    result: dict[str, Any] = {"sentences": count, "texts": len(truth)}
    for dtype, (stock, fused) in models.pairs.items():
        a, b = embeddings(stock), embeddings(fused)
        error = float((a - b).abs().max())
        cosine = float(torch.nn.functional.cosine_similarity(a.double(), b.double()).min())
        result[dtype] = {
            "max_abs_error": error,
            "min_cosine": cosine,
            "stock_error_to_fp32": float((a - truth).abs().max()),
            "fused_error_to_fp32": float((b - truth).abs().max()),
            "holds": cosine >= MIN_COSINE[dtype] and error <= MAX_ERROR[dtype],
        }
    result["gradient"] = _gradient_parity(models)
    return result


def _gradient_parity(models: Models) -> dict[str, Any]:
    """All parameters' gradients of one loss, dropout off, fp32: distance over norm."""
    batch = models.text.padded(8, 64)
    grads = []
    for model in models.pairs["fp32"]:
        contrastive_loss(model, batch).backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
        model.zero_grad(set_to_none=True)
    stock, fused = (g.double() for g in grads)
    error = float((stock - fused).norm() / stock.norm())
    return {"relative_error": error, "holds": error < 1e-4}


def _time(models: Models, case: Case, plan: Plan) -> dict[str, Any]:
    samples = measure.interleave(
        models.calls(case),
        rounds=plan.rounds,
        warmup=1,
        max_seconds=plan.seconds,
        min_rounds=plan.min_rounds,
    )
    return {
        **asdict(case),
        "stock_s": asdict(measure.spread(samples["stock"])),
        "fused_s": asdict(measure.spread(samples["fused"])),
        "speedup": asdict(measure.ratios(samples["stock"], samples["fused"])),
        "load": measure.load_average(),
    }


def _peaks(models: Models, case: Case) -> dict[str, int | None]:
    calls = models.calls(case)
    warmup = 0 if case.kind == "forward" else 1  # the optimizer's state is not a step's
    return {
        f"{name}_peak_bytes": measure.peak_extra_bytes(call, warmup=warmup)
        for name, call in calls.items()
    }


def run(out: Path, *, quick: bool, threads: int | None, quiet: bool) -> dict[str, Any]:
    """Run the demo, print it, write demo.json and demo.png under `out`, return the JSON."""
    begin = time.perf_counter()
    plan = QUICK if quick else FULL
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    console = make_console(quiet=quiet)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True, quiet=quiet),
        transient=True,
    )
    todo = list(cases(plan))
    with progress:
        bar = progress.add_task("loading all-MiniLM-L6-v2", total=2 * len(todo) + 2)
        models = Models()
        progress.update(bar, advance=1, description="parity")
        agreement = parity(models, plan)
        rows = []
        for case in todo:
            progress.update(bar, advance=1, description=f"timing {_label(case)}")
            rows.append(_time(models, case, plan))
        measure.settle_heap()
        for case, row in zip(todo, rows, strict=True):
            progress.update(bar, advance=1, description=f"memory {_label(case)}")
            row.update(_peaks(models, case))
        progress.update(bar, completed=2 * len(todo) + 2)
    result = {
        "environment": _environment(quick),
        "swap": str(models.report).splitlines(),
        "swapped": {kind: models.report.count(kind) for kind in KINDS},
        "parity": agreement,
        "parity_holds": all(agreement[key]["holds"] for key in (*DTYPES, "gradient")),
        "rows": rows,
        "memory_method": measure.peak_method(),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    result["verdict"] = demo_report.verdict(result)
    demo_report.render(result, console)
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    demo_report.plot(result, out / "demo.png")
    console.print(f"Wrote {out / 'demo.json'} and {out / 'demo.png'}.")
    return result


def _label(case: Case) -> str:
    return f"{case.dtype} {case.kind}, {case.S} tokens x {case.B}"


def _environment(quick: bool) -> dict[str, Any]:
    import transformers

    cpu = examine_cpu()
    return {
        "fastattn": fastattn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": cpu["model"],
        "isa": cpu["active"],
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "quick": quick,
    }
