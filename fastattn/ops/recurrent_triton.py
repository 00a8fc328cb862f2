"""The recurrence of LSTM, GRU and RNN on the Triton kernels, for recurrent_op.py: on CUDA, and on
CPU tensors in tests (Triton's interpreter, or a hook that takes the launches over).

Triton is imported at the first call: `import fastattn` needs none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def variant(
    w_hh: Sequence[Tensor], b_hn: Sequence[Tensor], w_hr: Sequence[Tensor], h0: Tensor,
    h_mask: Tensor | None, offsets: Tensor | None, lengths: Tensor | None, cell: int,
) -> str:  # fmt: skip
    """What tells one set of compiled kernels from another, in words, for the check at first use
    (beside which upstream gradients there are, and whether training saves). A small call with the
    same words (few steps, as many sequences as "B<=" says, or a few more) runs the same code."""
    from fastattn.kernels.recurrent import sequences_of, tier
    from fastattn.kernels.recurrent_checks import GATES

    D, B, P = h0.shape
    H = w_hh[0].shape[0] // GATES[cell]
    given = {"b_hn": b_hn, "h_mask": h_mask is not None, "offsets": offsets is not None}
    given["lengths"] = lengths is not None
    words = [("lstm", "gru", "rnn_tanh", "rnn_relu")[cell], tier(cell, H, bool(w_hr), h0)]
    words += [f"H{H}", f"D{D}", str(h0.dtype).removeprefix("torch."), f"B<={sequences_of(B)}"]
    kinds = {"offsets": offsets, "lengths": lengths}
    words += [f"P{P}"] if w_hr else []
    words += [name for name, there in given.items() if there]
    words += [str(x.dtype).removeprefix("torch.") for x in kinds.values() if x is not None]
    return " ".join(words)


def forward(
    gx: Tensor, w_hh: Sequence[Tensor], b_hn: Sequence[Tensor], w_hr: Sequence[Tensor], h0: Tensor,
    c0: Tensor | None, h_mask: Tensor | None, offsets: Tensor | None, lengths: Tensor | None,
    T: int, cell: int, reverse: int, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y, h_n, c_n, gates, cells: :func:`fastattn.kernels.recurrent.recurrent_forward`."""
    from fastattn.kernels.recurrent import recurrent_forward

    found: tuple[Tensor, ...] = recurrent_forward(
        gx, w_hh, b_hn, w_hr, h0, c0, h_mask, offsets, lengths, T, cell, reverse, save
    )
    return found


def backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, y: Tensor, gates: Tensor,
    cells: Tensor, w_hh: Sequence[Tensor], w_hr: Sequence[Tensor], h0: Tensor, c0: Tensor | None,
    h_mask: Tensor | None, offsets: Tensor | None, lengths: Tensor | None, T: int, cell: int,
    reverse: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dgx, dghn, dh0, dc0, dh: :func:`fastattn.kernels.recurrent.recurrent_backward`."""
    from fastattn.kernels.recurrent import recurrent_backward

    found: tuple[Tensor, ...] = recurrent_backward(
        dy, dh_n, dc_n, y, gates, cells, w_hh, w_hr, h0, c0, h_mask, offsets, lengths, T, cell,
        reverse,
    )  # fmt: skip
    return found
