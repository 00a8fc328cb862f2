"""What ``lstm``, ``gru``, ``rnn`` and their cells accept, checked before any kernel runs.

Lengths are read on the CPU always and on another device only under
``fastattn.debug_checks(True)``: a read would synchronise.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from fastattn._debug import debug_checks_enabled
from fastattn.ops.attention_checks import check_strided, fail
from fastattn.ops.layernorm_checks import FLOATS
from fastattn.reference.recurrent import GATES, LSTM, Weights, by_layer, entry_size

_PARTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
_SAID = (
    "gates * hidden, features of the layer's input",
    "gates * hidden, features of h",
    "gates * hidden",
    "gates * hidden",
    "features of h, hidden",
)


def check_float(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        fail(op, f"{name} must be a Tensor, got {type(x).__name__}", TypeError)
    check_strided(op, name, x)
    if x.dtype not in FLOATS:
        fail(op, f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}", TypeError)


def check_goes_with(
    op: str, name: str, given: Any, x: Tensor, shape: tuple[int, ...], what: str
) -> None:
    """given: a tensor of x's dtype and device and of this very shape."""
    if not isinstance(given, Tensor):
        fail(op, f"{name} must be a Tensor, got {type(given).__name__}", TypeError)
    if given.dtype != x.dtype:
        fail(op, f"{name} must have x's dtype {x.dtype}, got {given.dtype}", TypeError)
    if given.device != x.device:
        fail(op, f"{name} must be on x's device {x.device}, got {given.device}")
    if given.shape != shape:
        fail(op, f"{name} must have shape {shape} ({what}), got {tuple(given.shape)}")


def check_x(op: str, x: Any, packed: bool, batch_first: bool) -> int:
    """A padded batch, one sequence, or the rows of a packed batch; returns its dimensions."""
    if type(x) is Tensor and x.dtype in FLOATS and x.layout is torch.strided:
        dims = x.dim()
        if dims == 2 or (dims == 3 and not packed):
            return dims
    check_float(op, "x.data" if packed else "x", x)
    if packed and x.dim() != 2:
        fail(op, f"x.data must have shape (rows, features), got {tuple(x.shape)}")
    if x.dim() not in (2, 3):
        batch = "(B, T, I)" if batch_first else "(T, B, I)"
        fail(op, f"x must have shape {batch}, or (T, I) for one sequence, got {tuple(x.shape)}")
    return x.dim()  # type: ignore[no-any-return]


def check_layers(
    op: str, weights: Any, x: Tensor, directions: int, cell: int
) -> list[tuple[Weights, ...]]:
    """The weights by layer, every one checked. x: (..., I)."""
    features = x.shape[-1]
    if directions == 1 and type(weights) is list and len(weights) == 4:
        # torch's list for one layer with biases: a small call takes as long as its checks.
        w_ih, w_hh, b_ih, b_hh = weights
        if plainly_right(w_ih, w_hh, b_ih, b_hh, x, features, cell):
            return [((w_ih, w_hh, b_ih, b_hh, None),)]
    _check_entries(op, weights, GATES[cell])
    layers = by_layer(weights, directions, GATES[cell])
    if len(layers[-1]) != directions:
        fail(
            op,
            f"weights must have {directions} entries a layer for bidirectional="
            f"{directions == 2}, got {sum(map(len, layers))}",
        )
    w_hh = layers[0][0][1]
    _check_matrix(op, "weights[0]: w_hh", w_hh)
    rows, P = w_hh.shape
    H, odd = divmod(rows, GATES[cell])
    if odd or not H:
        fail(op, f"weights[0]: w_hh must have {GATES[cell]} H rows, got {rows}")
    for i, entries in enumerate(layers):
        for d, entry in enumerate(entries):
            if entry[4] is not None or not plainly_right(*entry[:4], x, features, cell, H):
                if i == d == 0:
                    check_x_fits(op, "w_ih", entry[0], [w for e in layers for y in e for w in y], x)
                _check_entry(op, i * directions + d, entry, x, (rows, features, H, P), cell)
        features = P * directions
    return layers


