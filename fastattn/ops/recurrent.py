"""What ``lstm``, ``gru``, ``rnn`` and their cells share: layers, layouts, masks, states.

T steps, B sequences, I inputs, H hidden features, P features of h (H without a projection), D
directions, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn import choices
from fastattn.backends import select
from fastattn.ops import recurrent_checks as check
from fastattn.ops import recurrent_gpu  # noqa: F401  registers implementations
from fastattn.ops import recurrent_rows as layout
from fastattn.ops._eager import autocast_dtype, transformed, wants_grad
from fastattn.ops._guard import as_named
from fastattn.ops.attention_checks import fail, seed_tensor
from fastattn.ops.layernorm import add_layer_norm
from fastattn.ops.recurrent_op import layer
from fastattn.ops.recurrent_step import fused, step
from fastattn.ops.stock import recurrent as stock_layers
from fastattn.ops.stock import recurrent_cell as stock_cell
from fastattn.reference.dropout import draw_seed
from fastattn.reference.recurrent import GATES, GRU, LSTM, Weights, cell_step, layer_seed, stack


def pair(op: str, state: Any) -> tuple[Any, Any]:
    """h and c of the LSTM's state."""
    if state is None:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        got = type(state).__name__
        got += f" of {len(state)}" if isinstance(state, (tuple, list)) else ""
        fail(op, f"state must be a pair (h, c) or None, got {got}", TypeError)
    return state[0], state[1]


class Options(NamedTuple):
    """The keyword arguments that all of them take, in the order of their signatures."""

    lengths: Any
    batch_first: bool
    bidirectional: bool
    dropout_p: float
    recurrent_dropout_p: float
    seed: int | Tensor | None
    backend: str


def run(
    op: str,
    cell: int,
    x: Any,
    h: Tensor | None,
    c: Tensor | None,
    weights: Any,
    options: Options,
) -> tuple[Any, Tensor, Tensor]:
    """All layers; h, c: the initial states, (L D, B, P) and (L D, B, H), None = zeros.

    Returns:
        y as the caller gave x, h_n, c_n (empty but for the LSTM).
    """
    batch_first, D = options.batch_first, 2 if options.bidirectional else 1
    packed = type(x) is not Tensor and isinstance(x, PackedSequence)
    data = x.data if packed else x
    dims = check.check_x(op, data, packed, batch_first)
    dtype = autocast_dtype(data.device)
    if dtype is not None:
        # GRU's alone: torch's LSTM and RNN give the autocast dtype.
        wide = cell == GRU and _carried_wide(dtype, data, h)
        data, h, c, weights = _cast(dtype, data, h, c, weights)
        x = PackedSequence(data, *x[1:]) if packed else data
        if wide:
            with torch.autocast("cpu", enabled=False):
                y, h_n, c_n = run(op, cell, x, h, c, weights, options)
            y = PackedSequence(y.data.float(), *y[1:]) if packed else y.float()
            return y, h_n.float(), c_n
    layers = check.check_layers(op, weights, data, D, cell)
    one = dims == 2 and not packed  # one sequence, without a dimension of the batch
    if packed:
        B = layout.batch_of_packed(x)
        check.check_packed(op, data.shape[0], x.batch_sizes, B)
    else:
        B = 1 if one else data.shape[0 if batch_first else 1]
    if h is not None or c is not None:
        _check_states(op, h, c, data, layers, cell, None if one else B)
    if options.dropout_p or options.recurrent_dropout_p or options.seed is not None:
        options = _check_masks(op, options, data)
    if options.lengths is not None:
        if packed or one:
            got = "a PackedSequence" if packed else f"one sequence of shape {tuple(data.shape)}"
            fail(op, f"lengths belong to a padded batch, x is {got}")
        T = data.shape[1 if batch_first else 0]
        options = options._replace(lengths=check.check_lengths(op, options.lengths, T, B))
    chosen = None
    if choices.wanted(op, options.backend):
        call = _call(data, (h, c), layers, options, packed, B)
        chosen = choices.pick(op, options.backend, call, lambda: choices.Call(*call))
    chosen = chosen or select(op, options.backend, data.device.type, data.dtype)
    if chosen == "torch" and not transformed():
        return stock_layers(data, h, c, layers, cell, batch_first, D == 2)
    if chosen in ("reference", "torch") or transformed():
        named = options._asdict()
        del named["backend"]
        return stack(x, h, c, [entry for entries in layers for entry in entries], cell, **named)
    if packed:
        rows = layout.of_packed(x, B)
    elif one:
        rows = layout.Rows(data, data.shape[0], 1)
    else:
        rows = layout.of_padded(data, options.lengths, batch_first)
    masks = Masks(options, rows) if options.dropout_p or options.recurrent_dropout_p else None
    h, c = _initial(rows, layers, h, c, cell, D, one)
    with as_named(options.backend, chosen):
        y, h_n, c_n = _layers(rows, layers, h, c, cell, D, masks, chosen)
    if rows.inverse is not None:
        h_n = h_n.index_select(1, rows.inverse)
        c_n = c_n.index_select(1, rows.inverse) if cell == LSTM else c_n
    if one:
        return y, h_n.squeeze(1), c_n.squeeze(1) if cell == LSTM else c_n
    return layout.to_caller(y, rows, x, packed, batch_first), h_n, c_n


