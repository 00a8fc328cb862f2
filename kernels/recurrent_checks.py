"""What the Triton kernels of the recurrence want of a call's shapes. The public functions check
before they get here; a direct call must not leave its tensors either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.rows import DTYPES

GATES = (4, 3, 1, 1)  # of LSTM, GRU, RNN with tanh and with relu


def check(right: bool, *words: object) -> None:
    if not right:
        raise ValueError(f"fastattn::recurrence: {''.join(map(str, words))}")


def _tensor(
    name: str, x: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: Any = None
) -> None:
    if x is None:
        return
    check(tuple(x.shape) == shape, name, " must have shape ", shape, ", got ", tuple(x.shape))
    wanted = like.dtype if dtype is None else dtype
    check(x.dtype == wanted, name, " must be ", wanted, ", got ", x.dtype)
    check(x.is_contiguous(), name, " must be contiguous")
    check(x.device == like.device, name, " must be on ", like.device, ", got ", x.device)


def _integers(name: str, x: Tensor | None, n: int, like: Tensor) -> None:
    if x is not None:
        check(tuple(x.shape) == (n,), name, " must have shape (", n, ",), got ", tuple(x.shape))
        check(x.dtype in (torch.int32, torch.int64), name, " must be int32 or int64")
        check(x.is_contiguous(), name, " must be contiguous")
        check(x.device == like.device, name, " must be on ", like.device, ", got ", x.device)


def check_call(
    h0: Tensor, w_hh: Sequence[Tensor], b_hn: Sequence[Tensor], w_hr: Sequence[Tensor],
    c0: Tensor | None, h_mask: Tensor | None, offsets: Tensor | None, lengths: Tensor | None,
    T: int, cell: int, reverse: int, N: int,
) -> int:  # fmt: skip
    """What forward and backward have in common; returns H."""
    check(cell in range(4), "cell must be 0 to 3, got ", cell)
    check(h0.dtype in DTYPES, "h0 must be float32, bfloat16 or float16, got ", h0.dtype)
    check(h0.dim() == 3 and h0.shape[0] in (1, 2), "h0 must have shape (D, B, P), D = 1 or 2, got ",
          tuple(h0.shape))  # fmt: skip
    D, B, P = h0.shape
    gates = GATES[cell]
    check(T >= 0, "T must not be negative, got ", T)
    check(0 <= reverse < 1 << D, "reverse must have a bit for each of ", D, " directions, got ",
          reverse)  # fmt: skip
    check(len(w_hh) == D, "w_hh must have one tensor for each of ", D, " directions")
    check(w_hh[0].dim() == 2 and w_hh[0].shape[0] % gates == 0, "w_hh must have shape (", gates,
          " H, P), got ", tuple(w_hh[0].shape))  # fmt: skip
    H = w_hh[0].shape[0] // gates
    check(H > 0 and P > 0, "H and P must be at least 1")
    for w in w_hh:
        _tensor("w_hh", w, (gates * H, P), h0)
    for name, of, shape, only in (("b_hn", b_hn, (H,), 1), ("w_hr", w_hr, (P, H), 0)):
        check(len(of) in (0, D), name, " must have one tensor a direction, or none")
        check(not of or cell == only, name, " is ", "an LSTM's" if only == 0 else "a GRU's")
        for x in of:
            _tensor(name, x, shape, h0)
    check(bool(w_hr) or P == H, "h0 must have ", H, " features without w_hr, got ", P)
    check((c0 is not None) == (cell == 0), "c0 is an LSTM's, and an LSTM needs it")
    _tensor("h0", h0, (D, B, P), h0)
    _tensor("c0", c0, (D, B, H), h0)
    _tensor("h_mask", h_mask, (D, B, P), h0)
    _integers("offsets", offsets, T + 1, h0)
    _integers("lengths", lengths, B, h0)
    check(offsets is not None or N == T * B, "there must be T B = ", T * B, " rows, got ", N)
    return int(H)


def check_forward(gx: Tensor, h0: Tensor, cell: int, H: int) -> None:
    _tensor("gx", gx, (h0.shape[0], gx.shape[1], GATES[cell] * H), h0)


def check_backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, y: Tensor, gates: Tensor,
    cells: Tensor, h0: Tensor, cell: int, H: int,
) -> None:  # fmt: skip
    D, B, P = h0.shape
    N = y.shape[0]
    _tensor("y", y, (N, D * P), h0)
    _tensor("dy", dy, (N, D * P), h0)
    _tensor("dh_n", dh_n, (D, B, P), h0)
    check(dc_n is None or cell == 0, "dc_n is an LSTM's")
    _tensor("dc_n", dc_n, (D, B, H), h0)
    if cell <= 1:
        _tensor("gates", gates, (D, N, 4 * H), h0)
    if cell == 0:
        _tensor("cells", cells, (D, N, H), h0)
