"""Writes the parts of the site that the code decides: `python docs/generate.py`.

The table of backends.md comes from fastattn/backends.py, cli.md from the commands themselves, the
figures from docs/figures.py. tests/test_docs.py compares what is committed with what comes out.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer.main

import fastattn
from fastattn.cli.app import EXIT_CODES, app

sys.path.insert(0, str(Path(__file__).parent))
from figures import figures

FOLDER = Path(__file__).parent
backends = sys.modules[fastattn.backends.__module__]  # fastattn.backends is the function
NAMES = {"cpu": "CPU", "triton": "Triton", "cuda": "CUDA C++", "reference": "plain PyTorch"}
OPS = (
    ("attention", "attention, over a KV cache too"),
    ("layernorm_ffn", "layernorm_ffn"),
    ("layer_norm", "norms, bias_act"),
    ("lstm", "lstm, gru, rnn"),
    ("embedding", "embedding, linear_cross_entropy"),
)
# What is asked: device type, compute capability, dtype, ROCm.
HALF, FULL = torch.bfloat16, torch.float32
PLACES: tuple[tuple[str, str, tuple[int, int] | None, torch.dtype, bool], ...] = (
    ("CPU, fp32, bf16, fp16", "cpu", None, FULL, False),
    ("CPU, fp64", "cpu", None, torch.float64, False),
    ("A100 (8.0), bf16, fp16", "cuda", (8, 0), HALF, False),
    ("A100 (8.0), fp32", "cuda", (8, 0), FULL, False),
    ("8.6, 8.9, bf16, fp16", "cuda", (8, 6), HALF, False),
    ("8.6, 8.9, fp32", "cuda", (8, 6), FULL, False),
    ("H100 (9.0), bf16, fp16", "cuda", (9, 0), HALF, False),
    ("H100 (9.0), fp32", "cuda", (9, 0), FULL, False),
    ("B200 (10.x), bf16, fp16", "cuda", (10, 0), HALF, False),
    ("B200 (10.x), fp32", "cuda", (10, 0), FULL, False),
    ("12.x, bf16, fp16", "cuda", (12, 0), HALF, False),
    ("12.x, fp32", "cuda", (12, 0), FULL, False),
    ("NVIDIA before 8.0", "cuda", (7, 5), HALF, False),
    ("AMD (ROCm)", "cuda", (9, 4), HALF, True),
    ("any GPU, fp64", "cuda", (9, 0), torch.float64, False),
    ("other devices", "mps", None, FULL, False),
)


@contextmanager
def _machine(capability: tuple[int, int] | None, rocm: bool) -> Iterator[None]:
    """A machine with such a GPU, or without one, on which everything is built and new enough."""
    patches: tuple[tuple[Any, str, Any], ...] = (
        (torch.cuda, "is_available", lambda: capability is not None),
        (torch.cuda, "get_device_capability", lambda *_: capability),
        (torch.version, "hip", "7.0" if rocm else None),
        (backends, "_triton_missing", lambda: None),
        (backends, "_cuda_missing", lambda: "built for NVIDIA" if rocm else None),
        (backends, "_C_ERROR", ""),
    )
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _order(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """The backends that `auto` tries, without those that have no kernel of the op."""
    by_barrier = device == "cuda" and op in backends._RECURRENT
    order = backends._AUTO["cuda"] if by_barrier else backends._order(device, dtype)
    return [b for b in order if backends.can_serve(op, b, device, dtype, 64)]


def backend_table() -> str:
    lines = [
        "| tensors on | " + " | ".join(title for _, title in OPS) + " |",
        "| --- |" + " --- |" * len(OPS),
    ]
    for what, device, capability, dtype, rocm in PLACES:
        with _machine(capability, rocm):
            cells = []
            for op, _ in OPS:
                order = _order(op, device, dtype)
                cell = ", ".join(NAMES[b] for b in order)
                if op == "layernorm_ffn" and "cuda" in order:
                    others = [NAMES[b] for b in order if b != "cuda"]
                    cell = f"CUDA C++ where narrow, {', '.join(others)}"
                cells.append(cell)
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def command_line() -> str:
    """A section a command: what it does, its arguments and options, as `--help` has them."""
    root: Any = typer.main.get_command(app)
    parts = [
        "# Command line",
        "<!-- written by docs/generate.py -->",
        "`fastattn COMMAND`, or `python -m fastattn COMMAND`. It needs the extra `cli`: "
        "`pip install 'fastattn[cli]'`; `demo` needs `fastattn[demo]`.",
        EXIT_CODES,
        "With `--json` stdout is JSON and nothing else. `fastattn --version` prints the version.",
    ]
    for name, command in root.commands.items():
        parts += [f"## {name}", *re.split(r"\n\s*\n", command.help.strip())]
        rows = ["| option | |", "| --- | --- |"]
        for p in command.params:
            if getattr(p, "name", "") == "help":
                continue
            argument = p.param_type_name == "argument"
            shown = p.metavar if argument else p.opts[0]
            default = p.default
            is_plain = isinstance(default, (int, float, str, Path)) and default is not False
            value = getattr(default, "value", default)
            more = f" Default: {value}." if is_plain and not argument else ""
            rows.append(f"| `{shown}` | {p.help or ''}{more} |")
        parts.append("\n".join(rows))
    parts = [re.sub(r"\n\s*", "\n", p) if p.startswith("|") else " ".join(p.split()) for p in parts]
    return "\n\n".join(parts) + "\n"


def pages() -> Iterator[tuple[Path, str]]:
    """Every generated file with its text."""
    yield FOLDER / "cli.md", command_line()
    path = FOLDER / "backends.md"
    pattern = re.compile(r"(<!-- auto:begin.*?-->\n).*?(<!-- auto:end -->)", re.DOTALL)
    old = path.read_text()
    assert len(pattern.findall(old)) == 1
    yield path, pattern.sub(lambda m: f"{m[1]}{backend_table()}\n{m[2]}", old)
    yield from figures()


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text)
