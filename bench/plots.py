"""The plots of bench/RESULTS.md, as SVG with text as text (some 20 KB each)."""

import math
from pathlib import Path
from typing import Any

from bench.registry import SECTIONS

STOCK, FUSED = "#9a9a9a", "#0b6fb8"
COLOURS = {"fp32": "#0b6fb8", "bf16": "#c2571a", "fp16": "#3f8f4f"}
MARKS = {"attention": "o", "layernorm_ffn": "s", "embedding": "D", "recurrent": "^"}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "fastattn", "font.size": 8, "axes.grid": True,
        "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    })  # fmt: skip
    return pyplot


def _grid(plt: Any, series: dict[str, list[dict[str, Any]]], columns: int) -> Any:
    rows = math.ceil(len(series) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.9 * columns, 2.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(series) :]:
        axis.set_visible(False)
    return figure, axes.flat


def _lines(axis: Any, points: list[dict[str, Any]], stock: list[float], fused: list[float]) -> None:
    x = [p["x"] for p in points]
    axis.plot(x, stock, ".-", color=STOCK, label="stock")
    axis.plot(x, fused, ".-", color=FUSED, label="fastattn")
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [str(n) for n in x])
    axis.minorticks_off()


def speed(plt: Any, series: dict[str, list[dict[str, Any]]]) -> Any:
    """GFLOP/s over size."""
    figure, axes = _grid(plt, series, 4)
    for axis, (name, points) in zip(axes, series.items(), strict=False):
        rates = [[p["flops"] / p[k] / 1e9 for p in points] for k in ("stock_s", "fused_s")]
        _lines(axis, points, *rates)
        what, _, rest = name.partition(", over ")
        axis.set_title(f"{what}\n{rest.partition(': ')[2]}")
        axis.set_xlabel(rest.partition(":")[0])
    axes[0].set_ylabel("GFLOP/s")
    axes[0].legend(frameon=False)
    return figure


def memory(plt: Any, series: dict[str, list[dict[str, Any]]]) -> Any:
    """Peak extra memory over size."""
    figure, axes = _grid(plt, series, 4)
    for axis, (name, points) in zip(axes, series.items(), strict=False):
        peaks = [[p[k] / 2**20 for p in points] for k in ("stock_bytes", "fused_bytes")]
        _lines(axis, points, *peaks)
        operands = [p["operand_bytes"] / 2**20 for p in points]
        axis.plot([p["x"] for p in points], operands, ":", color="black", label="q + k + v + o")
        axis.set_title(name.replace(", over S: ", "\n"))
        axis.set_xlabel("S")
    axes[0].set_ylabel("peak extra MiB")
    axes[0].legend(frameon=False)
    return figure


def threads(plt: Any, series: dict[str, list[dict[str, Any]]]) -> Any:
    """How many times faster than stock on one thread."""
    figure, axes = _grid(plt, series, 3)
    for axis, (name, points) in zip(axes, series.items(), strict=False):
        base = points[0]["stock_s"]
        _lines(axis, points, *([base / p[k] for p in points] for k in ("stock_s", "fused_s")))
        axis.set_title(name.replace(", ", "\n", 1))
        axis.set_xlabel("threads")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("times stock on one thread")
    axes[0].legend(frameon=False)
    return figure


def roofline(plt: Any, result: dict[str, Any]) -> Any:
    """Every row with FLOPs and bytes, under the measured ceilings."""
    ceilings = result["curves"]["rows"]["ceilings"]
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    slope, left, right = ceilings["copy"], 0.1, 1e4
    for dtype in ("fp32", "bf16", "fp16"):
        peak = ceilings[f"gemm {dtype}"]
        knee = peak / slope
        axis.plot([left, knee, right], [left * slope / 1e9, peak / 1e9, peak / 1e9],
                  color=COLOURS[dtype], lw=1, label=f"copy, then GEMM {dtype}")  # fmt: skip
    for section in SECTIONS:
        for dtype, colour in COLOURS.items():
            rows = [
                r for r in result.get(section, {"rows": ()})["rows"]
                if r["flops"] and r["bytes"] and r["dtype"] == dtype
            ]  # fmt: skip
            axis.scatter(
                [r["flops"] / r["bytes"] for r in rows],
                [r["flops"] / r["seconds"]["fused"]["median"] / 1e9 for r in rows],
                s=14, marker=MARKS.get(section, "o"), color=colour, alpha=0.7,
                label=f"{section} {dtype}" if rows else None,
            )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=(left, right), xlabel="FLOPs a byte that must move",
             ylabel="GFLOP/s")  # fmt: skip
    axis.legend(frameon=False, fontsize=6, loc="lower right")
    return figure


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write what the result has figures for."""
    if "curves" not in result:
        return []
    plt = _pyplot()
    curves = result["curves"]["rows"]
    figures = {
        "speed": speed(plt, curves["sizes"]), "memory": memory(plt, curves["memory"]),
        "threads": threads(plt, curves["threads"]), "roofline": roofline(plt, result),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
        plt.close(figure)
    return written
