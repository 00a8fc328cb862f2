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

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastattn.reference.dropout import draw_seed
from fastattn.reference.layernorm_ffn import OUTPUT_SITE, dropout

LSTM, GRU, RNN_TANH, RNN_RELU = range(4)
GATES = (4, 3, 1, 1)

# Of one layer and direction: w_ih (G H, I), w_hh (G H, P), b_ih (G H,), b_hh (G H,), w_hr (P, H).
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


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
    none = gx[0, :, :1].expand(rows, h0.shape[2])  # without steps: no rows, but a history
    y = [torch.cat(steps) if T else none for steps in ys]
    return torch.cat(y, -1), torch.stack(h_n), torch.stack(c_n)


def layer(
    x: Tensor,
    weights: Sequence[Weights],
    h0: Tensor,
    c0: Tensor | None,
    h_mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    T: int,
    cell: int,
    reverse: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The product of the inputs, then :func:`recurrence`.

    Args:
        x: (rows, I); rows that a sequence does not have must be finite.
        weights: D of (w_ih (G H, I), w_hh, b_ih or None, b_hh or None, w_hr or None).
    """
    gx, b_hn = [], []
    for w_ih, _, b_ih, b_hh, _ in weights:
        product = x @ w_ih.t()
        if b_ih is not None:
            product = product + b_ih
        if b_hh is not None and cell == GRU:
            H = b_hh.shape[0] // 3
            product = product + torch.cat((b_hh[: 2 * H], torch.zeros_like(b_hh[:H])))
            b_hn.append(b_hh[2 * H :])
        elif b_hh is not None:
            product = product + b_hh
        gx.append(product)
    w_hr = [w[4] for w in weights if w[4] is not None]
    return recurrence(
        torch.stack(gx), [w[1] for w in weights], b_hn, w_hr, h0, c0, h_mask, offsets, lengths, T,
        cell, reverse,
    )  # fmt: skip


def entry_size(weights: Sequence[Tensor], gates: int) -> int:
    """Of a flat sequence, how many tensors make one layer and direction, as the first ones say."""
    rows, features = weights[1].shape
    return (4 if len(weights) > 2 and weights[2].dim() == 1 else 2) + (features * gates != rows)


def by_layer(weights: Sequence[Any], directions: int, gates: int) -> list[tuple[Weights, ...]]:
    """Weights layer by layer, each ``directions`` tuples of five.

    Args:
        weights: an entry a layer and direction, each w_ih, w_hh, then b_ih and b_hh or neither,
            then w_hr or not; or all of these tensors in one flat sequence, as torch's.
    """
    if weights and isinstance(weights[0], Tensor):
        n = entry_size(weights, gates)
        weights = [weights[i : i + n] for i in range(0, len(weights), n)]
    full: list[Weights] = []
    for entry in weights:
        last = entry[-1] if len(entry) in (3, 5) else None
        biases = entry[2:4] if len(entry) >= 4 else (None, None)
        full.append((entry[0], entry[1], biases[0], biases[1], last))
    return [tuple(full[i : i + directions]) for i in range(0, len(full), directions)]


_STREAM = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: far apart for neighbours


def layer_seed(seed: int | Tensor, stream: int) -> int | Tensor:
    """The key of one mask of a call: layer l's of h is stream 2 l, that behind it 2 l + 1."""
    step = stream * _STREAM & (2**64 - 1)
    return seed + (step - 2**64 if step >= 2**63 else step)  # a tensor wraps around


def scaled_mask(shape: Sequence[int], p: float, seed: int | Tensor, like: Tensor) -> Tensor:
    """0 where dropped, else 1 / (1 - p), in the rows and columns of ``shape``."""
    return dropout(like.new_ones(tuple(shape)), p, seed, OUTPUT_SITE)


def stack(
    x: Tensor | PackedSequence,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Any],
    cell: int,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout_p: float = 0.0,
    recurrent_dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Any, Tensor, Tensor]:
    """All layers: :func:`fastattn.lstm` and its kin, with the states apart and all of it padded.

    Returns:
        y, h_n, c_n (empty but for the LSTM).
    """
    options: dict[str, Any] = {
        "bidirectional": bidirectional, "dropout_p": dropout_p,
        "recurrent_dropout_p": recurrent_dropout_p, "seed": seed,
    }  # fmt: skip
    if isinstance(x, PackedSequence):
        padded, steps = pad_packed_sequence(x)  # in the caller's order
        y, h_n, c_n = stack(padded, h0, c0, weights, cell, lengths=steps, **options)
        if x.sorted_indices is not None:
            y = y.index_select(1, x.sorted_indices)
        rows = torch.cat([y[t, :n] for t, n in enumerate(x.batch_sizes.tolist())])
        return PackedSequence(rows, x.batch_sizes, x.sorted_indices, x.unsorted_indices), h_n, c_n
    if x.dim() == 2:
        h0, c0 = (None if s is None else s.unsqueeze(1) for s in (h0, c0))
        y, h_n, c_n = stack(x.unsqueeze(1), h0, c0, weights, cell, **options)
        return y.squeeze(1), h_n.squeeze(1), c_n.squeeze(1) if cell == LSTM else c_n
    if batch_first:
        x = x.transpose(0, 1)
    if lengths is not None:
        lengths = torch.as_tensor(lengths).to(x.device)
        here = torch.arange(x.shape[0], device=x.device)[:, None] < lengths
        x = torch.where(here[..., None], x, 0.0)
    y, h_n, c_n = _layers(x, h0, c0, weights, cell, lengths, options)
    return y.transpose(0, 1) if batch_first else y, h_n, c_n


