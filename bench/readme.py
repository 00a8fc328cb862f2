"""Puts measured figures into README.md between its markers: `python -m bench.readme`.

Reads what `make demo` and `make bench` wrote. A part whose file is missing stays as it is; a quick
demo is refused, since its figures are rough. Nothing is left out: losses are rows like any other.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from bench import report

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "bench" / "demo.png"


def put(text: str, name: str, body: str) -> str:
    """The text with what stands between `<!-- name:begin -->` and `<!-- name:end -->` replaced."""
    pattern = re.compile(rf"(<!-- {name}:begin.*?-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    new, count = pattern.subn(lambda m: m[1] + body.strip("\n") + "\n" + m[2], text)
    if count != 1:
        sys.exit(
            f"bench.readme: README.md needs the markers of {name} once, has them {count} times"
        )
    return new


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _mib(value: int | None) -> str:
    return "n/a" if value is None else f"{value / 2**20:.1f}"


def demo(result: dict[str, Any]) -> str:
    """Parity, every row, the verdict."""
    env, parity = result["environment"], result["parity"]
    lines = [
        f"`make demo` on {env['cpu']} ({env['threads']} threads, {env['isa']}), torch "
        f"{env['torch']}, transformers {env['transformers']}, {env['date']}.",
        "",
        result["verdict"],
        "",
        "| embeddings, fused against stock | max abs error | min cosine |",
        "| --- | ---: | ---: |",
    ]
    for dtype in ("fp32", "bf16"):
        p = parity[dtype]
        lines.append(f"| {dtype} | {p['max_abs_error']:.1e} | {p['min_cosine']:.7f} |")
    lines += [
        "",
        "| what | dtype | tokens × batch | stock ms | fused ms | speedup [quartiles] "
        "| stock MiB | fused MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        s = row["speedup"]
        what = row["kind"] + (", padded" if row["padded"] else "")
        mark = "**" if s["median"] >= 1 else ""
        lines.append(
            f"| {what} | {row['dtype']} | {row['S']} × {row['B']} "
            f"| {_ms(row['stock_s']['median'])} | {_ms(row['fused_s']['median'])} "
            f"| {mark}{s['median']:.2f}{mark} [{s['q1']:.2f}, {s['q3']:.2f}] "
            f"| {_mib(row['stock_peak_bytes'])} | {_mib(row['fused_peak_bytes'])} |"
        )
    lines += ["", f"MiB: {result['memory_method']}.", "", "![latency and speedup](bench/demo.png)"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-out" / "demo.json")
    parser.add_argument("--bench", type=Path, default=ROOT / "bench" / "out" / "results.json")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    done = []
    if args.demo.exists():
        result = json.loads(args.demo.read_text())
        if result["environment"]["quick"]:
            sys.exit(f"bench.readme: {args.demo} is of a --quick run; run `make demo` first")
        text = put(text, "demo", demo(result))
        shutil.copy(args.demo.with_suffix(".png"), PICTURE)
        done.append("demo")
    if args.bench.exists():
        text = put(text, "bench", report.headline(json.loads(args.bench.read_text())))
        done.append("bench")
    readme.write_text(text)
    print(f"README.md: {', '.join(done) or 'nothing to put in'}")


if __name__ == "__main__":
    main()
