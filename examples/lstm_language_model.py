"""Train a character model on Wikipedia with torch's LSTM and with the fused one, side by side.

    pip install "fastattn[examples]"
    python examples/lstm_language_model.py

One model, copied; in the copy ``fastattn.swap`` makes the LSTM fused. Both see the same batches
and, with ``--dropout``, draw the same masks, so their losses agree to rounding. They take turns
step by step, so whatever slows the machine slows both.

The text: the excerpt of Wikipedia that gensim ships for its tests (read, not downloaded), or any
file, by ``--text``.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wikipedia_text import CHARACTERS, as_ids, wikipedia

import fastattn


class LanguageModel(nn.Module):
    def __init__(self, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.head = nn.Linear(hidden, CHARACTERS)

    def forward(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """ids: (T, B). Returns logits (T, B, CHARACTERS) and the state after the last step."""
        y, state = self.lstm(self.embed(ids), state)
        return self.head(y), state


class Trainer:
    """A model, its optimizer and where its sequences stand."""

    def __init__(self, model: LanguageModel, lr: float) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        self.state: Any = None
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, ids: Tensor, seed: int) -> None:
        """One batch (T + 1, B), which goes on where the last one ended."""
        torch.manual_seed(seed)  # of the dropout
        start = time.perf_counter()
        logits, state = self.model(ids[:-1], self.state)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.state = tuple(s.detach() for s in state)
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def batches(text: str, steps: int, T: int, B: int) -> list[Tensor]:
    """B readers, evenly spaced in the text, T characters a step; each batch (T + 1, B)."""
    ids = as_ids(text)
    length = len(ids) // B
    if length < T + 2:
        raise SystemExit(f"the text has {len(ids)} characters; {B} x {T} need more")
    columns = ids[: B * length].view(B, length).t()
    starts = [i * T % (length - T - 1) for i in range(steps)]
    return [columns[s : s + T + 1].contiguous() for s in starts]


def report(stock: Trainer, fused: Trainer, tokens: int) -> dict[str, float]:
    """Prints the comparison and returns its figures."""
    apart = max(abs(a - b) for a, b in zip(stock.losses, fused.losses, strict=True))
    # The first steps make threads and packed weights.
    warm = min(3, len(stock.seconds) - 1)
    a, b = (statistics.median(t.seconds[warm:]) for t in (stock, fused))
    ratio = statistics.median(
        s / f for s, f in zip(stock.seconds[warm:], fused.seconds[warm:], strict=True)
    )
    print(f"greatest difference of the losses: {apart:.1e}")
    print(f"torch.nn.LSTM     {a * 1e3:8.1f} ms a step, {tokens / a:9.0f} characters/s")
    print(f"fastattn.nn.LSTM  {b * 1e3:8.1f} ms a step, {tokens / b:9.0f} characters/s")
    print(f"{ratio:.2f} x as fast (the whole step, median of neighbouring pairs)")
    return {"apart": apart, "stock_s": a, "fused_s": b, "ratio": ratio}


def plot(stock: Trainer, fused: Trainer, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for trainer, label, style in ((stock, "torch.nn.LSTM", "-"), (fused, "fastattn", "--")):
        left.plot(trainer.losses, style, label=label)
        total = torch.tensor(trainer.seconds).cumsum(0)
        right.plot(total, trainer.losses, style, label=label)
    left.set(xlabel="step", ylabel="loss (nats a character)", title="same curve")
    right.set(xlabel="seconds of its own steps", title="sooner")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0, help="between layers")
    parser.add_argument("--length", type=int, default=128, help="characters a step and sequence")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a file; default: gensim's Wikipedia")
    parser.add_argument("--plot", type=Path, default=Path("lstm_language_model.png"))
    args = parser.parse_args(argv)
    text = args.text.read_text(errors="ignore") if args.text else wikipedia()

    torch.manual_seed(args.seed)
    model = LanguageModel(args.hidden, args.layers, args.dropout)
    fused_model = copy.deepcopy(model)
    print(fastattn.swap(fused_model, only=nn.LSTM))
    stock, fused = Trainer(model, args.lr), Trainer(fused_model, args.lr)

    print(f"\n{'step':>5} {'torch':>10} {'fastattn':>10}   ms a step")
    for i, ids in enumerate(batches(text, args.steps, args.length, args.batch)):
        for trainer in (stock, fused) if i % 2 else (fused, stock):
            trainer.step(ids, args.seed + i)
        if i % max(args.steps // 20, 1) == 0 or i == args.steps - 1:
            print(
                f"{i:5} {stock.losses[-1]:10.6f} {fused.losses[-1]:10.6f}"
                f"   {stock.seconds[-1] * 1e3:.1f}, {fused.seconds[-1] * 1e3:.1f}",
                flush=True,
            )
    figures = report(stock, fused, args.length * args.batch)
    plot(stock, fused, args.plot)
    print(f"Wrote {args.plot}")
    return figures


if __name__ == "__main__":
    main()
