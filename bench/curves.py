"""Figures over size and over threads, peaks of memory over size, and the machine's ceilings: what
the plots are made of."""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import attention, layernorm_ffn, recurrent
from bench.harness import DTYPES, Case, Setting, roof_probe, run_case, run_memory
from fastattn.measure import interleave, spread

PLAIN = Setting(peers=False)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
ROWS = (1, 8, 64, 256, 1024, 4096)
BATCHES = (1, 4, 16, 64)
MEMORY = (256, 512, 1024, 2048, 4096)


def _mode(train: bool) -> str:
    return "fwd+bwd" if train else "fwd"


def lines(quick: bool) -> dict[str, list[tuple[int, Case]]]:
    """Series by name: size and case of each point."""
    found: dict[str, list[tuple[int, Case]]] = {}
    some = slice(0, 3) if quick else slice(None)
    for dtype in ("fp32", "bf16"):
        for train in (False, True):
            mode = f"{dtype} {_mode(train)}"
            found[f"attention, B1 H12 D64, over S: {mode}"] = [
                (S, _case(partial(attention.plain, attention.Shape(S=S, dtype=dtype, train=train)),
                          dtype)) for S in LENGTHS[some]
            ]  # fmt: skip
            found[f"layernorm_ffn, D=768, over rows: {mode}"] = [
                (M, _case(partial(layernorm_ffn.ffn, rows=M, d=768, f=3072, dtype=dtype,
                                  train=train), dtype)) for M in ROWS[some]
            ]  # fmt: skip
            found[f"lstm, T=64 H=256, over B: {mode}"] = [
                (B, _case(partial(recurrent.layer, name="LSTM", T=64, B=B, H=256, dtype=dtype,
                                  train=train), dtype)) for B in BATCHES[some]
            ]  # fmt: skip
    return found


def _case(make: Any, dtype: str) -> Case:
    return Case("point", "point", dtype, make)


def _point(x: int, case: Case, seconds: float) -> dict[str, Any]:
    row = run_case(case, PLAIN, rounds=9, max_seconds=seconds)
    return {
        "x": x, "stock_s": row.stock_s, "fused_s": row.fused_s, "flops": row.flops,
        "load": row.load,
    }  # fmt: skip


def sizes(quick: bool) -> dict[str, list[dict[str, Any]]]:
    seconds = 0.2 if quick else 1.0
    found = {}
    for name, points in lines(quick).items():
        found[name] = [_point(x, case, seconds) for x, case in points]
        print(f"curves: {name}", flush=True)
    return found


def threads(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """From one thread to all of torch's, as powers of two."""
    most = torch.get_num_threads()
    counts = sorted({1, most, *(2**i for i in range(1, most.bit_length()) if 2**i < most)})
    shape = attention.Shape(S=1024, train=True)
    cases = {
        "attention fwd+bwd, S=1024 fp32": partial(attention.plain, shape),
        "layernorm_ffn fwd+bwd, 512 rows D=768 fp32": partial(
            layernorm_ffn.ffn, rows=512, d=768, f=3072, dtype="fp32", train=True),
        "lstm fwd+bwd, T=64 B=32 H=256 fp32": partial(
            recurrent.layer, name="LSTM", T=64, B=32, H=256, dtype="fp32", train=True),
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    try:
        for n in counts:
            torch.set_num_threads(n)
            for name, make in cases.items():
                point = _point(n, _case(make, "fp32"), 0.3 if quick else 2.0)
                found[name].append(point)
    finally:
        torch.set_num_threads(most)
    return found


def ceilings() -> dict[str, float]:
    """FLOP/s of a GEMM by dtype, bytes/s of a copy and of a read."""
    found = {}
    for kind, dtype in (*(("gemm", d) for d in DTYPES), ("copy", ""), ("read", "")):
        probe, work = roof_probe(kind, dtype)
        times = interleave({"probe": probe}, rounds=9, max_seconds=3.0)["probe"]
        found[f"{kind} {dtype}".strip()] = work / spread(times).median
    return found


def memory(quick: bool) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for dtype in ("fp32", "bf16"):
        for train in (False, True):
            name = f"attention, B1 H12 D64, over S: {dtype} {_mode(train)}"
            found[name] = []
            for S in MEMORY[:2] if quick else MEMORY:
                shape = attention.Shape(S=S, dtype=dtype, train=train)
                row = run_memory(_case(partial(attention.plain, shape), dtype), PLAIN)
                found[name].append({"x": S, **row})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", action="store_true", help="the peaks alone")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if args.memory:
        args.json.write_text(json.dumps(memory(args.quick)))
        return
    result: dict[str, Any] = {"ceilings": ceilings(), "sizes": sizes(args.quick)}
    result["threads"] = threads(args.quick)
    # In a process of its own: peaks are taken from a heap that timings have not shaped.
    path = args.json.with_name("curves-memory.json")
    more = ["--quick"] if args.quick else []
    command = [sys.executable, "-m", "bench.curves", "--memory", "--json", str(path), *more]
    subprocess.run(command, check=True)
    result["memory"] = json.loads(path.read_text())
    args.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