def plainly_right(
    w_ih: Any,
    w_hh: Any,
    b_ih: Any,
    b_hh: Any,
    x: Tensor,
    features: int,
    cell: int,
    H: int | None = None,
) -> bool:
    """The common weights in few steps; what is unusual goes through every check by name."""
    try:
        dtype, device, shape = x.dtype, x.device, w_hh.shape
        rows, columns = shape
        return (
            rows == GATES[cell] * columns
            and (H is None or columns == H)
            and columns > 0
            and w_ih.shape == (rows, features)
            and b_ih.shape == (rows,)
            and b_hh.shape == (rows,)
            and w_ih.dtype is dtype
            and w_hh.dtype is dtype
            and b_ih.dtype is dtype
            and b_hh.dtype is dtype
            and w_ih.device == device
            and w_hh.device == device
            and b_ih.device == device
            and b_hh.device == device
        )
    except (AttributeError, ValueError):  # no tensors, no matrix
        return False


def check_x_fits(op: str, name: str, w_ih: Any, weights: Sequence[Any], x: Tensor) -> None:
    """Where the weights agree with one another, x is what is wrong."""
    tensors = [w for w in weights if w is not None]
    if not all(isinstance(w, Tensor) for w in tensors):
        return  # named below
    dtypes, devices = {w.dtype for w in tensors}, {w.device for w in tensors}
    if len(dtypes) == 1 and x.dtype not in dtypes:
        fail(op, f"x must have the weights' dtype {dtypes.pop()}, got {x.dtype}", TypeError)
    if len(devices) == 1 and x.device not in devices:
        fail(op, f"x must be on the weights' device {devices.pop()}, got {x.device}")
    if w_ih.dim() == 2 and w_ih.shape[1] != x.shape[-1]:
        shape = f"x has shape {tuple(x.shape)}, {name} {tuple(w_ih.shape)}"
        fail(op, f"x must have {w_ih.shape[1]} features, got {x.shape[-1]} ({shape})")


def _check_entries(op: str, weights: Any, gates: int) -> None:
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence) or not weights:
        fail(
            op,
            "weights must be a sequence of (w_ih, w_hh, b_ih, b_hh), one a layer and direction, "
            f"got {_describe(weights)}",
            TypeError,
        )
    if isinstance(weights[0], Tensor):
        if any(not isinstance(w, Tensor) for w in weights) or len(weights) < 2:
            fail(op, "weights as a flat sequence must be at least two tensors, nothing else",
                 TypeError)  # fmt: skip
        if weights[1].dim() != 2:
            fail(op, f"weights[1] must be the matrix w_hh, got shape {tuple(weights[1].shape)}")
        each = entry_size(weights, gates)
        if len(weights) % each == 1:  # no matrix w_hh; other remains are named below
            fail(op, f"weights must have {each} tensors a layer and direction, as the first ones "
                 f"are, got {len(weights)}")  # fmt: skip
        return
    for i, entry in enumerate(weights):
        if not isinstance(entry, Sequence) or not 2 <= len(entry) <= 5:
            fail(
                op,
                f"weights[{i}] must be w_ih, w_hh, then b_ih and b_hh or neither, then w_hr of a "
                f"projection, got {_describe(entry)}",
                TypeError,
            )


def _check_matrix(op: str, name: str, w: Any) -> None:
    if not isinstance(w, Tensor):
        fail(op, f"{name} must be a Tensor, got {type(w).__name__}", TypeError)
    if w.dim() != 2 or not w.shape[1]:
        fail(op, f"{name} must be a matrix, got {_describe(w)}")


