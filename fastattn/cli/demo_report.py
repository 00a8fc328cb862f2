"""How the demo's figures are shown: tables, one picture, and a verdict that hides nothing."""

import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastattn.measure import not_idle

# Below this distance from 1 a ratio is called a tie: it is what equal calls differ by.
TIE = 0.03

_SHORT = {"training step": "train ", "fine-tuning": "tune "}  # in the picture

STOCK, FUSED = "#9aa5b1", "#0b6e99"


def outcome(row: dict[str, Any]) -> str:
    """win, loss or tie: by the median, and only where the quartiles do not straddle 1."""
    s = row["speedup"]
    if s["median"] > 1 + TIE and s["q1"] > 1:
        return "win"
    if s["median"] < 1 - TIE and s["q3"] < 1:
        return "loss"
    return "tie"


def _batch(row: dict[str, Any]) -> str:
    return "padded" if row["padded"] else "full"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _mib(value: int | None) -> str:
    return "n/a" if value is None else f"{value / 2**20:.1f}"


def _style(row: dict[str, Any]) -> str:
    return {"win": "green", "loss": "red", "tie": "default"}[outcome(row)]


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("dtype")
    for name in ("tokens", "batch"):
        table.add_column(name, justify="right")
    table.add_column("rows")
    for name in ("stock\nms", "fused\nms", "speedup", "quartiles", "stock\nMiB", "fused\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        key = (row["dtype"], row["padded"])
        if last not in (None, key):
            table.add_section()
        last = key
        s = row["speedup"]
        table.add_row(
            row["dtype"],
            str(row["S"]),
            str(row["B"]),
            _batch(row),
            _ms(row["stock_s"]["median"]),
            _ms(row["fused_s"]["median"]),
            f"[{_style(row)}]{s['median']:.2f}x[/]",
            f"{s['q1']:.2f}–{s['q3']:.2f}",
            _mib(row["stock_peak_bytes"]),
            _mib(row["fused_peak_bytes"]),
        )
    return table


def render(result: dict[str, Any], console: Console) -> None:
    """Print everything."""
    env = result["environment"]
    console.print(
        f"[bold]all-MiniLM-L6-v2[/] on {env['cpu']} ({env['threads']} threads, {env['isa']}), "
        f"torch {env['torch']}, transformers {env['transformers']}"
    )
    kinds = ", ".join(f"{n} x {kind}" for kind, n in result["swapped"].items() if n)
    console.print(f"{result['swap'][0]}: {kinds}", markup=False)
    parity = result["parity"]
    table = Table(
        title=f"Parity: embeddings of {parity['sentences']} sentences and of texts to the full "
        "length, fused against stock",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    names = ("dtype", "max abs error", "min cosine", "stock to fp32", "fused to fp32", "holds")
    for name in names:
        table.add_column(name)
    for dtype in ("fp32", "bf16"):
        p = parity[dtype]
        table.add_row(
            dtype,
            f"{p['max_abs_error']:.2e}",
            f"{p['min_cosine']:.9f}",
            f"{p['stock_error_to_fp32']:.2e}",
            f"{p['fused_error_to_fp32']:.2e}",
            "[green]yes[/]" if p["holds"] else "[red]NO[/]",
        )
    console.print(table)
    g = parity["gradient"]
    console.print(
        f"Gradient of all parameters, fp32: relative error {g['relative_error']:.1e} "
        + ("" if g["holds"] else "[red](too large)[/]")
    )
    for kind, title in (
        ("forward", "Embedding a batch"),
        ("training step", "Training step (forward, backward, AdamW; dropout on; bf16 = autocast)"),
        ("fine-tuning", "Fine-tuning: the same with all frozen but the last two of six layers"),
    ):
        console.print(_table(title, [r for r in result["rows"] if r["kind"] == kind]))
    console.print(
        "Medians of interleaved runs; speedup = stock / fused in neighbouring runs with its "
        f"quartiles. MiB: {result['memory_method']}; the result included.",
        style="dim",
    )
    console.print(f"\n[bold]Verdict.[/] {result['verdict']}")


def _mean(rows: list[dict[str, Any]]) -> float:
    """Geometric mean of the speedups."""
    return math.exp(sum(math.log(r["speedup"]["median"]) for r in rows) / len(rows))


def _name(row: dict[str, Any]) -> str:
    kind = {"forward": "", "training step": "training "}.get(row["kind"], f"{row['kind']} ")
    return f"{kind}{row['dtype']} {row['S']} tokens x {row['B']} {_batch(row)}"


def verdict(result: dict[str, Any]) -> str:
    """One paragraph, computed from the rows."""
    rows = result["rows"]
    parts = []
    if result["parity_holds"]:
        parts.append("The swapped model computes what the stock model does, to rounding.")
    else:
        parts.append("THE SWAPPED MODEL DOES NOT AGREE WITH THE STOCK MODEL (see parity).")
    for label, chosen in (
        ("fp32", [r for r in rows if r["kind"] == "forward" and r["dtype"] == "fp32"]),
        ("bf16", [r for r in rows if r["kind"] == "forward" and r["dtype"] == "bf16"]),
        ("training", [r for r in rows if r["kind"] == "training step"]),
        ("fine-tuning", [r for r in rows if r["kind"] == "fine-tuning"]),
    ):
        counts = [sum(outcome(r) == o for r in chosen) for o in ("win", "tie", "loss")]
        parts.append(
            f"{label}: {_mean(chosen):.2f}x on (geometric) average over {len(chosen)} cases, "
            f"{counts[0]} faster, {counts[1]} equal within noise, {counts[2]} slower."
        )
    best = max(rows, key=lambda r: float(r["speedup"]["median"]))
    worst = min(rows, key=lambda r: float(r["speedup"]["median"]))
    parts.append(
        f"Best {best['speedup']['median']:.2f}x ({_name(best)}), "
        f"worst {worst['speedup']['median']:.2f}x ({_name(worst)})."
    )
    measured = [r for r in rows if r["stock_peak_bytes"] and r["fused_peak_bytes"]]
    if measured:
        less = [r for r in measured if r["fused_peak_bytes"] < 0.97 * r["stock_peak_bytes"]]
        more = [r for r in measured if r["fused_peak_bytes"] > 1.03 * r["stock_peak_bytes"]]
        parts.append(
            f"Peak memory: less in {len(less)}, more in {len(more)} of {len(measured)} cases."
        )
    parts.append(
        "The whole model is timed, attention, feed-forward blocks, norms and embeddings swapped: "
        "the matrix products are as many on both sides and bound what fusing can win."
        + not_idle([r["load"] for r in rows], result["environment"]["threads"])
    )
    return " ".join(parts)


def plot(result: dict[str, Any], path: Path) -> None:
    """Latency of stock and fused, and the speedup with its quartiles, one panel row a dtype."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = ("fp32", "bf16")
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained", squeeze=False)
    for column, dtype in enumerate(dtypes):
        rows = [r for r in result["rows"] if r["dtype"] == dtype]
        labels = [
            f"{_SHORT.get(r['kind'], '')}{r['S']}×{r['B']}{' pad' if r['padded'] else ''}"
            for r in rows
        ]
        x = range(len(rows))
        top, bottom = axes[0][column], axes[1][column]
        for key, colour, shift in (("stock", STOCK, -0.2), ("fused", FUSED, 0.2)):
            heights = [r[f"{key}_s"]["median"] * 1e3 for r in rows]
            top.bar([i + shift for i in x], heights, 0.38, color=colour, label=key)
        top.set(yscale="log", title=f"{dtype}: latency, ms (log)")
        top.yaxis.set_major_formatter("{x:g}")
        top.yaxis.set_minor_formatter("{x:g}")
        top.legend(frameon=False)
        median = [r["speedup"]["median"] for r in rows]
        spread = (
            [r["speedup"]["median"] - r["speedup"]["q1"] for r in rows],
            [r["speedup"]["q3"] - r["speedup"]["median"] for r in rows],
        )
        bottom.errorbar(x, median, yerr=spread, fmt="o", color=FUSED, capsize=3)
        bottom.axhline(1, color=STOCK, linewidth=1.5)
        bottom.set(title=f"{dtype}: stock / fused (above 1: fused is faster)", ylim=(0, None))
        for axis in (top, bottom):
            axis.set_xticks(list(x), labels, rotation=60, ha="right", fontsize=8)
            axis.grid(axis="y", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    env = result["environment"]
    figure.suptitle(
        f"all-MiniLM-L6-v2, stock (sdpa) against fastattn {env['fastattn']}: tokens × batch; "
        f"{env['cpu']}, {env['threads']} threads, torch {env['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
