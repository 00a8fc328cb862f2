"""Calls of the recurrence that tests of every backend share: inputs, the oracle's values and
gradients in fp64, and plain PyTorch's in the call's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn.ops import recurrent_cuda
from fastattn.reference.recurrent import GATES, GRU, LSTM, RNN_RELU, RNN_TANH, recurrence

__all__ = ["GATES", "GRU", "LSTM", "RNN_RELU", "RNN_TANH", "Problem", "judge", "problem", "run"]
_FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class Problem:
    """Arguments of the recurrence by name, as the oracle takes them, and upstream gradients."""

    given: dict[str, Any]
    upstream: dict[str, Tensor]  # dy, dh_n, dc_n

    @property
    def cell(self) -> int:
        return int(self.given["cell"])

    def exists(self) -> Tensor:
        """(rows,) bool: rows of steps that their sequence has."""
        g = self.given
        B, T = g["h0"].shape[1], g["T"]
        if g["lengths"] is None:
            return torch.ones(g["gx"].shape[1], dtype=torch.bool)
        if g["offsets"] is None:
            return (torch.arange(T)[:, None] < g["lengths"][None, :]).reshape(-1)
        starts = g["offsets"].tolist()
        here = [g["lengths"][: b - a] > t for t, (a, b) in enumerate(pairwise(starts))]
        return torch.cat(here) if T and B else torch.ones(0, dtype=torch.bool)

    def oracle(self, cast: torch.dtype) -> dict[str, Tensor]:
        """y, h_n, c_n and the gradients dgx, dh0, dc0, dghn, dh of all, computed in `cast`."""
        g = dict(self.given)

        def leaf(x: Tensor) -> Tensor:
            return x.to(cast).requires_grad_()

        leaves = {n: leaf(g[n]) for n in ("gx", "h0", "c0") if g[n] is not None}
        weights = {n: [w.to(cast) for w in g[n]] for n in ("w_hh", "w_hr")}
        weights["b_hn"] = [b.to(cast) for b in g["b_hn"]]
        mask = None if g["h_mask"] is None else g["h_mask"].to(cast)
        y, h_n, c_n = recurrence(**{**g, **leaves, **weights, "h_mask": mask})
        outputs = {"y": y, "h_n": h_n} | ({"c_n": c_n} if self.cell == LSTM else {})
        dys = {f"d{n}": self.upstream[f"d{n}"] for n in outputs}
        total = sum((x * dys[f"d{n}"].to(cast)).sum() for n, x in outputs.items())
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        found = {n: x.detach() for n, x in outputs.items()}
        for (n, x), grad in zip(leaves.items(), grads, strict=True):
            found[f"d{n}"] = torch.zeros_like(x) if grad is None else grad
        return found


def problem(
    dtype: torch.dtype,
    *,
    cell: int = LSTM,
    T: int = 4,
    B: int = 5,
    H: int = 24,
    P: int | None = None,
    D: int = 1,
    reverse: int = 0,
    lengths: list[int] | None = None,
    packed: bool = False,
    mask: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    """packed: rows of `lengths`, in descending order, by offsets."""
    make = torch.Generator().manual_seed(1000 * T + 100 * B + H + seed)
    G, p = GATES[cell], H if P is None else P

    def randn(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=make) * size).to(dtype)

    offsets, N = None, T * B
    if packed:
        assert lengths is not None
        counts = torch.tensor([sum(n > t for n in lengths) for t in range(T)])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        N = int(offsets[-1])
    given = {
        "gx": randn(D, N, G * H),
        "w_hh": [randn(G * H, p, size=p**-0.5) for _ in range(D)],
        "b_hn": [randn(H) for _ in range(D)] if cell == GRU and bias else [],
        "w_hr": [randn(p, H, size=H**-0.5) for _ in range(D)] if P is not None else [],
        "h0": randn(D, B, p),
        "c0": randn(D, B, H) if cell == LSTM else None,
        "h_mask": (torch.rand(D, B, p, generator=make) > 0.3).to(dtype) * 1.5 if mask else None,
        "offsets": offsets,
        "lengths": None if lengths is None or packed else torch.tensor(lengths),
        "T": T,
        "cell": cell,
        "reverse": reverse,
    }  # fmt: skip
    upstream = {"dy": randn(N, D * p), "dh_n": randn(D, B, p), "dc_n": randn(D, B, H)}
    return Problem(given, upstream)


def run(made: Problem, tier: int) -> dict[str, Tensor]:
    """Forward and backward, from that tier on."""
    g, up = made.given, made.upstream
    y, h_n, c_n, gates, cells = recurrent_cuda.forward(**g, save=True, tier=tier)
    rest = (g[n] for n in ("w_hh", "w_hr", "h0", "c0", "h_mask", "offsets", "lengths", "T", "cell",
                           "reverse"))  # fmt: skip
    dc_n = up["dc_n"] if made.cell == LSTM else None
    grads = recurrent_cuda.backward(up["dy"], up["dh_n"], dc_n, y, gates, cells, *rest, tier=tier)
    names = ("dgx", "dghn", "dh0", "dc0", "dh")
    return {"y": y, "h_n": h_n, "c_n": c_n, **dict(zip(names, grads, strict=True))}


def judge(made: Problem, tier: int) -> dict[str, Tensor]:
    """Within twice the error of plain PyTorch at the same dtype."""
    got = run(made, tier)
    dtype = made.given["gx"].dtype
    right, plain = made.oracle(torch.float64), made.oracle(dtype)
    for name, want in right.items():
        x = got[name].double()
        assert x.shape == want.shape, name
        allowed = 2 * (plain[name].double() - want).norm() + _FLOOR[dtype] * want.norm() + 1e-6
        assert (x - want).norm() <= allowed, name
    gone = ~made.exists()
    assert not got["dgx"][:, gone].any()
    assert not got["y"][gone].any()
    return got
