"""``fastattn.embedding``: check, choose a backend, launch, return."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastattn import choices
from fastattn.backends import select
from fastattn.ops import embedding_op as op
from fastattn.ops import layernorm_checks as check
from fastattn.ops._eager import wants_grad
from fastattn.ops.attention_checks import check_bool, check_strided, fail, seed_tensor
from fastattn.ops.layernorm import NormName
from fastattn.ops.layernorm_op import NORMS
from fastattn.reference.embedding import sinusoidal_positions

_NAME = "embedding"


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    positions: Tensor | None = None,
    position_weight: Tensor | Literal["sinusoidal"] | None = None,
    position_offset: int = 0,
    segments: Tensor | None = None,
    segment_weight: Tensor | None = None,
    scale: float = 1.0,
    norm: NormName | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The input of a transformer in one call.

    ``s = scale * weight[ids] + position_weight[positions] + segment_weight[segments]``,
    ``y = dropout(norm(s))``

    V rows of a table, N features. The sum, the norm and its statistics are fp32 whatever the
    tables are; it is rounded once.

    Args:
        ids: (*, S), int64 or int32, each in [0, V).
        weight: (V, N), float32, bfloat16, float16 or float64.
        positions: of ids' last dimensions, such as (S,) or (*, S), or broadcastable to ids; None
            counts ``position_offset``, ``position_offset + 1``, ... along S.
        position_weight: (P, N), or "sinusoidal" (Vaswani et al., 1706.03762); None = no positions.
        segments: as positions. None = 0 everywhere, where segment_weight is given.
        segment_weight: (T, N).
        scale: multiplies the rows of weight. Default 1.
        norm: "layer", "rms" or None. norm_weight, norm_bias: (N,). eps: added to the variance.
        dropout_p: probability in [0, 1) with which an element of the result is dropped.
        seed: int or 1-element int64 tensor that fixes the mask; None draws one from torch.
        padding_idx, position_padding_idx: the row whose gradient is zero; may be negative.
        scale_grad_by_freq: divide the gradient of a row of weight by how often ids name it.
        backend: "auto", "cpu", "reference" or "torch".

    Returns:
        (*, S, N) in weight's dtype, contiguous. The gradients of the tables are dense, summed in
        fp32 in the order of the tokens: bitwise the same for every thread count.

    Saved for the backward: the arguments, and 8 bytes a token where there is a norm.

    Raises:
        IndexError: an index outside its table (on the CPU; while compiling a RuntimeError).
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> ids, words = torch.tensor([[2, 0, 3]]), torch.randn(5, 8)
    >>> y = fastattn.embedding(ids, words, position_weight="sinusoidal", norm="layer")
    >>> y.shape, torch.equal(fastattn.embedding(ids, words), words[ids])
    (torch.Size([1, 3, 8]), True)
    """
    _check_tables(ids, weight, position_weight, segment_weight)
    _check_numbers(position_offset, scale, eps, scale_grad_by_freq)
    rows, columns = weight.shape
    for name, p in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if p is not None:
            if norm is None:
                fail(_NAME, f"{name} belongs to a norm, got norm=None")
            check.check_parameter(_NAME, name, p, weight, (columns,), "weight")
    if position_weight is None and positions is not None:
        fail(_NAME, "positions need position_weight, got None")
    if segment_weight is None and segments is not None:
        fail(_NAME, "segments need segment_weight, got None")
    positions = _index("positions", positions, ids)
    segments = _index("segments", segments, ids)
    if ids.dim() == 0 and position_weight is not None and positions is None:
        fail(_NAME, "ids must have a dimension for positions to count along, got shape ()")
    if isinstance(position_weight, str):
        if position_weight != "sinusoidal":
            fail(
                _NAME, f"position_weight must be a Tensor or 'sinusoidal', got {position_weight!r}"
            )
        positions, position_weight = _sinusoidal(ids, positions, position_offset, columns, weight)
        position_offset = 0
    if seed is not None or dropout_p != 0.0:
        check.check_probability(_NAME, "dropout_p", dropout_p)
        seed = seed_tensor(_NAME, seed, dropout_p, weight)
    table_rows = None if position_weight is None else position_weight.shape[0]
    numbers = op.Numbers(
        position_offset,
        float(scale),
        check.check_choice(_NAME, "norm", norm, NORMS),
        eps,
        dropout_p,
        _padding("padding_idx", padding_idx, rows),
        _padding("position_padding_idx", position_padding_idx, table_rows),
        scale_grad_by_freq,
    )
    tensors = (
        ids, weight, positions, position_weight, segments, segment_weight, norm_weight, norm_bias,
        seed,
    )  # fmt: skip
    if (_tuned(backend, tensors, numbers) or select(
        _NAME, backend, weight.device.type, weight.dtype
    )) in ("reference", "torch"):  # torch's ops, where nothing is dropped  # fmt: skip
        return op.by_reference(tensors, numbers)
    try:
        return op.forward(tensors, numbers)
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        if "must be in [0, " not in text:
            raise
        raise IndexError(text[max(0, text.find(f"fastattn::{_NAME}")) :]) from None