def _call(
    x: Tensor,
    states: tuple[Tensor | None, Tensor | None],
    layers: list[tuple[Weights, ...]],
    options: Options,
    packed: bool,
    B: int,
) -> tuple[Any, ...]:
    """The fields of choices.Call."""
    first = layers[0][0]
    drops, ragged = (
        bool(options.dropout_p or options.recurrent_dropout_p),
        packed or options.lengths is not None,
    )
    training = wants_grad(x, *states, *(w for of in layers for entry in of for w in entry))
    rows, features = x.numel() // x.shape[-1], x.shape[-1]
    # cuDNN's backward has no derivative, and promises no order of its sums.
    kept = x.device.type == "cpu" or not training
    # A projection is computed step by step there, with a warning.
    plain = kept and not drops and not ragged and rows > 0 and first[4] is None
    shape = (len(layers), len(layers[0]), features, *first[1].shape, *map(_given, first[2:]))
    fixed = (*shape, drops, ragged, options.batch_first)
    return x.device.type, x.dtype, training, plain, (rows // max(B, 1), B), fixed, 0


def _given(x: Tensor | None) -> bool:
    return x is not None


def _check_masks(op: str, options: Options, x: Tensor) -> Options:
    """The dropouts checked, the seed a tensor."""
    check.check_probability(op, "dropout_p", options.dropout_p, 1.0)
    check.check_probability(op, "recurrent_dropout_p", options.recurrent_dropout_p, 0.0)
    if options.seed is None:
        return options
    return options._replace(seed=seed_tensor(op, options.seed, 1.0, x))


def _initial(
    rows: layout.Rows,
    layers: list[tuple[Weights, ...]],
    h: Tensor | None,
    c: Tensor | None,
    cell: int,
    D: int,
    one: bool,
) -> tuple[Tensor, Tensor | None]:
    """The initial states, (L D, B, P) and (L D, B, H), in the order of the rows' places."""
    if h is not None:
        if one:
            return h.unsqueeze(1), None if c is None else c.unsqueeze(1)
        if rows.order is None:
            return h, c
        return h.index_select(1, rows.order), None if c is None else c.index_select(1, rows.order)
    gate_rows, P = layers[0][0][1].shape
    count = len(layers) * D
    h = rows.x.new_zeros((count, rows.B, P))
    if cell != LSTM:
        return h, None
    H = gate_rows // GATES[LSTM]
    return h, h if H == P else h.new_zeros((count, rows.B, H))  # nobody writes to them


def _layers(
    rows: layout.Rows,
    layers: list[tuple[Weights, ...]],
    h: Tensor,
    c: Tensor | None,
    cell: int,
    D: int,
    masks: Masks | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x, T, _, offsets, lengths, *_ = rows
    reverse = 2 if D == 2 else 0
    if len(layers) == 1:
        mask = None if masks is None else masks.of_h(0, layers[0])
        return layer(x, layers[0], h, c, mask, offsets, lengths, T, cell, reverse, backend)
    h_n, c_n = [], []
    for i, entries in enumerate(layers):
        mask = None
        if masks is not None:
            mask = masks.of_h(i, entries)
            x = masks.between(x, i) if i else x
        mine = slice(i * D, (i + 1) * D)
        x, h_i, c_i = layer(
            x, entries, h[mine], None if c is None else c[mine], mask, offsets, lengths, T, cell,
            reverse, backend,
        )  # fmt: skip
        h_n.append(h_i)
        c_n.append(c_i)
    return x, torch.cat(h_n), torch.cat(c_n) if cell == LSTM else c_n[0]


class Masks:
    """The dropouts of a call.

    Recurrent dropout has one mask of h a layer and sequence, the same in every step (Gal and
    Ghahramani, arXiv:1512.05287). Both masks are Philox words of the seed, in the padded rows of
    the caller's sequences whatever the layout. Without a seed F.dropout runs between layers: from
    the same state of torch's generator the masks are those of torch's modules.
    """

    def __init__(self, options: Options, rows: layout.Rows) -> None:
        self._p_between, self._p_h = options.dropout_p, options.recurrent_dropout_p
        self._rows = rows
        self._seed = self._h_seed = options.seed
        if self._p_h and self._seed is None:
            self._h_seed = draw_seed(rows.x.device)

    def of_h(self, index: int, entries: tuple[Weights, ...]) -> Tensor | None:
        """(D, B, P) of a layer, None where nothing drops."""
        if not self._p_h:
            return None
        assert self._h_seed is not None
        D, P = len(entries), entries[0][1].shape[1]
        B, order = self._rows.B, self._rows.order
        mask = self._words((D * B, P), self._p_h, layer_seed(self._h_seed, 2 * index))
        mask = mask.view(D, B, P)
        return mask if order is None else mask.index_select(1, order)

    def between(self, y: Tensor, index: int) -> Tensor:
        """What layer ``index`` gets of the output y of the one below."""
        if not self._p_between:
            return y
        if self._seed is None:
            return F.dropout(y, self._p_between)
        if self._p_between == 1.0:
            return torch.zeros_like(y)
        rows, seed = self._rows, layer_seed(self._seed, 2 * index - 1)
        places = layout.padded_places(rows)
        steps = rows.T * rows.B
        mask = self._words((steps, y.shape[1]), self._p_between, seed)
        return y * (mask if places is None else mask.index_select(0, places))

    def _words(self, shape: tuple[int, int], p: float, seed: int | Tensor) -> Tensor:
        """0 or 1 / (1 - p): the dropout of a tensor of ones, by the backend that there is."""
        if 0 in shape:
            return self._rows.x.new_ones(shape)
        return add_layer_norm(self._rows.x.new_ones(shape), norm=None, dropout_p=p, seed=seed)[1]


def _check_states(
    op: str, h: Any, c: Any, x: Tensor, layers: Any, cell: int, B: int | None
) -> None:
    """Shapes (L D, B, P) and (L D, B, H); without B for one sequence."""
    gate_rows, P = layers[0][0][1].shape
    count = len(layers) * len(layers[0])
    batch = () if B is None else (B,)
    what = f"layers * directions, {'' if B is None else 'batch, '}features"
    both = cell == LSTM
    check.check_goes_with(op, "state[0]" if both else "state", h, x, (count, *batch, P), what)
    if both:
        check.check_goes_with(op, "state[1]", c, x, (count, *batch, gate_rows // GATES[LSTM]), what)


def _cast(dtype: torch.dtype, *given: Any) -> list[Any]:
    """Tensors, also in tuples and lists, in a dtype of autocast's (float64 stays)."""

    def cast(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(dtype) if x.dtype in _CAST else x
        return type(x)(map(cast, x)) if isinstance(x, (tuple, list)) else x

    return [cast(x) for x in given]


_CAST = (torch.float32, torch.bfloat16, torch.float16)


def _carried_wide(dtype: torch.dtype, x: Tensor, state: Any) -> bool:
    """Whether torch carries a state in fp32 through its cells and its GRU on a CPU under autocast,
    which has no rule for them: products alone are in its dtype, and the state keeps its own, that
    of x where none is given."""
    if x.device.type != "cpu":
        return False
    kept = state.dtype if isinstance(state, Tensor) else x.dtype
    return torch.promote_types(dtype, kept) == torch.float32


def run_cell(
    op: str,
    cell: int,
    x: Any,
    h: Any,
    c: Any,
    weights: tuple[Any, Any, Any, Any],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """One step, h and c after it; x (B, I), states (B, H) or None, or all without B."""
    dtype = autocast_dtype(x.device) if isinstance(x, Tensor) else None
    if dtype is not None:
        # A loop over a cell would round its state once a step: all of it in fp32, which is no
        # slower than casting the weights in every step. torch's RNN cell gives the autocast dtype.
        if cell in (LSTM, GRU) and _carried_wide(dtype, x, c if cell == LSTM else h):
            x, h, c, weights = _cast(torch.float32, x, h, c, weights)
            with torch.autocast("cpu", enabled=False):
                return run_cell(op, cell, x, h, c, weights, backend)
        x, h, c, weights = _cast(dtype, x, h, c, weights)
    H = check.check_cell(op, x, h, c, weights, cell)
    chosen = None
    if choices.wanted(op, backend):
        training = wants_grad(x, h, c, *weights)
        plain = not (training and x.device.type != "cpu") and x.numel() > 0
        sizes = (x.shape[0] if x.dim() == 2 else 1,)
        fixed = (x.shape[-1], H, cell, _given(weights[2]))
        call = (x.device.type, x.dtype, training, plain, sizes, fixed, 0)
        chosen = choices.pick(op, backend, call, lambda: choices.Call(*call))
    chosen = chosen or select(op.removesuffix("_cell"), backend, x.device.type, x.dtype)
    if chosen == "torch" and not transformed():
        return stock_cell(x, h, c, weights, cell)
    if chosen in ("reference", "torch") or transformed():
        return cell_step(x, h, c, weights, cell)
    one = x.dim() == 1
    if one:
        x = x.unsqueeze(0)
    if h is None:
        h = x.new_zeros((x.shape[0], H))
        c = h if cell == LSTM else None  # nobody writes to them
    elif one:
        h, c = h.unsqueeze(0), None if c is None else c.unsqueeze(0)
    if chosen == "cpu" and fused(x, h):
        y, c_n = step(x, *weights, h, c, cell)
    else:
        states = h.unsqueeze(0), None if c is None else c.unsqueeze(0)
        with as_named(backend, chosen):
            y, _, c_n = layer(x, ((*weights, None),), *states, None, None, None, 1, cell, 0, chosen)
        if cell == LSTM:
            c_n = c_n.squeeze(0)
    if one:
        y = y.squeeze(0)
        c_n = c_n.squeeze(0) if cell == LSTM else c_n
    return y, c_n
