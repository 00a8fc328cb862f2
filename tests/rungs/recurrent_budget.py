"""The budget's rows of the kernels of LSTM, GRU and RNN; see budget.py. H stands where a head dim
does. Every call has all that costs registers: two directions, lengths, a mask, what training saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from recurrence_calls import GRU, LSTM, RNN_TANH, backward, forward
from recurrence_calls import call as make

from fastattn.kernels import recurrent as kernels

from .calls import FAMILIES, tiles_of
from .launches import Launch, recorded

CELLS = {"lstm": LSTM, "gru": GRU, "rnn": RNN_TANH}
KERNELS = (
    "recurrent_sequence_kernel", "recurrent_sequence_backward_kernel", "recurrent_step_kernel",
    "recurrent_step_backward_kernel", "hidden_gradient_kernel", "project_kernel",
)  # fmt: skip
# A feature is a cell and its size: "whole" is the widest that one program holds, "half" half of it;
# "few", "some" and "many" are B = 16, 32 and 64 at H = 1024, where steps are launches; "projected"
# has P = 256 there.
_WHOLE = ("lstm whole", "gru whole", "rnn whole")
_STEPS = ("lstm few", "gru many", "lstm projected")
FEATURES = {
    "bf16": (*_WHOLE, *_STEPS, "lstm some"),
    "fp16": ("gru whole", "lstm few"),
    "fp32": (*_WHOLE, "lstm half", "gru half", "rnn half", *_STEPS),
}
_BATCH = {"some": 32, "many": 64}
_WIDE, _PROJECTED = 1024, 256


def widest(arch: str, cell: int, dtype: torch.dtype) -> int:
    """The widest power of two that the sequence tier serves on an architecture."""
    sizes = (16, 32, 64, 128, 256, 512)
    family = FAMILIES[arch]
    return max(H for H in sizes if kernels.whole_sequence(cell, H, False, dtype, family))


def launches(
    arch: str, dtype: torch.dtype, feature: str, names: Sequence[str] = KERNELS
) -> Iterator[tuple[int, Launch]]:
    """H and the first launch of each kernel; nothing runs."""
    torch.manual_seed(0)
    name, size = feature.split()
    cell = CELLS[name]
    H = _WIDE
    if size in ("whole", "half"):
        H = widest(arch, cell, dtype) // (1 + (size == "half"))
    B = _BATCH.get(size, 16)
    call = make(
        cell, T=1, B=B, H=H, D=2, P=_PROJECTED if size == "projected" else None, dtype=dtype,
        lengths=[1] * B, mask=True,
    )  # fmt: skip
    with tiles_of(arch), recorded() as found:
        y, _, _, gates, cells = forward(call)
        backward(call, (y, gates, cells))
    for kernel in names:
        yield from [(H, x) for x in found if x.name == kernel][:1]