def _check_numbers(offset: Any, scale: Any, eps: Any, by_count: Any) -> None:
    check.check_int(_NAME, "position_offset", offset)
    if not isinstance(scale, (int, float)) or scale != scale:
        kind = ValueError if isinstance(scale, float) else TypeError
        fail(_NAME, f"scale must be a float, got {scale!r}", kind)
    check.check_number(_NAME, "eps", eps)
    check_bool(_NAME, "scale_grad_by_freq", by_count)


def _tuned(backend: str, tensors: tuple[Any, ...], numbers: op.Numbers) -> str | None:
    if not choices.wanted(_NAME, backend):
        return None
    ids, weight, positions, position_weight, segments, segment_weight, *norms, _ = tensors
    tables = [weight, position_weight, segment_weight, *norms]
    given = tuple(x is not None for x in (*tables, positions, segments))
    same = all(x is None or x.dtype == weight.dtype for x in tables)
    plain = same and not numbers.dropout_p and weight.device.type == "cpu"
    call = (
        weight.device.type, weight.dtype, wants_grad(*tables), plain, (ids.numel(),),
        (*weight.shape, numbers.norm, bool(numbers.dropout_p), given), 0,
    )  # fmt: skip
    return choices.pick(_NAME, backend, call, lambda: choices.Call(*call))


def _check_tables(ids: Any, weight: Any, position_weight: Any, segment_weight: Any) -> None:
    check.check_x(_NAME, weight, "weight")
    if weight.dim() != 2 or weight.shape[1] == 0:
        fail(_NAME, f"weight must have shape (rows, columns), got {tuple(weight.shape)}")
    _check_index("ids", ids, weight)
    for name, table in (("position_weight", position_weight), ("segment_weight", segment_weight)):
        if table is None or (isinstance(table, str) and name == "position_weight"):
            continue
        check.check_x(_NAME, table, name)
        if table.dim() != 2 or table.shape[1] != weight.shape[1]:
            fail(_NAME, f"{name} must have shape (rows, {weight.shape[1]}) to match weight, got "
                 f"{tuple(table.shape)}")  # fmt: skip
        if (table.dtype == torch.float64) != (weight.dtype == torch.float64):
            fail(
                _NAME, f"{name} must go with weight's {weight.dtype}, got {table.dtype}", TypeError
            )
        if table.device != weight.device:
            fail(_NAME, f"{name} must be on weight's device {weight.device}, got {table.device}")


def _check_index(name: str, index: Any, weight: Tensor) -> None:
    if not isinstance(index, Tensor):
        fail(_NAME, f"{name} must be a Tensor, got {type(index).__name__}", TypeError)
    check_strided(_NAME, name, index)
    if index.dtype not in (torch.int64, torch.int32):
        fail(_NAME, f"{name} must be int64 or int32, got {index.dtype}", TypeError)
    if index.device != weight.device:
        fail(_NAME, f"{name} must be on weight's device {weight.device}, got {index.device}")


def _index(name: str, index: Tensor | None, ids: Tensor) -> Tensor | None:
    """Positions or segments as ids' last dimensions; only what truly broadcasts is copied."""
    if index is None:
        return None
    _check_index(name, index, ids)
    while index.dim() > 1 and index.shape[0] == 1 and index.shape != ids.shape:
        index = index[0]
    if index.shape == ids.shape[ids.dim() - index.dim() :]:
        return index
    try:
        return index.expand(ids.shape).contiguous()
    except RuntimeError:
        fail(_NAME, f"{name} must be broadcastable to ids {tuple(ids.shape)}, got "
             f"{tuple(index.shape)}")  # fmt: skip


def _sinusoidal(
    ids: Tensor, positions: Tensor | None, offset: int, columns: int, weight: Tensor
) -> tuple[Tensor | None, Tensor]:
    """A table of the positions that occur, and which of its rows each token takes."""
    if positions is None:
        at = torch.arange(ids.shape[-1], device=ids.device) + offset
        rows = None
    else:
        at = positions.reshape(-1)
        rows = torch.arange(at.shape[0], device=ids.device).view(positions.shape)
    table = sinusoidal_positions(at, columns)
    return rows, table.double() if weight.dtype == torch.float64 else table


def _padding(name: str, index: int | None, rows: int | None) -> int:
    if index is None:
        return -1
    if rows is None:
        fail(_NAME, f"{name} belongs to a table of positions, got none")
    if isinstance(index, bool) or not isinstance(index, int) or not -rows <= index < rows:
        fail(_NAME, f"{name} must be in [{-rows}, {rows}), got {index!r}")
    return index % rows
