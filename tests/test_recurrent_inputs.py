"""The product of a recurrence's inputs, made in parts that stay in the caches where it need not be
kept."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from recurrent_layers import hold, judge, make
from rule import one_thread
from torch import Tensor

import fastattn
from fastattn import reference

# Two of them or more, of 1024 rows at least (csrc/bindings/recurrent.cpp).
UNEVEN = torch.tensor([0, 60, 1, *range(27, 60), *[59] * 20])
IN_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("lstm", {"T": 33, "B": 64, "H": 256, "D": 2}),
    "lstm_lengths": ("lstm", {"T": 60, "B": 56, "H": 256, "D": 2, "lengths": UNEVEN}),
    "lstm_bf16": ("lstm", {"T": 42, "B": 100, "H": 256, "D": 2, "dtype": torch.bfloat16}),
    "lstm_projected": ("lstm", {"T": 52, "B": 40, "H": 512, "proj": 40}),
    "gru": ("gru", {"T": 3, "B": 1400, "H": 200, "D": 2}),
    "gru_packed": ("gru", {"T": 70, "B": 140, "H": 341, "packed": [*range(1, 71)] * 2}),
    "rnn": ("rnn_tanh", {"T": 2, "B": 2100, "H": 1024, "D": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PARTS)
def test_inputs_in_parts(name: str) -> None:
    cell, sizes = IN_PARTS[name]
    call = make(cell, **sizes)
    # The weights' gradients are GEMMs over thousands of rows, with the error of those. An LSTM has
    # no parts here: it keeps its gates.
    judge(replace(call, frozen=tuple(f"w{i}" for i in range(len(call.weights)))), "cpu")
    with torch.no_grad(), torch.profiler.profile() as profile:
        got = call.run(fastattn, call.leaves(), backend="cpu")
    products = [e.count for e in profile.key_averages() if e.key == "aten::mm"]
    assert sum(products) > sizes.get("D", 1)
    with one_thread(), torch.no_grad():
        right = call.run(reference, call.leaves(Tensor.double))
        hold(got, right, lambda cast: call.run(reference, call.leaves(cast)), outputs_alone=True)
