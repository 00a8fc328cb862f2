"""The naive recurrence beneath LSTM, GRU and RNN: one layer, after the product of its inputs.

    gx[d, row(t, b)] = W_ih x + b_ih + b_hh      (GRU: without the n gate's b_hh, which is b_hn)

T steps, B sequences, H hidden features, P features of h (P = H without a projection), D directions
(1 or 2), G gates: LSTM i f g o (Hochreiter and Schmidhuber, 1997; projection: Sak, 2014), GRU
r z n (Cho, 2014, in cuDNN's form), RNN one.

Rows of gx and y: t B + b, or, where ``offsets`` are given (packed, sequences in descending order of
their lengths), offsets[t] + b for b < offsets[t + 1] - offsets[t]. A sequence that has no step t
keeps its state there and has y = 0, so a reversed direction begins at its last step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LSTM, GRU, RNN_TANH, RNN_RELU = range(4)
GATES = (4, 3, 1, 1)


def _cell(
    cell: int, gx: Tensor, gh: Tensor, b_hn: Tensor | None, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if cell == LSTM:
        i, f, g, o = (gx + gh).chunk(4, -1)
        assert c is not None
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if cell == GRU:
        (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * (hn if b_hn is None else hn + b_hn))
        return (1 - z) * n + z * h, None
    return (torch.tanh if cell == RNN_TANH else torch.relu)(gx + gh), None


def recurrence(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence in plain PyTorch, step by step, in the caller's dtype; differentiable.

    Args:
        gx: (D, rows, G H), rows as the module's docstring says.
        w_hh: D of (G H, P).
        b_hn: D of (H,), GRU's hidden bias of the n gate; empty: none.
        w_hr: D of (P, H), LSTM's projection; empty: none.
        h0: (D, B, P).
        c0: (D, B, H), LSTM's; else None.
        h_mask: (D, B, P), multiplies h where it enters W_hh h (recurrent dropout), in every step.
        offsets: (T + 1,) int, or None.
        lengths: (B,) int, steps of each sequence of a padded batch, or None = all T.
        cell: 0 LSTM, 1 GRU, 2 RNN (tanh), 3 RNN (relu).
        reverse: bit d is set where direction d runs from the last step to the first.

    Returns:
        y (rows, D P), h_n (D, B, P), c_n (D, B, H; LSTM's, else empty).
    """
    D, B = h0.shape[:2]
    limits = None if offsets is None else offsets.tolist()
    ys: list[list[Any]] = [[None] * T for _ in range(D)]
    h_n, c_n = [], []
    for d in range(D):
        h, c = h0[d], None if c0 is None else c0[d]
        for t in reversed(range(T)) if reverse >> d & 1 else range(T):
            first = t * B if limits is None else limits[t]
            n = B if limits is None else limits[t + 1] - first
            h_in = h[:n] if h_mask is None else h[:n] * h_mask[d, :n]
            bias = b_hn[d] if b_hn else None
            new, new_c = _cell(
                cell, gx[d, first : first + n], h_in @ w_hh[d].t(), bias, h[:n],
                None if c is None else c[:n],
            )  # fmt: skip
            if w_hr:
                new = new @ w_hr[d].t()
            ys[d][t] = new
            if lengths is not None:
                here = (lengths > t)[:, None]
                ys[d][t] = torch.where(here, new, 0.0)
                new = torch.where(here, new, h)
                new_c = None if new_c is None or c is None else torch.where(here, new_c, c)
            h = torch.cat((new, h[n:])) if n < B else new
            if c is not None and new_c is not None:
                c = torch.cat((new_c, c[n:])) if n < B else new_c
        h_n.append(h)
        c_n.append(c if c is not None else h.new_empty((0,)))
    rows = gx.shape[1]
    y = [torch.cat(steps) if T else gx.new_empty((rows, h0.shape[2])) for steps in ys]
    return torch.cat(y, -1), torch.stack(h_n), torch.stack(c_n)
