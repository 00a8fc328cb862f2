"""Train a small GPT on Wikipedia with torch's layers and with fused ones, then let it write.

    pip install "fastattn[examples]"
    python examples/gpt_language_model.py

Two models of one class start from one state_dict and see the same batches, turn by turn, so their
losses agree to rounding.  What they have learned then writes in three ways: by computing the whole
text again for every character, with keys and values joined by torch.cat, and with
fastattn.nn.KVCache.  All three choose the likeliest character, so they write the same.

The text: the excerpt of Wikipedia that gensim ships for its tests (read, not downloaded), or any
file, by ``--text``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wikipedia_text import CHARACTERS, as_ids, wikipedia

import fastattn

Past = list[tuple[Tensor, Tensor]]


class StockAttention(nn.MultiheadAttention):
    """Causal self attention by F.scaled_dot_product_attention; ``past`` is grown by torch.cat."""

    def forward(self, x: Tensor, past: Past | None, layer: int) -> Tensor:  # type: ignore[override]
        B, T, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        begun = past is not None and layer < len(past)
        if past is not None and begun:
            k, v = (torch.cat(pair, 2) for pair in zip(past[layer], (k, v), strict=True))
            past[layer] = k, v
        elif past is not None:
            past.append((k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=not begun)
        return self.out_proj(o.transpose(1, 2).reshape(B, T, width))


class FusedAttention(fastattn.nn.MultiheadAttention):
    """The same weights; ``past`` is a step of a KVCache."""

    def forward(self, x: Tensor, past: Any, layer: int) -> Tensor:  # type: ignore[override]
        mask, cached = None, None
        if past is None:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        else:
            cached = past[layer]
        return super().forward(
            x, x, x, need_weights=False, attn_mask=mask, is_causal=past is None, kv_cache=cached
        )[0]


class StockFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear2(F.gelu(self.linear1(self.norm(x))))


class GPT(nn.Module):
    """Pre-norm transformer; ``fused`` says whose layers it is made of, and nothing else."""

    def __init__(self, width: int, layers: int, heads: int, context: int, fused: bool) -> None:
        super().__init__()
        lib = fastattn.nn if fused else nn
        attention = FusedAttention if fused else StockAttention
        feed_forward = fastattn.nn.LayerNormFFN if fused else StockFeedForward
        self.fused = fused
        self.character = lib.Embedding(CHARACTERS, width)
        self.position = lib.Embedding(context, width)
        self.norms = nn.ModuleList(lib.LayerNorm(width) for _ in range(layers))
        self.attentions = nn.ModuleList(
            attention(width, heads, batch_first=True) for _ in range(layers)
        )
        self.feed_forwards = nn.ModuleList(feed_forward(width, 4 * width) for _ in range(layers))
        self.norm = lib.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)

    def forward(self, ids: Tensor, start: int = 0, past: Any = None) -> Tensor:
        """ids: (B, T), standing at start, ... . Returns (B, T, width), before the head."""
        positions = torch.arange(start, start + ids.shape[1])
        x = self.character(ids) + self.position(positions)
        layers = zip(self.norms, self.attentions, self.feed_forwards, strict=True)
        for i, (norm, attention, feed_forward) in enumerate(layers):
            x = feed_forward(x + attention(norm(x), past, i))
        return self.norm(x)

    def loss(self, ids: Tensor) -> Tensor:
        """Of predicting every character of (B, T + 1) from those before it."""
        x, target = self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
        if self.fused:  # without the logits in memory
            return fastattn.linear_cross_entropy(x, self.head.weight, target)
        return F.cross_entropy(self.head(x), target)

    def likeliest(self, ids: Tensor, start: int = 0, past: Any = None) -> Tensor:
        """(B, 1), the character behind the last."""
        return self.head(self(ids, start, past)[:, -1:]).argmax(-1)


class Trainer:
    """A model, its optimizer, and what each step took and lost."""

    def __init__(self, model: GPT, lr: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, ids: Tensor) -> None:
        start = time.perf_counter()
        loss = self.model.loss(ids)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


# ----------------------------------------------------------------------------- three ways to write


def write(step: Callable[[Tensor, int], Tensor], prompt: Tensor, n: int) -> tuple[Tensor, Any]:
    """n characters behind a prompt (B, T): the text, and the seconds of each character.

    ``step(ids, start)`` gets what it has not seen and returns the next character.
    """
    text, new, seconds = [prompt], prompt, []
    for _ in range(n):
        begin = time.perf_counter()
        new = step(new, sum(part.shape[1] for part in text) - new.shape[1])
        seconds.append(time.perf_counter() - begin)
        text.append(new)
    return torch.cat(text, 1), seconds


def recompute(model: GPT) -> Callable[[Tensor, int], Tensor]:
    seen: list[Tensor] = []

    def step(new: Tensor, start: int) -> Tensor:
        seen.append(new)
        return model.likeliest(torch.cat(seen, 1))

    return step


def with_cat(model: GPT) -> Callable[[Tensor, int], Tensor]:
    past: Past = []
    return lambda new, start: model.likeliest(new, start, past)


def with_cache(model: GPT, cache: Any) -> Callable[[Tensor, int], Tensor]:
    cache.reset()
    return lambda new, start: model.likeliest(new, start, cache.extend(new.shape[1]))


def generate(stock: GPT, fused: GPT, prompt: Tensor, n: int, rounds: int) -> dict[str, Any]:
    """The three ways in turns; per way the text and the best seconds of each character."""
    attention = fused.attentions[0]
    B, capacity = prompt.shape[0], prompt.shape[1] + n
    cache = fastattn.nn.KVCache(
        len(fused.attentions), B, attention.num_heads, attention.head_dim, capacity
    )
    ways = {
        "all again": lambda: recompute(stock),
        "torch.cat": lambda: with_cat(stock),
        "KVCache": lambda: with_cache(fused, cache),
    }
    texts: dict[str, Tensor] = {}
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(rounds):
            for name, way in ways.items():
                texts[name], taken = write(way(), prompt, n)
                seconds[name].append(taken)
    best = {name: [min(s) for s in zip(*taken, strict=True)] for name, taken in seconds.items()}
    # What torch.cat writes anew: all keys and values, at every character.
    row = cache.nbytes // capacity
    copied = sum(row * (prompt.shape[1] + i) for i in range(1, n))
    return {"texts": texts, "seconds": best, "bytes": cache.nbytes, "copied": copied}


# ----------------------------------------------------------------------------------------- reports


def report(stock: Trainer, fused: Trainer, tokens: int, made: dict[str, Any]) -> dict[str, Any]:
    """Prints the comparison and returns its figures."""
    apart = max(abs(a - b) for a, b in zip(stock.losses, fused.losses, strict=True))
    warm = min(3, len(stock.seconds) - 1)
    a, b = (statistics.median(t.seconds[warm:]) for t in (stock, fused))
    pairs = zip(stock.seconds[warm:], fused.seconds[warm:], strict=True)
    ratio = statistics.median(s / f for s, f in pairs)
    print(f"greatest difference of the losses: {apart:.1e}")
    print(f"torch     {a * 1e3:8.1f} ms a step, {tokens / a:9.0f} characters/s")
    print(f"fastattn  {b * 1e3:8.1f} ms a step, {tokens / b:9.0f} characters/s")
    print(f"{ratio:.2f} x as fast (the whole step, median of neighbouring pairs)\n")
    texts, right = made["texts"], made["texts"]["all again"]
    same = min(float((text == right).float().mean()) for text in texts.values())
    rates = {}
    for name, seconds in made["seconds"].items():
        # Without the first, which reads the prompt.
        rates[name] = right.shape[0] * (len(seconds) - 1) / sum(seconds[1:])
        print(f"{name:<10}{rates[name]:9.0f} characters/s")
    print(
        f"keys and values: {made['bytes'] / 1e6:.1f} MB; torch.cat copied "
        f"{made['copied'] / 1e6:.0f} MB of them, KVCache none"
    )
    print(f"same characters: {same:.1%}\n")
    return {"apart": apart, "ratio": ratio, "stock_s": a, "fused_s": b, "same": same, **rates}


def plot(stock: Trainer, fused: Trainer, made: dict[str, Any], prompt: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4))
    for trainer, label, style in ((stock, "torch", "-"), (fused, "fastattn", "--")):
        left.plot(trainer.losses, style, label=label)
        total = torch.tensor(trainer.seconds).cumsum(0)
        middle.plot(total, trainer.losses, style, label=label)
    for name, seconds in made["seconds"].items():
        places = range(prompt + 1, prompt + len(seconds))
        right.plot(places, [s * 1e3 for s in seconds[1:]], label=name)
    left.set(xlabel="step", ylabel="loss (nats a character)", title="same curve")
    middle.set(xlabel="seconds of its own steps", title="sooner")
    right.set(xlabel="position", ylabel="ms a character", yscale="log", title="writing")
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="characters a sequence")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--prompts", type=int, default=2, help="texts written at once")
    parser.add_argument("--prompt", type=int, default=32, help="characters of a prompt")
    parser.add_argument("--rounds", type=int, default=3, help="of writing, for its times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a file; default: gensim's Wikipedia")
    parser.add_argument("--plot", type=Path, default=Path("gpt_language_model.png"))
    args = parser.parse_args(argv)
    ids = as_ids(args.text.read_text(errors="ignore") if args.text else wikipedia())
    if len(ids) < args.length + 2 or args.prompt >= args.length:
        raise SystemExit(f"{len(ids)} characters, prompts of {args.prompt}: --length is too large")

    torch.manual_seed(args.seed)
    sizes = (args.width, args.layers, args.heads, args.length)
    stock, fused = (Trainer(GPT(*sizes, fused), args.lr) for fused in (False, True))
    fused.model.load_state_dict(stock.model.state_dict())

    print(f"{'step':>5} {'torch':>10} {'fastattn':>10}   ms a step")
    for i in range(args.steps):
        starts = torch.randint(len(ids) - args.length, (args.batch,)).tolist()
        batch = torch.stack([ids[s : s + args.length + 1] for s in starts])
        for trainer in (stock, fused) if i % 2 else (fused, stock):
            trainer.step(batch)
        if i % max(args.steps // 15, 1) == 0 or i == args.steps - 1:
            print(
                f"{i:5} {stock.losses[-1]:10.6f} {fused.losses[-1]:10.6f}"
                f"   {stock.seconds[-1] * 1e3:.1f}, {fused.seconds[-1] * 1e3:.1f}",
                flush=True,
            )

    stock.model.load_state_dict(fused.model.state_dict())  # so that all write the same
    for trainer in (stock, fused):
        trainer.model.eval()
    prompt = torch.stack([ids[s : s + args.prompt] for s in range(args.prompts)])
    rest = args.length - args.prompt
    made = generate(stock.model, fused.model, prompt, rest, args.rounds)
    figures = report(stock, fused, args.length * args.batch, made)
    print("It writes:", bytes(made["texts"]["KVCache"][0].tolist()).decode())
    plot(stock, fused, made, args.prompt, args.plot)
    print(f"Wrote {args.plot}")
    return figures


if __name__ == "__main__":
    main()
