"""How sequences lie in the rows of a recurrent layer.

Three layouts (T steps, B sequences): padded, row t B + b; packed, the steps that exist alone, step
by step, sequences in descending order of their lengths (as in a PackedSequence); padded with
lengths. On the CPU a padded batch with lengths is packed, so padding costs nothing. Under
torch.compile, whose shapes cannot depend on values, and on GPUs, where reading them would
synchronise, it stays padded and the recurrence skips what is not there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.ops._eager import make_function


class Rows(NamedTuple):
    x: Tensor  # (rows, I)
    T: int
    B: int
    offsets: Tensor | None = None  # (T + 1,), packed: first row of each step
    lengths: Tensor | None = None  # (B,), padded with lengths
    order: Tensor | None = None  # (B,), packed: the caller's number of the sequence in each place
    inverse: Tensor | None = None  # (B,): the place of each sequence
    at: Tensor | None = None  # (rows,), packed here: each row's place in the caller's tensor


def batch_of_packed(x: PackedSequence) -> int:
    """B; only where nothing else tells it, the value of the first size."""
    if x.sorted_indices is not None:
        return x.sorted_indices.shape[0]
    return int(x.batch_sizes[0]) if x.batch_sizes.shape[0] else 0


def of_packed(x: PackedSequence, B: int) -> Rows:
    data, sizes = x.data, x.batch_sizes
    T = sizes.shape[0]
    if not torch.compiler.is_compiling() and data.shape[0] == T * B:  # all are as long
        return Rows(data, T, B, order=x.sorted_indices, inverse=x.unsorted_indices)
    return Rows(
        data, T, B, _offsets(sizes).to(data.device), order=x.sorted_indices,
        inverse=x.unsorted_indices,
    )  # fmt: skip


def of_padded(x: Tensor, lengths: Tensor | None, batch_first: bool) -> Rows:
    """x: (T, B, I), or batch first (B, T, I)."""
    B, T, features = x.shape if batch_first else (x.shape[1], x.shape[0], x.shape[2])
    if lengths is not None and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _packed_here(x, lengths.cpu(), batch_first, T, B)
    if batch_first and (B != 1 or lengths is not None):  # the rows of one sequence lie right
        x = x.transpose(0, 1)
    if lengths is not None:
        lengths = lengths.to(x.device)
        here = torch.arange(T, device=x.device)[:, None] < lengths
        x = torch.where(here[..., None], x, 0.0)  # what lies beyond may be NaN
    return Rows(x.reshape(T * B, features), T, B, lengths=lengths)


def _offsets(sizes: Tensor) -> Tensor:
    offsets = sizes.new_zeros(sizes.shape[0] + 1)
    torch.cumsum(sizes, 0, out=offsets[1:])
    return offsets


def _packed_here(x: Tensor, lengths: Tensor, batch_first: bool, T: int, B: int) -> Rows:
    flat = x.reshape(T * B, x.shape[2])
    N = int(lengths.sum())
    if N == T * B:
        return Rows(x.transpose(0, 1).reshape(flat.shape) if batch_first else flat, T, B)
    lengths = lengths.long()
    ordered, order = torch.sort(lengths, descending=True, stable=True)
    steps = int(ordered[0])
    sizes = (torch.arange(steps)[:, None] < ordered).sum(1)
    offsets = _offsets(sizes)
    t, place = _steps_and_places(offsets, N)
    b = order[place]
    at = b * T + t if batch_first else t * B + b
    return Rows(gather(flat, at), steps, B, offsets, None, order, torch.argsort(order), at)


def _steps_and_places(offsets: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Of every packed row: its step, and its sequence's place in the step."""
    rows = torch.arange(N, device=offsets.device)
    t = torch.repeat_interleave(offsets.diff(), output_size=N)
    return t, rows - offsets[t]


def padded_places(rows: Rows) -> Tensor | None:
    """Of every packed row t B + b, b the caller's number; None where that is its own number."""
    if rows.offsets is None and rows.order is None:
        return None
    N = rows.x.shape[0]
    if rows.offsets is None:
        t = torch.arange(N, device=rows.x.device) // max(rows.B, 1)
        place = torch.arange(N, device=rows.x.device) - t * rows.B
    else:
        t, place = _steps_and_places(rows.offsets, N)
    return t * rows.B + (place if rows.order is None else rows.order[place])


def to_caller(y: Tensor, rows: Rows, x: Any, packed: bool, batch_first: bool) -> Any:
    """y (rows, F) as the caller gave the batch x."""
    if packed:
        return PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    if rows.at is not None:
        return scatter(y, rows.at, x.shape[0] * x.shape[1]).view(*x.shape[:2], y.shape[1])
    if batch_first and rows.B == 1:
        return y.unsqueeze(0)
    y = y.view(rows.T, rows.B, y.shape[1])
    return y.transpose(0, 1) if batch_first else y


def gather(x: Tensor, at: Tensor) -> Tensor:
    """The rows of x that ``at`` names, none twice, so the gradient is a copy too (index_select's
    adds up row by row)."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Gather.apply(x, at)  # type: ignore[no-any-return]
    return x.index_select(0, at)


def scatter(y: Tensor, at: Tensor, rows: int) -> Tensor:
    """The adjoint: y's rows where ``at`` says among ``rows`` rows, zeros elsewhere."""
    if y.requires_grad and torch.is_grad_enabled():
        return _Scatter.apply(y, at, rows)  # type: ignore[no-any-return]
    return _placed(y, at, rows)


def _placed(y: Tensor, at: Tensor, rows: int) -> Tensor:
    out = y.new_zeros((rows, y.shape[1]))
    out[at] = y
    return out


def _gather_forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
    ctx.save_for_backward(at)
    ctx.rows = x.shape[0]
    return x.index_select(0, at)


def _gather_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return scatter(dy, ctx.saved_tensors[0], ctx.rows), None


def _scatter_forward(ctx: Any, y: Tensor, at: Tensor, rows: int) -> Tensor:
    ctx.save_for_backward(at)
    return _placed(y, at, rows)


def _scatter_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
    return gather(dout, ctx.saved_tensors[0]), None, None


_Gather = make_function("_Gather", forward=_gather_forward, backward=_gather_backward)
_Scatter = make_function("_Scatter", forward=_scatter_forward, backward=_scatter_backward)