def _layers(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Any],
    cell: int,
    lengths: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    T, B = x.shape[:2]
    D = 2 if options["bidirectional"] else 1
    p_between, p_h, seed = (options[n] for n in ("dropout_p", "recurrent_dropout_p", "seed"))
    layers = by_layer(weights, D, GATES[cell])
    rows, P = layers[0][0][1].shape
    if h0 is None:
        h0 = x.new_zeros((len(layers) * D, B, P))
    if c0 is None and cell == LSTM:
        c0 = x.new_zeros((len(layers) * D, B, rows // GATES[cell]))
    mask_seed = draw_seed(x.device) if seed is None and p_h else seed
    h_n, c_n = [], []
    for i, entries in enumerate(layers):
        mask = None
        if p_h:
            assert mask_seed is not None
            mask = scaled_mask((D * B, P), p_h, layer_seed(mask_seed, 2 * i), x).view(D, B, P)
        mine = slice(i * D, (i + 1) * D)
        y, h, c = layer(
            x.reshape(T * B, x.shape[2]), entries, h0[mine], None if c0 is None else c0[mine], mask,
            None, lengths, T, cell, 2 if D == 2 else 0,
        )  # fmt: skip
        x = y.view(T, B, D * P)
        h_n.append(h)
        c_n.append(c)
        if p_between and i + 1 < len(layers):
            if seed is None:
                x = F.dropout(x, p_between)
            else:
                kept = scaled_mask((T * B, D * P), p_between, layer_seed(seed, 2 * i + 1), x)
                x = x * kept.view_as(x)
    return x, torch.cat(h_n), torch.cat(c_n)


def cell_step(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    cell: int,
) -> tuple[Tensor, Tensor]:
    """One step of (B, I), or of (I,), from states of (B, H), or of (H,); weights without w_hr."""
    if x.dim() == 1:
        h, c = (None if s is None else s.unsqueeze(0) for s in (h, c))
        h, c = cell_step(x.unsqueeze(0), h, c, weights, cell)
        return h.squeeze(0), c.squeeze(0)
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None
    assert w_hh is not None
    zeros = x.new_zeros((x.shape[0], w_hh.shape[1]))
    h = zeros if h is None else h
    c = zeros if c is None else c
    y, _, c_n = layer(
        x, [(w_ih, w_hh, b_ih, b_hh, None)], h[None], c[None] if cell == LSTM else None, None, None,
        None, 1, cell, 0,
    )  # fmt: skip
    return y, c_n[0]
