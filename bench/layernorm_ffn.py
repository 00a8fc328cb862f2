"""Rows of layernorm_ffn, add_layer_norm and linear_cross_entropy on the CPU.

    python -m bench.layernorm_ffn --case NAME

The baseline is plain PyTorch, as a model has it. The bare GEMMs of the same shapes (out= into
warm memory, nothing between them) take turns with both in the same rounds: "share" is their time
over the fused call's. A row passes at its ratio or at 90 % of the bare GEMMs.

GEMMs of D x F on M rows: forward 2, backward 4 more, 2 M D F FLOPs each.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.harness import DTYPES, Thunk, environment, load_average
from fastattn.measure import Spread, interleave, ratios, spread

SHARE = 0.9
Compiler = Callable[[Any], Any]  # of a function: torch.compile, or one that gives None


@dataclass(frozen=True)
class Contest:
    """Thunks on the same tensors; gemm: the bare products, None where there are none."""

    stock: Thunk
    fused: Thunk
    gemm: Thunk | None = None
    compiled: Thunk | None = None  # stock under torch.compile, where that was asked for


@dataclass(frozen=True)
class Case:
    name: str
    what: str
    make: Callable[[Compiler], Contest]
    ratio: float


@dataclass
class Row:
    name: str
    what: str
    stock_s: Spread
    fused_s: Spread
    speedup: Spread
    share: Spread | None
    compiled: Spread | None  # torch.compile's time over ours
    target: float
    verdict: str
    load: float


def _step(
    fn: Callable[..., Any] | None, leaves: list[Tensor], do: list[Tensor], train: bool
) -> Any:
    if fn is None:
        return None
    if train:
        return lambda: torch.autograd.grad(fn(*leaves), leaves, do)

    def inference() -> object:
        with torch.no_grad():
            return fn(*leaves)

    return inference


def ffn(compiler: Compiler, rows: int, d: int, f: int, dtype: str, train: bool) -> Contest:
    t = DTYPES[dtype]
    shapes = [(rows, d), (f, d), (f,), (d, f), (d,), (d,), (d,)]
    leaves = [(torch.randn(s) * (s[-1] ** -0.5 if i in (1, 3) else 1)).to(t) for i, s in
              enumerate(shapes)]  # fmt: skip
    for x in leaves:
        x.requires_grad_(train)
    do = [torch.randn(rows, d).to(t)]

    def stock(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, g: Any, b: Any) -> Tensor:
        hidden = F.gelu(F.linear(F.layer_norm(x, (d,), g, b), w1, b1))
        return x + F.linear(hidden, w2, b2)

    def fused(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, g: Any, b: Any) -> Tensor:
        return fastattn.layernorm_ffn(x, w1, b1, w2, b2, norm_weight=g, norm_bias=b)

    x, w1, w2, dy = leaves[0].detach(), leaves[1].detach(), leaves[3].detach(), do[0]
    u = torch.randn(rows, f).to(t)
    out_u, out_x = torch.empty_like(u), torch.empty_like(x)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)

    def gemm() -> None:
        torch.mm(x, w1.t(), out=out_u)
        torch.mm(u, w2.t(), out=out_x)
        if train:
            torch.mm(dy, w2, out=out_u)
            torch.mm(dy.t(), u, out=dw2)
            torch.mm(u, w1, out=out_x)
            torch.mm(u.t(), x, out=dw1)

    steps = [_step(fn, leaves, do, train) for fn in (stock, fused, compiler(stock))]
    return Contest(steps[0], steps[1], gemm, steps[2])


def add_norm(compiler: Compiler, rows: int, d: int, dtype: str, train: bool) -> Contest:
    t = DTYPES[dtype]
    leaves = [
        torch.randn(s).to(t).requires_grad_(train) for s in ((rows, d), (rows, d), (d,), (d,))
    ]
    do = [torch.randn(rows, d).to(t) for _ in range(2)]

    def stock(x: Any, residual: Any, g: Any, b: Any) -> tuple[Tensor, Tensor]:
        s = residual + F.dropout(x, 0.1)
        return F.layer_norm(s, (d,), g, b), s

    def fused(x: Any, residual: Any, g: Any, b: Any) -> tuple[Tensor, Tensor]:
        return fastattn.add_layer_norm(x, residual, g, b, dropout_p=0.1)

    steps = [_step(fn, leaves, do, train) for fn in (stock, fused, compiler(stock))]
    return Contest(steps[0], steps[1], compiled=steps[2])


def loss(
    compiler: Compiler, rows: int, d: int, vocabulary: int, ignored: float, dtype: str
) -> Contest:
    """Forward and both gradients; a hidden state of std 0.05."""
    t = DTYPES[dtype]
    x = (torch.randn(rows, d) * 0.05).to(t).requires_grad_()
    w = (torch.randn(vocabulary, d) * d**-0.5).to(t).requires_grad_()
    target = torch.randint(vocabulary, (rows,))
    target[torch.rand(rows) < ignored] = -100

    def stock(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), target)

    def fused(x: Tensor, w: Tensor) -> Tensor:
        return fastattn.linear_cross_entropy(x, w, target)

    one = [torch.ones((), dtype=t)], [torch.ones(())]
    compiled = compiler(stock)
    return Contest(
        _step(stock, [x, w], one[0], True),
        _step(fused, [x, w], one[1], True),
        compiled=_step(compiled, [x, w], one[0], True),
    )


def _cases() -> dict[str, Case]:
    cases = []
    for dtype in ("fp32", "bf16"):
        for train in (False, True):
            word = "fwd+bwd" if train else "fwd"
            mode = "train" if train else "fwd"
            for d in (384, 768):
                for rows in (128, 2048):
                    target = {"fp32": (1.15, 1.1), "bf16": (1.3, 1.25)}[dtype][train]
                    cases.append(Case(
                        f"{dtype}_{mode}_d{d}_m{rows}", f"D={d} F={4 * d} M={rows} {dtype} {word}",
                        lambda c, r=rows, d=d, t=dtype, w=train: ffn(c, r, d, 4 * d, t, w),
                        target,
                    ))  # fmt: skip
            cases.append(Case(
                f"{dtype}_{mode}_add_norm", f"dropout + add + norm, 2048 x 768, {dtype} {word}",
                lambda c, t=dtype, w=train: add_norm(c, 2048, 768, t, w), 2.0,
            ))  # fmt: skip
        for d in (384, 768):
            cases.append(Case(
                f"{dtype}_one_row_d{d}", f"D={d} F={4 * d} one row {dtype} fwd",
                lambda c, d=d, t=dtype: ffn(c, 1, d, 4 * d, t, False), 1.2,
            ))  # fmt: skip
    for word, ignored, target in (("dense", 0.0, 1.05), ("sparse", 0.85, 4.0)):
        for dtype in ("fp32", "bf16"):
            cases.append(Case(
                f"{dtype}_train_loss_{word}",
                f"linear + loss, 2048 x 384 x 30522, {ignored:.0%} ignored, {dtype} fwd+bwd",
                lambda c, i=ignored, t=dtype: loss(c, 2048, 384, 30522, i, t), target,
            ))  # fmt: skip
    return {case.name: case for case in cases}


CASES = _cases()


def run_case(case: Case, rounds: int, max_seconds: float, compile_stock: bool) -> Row:
    torch.manual_seed(0)
    torch.compiler.reset()
    contest = case.make(torch.compile if compile_stock else lambda fn: None)
    fns = {"stock": contest.stock, "fused": contest.fused}
    for name in ("gemm", "compiled"):
        if getattr(contest, name) is not None:
            fns[name] = getattr(contest, name)
    samples = interleave(fns, rounds=rounds, max_seconds=max_seconds, min_rounds=5)
    speedup = ratios(samples["stock"], samples["fused"])
    share = ratios(samples["gemm"], samples["fused"]) if "gemm" in samples else None
    compiled = ratios(samples["compiled"], samples["fused"]) if "compiled" in samples else None
    good = speedup.median >= case.ratio or (share is not None and share.median >= SHARE)
    return Row(
        case.name, case.what, spread(samples["stock"]), spread(samples["fused"]), speedup, share,
        compiled, case.ratio, "PASS" if good else "SHORT", load_average(),
    )  # fmt: skip


def line(row: Row) -> str:
    share = "      -" if row.share is None else f"{row.share.median:7.0%}"
    peer = "      -" if row.compiled is None else f"{row.compiled.median:7.2f}"
    return (
        f"{row.name:26} {row.stock_s.median * 1e3:9.3f}ms {row.fused_s.median * 1e3:9.3f}ms "
        f"{row.speedup:.2f} {row.target:5.2f}x {share} {peer}  {row.verdict}  [load {row.load:.1f}]"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", help="a case by name; repeatable; default: all")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max-seconds", type=float, default=20.0, help="a case; at least 5 rounds")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile of stock beside it")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args(argv)
    if args.list:
        for case in CASES.values():
            print(f"{case.name:26} {case.what}")
        return
    missing = [name for name in args.case or () if name not in CASES]
    if missing:
        sys.exit(f"bench.layernorm_ffn: no case {', '.join(missing)}; see --list")
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"{'case':26} {'stock':>11} {'fused':>11} {'ratio [q1, q3]':>17} {'target':>6} of gemm peer"
    )
    rows = []
    for name in args.case or CASES:
        rows.append(run_case(CASES[name], args.rounds, args.max_seconds, args.compile))
        print(line(rows[-1]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        shown = [asdict(row) for row in rows]
        args.json.write_text(json.dumps({"environment": environment(), "rows": shown}, indent=1))


if __name__ == "__main__":
    main()
