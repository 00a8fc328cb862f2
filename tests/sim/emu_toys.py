"""Cases of the emulator's toys and what each must give: the tests of the rung itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .emu import HERE, Case, Program

PROGRAMS = {name: Program((HERE / "toys" / f"{name}.cu",)) for name in ("gemm", "reduce", "grid")}
NAN = float("nan")


@dataclass
class Toy:
    program: Program
    case: Case
    error: Callable[[dict[str, torch.Tensor]], float]  # largest, against fp64


def gemm(bug: int = 0, M: int = 70, N: int = 66, K: int = 72) -> Toy:
    make = torch.Generator().manual_seed(M * N + K)
    a = torch.randn(M, K, generator=make).bfloat16()
    b = torch.randn(N, K, generator=make).bfloat16()
    expected = a.double() @ b.double().T
    case = Case("gemm", {"bug": bug}, {"a": a, "b": b}, {"c": torch.full((M, N), NAN)})
    return Toy(PROGRAMS["gemm"], case, lambda got: float((got["c"] - expected).abs().max()))


def reduce(bug: int = 0, rows: int = 2, n: int = 200) -> Toy:
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(n))
    mirrored = x[:, :128].reshape(rows, 4, 32).flip(-1).reshape(rows, 128)
    outputs = {
        "out": torch.zeros(rows),
        "reversed": torch.full((rows, 128), NAN),
        "flag": torch.zeros(1, dtype=torch.int32),
    }

    def error(got: dict[str, torch.Tensor]) -> float:
        sums = (got["out"] - x.double().sum(1)).abs().max()
        return float(torch.maximum(sums, (got["reversed"] - mirrored).abs().max()))

    return Toy(PROGRAMS["reduce"], Case("reduce", {"bug": bug}, {"x": x}, outputs), error)


def grid(bug: int = 0, n: int = 150, steps: int = 3) -> Toy:
    make = torch.Generator().manual_seed(n)
    w = torch.randn(n, n, generator=make) / n**0.5
    h = torch.zeros(2, n)
    h[0] = torch.randn(n, generator=make)
    outputs = {"h": h, "arrived": torch.zeros(1, dtype=torch.int32)}
    case = Case("grid", {"bug": bug, "steps": steps}, {"w": w}, outputs)

    def error(got: dict[str, torch.Tensor]) -> float:
        expected = h[0].double()
        for _ in range(steps):
            expected = torch.tanh(w.double() @ expected)
        return float((got["h"][steps % 2] - expected).abs().max())

    return Toy(PROGRAMS["grid"], case, error)