def _describe(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a Tensor of shape {tuple(x.shape)}"
    if isinstance(x, Sequence) and not isinstance(x, str):
        return f"{type(x).__name__} of {len(x)}"
    return type(x).__name__


def _check_entry(
    op: str, index: int, entry: Weights, x: Tensor, sizes: tuple[int, int, int, int], cell: int
) -> None:
    rows, features, H, P = sizes
    w_hr = entry[4]
    shapes = ((rows, features), (rows, P), (rows,), (rows,), (P, H))
    for name, given, shape, what in zip(_PARTS, entry, shapes, _SAID, strict=True):
        if given is not None or name in ("w_ih", "w_hh"):
            check_goes_with(op, f"weights[{index}]: {name}", given, x, shape, what)
    if w_hr is None and P != H:
        fail(
            op,
            f"weights[{index}]: w_hh must have {H} columns without a projection w_hr, got {P}",
        )
    if w_hr is not None and cell != LSTM:
        fail(op, f"weights[{index}]: w_hr, a projection, belongs to the LSTM")


def check_lengths(op: str, lengths: Any, T: int, B: int) -> Tensor:
    """(B,) int32 or int64; their values where they can be read."""
    if not isinstance(lengths, Tensor):
        if hasattr(lengths, "__array__") and hasattr(lengths, "tolist"):  # of NumPy
            lengths = lengths.tolist()
        if not isinstance(lengths, Sequence) or isinstance(lengths, str):
            fail(
                op,
                f"lengths must be a Tensor or a sequence of ints, got {type(lengths).__name__}",
                TypeError,
            )
        for n in lengths:
            if isinstance(n, bool) or not hasattr(n, "__index__"):
                fail(op, f"lengths must be ints, got {n!r}", TypeError)
        lengths = torch.tensor([index(n) for n in lengths], dtype=torch.int64)
    if lengths.dtype not in (torch.int32, torch.int64):
        fail(op, f"lengths must be int32 or int64, got {lengths.dtype}", TypeError)
    if lengths.shape != (B,):
        fail(op, f"lengths must have shape ({B},), one a sequence, got {tuple(lengths.shape)}")
    if torch.compiler.is_compiling() or not B:
        return lengths  # type: ignore[no-any-return]
    if lengths.device.type == "cpu" or debug_checks_enabled():
        least, most = (int(x) for x in lengths.aminmax())
        if least < 0 or most > T:
            fail(op, f"lengths must be in [0, {T}], got {least if least < 0 else most}")
    return lengths  # type: ignore[no-any-return]


def check_packed(op: str, rows: int, sizes: Tensor, B: int) -> None:
    """batch_sizes of a PackedSequence, which anybody can make by hand; they lie on the CPU."""
    if torch.compiler.is_compiling():
        return
    if sizes.dtype not in (torch.int32, torch.int64) or sizes.dim() != 1:
        fail(op, f"x.batch_sizes must be one dimension of int64, got {_describe(sizes)} of "
                 f"{sizes.dtype}", TypeError)  # fmt: skip
    counts = sizes.tolist()
    if not counts:
        counts = [0]
    if counts[0] != B or counts[-1] < 0 or counts != sorted(counts, reverse=True):
        fail(op, f"x.batch_sizes must fall from the number of sequences, {B}, got {counts}")
    if sum(counts) != rows:
        fail(op, f"x.batch_sizes must add up to x.data's {rows} rows, got {sum(counts)}")


def check_probability(op: str, name: str, p: Any, most: float) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        fail(op, f"{name} must be a float, got {p!r}", TypeError)
    if not 0.0 <= p < 1.0 and p != most:
        fail(op, f"{name} must be in [0, 1{']' if most == 1.0 else ')'}, got {p}")


def check_cell(op: str, x: Any, h: Any, c: Any, weights: tuple[Any, ...], cell: int) -> int:
    """One step: x (B, I) and states (B, H), or (I,) and (H,). Returns H."""
    w_ih, w_hh, b_ih, b_hh = weights
    if (
        type(x) is Tensor
        and x.dim() == 2
        and x.dtype in FLOATS
        and plainly_right(w_ih, w_hh, b_ih, b_hh, x, x.shape[1], cell)
        and _are_states(h, c, x, (x.shape[0], w_hh.shape[1]), cell)
    ):
        return w_hh.shape[1]  # type: ignore[no-any-return]
    check_float(op, "x", x)
    if x.dim() not in (1, 2):
        fail(op, f"x must have shape (B, I), or (I,) for one sequence, got {tuple(x.shape)}")
    _check_matrix(op, "w_hh", w_hh)
    rows, H = w_hh.shape
    if rows != GATES[cell] * H:
        fail(op, f"w_hh must have {GATES[cell]} H rows and H columns, got {tuple(w_hh.shape)}")
    check_x_fits(op, "w_ih", w_ih, weights, x)
    for i, given in enumerate(weights):
        if given is not None or i < 2:
            shape = ((rows, x.shape[-1]), (rows, H))[i] if i < 2 else (rows,)
            check_goes_with(op, _PARTS[i], given, x, shape, _SAID[i])
    if h is not None or c is not None:
        for name, state in (("h", h), ("c", c))[: 2 if cell == LSTM else 1]:
            check_goes_with(op, name, state, x, (*x.shape[:-1], H), "x's batch, hidden")
    return H  # type: ignore[no-any-return]


def _are_states(h: Any, c: Any, x: Tensor, shape: tuple[int, int], cell: int) -> bool:
    if h is None and c is None:
        return True
    for state in (h, c) if cell == LSTM else (h,):
        if not isinstance(state, Tensor) or state.shape != shape or state.dtype is not x.dtype:
            return False
        if state.device != x.device:
            return False
    return True
