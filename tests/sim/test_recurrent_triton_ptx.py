"""The Triton kernels of LSTM, GRU and RNN as Triton compiles them for sm_80, in the PTX simulator:
values against the fp64 oracle, bounds, races, reads of what nobody wrote.

The sanitizer (tests/rungs) sees no hazard inside a program. Here the state that a step hands to the
next one passes through the shared memory of a program of several warps.
"""

import dataclasses

import pytest
import torch
from recurrence_calls import GRU, LSTM, judge, run
from recurrence_calls import call as make
from rungs.calls import tiles_of
from rungs.recurrent_cases import tier_of

from sim import triton_launches

BF16 = torch.bfloat16
CASES = {
    "lstm_sequence": {"cell": LSTM, "H": 16, "T": 3, "B": 2, "lengths": [3, 1], "mask": True},
    "gru_sequence": {"cell": GRU, "H": 20, "packed": [2, 1]},
    "lstm_steps": {"cell": LSTM, "H": 20, "T": 2, "B": 2, "lengths": [2, 1], "P": 7},
}


FULL = ("lstm_sequence", "lstm_steps")
SMALL = [pytest.param(n, marks=[pytest.mark.full] if n in FULL else []) for n in CASES]


@pytest.mark.parametrize("name", SMALL)
def test_small_tiles(name: str) -> None:
    with tier_of(name), triton_launches.running() as gpu:
        judge(make(**CASES[name], dtype=BF16))
    assert gpu.launches


@pytest.mark.parametrize("name", ["lstm_sequence", "lstm_steps"])
def test_the_tiles_of_an_sm_80(name: str) -> None:
    """Several warps, weights in shared memory, pipelined copies (cp.async)."""
    call = make(LSTM, H=32, T=2, B=2, D=1, dtype=BF16)
    with tier_of(name), tiles_of("sm_80"), triton_launches.running() as gpu:
        judge(call)
    assert {x.block for x in gpu.launches} <= {64, 128}


@pytest.mark.full
def test_any_order_of_blocks() -> None:
    call = make(GRU, H=20, T=2, B=2, D=2, dtype=BF16)
    results = []
    for order in ("forward", "random"):
        with tier_of("_steps"), triton_launches.running(seed=5, order=order):
            results.append(run(dataclasses.replace(call)))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name
