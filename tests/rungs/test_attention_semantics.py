"""Rung (b) on the attention kernels: bounds, races, unwritten reads, and values, case by case."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from tools import padded
from torch import Tensor

from fastattn.kernels import attention as kernels
from rungs.calls import attend, check, tiles_of
from rungs.cases import CASES, FAR, Case
from rungs.semantics import semantics

pytestmark = pytest.mark.sampled(3)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    case = CASES[name]
    with semantics(may_hold_nan=case.may_hold_nan) as session:
        check(case.problem(), backward=case.backward, deterministic=case.deterministic)
    assert session.launches >= (4 if case.deterministic else 3)


@pytest.mark.parametrize("name", FAR)
def test_inputs_beyond_32_bit_offsets(name: str) -> None:
    with semantics():
        check(FAR[name].problem())


@contextmanager
def results_far_apart() -> Iterator[None]:
    """Results laid out with rows 2^29 elements apart, in a file without contents."""
    import numpy as np

    def empty_as(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        stride = 1 << 29
        room = torch.from_numpy(np.zeros(shape[2] * stride, np.uint16)).view(x.dtype)
        return torch.as_strided(room, shape, (1024, 64, stride, 1))

    with mock.patch.object(kernels, "empty_as", empty_as):
        yield


def test_results_beyond_32_bit_offsets() -> None:
    problem = padded(b=1, h=2, sq=6, sk=6, d=16, dtype=torch.bfloat16, causal=True)
    with semantics(), results_far_apart():
        check(problem)


def test_backward_is_bitwise_repeatable() -> None:
    problem = CASES["all"].problem()
    with semantics():
        first, second = attend(problem).all(), attend(problem).all()
    assert all(torch.equal(first[n].nan_to_num(7), second[n].nan_to_num(7)) for n in first)


# ---- after pipelining, with the tiles that ship (make verify-full)

PIPELINED = {
    "plain": Case(lambda: padded(b=1, h=1, sq=150, sk=200, d=64, dtype=torch.bfloat16)),
    "causal": Case(
        lambda: padded(b=1, h=2, hk=1, sq=150, sk=150, d=64, dtype=torch.float16, causal=True)
    ),
    "wide": Case(lambda: padded(b=1, h=1, sq=70, sk=150, d=128, dtype=torch.bfloat16)),
    "fp32": Case(lambda: padded(b=1, h=1, sq=70, sk=90, d=64, causal="bottom_right")),
    "all": CASES["bf16_all"],
}


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", PIPELINED)
def test_after_pipelining(name: str, arch: str) -> None:
    with semantics("ttgir", int(arch[3:])), tiles_of(arch):
        check(PIPELINED[name].problem())
