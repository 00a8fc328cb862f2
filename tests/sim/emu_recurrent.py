"""Cases of csrc/cuda/recurrent.h for the source emulator, with their values in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recurrence_calls import GRU, LSTM, RNN_TANH, Call, by_reference, call
from torch import Tensor

from .emu import HERE, ROOT, Case, Program

NAN = float("nan")
_CUDA = ROOT / "csrc" / "cuda"
BLOCK, GRID, STEP = range(3)  # RecurrentTier
_CODES = {
    torch.bfloat16: ("__nv_bfloat16", "DType::kBf16"),
    torch.float32: ("float", "DType::kF32"),
}


def program(*dtypes: torch.dtype, cuda: Path = _CUDA, held: int | None = None) -> Program:
    """All cells and both tiers of these dtypes, of csrc/cuda or of a copy that names its own. held:
    registers of a thread for weights."""
    lines = [
        f"make<{t}, {units}>({code})"
        for t, code in (_CODES[d] for d in dtypes)
        for units in (16, 128)
    ]
    sources = tuple(cuda / f"{name}.cu" for name in ("recurrent", "lstm", "gru", "rnn"))
    defines: tuple[str, ...] = (
        (f"FASTATTN_RECURRENT_VARIANTS(make)={', '.join(lines)}",) if dtypes else ()
    )
    if held is not None:
        defines += (f"FASTATTN_RECURRENT_HELD={held}",)
    return Program((*sources, HERE / "launchers" / "recurrent.cpp"), defines)


# One a dtype: g++ takes a minute for the cells of each.
PROGRAMS = {dtype: program(dtype) for dtype in (torch.bfloat16, torch.float32)}
# Weights beyond a warp's first chunks lie in shared memory: with 16 blocks of 16 units that wants
# few registers for them.
FEW_HELD = program(torch.bfloat16, held=32)


@dataclass
class Pass:
    case: Case
    dtype: torch.dtype
    right: dict[str, Tensor]  # fp64
    plain: dict[str, Tensor]  # by plain PyTorch in the case's dtype

    def check(self, got: dict[str, Tensor]) -> None:
        """Within twice the error of plain PyTorch at the same dtype, and nothing left unwritten."""
        for name, right in self.right.items():
            x, plain = got[name].double(), self.plain[name].double()
            assert not x.isnan().any(), name
            unit = 1e-5 if self.dtype == torch.float32 else 1e-2
            allowed = 2 * float((plain - right).norm()) + unit * float(right.norm()) + 1e-6
            error = float((x - right).norm())
            assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def passes(
    dtype: torch.dtype,
    *,
    tier: int = GRID,
    multiprocessors: int = 0,
    shared: int = 0,
    **options: Any,
) -> tuple[Pass, Pass]:
    """The forward and the backward of one call; the latter gets what fp64 would have saved."""
    made = call(dtype=dtype, **options)
    g, cell = made.arguments(), made.cell
    D, B, H, P = made.sizes
    N = g["gx"].shape[1]
    right, plain = by_reference(made, Tensor.double), by_reference(made)
    saved = saved_by_reference(made, right["y"])
    numbers = {"T": made.T, "cell": cell, "reverse": made.reverse, "tier": tier,
               "multiprocessors": multiprocessors, "shared": shared}  # fmt: skip
    tensors = {"gx": g["gx"], "w_hh": torch.stack(g["w_hh"]), "h0": g["h0"]}
    tensors |= {"b_hn": torch.stack(g["b_hn"])} if g["b_hn"] else {}
    tensors |= {n: g[n] for n in ("c0", "h_mask", "offsets", "lengths") if g[n] is not None}
    outputs = {"y": torch.full((N, D * P), NAN), "h_n": torch.full((D, B, P), NAN)}
    if cell == LSTM:
        outputs |= {"c_n": torch.full((D, B, H), NAN), "cells": torch.full((D, N, H), NAN)}
    if cell in (LSTM, GRU):
        outputs["gates"] = torch.full((D, N, 4 * H), NAN)
    outputs = {n: t.to(dtype) for n, t in outputs.items()}
    forward = Case("recurrent_forward", numbers, tensors, outputs)
    grads = {"dgx": torch.full_like(g["gx"], NAN), "dh0": torch.full_like(g["h0"], NAN)}
    grads |= {"dc0": torch.full_like(g["c0"], NAN)} if cell == LSTM else {}
    grads |= {"dghn": torch.full((D, N, H), NAN).to(dtype)} if cell == GRU else {}
    upstream = {f"d{n}": t for n, t in made.upstreams().items()}
    backward = Case("recurrent_backward", numbers, {**tensors, **saved, **upstream}, grads)

    def only(values: dict[str, Tensor], names: Any) -> dict[str, Tensor]:
        return {n: values[n] for n in names if n in values}

    ways = (
        Pass(case, dtype, only(right, case.outputs), only(plain, case.outputs))
        for case in (forward, backward)
    )
    first, second = ways
    return first, second


def saved_by_reference(made: Call, y: Tensor) -> dict[str, Tensor]:
    """y, gates and cells as the contract has them, from fp64, with NaN in rows that no sequence
    has. y: the oracle's."""
    g, cell, T = made.arguments(), made.cell, made.T
    D, B, H, _ = made.sizes
    N, dtype = g["gx"].shape[1], g["gx"].dtype
    gates, cells = torch.full((D, N, 4 * H), NAN), torch.full((D, N, H), NAN)
    starts = None if g["offsets"] is None else g["offsets"].tolist()
    for d in range(D):
        w = g["w_hh"][d].double()
        h, c = g["h0"][d].double(), None if g["c0"] is None else g["c0"][d].double()
        for t in reversed(range(T)) if g["reverse"] >> d & 1 else range(T):
            first, n = (t * B, B) if starts is None else (starts[t], starts[t + 1] - starts[t])
            here = torch.arange(B) < n
            if g["lengths"] is not None:
                here &= g["lengths"] > t
            x = torch.zeros(B, g["gx"].shape[2], dtype=torch.float64)
            x[:n] = g["gx"][d, first : first + n].double()
            gh = (h if g["h_mask"] is None else h * g["h_mask"][d].double()) @ w.t()
            if cell == LSTM:
                i, f, n_, o = (x + gh).chunk(4, -1)
                i, f, n_, o = i.sigmoid(), f.sigmoid(), n_.tanh(), o.sigmoid()
                assert c is not None
                new_c = f * c + i * n_
                new, values = o * new_c.tanh(), torch.cat((i, f, n_, o), -1)
                c = torch.where(here[:, None], new_c, c)
                cells[d, first : first + n] = torch.where(here[:, None], c, NAN)[:n].float()
            elif cell == GRU:
                (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), gh.chunk(3, -1)
                r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
                hn = hn + (g["b_hn"][d].double() if g["b_hn"] else 0.0)
                n_ = (xn + r * hn).tanh()
                new, values = (1 - z) * n_ + z * h, torch.cat((r, z, n_, hn), -1)
            else:
                new = (x + gh).tanh() if cell == RNN_TANH else (x + gh).relu()
                values = torch.zeros(B, 4 * H, dtype=torch.float64)
            h = torch.where(here[:, None], new, h)
            gates[d, first : first + n] = torch.where(here[:, None], values, NAN)[:n].float()
    found = {"y": y.to(dtype)}
    if cell in (LSTM, GRU):
        found["gates"] = gates.to(dtype)
    if cell == LSTM:
        found["cells"] = cells.to(dtype)
    return found
