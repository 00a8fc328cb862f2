"""The CUDA attention backward, compiled for the host, under the sanitizers: races whatever the
order, also between blocks and beside atomics, overruns, and the same bits by every schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tools import Problem, packed, padded, values

from sim.emu_attention_backward import Variant, check, program

BF16 = torch.bfloat16
SERVED = program([Variant("bf16", 64), Variant("bf16", 64, True, True), Variant("f32", 64)])
# Tails of rows, keys and columns, grouped heads; several tiles of each.
CASES: dict[str, Callable[[], Problem]] = {
    "bf16": lambda: padded(b=1, h=2, hk=1, sq=140, sk=150, d=40, dtype=BF16, causal=True),
    "f32": lambda: padded(b=1, h=2, hk=1, sq=70, sk=130, d=40),
    # Copies of k and v, or q and do, that no tile follows must have landed all the same.
    "no rows, no keys": lambda: packed([0, 9, 0, 3], [5, 0, 0, 3], h=2, d=16, dtype=BF16),
}


@pytest.mark.parametrize("name", CASES)
def test_bitwise_the_same_whatever_the_order(name: str) -> None:
    problem = CASES[name]()
    first = check(problem, SERVED, resident=1)
    ways = [("reverse", "lazy", 0x3C003C00), ("cyclic", "eager", 0xFFFFFFFF),
            ("random:5", "lazy", 0xFFFFFFFF)]  # fmt: skip
    for schedule, cp_async, poison in ways:
        how = {"schedule": schedule, "cp_async": cp_async, "poison": poison, "resident": 4}
        got = check(problem, SERVED, **how)
        for n in ("dq", "dk", "dv"):
            assert torch.equal(got[n], first[n]), (n, how)


@pytest.mark.parametrize("name", CASES)
def test_no_races(name: str) -> None:
    check(CASES[name](), SERVED, "tsan", schedule="reverse")


def with_atomics() -> Problem:
    bias = values((1, 1, 70, 83), BF16, "normal")
    return padded(b=1, h=2, hk=1, sq=70, sk=83, d=40, dtype=BF16, bias=bias)


def test_no_races_beside_the_atomics() -> None:
    check(with_atomics(), SERVED, "tsan", deterministic=False, resident=4)


@pytest.mark.parametrize("name", CASES)
def test_bounds(name: str) -> None:
    check(CASES[name](), SERVED, "asan")


def test_bounds_beside_the_atomics() -> None:
    check(with_atomics(), SERVED, "asan", deterministic=False)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_elements_on_no_16_byte_boundary(dtype: torch.dtype) -> None:
    problem = padded(b=1, h=2, hk=1, sq=37, sk=41, d=24, dv=20, dtype=dtype)
    check(problem, SERVED, "asan", lead=4)
    turned = {n: getattr(problem, n).transpose(-1, -2).contiguous().mT for n in "qkv"}
    check(Problem(**turned), SERVED)
