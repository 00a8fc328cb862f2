"""The end of `make verify`: what was proved of which op on which backend by which rung, from the
JUnit files that pytest wrote. Exit code 1 where anything is not green or did not run.

    python tests/verify_table.py build/verify-*.xml
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Test file -> op (or what is tested instead), backend, rung.
ROWS = {
    "rungs.test_attention_semantics": ("attention", "triton", "sanitizer on Triton's IR (ttsem)"),
    "rungs.test_attention_driver": ("attention", "triton", "Triton's launcher, stand-in driver"),
    "rungs.test_layernorm_semantics": (
        "layernorm_ffn",
        "triton",
        "sanitizer on Triton's IR (ttsem)",
    ),
    "rungs.test_layernorm_driver": (
        "layernorm_ffn",
        "triton",
        "Triton's launcher, stand-in driver",
    ),
    "rungs.test_layernorm_first_use": ("layernorm_ffn", "triton", "first-use check"),
    "rungs.test_recurrent_semantics": ("lstm, gru", "triton", "sanitizer on Triton's IR (ttsem)"),
    "rungs.test_recurrent_driver": (
        "lstm, gru",
        "triton",
        "Triton's launcher, stand-in driver",
    ),
    "sim.test_recurrent_triton_ptx": ("lstm, gru", "triton", "sm_80 PTX in the simulator"),
    "rungs.test_cache_semantics": ("KV cache", "triton", "sanitizer on Triton's IR (ttsem)"),
    "rungs.test_cache_driver": ("KV cache", "triton", "Triton's launcher, stand-in driver"),
    "rungs.test_cache_first_use": ("KV cache", "triton", "first-use check"),
    "rungs.test_budget": ("all", "triton", "machine code within budget"),
    "rungs.test_mutants": ("all", "triton", "planted bugs caught"),
    "rungs.test_first_use": ("attention", "triton", "first-use check"),
    "sim.test_attention_triton_ptx": ("attention", "triton", "sm_80 PTX in the simulator"),
    "sim.test_attention_cuda": (
        "attention",
        "cuda",
        "binding, launcher, sm_80 PTX in the simulator",
    ),
    "sim.test_attention_cuda_backward": (
        "attention",
        "cuda",
        "binding, launcher, sm_80 PTX in the simulator",
    ),
    "sim.test_attention_cuda_traffic": ("attention", "cuda", "banks, vectors (PTX simulator)"),
    "sim.test_emu_attention": ("attention", "cuda", "source under TSan and ASan (emulator)"),
    "sim.test_emu_attention_backward": (
        "attention",
        "cuda",
        "source under TSan and ASan (emulator)",
    ),
    "sim.test_layernorm_ffn_cuda": (
        "layernorm_ffn",
        "cuda",
        "binding, launcher, sm_80 PTX in the simulator",
    ),
    "sim.test_emu_layernorm_ffn": (
        "layernorm_ffn",
        "cuda",
        "source under TSan and ASan (emulator)",
    ),
    "sim.test_layernorm_ffn_launcher": (
        "layernorm_ffn",
        "cuda",
        "op: schema, autograd, compile, errors, first use",
    ),
    "sim.test_recurrent_cuda": (
        "lstm, gru, rnn",
        "cuda",
        "binding, launcher, sm_80 PTX in the simulator",
    ),
    "sim.test_emu_recurrent": (
        "lstm, gru, rnn",
        "cuda",
        "source under TSan and ASan (emulator)",
    ),
    "sim.test_budget": ("all", "cuda", "machine code within budget"),
    "sim.test_mutants": ("all", "cuda", "planted bugs caught"),
    "sim.test_launcher_ops": ("attention", "cuda", "op: schema, autograd, compile, errors"),
    "sim.test_launcher_launches": ("attention", "cuda", "failures, devices, streams, capture"),
    "sim.test_launcher_kernels": ("attention", "cuda", "launchers without torch"),
    "sim.test_launcher_setup": ("-", "cuda", "how the extension is built"),
}
_SELF = ("-", "-", "the rungs themselves")


def main(paths: list[str]) -> int:
    counts: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    seen = set()
    for path in paths:
        for case in ET.parse(path).iter("testcase"):
            module = ".".join(case.get("classname", "").removeprefix("tests.").split(".")[:2])
            seen.add(module)
            row = counts[ROWS.get(module, _SELF)]
            bad = any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
            row[bad] += 1
            row[2] += float(case.get("time", 0))
    table = Table("op", "backend", "rung", "green", "red", "s", title="make verify")
    for key, (green, red, seconds) in sorted(counts.items(), reverse=True):
        colour = "[red]" if red else ""
        table.add_row(*key, str(int(green)), f"{colour}{int(red)}", f"{seconds:.0f}")
    Console(width=110).print(table)
    missing = sorted(set(ROWS) - seen)
    if missing:
        print("did not run:", ", ".join(missing))
    return int(bool(missing) or any(red for _, red, _ in counts.values()))


if __name__ == "__main__":
    sys.exit(main([str(Path(p)) for p in sys.argv[1:]]))
