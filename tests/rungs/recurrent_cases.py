"""Calls of the recurrence (LSTM, GRU, RNN) for the rungs: small, several tiles each way, one
feature or trap at a time, each on one of the tiers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from recurrence_calls import GRU, RNN_RELU, RNN_TANH, Call, backward, by_reference, forward, judge
from recurrence_calls import call as make
from torch import Tensor

from fastattn.kernels import recurrent as kernels

BF16, F16 = torch.bfloat16, torch.float16

# Names end with the tier.
CASES: dict[str, dict[str, Any]] = {
    "rec_lstm_sequence": {"H": 5, "D": 2, "T": 3, "B": 3, "lengths": [1, 3, 0], "mask": True},
    "rec_lstm_packed_sequence": {"H": 7, "packed": [3, 2, 2, 1], "dtype": BF16, "reverse": 1},
    "rec_lstm_blocks_sequence": {"H": 3, "T": 2, "B": 18},
    "rec_gru_sequence": {"cell": GRU, "H": 20, "D": 2, "packed": [3, 3, 1], "mask": True},
    "rec_gru_lengths_sequence": {"cell": GRU, "H": 5, "T": 3, "B": 2, "lengths": [1, 3]},
    "rec_rnn_sequence": {"cell": RNN_TANH, "H": 5, "T": 3, "B": 3, "lengths": [1, 3, 0]},
    "rec_relu_sequence": {"cell": RNN_RELU, "H": 16, "D": 2, "T": 2, "B": 2, "dtype": F16},
    "rec_lstm_steps": {"H": 20, "D": 2, "T": 3, "B": 3, "lengths": [1, 3, 0], "mask": True},
    "rec_lstm_packed_steps": {"H": 17, "packed": [3, 2, 2, 1], "dtype": BF16, "reverse": 1},
    "rec_lstm_blocks_steps": {"H": 3, "T": 2, "B": 18},
    "rec_gru_steps": {"cell": GRU, "H": 20, "D": 2, "packed": [3, 3, 1], "mask": True},
    "rec_gru_lengths_steps": {"cell": GRU, "H": 5, "T": 3, "B": 2, "lengths": [1, 3]},
    "rec_rnn_steps": {"cell": RNN_TANH, "H": 20, "T": 3, "B": 3, "lengths": [1, 3, 0]},
    "rec_relu_steps": {"cell": RNN_RELU, "H": 16, "D": 2, "T": 2, "B": 2, "dtype": F16},
    "rec_projected_steps": {"H": 18, "P": 7, "D": 2, "T": 3, "B": 2, "lengths": [1, 3],
                            "mask": True},
    "rec_projected_wide_steps": {"H": 5, "P": 18, "packed": [2, 1], "dtype": BF16},
}  # fmt: skip


@contextmanager
def tier_of(name: str) -> Iterator[None]:
    whole = name.endswith("_sequence")
    with mock.patch.object(kernels, "whole_sequence", return_value=whole):
        yield


def case_named(name: str) -> Call:
    torch.manual_seed(0)
    if name.startswith("rec_far"):
        return make(RNN_TANH, H=16, packed=[2, 2], offset_dtype=torch.int32)
    return make(**CASES[name], poison=True)


def check(name: str) -> None:
    """AssertionError unless the call is as near to the fp64 oracle as plain PyTorch is (x 2)."""
    with tier_of(name):
        if name.startswith("rec_far"):
            _check_far(case_named(name))
        elif name.startswith("rec_wild"):
            wild(name, [0, 3, 900], None)
        else:
            judge(case_named(name))


def _check_far(near: Call) -> None:
    """The rows of a call beyond 2^31 elements: 4 GB of addresses, of which a few pages exist."""
    N = (1 << 27) + 16
    right = by_reference(near)

    def far_rows(*shape: int) -> Tensor:
        room = np.zeros(int(np.prod(shape)), np.uint16)
        return torch.from_numpy(room).view(BF16).view(shape)

    def at_the_end(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        n, shape[dim] = shape[dim], N
        room = far_rows(*shape)
        room.narrow(dim, N - n, n).copy_(x)
        return room

    small = {n: x.to(BF16) for n, x in near.tensors.items()}
    n = small["gx"].shape[1]
    assert near.offsets is not None
    call = Call(
        near.cell, near.T, {**small, "gx": at_the_end(small["gx"], 1)},
        (near.offsets + N - n).to(torch.int32),
    )  # fmt: skip
    up = at_the_end(near.upstreams()["y"].to(BF16), 0)
    with (
        mock.patch.object(kernels.Call, "rows", lambda self, *shape: far_rows(*shape)),
        mock.patch.object(Call, "upstreams", return_value={"y": up}),
    ):
        y, _, _, gates, cells = forward(call)
        dgx = backward(call, (y, gates, cells))["dgx"]
    only_y = {**right, **by_reference(Call(**{**vars(near), "upstream": ("y",)}))}
    torch.testing.assert_close(y[-n:].float(), right["y"], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dgx[:, -n:].float(), only_y["dgx"], rtol=5e-2, atol=5e-2)


# Of their own: 4 GB of addresses a tensor.
FAR = ("rec_far_sequence", "rec_far_steps")


def wild(name: str, offsets: list[int] | None, lengths: list[int] | None) -> None:
    """Offsets and lengths that nobody checked: any values, no access outside of the tensors."""
    with tier_of(name):
        base = make(H=5, D=2, T=2, B=3) if offsets is None else make(H=5, packed=[2, 2, 1])
        call = Call(
            base.cell, base.T, base.tensors,
            None if offsets is None else torch.tensor(offsets),
            None if lengths is None else torch.tensor(lengths),
        )  # fmt: skip
        N = base.tensors["gx"].shape[1]

        def rows(self: object, *shape: int) -> Tensor:  # rows that no step writes
            return torch.zeros(shape, dtype=base.tensors["gx"].dtype)

        with mock.patch.object(kernels.Call, "rows", rows):
            y, *_, gates, cells = forward(call)
            assert y.shape[0] == N
            x = call.tensors
            kernels.recurrent_backward(
                torch.ones_like(y), None, None, y, gates.nan_to_num(), cells.nan_to_num(),
                call.of("w_hh", x), [], x["h0"], x["c0"], None, call.offsets, call.lengths, call.T,
                call.cell, 0,
            )  # fmt: skip
