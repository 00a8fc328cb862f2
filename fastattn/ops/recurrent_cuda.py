"""The recurrence (reference/recurrent.py) by CUDA C++ kernels: schemas, and the choice of the tier.

Where W_hh stays in the GPU's registers and shared memory for the whole call, one launch makes
every step (csrc/cuda/recurrent.h: ``recurrence_cuda_kernel_fwd`` and ``_bwd``). Beyond that, and
with a projection, a step is torch's GEMM and a launch of ``recurrence_cuda_step_fwd`` or ``_bwd``.
Which of the two a call takes follows from its sizes and the GPU, never from values on the device.

``forward`` and ``backward`` serve CUDA tensors, and CPU tensors in tests/sim, where the same
binding and kernels are linked with a stand-in for the CUDA runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.layernorm_op import lib
from fastattn.reference.recurrent import GATES, GRU, LSTM

BLOCK, GRID, STEP = range(3)  # RecurrentTier of csrc/cuda/recurrent.h
_ROWS = "Tensor? offsets, Tensor? lengths, int T, int cell, int reverse"
_STATE = "Tensor h0, Tensor? c0, Tensor? h_mask"
lib.define(
    "recurrence_cuda_kernel_fwd(Tensor gx, Tensor[] w_hh, Tensor[] b_hn, Tensor[] w_hr, "
    f"{_STATE}, {_ROWS}, bool save, int tier=0)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
lib.define(
    "recurrence_cuda_kernel_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor y, Tensor gates, "
    f"Tensor cells, Tensor[] w_hh, Tensor[] w_hr, {_STATE}, {_ROWS}, int tier=0)"
    " -> (Tensor dgx, Tensor dghn, Tensor dh0, Tensor dc0, Tensor dh)"
)
lib.define(
    "recurrence_cuda_tier(Tensor like, int B, int H, int P, int D, int cell, bool backward, "
    "int tier) -> int"
)
lib.define(
    "recurrence_cuda_step_fwd(Tensor gx, Tensor[] product, Tensor[] b_hn, Tensor? h_mask, "
    f"{_ROWS}, int s, int part, Tensor(a!) h, Tensor(b!)? c, Tensor(c!) next, Tensor(d!) y, "
    "Tensor(e!)? gates, Tensor(f!)? cells) -> ()"
)
lib.define(
    "recurrence_cuda_step_bwd(Tensor? dy, Tensor[] product, Tensor y, Tensor gates, Tensor cells, "
    f"{_STATE}, {_ROWS}, int s, int part, Tensor(a!) h, Tensor(b!)? c, Tensor(c!) next, "
    "Tensor(d!) dgx, Tensor(e!)? dghn, Tensor(f!)? dh) -> ()"
)
_OPS = torch.ops.fastattn
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tier_of(
    like: Tensor, B: int, H: int, P: int, D: int, cell: int, backward: bool, tier: int = BLOCK
) -> int:
    """The tier of a call on like's device and in its dtype; tier: the first to be considered.

    BLOCK: a block holds W_hh and a slice of the batch. GRID: blocks share W_hh and meet after every
    step. STEP: a GEMM and a launch a step.
    """
    if P != H or B == 0:
        return STEP if P != H else BLOCK
    return int(_OPS.recurrence_cuda_tier(like, B, H, P, D, cell, backward, tier))


def forward(
    gx: Tensor,
    w_hh: list[Tensor],
    b_hn: list[Tensor],
    w_hr: list[Tensor],
    h0: Tensor,
    c0: Tensor | None,
    h_mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    T: int,
    cell: int,
    reverse: int,
    save: bool,
    *,
    tier: int = BLOCK,
) -> Five:
    """One layer's recurrence.

    Args:
        gx: (D, N, G H), W_ih x + b of every row (t, b); contiguous, as all tensors here, and of one
            dtype (float32, bfloat16, float16) and device with all others.
        w_hh: D of (G H, P).
        b_hn: D of (H,), GRU's; empty: none.
        w_hr: D of (P, H), LSTM's projection; empty: none.
        h0: (D, B, P).
        c0: (D, B, H), LSTM's; else None.
        h_mask: (D, B, P), multiplies h where it enters W_hh h; None: none.
        offsets: (T + 1,) int64, first row of each step of a packed batch; None: rows t B + b.
        lengths: (B,) int32 or int64 steps of each sequence; None: T.
        T: steps.
        cell: 0 LSTM, 1 GRU, 2 RNN (tanh), 3 RNN (relu).
        reverse: bit d is set where direction d runs from the last step to the first.
        save: whether gates and cells are wanted.
        tier: the first tier to be considered (tests).

    Returns:
        y (N, D P), h_n (D, B, P), c_n (D, B, H) or (0,), gates (D, N, 4 H) or (0,), cells (D, N, H)
        or (0,). Rows of gates and cells that no sequence has are not written.

    Raises:
        RuntimeError: an argument that does not fit the others, by name; a launch that failed.
    """
    H, (D, B, P) = w_hh[0].shape[0] // GATES[cell], h0.shape
    if tier_of(h0, B, H, P, D, cell, False, tier) == STEP:
        return _forward_by_steps(
            gx, w_hh, b_hn, w_hr, h0, c0, h_mask, offsets, lengths, T, cell, reverse, save
        )
    results: Five = _OPS.recurrence_cuda_kernel_fwd(
        gx, w_hh, b_hn, w_hr, h0, c0, h_mask, offsets, lengths, T, cell, reverse, save, tier
    )
    return results


def backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    w_hh: list[Tensor],
    w_hr: list[Tensor],
    h0: Tensor,
    c0: Tensor | None,
    h_mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    T: int,
    cell: int,
    reverse: int,
    *,
    tier: int = BLOCK,
) -> Five:
    """The gradients of gx and of the first states; those of weights are the caller's GEMMs.

    Args: as ``forward``'s; dy (N, D P), dh_n, dc_n: upstream gradients, None = 0; y, gates, cells:
        the forward's, with ``save``.

    Returns:
        dgx (D, N, G H), zero in rows that no sequence has; dghn (D, N, H), GRU's gradient of
        W_hn h + b_hn, else (0,); dh0 (D, B, P); dc0 (D, B, H), LSTM's, else (0,); dh (D, N, P),
        with a projection the gradient of h, else (0,). Bitwise repeatable.

    Raises:
        RuntimeError: as ``forward``.
    """
    H, (D, B, P) = w_hh[0].shape[0] // GATES[cell], h0.shape
    if tier_of(h0, B, H, P, D, cell, True, tier) == STEP:
        return _backward_by_steps(
            dy, dh_n, dc_n, y, gates, cells, w_hh, w_hr, h0, c0, h_mask, offsets, lengths, T, cell,
            reverse,
        )  # fmt: skip
    results: Five = _OPS.recurrence_cuda_kernel_bwd(
        dy, dh_n, dc_n, y, gates, cells, w_hh, w_hr, h0, c0, h_mask, offsets, lengths, T, cell,
        reverse, tier,
    )  # fmt: skip
    return results


def _forward_by_steps(
    gx: Tensor, w_hh: list[Tensor], b_hn: list[Tensor], w_hr: list[Tensor], h0: Tensor,
    c0: Tensor | None, h_mask: Tensor | None, offsets: Tensor | None, lengths: Tensor | None,
    T: int, cell: int, reverse: int, save: bool,
) -> Five:  # fmt: skip
    (D, B, P), N, H = h0.shape, gx.shape[1], w_hh[0].shape[0] // GATES[cell]
    y, none = gx.new_empty((N, D * P)), gx.new_empty((0,))
    gates = gx.new_empty((D, N, 4 * H)) if save and cell in (LSTM, GRU) else none
    cells = gx.new_empty((D, N, H)) if save and cell == LSTM else none
    h = h0.to(torch.float32, copy=True)
    c = None if c0 is None else c0.to(torch.float32, copy=True)
    h_in = h0.clone() if h_mask is None else (h * h_mask).to(gx.dtype)
    m = gx.new_zeros((D, B, H)) if w_hr else h_in

    def step(s: int, part: int, left: Tensor, weights: list[Tensor], to: Tensor) -> None:
        product = [torch.mm(left[d], w.t()) for d, w in enumerate(weights)]
        _OPS.recurrence_cuda_step_fwd(
            gx, product, b_hn, h_mask, offsets, lengths, T, cell, reverse, s, part, h, c, to, y,
            gates, cells,
        )  # fmt: skip

    for s in range(T if B else 0):
        step(s, 0, h_in, w_hh, m)
        if w_hr:
            step(s, 1, m, w_hr, h_in)
    return y, h.to(gx.dtype), none if c is None else c.to(gx.dtype), gates, cells


def _backward_by_steps(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, y: Tensor, gates: Tensor,
    cells: Tensor, w_hh: list[Tensor], w_hr: list[Tensor], h0: Tensor, c0: Tensor | None,
    h_mask: Tensor | None, offsets: Tensor | None, lengths: Tensor | None, T: int, cell: int,
    reverse: int,
) -> Five:  # fmt: skip
    (D, B, P), N, H = h0.shape, y.shape[0], w_hh[0].shape[0] // GATES[cell]
    none = y.new_empty((0,))
    dgx = y.new_empty((D, N, GATES[cell] * H))
    dghn = y.new_empty((D, N, H)) if cell == GRU else none
    dh = y.new_empty((D, N, P)) if w_hr else none

    def carried(upstream: Tensor | None, like: Tensor) -> Tensor:
        if upstream is None:
            return torch.zeros_like(like, dtype=torch.float32)
        return upstream.to(torch.float32, copy=True)

    h, c = carried(dh_n, h0), None if c0 is None else carried(dc_n, c0)
    dgh, dh_in = y.new_zeros((D, B, GATES[cell] * H)), y.new_zeros((D, B, P)) if w_hr else none

    def step(s: int, part: int, product: list[Tensor], to: Tensor) -> None:
        _OPS.recurrence_cuda_step_bwd(
            dy, product, y, gates, cells, h0, c0, h_mask, offsets, lengths, T, cell, reverse, s,
            part, h, c, to, dgx, dghn, dh,
        )  # fmt: skip

    # The last turn ends the gradients of the first states.
    for s in range(T + 1 if B and T else 0):
        product = [torch.mm(dgh[d], w) for d, w in enumerate(w_hh)] if s else []
        if w_hr:
            step(s, 1, product, dh_in)
            if s == T:
                break
            product = [torch.mm(dh_in[d], w) for d, w in enumerate(w_hr)]
        step(s, 0, product, dgh)
    return dgx, dghn, h.to(y.dtype), none if c is None else c.to(y.dtype), dh
