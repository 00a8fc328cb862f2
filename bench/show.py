"""A row as a line of a terminal."""

from typing import Any

from bench.harness import Row

HEADER = (
    f"{'case':30} {'stock':>9} {'fused':>9} {'ratio [q1, q3]':>19} {'target':>7} {'GFLOP/s':>8} "
    f"{'GB/s':>6} {'roof':>5} {'gemm':>5}  verdict"
)


def duration(s: float) -> str:
    return f"{s * 1e6:7.1f}us" if s < 1e-3 else f"{s * 1e3:7.2f}ms"


def line(row: Row) -> str:
    target = f"{row.target:.2f}x" if row.target else "-"
    note = ""
    if row.max_overhead is not None:
        target, note = f"+{row.max_overhead * 1e6:.0f}us", f" over {row.overhead * 1e6:+.1f}us"
    gemm = "-" if row.products is None else f"{row.products.median:.0%}"
    share = f"{row.share:.0%}" if row.roof_rate else "-"
    peers = "".join(f", {n} {s.median:.2f}" for n, s in row.over.items() if n != "stock")
    math = ", stock is SDPA's math" if row.stock_backend == "math" else ""
    return (
        f"{row.name:30} {duration(row.stock_s)} {duration(row.fused_s)} {row.speedup:>.2f} "
        f"{target:>7} {row.flops / row.fused_s / 1e9:8.1f} {row.bytes / row.fused_s / 1e9:6.1f} "
        f"{share:>5} {gemm:>5}  {row.verdict}{note}  [load {row.load:.1f}{peers}{math}]"
    )


def memory_line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']:30} stock {row['stock_times']:.2f}x fused {row['fused_times']:.2f}x of the "
        f"operands ({row['operand_bytes'] / 2**20:.0f} MiB), target {row['target']}x  "
        f"{row['verdict']}"
    )
