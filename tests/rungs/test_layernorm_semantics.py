"""Rung (b) on the kernels of layernorm_ffn and its parts: bounds, races, reads, values."""

import pytest
import torch
from ffn_tools import run
from test_layernorm import norm_call

from rungs import row_cases
from rungs.calls import tiles_of
from rungs.semantics import semantics

pytestmark = pytest.mark.sampled(3)


@pytest.mark.parametrize("name", row_cases.CASES)
def test_case(name: str) -> None:
    with semantics() as session:
        row_cases.check(name)
    assert session.launches


@pytest.mark.parametrize("name", row_cases.FAR)
def test_inputs_beyond_32_bit_offsets(name: str) -> None:
    with semantics():
        row_cases.check(name)


@pytest.mark.parametrize("name", ["row_add", "row_norm_wide", "row_act_gated"])
def test_backward_is_bitwise_repeatable(name: str) -> None:
    call = row_cases.case_named(name)
    with semantics():
        first, second = run(call, "triton").all(), run(call, "triton").all()
    assert all(torch.equal(first[n], second[n]) for n in first)


# ---- the tiles that ship (make verify-full)


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("n", [768, 8192 + 8])
def test_shipped_tiles(n: int, arch: str) -> None:
    call = norm_call("add_layer_norm", 5, n, dtype=torch.bfloat16, dropout_p=0.1, seed=2)
    with semantics("ttgir", int(arch[3:])), tiles_of(arch):
        row_cases.judge(call, "triton")
