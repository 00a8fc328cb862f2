"""MiniLM (a real BERT: 6 layers, 384 wide) in inference, swapped, against its peers on the CPU.

    python -m bench.minilm [--json FILE]

Peers: the stock model in eager mode, under ``torch.compile``, and, where ``onnx`` and
``onnxruntime`` are installed, ONNX Runtime with the graph that torch's exporter writes (fp32, as
many threads as torch). All take turns in one process; a ratio is a peer's time over ours.
"""

import argparse
import copy
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastattn
from bench.harness import DTYPES, environment, load_average
from fastattn.cli.demo_model import Batch, Text, load
from fastattn.measure import interleave, ratios, spread

# dtype, batch, tokens, target against eager
ROWS = (
    ("fp32", 8, 128, 1.08),
    ("bf16", 8, 128, 1.3),
    ("fp32", 1, 16, 2.5),
    ("fp32", 1, 128, 1.2),
)


def onnx_session(model: torch.nn.Module, batch: Batch) -> Callable[[], Any] | None:
    """Runs the model in ONNX Runtime, None where it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        return None
    import onnxruntime

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            out = self.model(input_ids=input_ids, attention_mask=attention_mask)
            return out.last_hidden_state  # type: ignore[no-any-return]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder) / "model.onnx")
        names = ["input_ids", "attention_mask"]
        torch.onnx.export(
            Hidden(), tuple(batch.inputs()[n] for n in names), path, input_names=names,
            output_names=["hidden"], dynamo=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(path, options)
    feed = {n: x.numpy() for n, x in batch.inputs().items()}
    return lambda: session.run(["hidden"], feed)


def row(dtype: str, B: int, S: int, target: float, rounds: int, seconds: float) -> dict[str, Any]:
    torch.compiler.reset()
    stock, tokenizer = load()
    stock = stock.to(DTYPES[dtype])
    batch = Text(tokenizer).full(B, S)
    fused = copy.deepcopy(stock)
    fastattn.swap(fused)
    compiled = torch.compile(copy.deepcopy(stock))
    fns: dict[str, Any] = {
        name: (lambda model=model: model(**batch.inputs()))
        for name, model in (("eager", stock), ("fused", fused), ("compiled", compiled))
    }
    if dtype == "fp32":
        session = onnx_session(copy.deepcopy(stock), batch)
        if session is not None:
            fns["onnxruntime"] = session
    with torch.no_grad():
        samples = interleave(fns, rounds=rounds, max_seconds=seconds, min_rounds=5)
    times = {name: spread(samples[name]).median for name in fns}
    peers = {n: ratios(samples[n], samples["fused"]) for n in fns if n != "fused"}
    good = peers["eager"].median >= target and all(
        peers[n].median >= 1 for n in peers if n != "eager"
    )
    return {
        "what": f"B{B} S{S} {dtype}", "seconds": times, "target": target,
        "ratios": {n: [r.median, r.q1, r.q3] for n, r in peers.items()},
        "verdict": "PASS" if good else "SHORT", "load": load_average(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.minilm", description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--max-seconds", type=float, default=20.0, help="a row")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = []
    for dtype, B, S, target in ROWS:
        r = row(dtype, B, S, target, args.rounds, args.max_seconds)
        times = "  ".join(f"{n} {t * 1e3:.2f}" for n, t in r["seconds"].items())
        peers = "  ".join(f"{n} {m:.2f} [{a:.2f}, {b:.2f}]" for n, (m, a, b) in r["ratios"].items())
        print(f"{r['what']:14} ms: {times}   x: {peers}   ({target} x eager) {r['verdict']} "
              f"[load {r['load']:.1f}]", flush=True)  # fmt: skip
        found.append(r)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": environment(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
