"""Torch's own ops behind the interface of ours: ``backend="torch"``.

``auto`` takes them where ``fastattn.tune`` found them faster on this machine, so that a swapped
model is not slower than it was. They serve calls that mean the same to torch, gradients included
(double backward and a row without keys too); every op says which (``plain``). Dropout is not among
them: torch's masks are others. On CUDA neither are masks, and training only where torch's kernels
have what ours promise; see the ops.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import choices, reference
from fastattn.ops._eager import differentiable_gradients, make_function, transformed, wants_grad
from fastattn.reference.layernorm_ffn import activate
from fastattn.reference.recurrent import GRU, LSTM, RNN_RELU


def row_choice(
    op: str,
    backend: str,
    x: Tensor,
    columns: int,
    others: tuple[Tensor | None, ...],
    plain: bool,
    fixed: tuple[Any, ...],
    width: int = 0,
) -> str | None:
    """The tuned backend of an op over rows of x; others: what it takes besides x."""
    if not choices.wanted(op, backend):
        return None
    dtype, dtypes = x.dtype, tuple([None if y is None else y.dtype for y in others])
    training = torch.is_grad_enabled() and wants_grad(x, *others)

    def describe() -> choices.Call:
        kinds = "".join("-" if t is None else "+" if t == dtype else str(t) for t in dtypes)
        same = all(t is None or t == dtype for t in dtypes)
        rows = x.numel() // max(columns, 1)
        every = (columns, *fixed, kinds)
        return choices.Call(x.device.type, dtype, training, plain and same, (rows,), every, width)

    key = (x.shape, columns, dtype, x.is_cuda, training, plain, dtypes, fixed)
    return choices.pick(op, backend, key, describe)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """F.scaled_dot_product_attention."""
    if not wants_grad(q, k, v) or torch.compiler.is_compiling() or transformed():
        return _sdpa(q, k, v, mask, causal, scale)
    return _Attention.apply(q, k, v, mask, causal, scale)  # type: ignore[no-any-return]


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def _attention_forward(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    ctx.save_for_backward(q, k, v)
    ctx.rest = (mask, causal, scale)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in (q, k, v)]
        o = _sdpa(leaves[0], leaves[1], leaves[2], mask, causal, scale)
    ctx.graph = (o, leaves)
    return o.detach()


def _attention_backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    """By torch's kernel, which has no derivative: under create_graph by plain PyTorch."""
    needs = tuple(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():
        mask, causal, scale = ctx.rest

        def formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any]:
            return (reference.attention(q, k, v, mask=mask, causal=causal, scale=scale),)

        grads = differentiable_gradients(formula, ctx.saved_tensors, needs, (do,))
        return *grads, None, None, None
    o, leaves = ctx.graph
    wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
    found = iter(torch.autograd.grad(o, wanted, do, retain_graph=True))
    return *(next(found) if need else None for need in needs), None, None, None


_Attention = make_function(
    "StockAttention", forward=_attention_forward, backward=_attention_backward
)


def rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, list(shape), weight, eps)


def recurrent(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    layers: list[tuple[Any, ...]],
    cell: int,
    batch_first: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n, c_n (empty but for the LSTM) as torch.nn.LSTM, GRU and RNN compute them."""
    entries = [entry for layer in layers for entry in layer]
    flat = [w for entry in entries for w in entry if w is not None]
    gate_rows, P = entries[0][1].shape
    batch = (x.shape[0 if batch_first else 1],) if x.dim() == 3 else ()
    if h is None:
        h = x.new_zeros((len(entries), *batch, P))
        if cell == LSTM:
            c = x.new_zeros((len(entries), *batch, gate_rows // 4))
    biased = entries[0][2] is not None
    rest = (flat, biased, len(layers), 0.0, wants_grad(x, h, c, *flat), bidirectional, batch_first)
    if x.dim() == 2:  # torch's functions, not its modules, take batches alone
        states = [s.unsqueeze(1) for s in (h, c) if s is not None]
        y, *last = _recurrent(x.unsqueeze(1), states, cell, (*rest[:-1], False))
        y, last = y.squeeze(1), [s.squeeze(1) for s in last]
    else:
        y, *last = _recurrent(x, [s for s in (h, c) if s is not None], cell, rest)
    return y, last[0], last[1] if cell == LSTM else x.new_empty(0)


def _recurrent(x: Tensor, states: list[Tensor], cell: int, rest: tuple[Any, ...]) -> Any:
    if cell == LSTM:
        return torch.lstm(x, states, *rest)
    if cell == GRU:
        return torch.gru(x, states[0], *rest)
    return (torch.rnn_relu if cell == RNN_RELU else torch.rnn_tanh)(x, states[0], *rest)


def recurrent_cell(
    x: Tensor, h: Tensor | None, c: Tensor | None, weights: tuple[Any, ...], cell: int
) -> tuple[Tensor, Tensor]:
    """h and c as torch.nn.LSTMCell, GRUCell and RNNCell compute them; c is h but for the LSTM."""
    if h is None:
        h = x.new_zeros((*x.shape[:-1], weights[1].shape[1]))
    if x.dim() == 1:  # torch's functions, not its modules, take batches alone
        c = None if c is None else c.unsqueeze(0)
        h, c = recurrent_cell(x.unsqueeze(0), h.unsqueeze(0), c, weights, cell)
        return h.squeeze(0), c.squeeze(0)
    if cell == LSTM:
        return torch.lstm_cell(x, (h, h if c is None else c), *weights)
    step = {GRU: torch.gru_cell, RNN_RELU: torch.rnn_relu_cell}.get(cell, torch.rnn_tanh_cell)
    y = step(x, h, *weights)
    return y, y


def encoder_layer(
    x: Tensor,
    mask: Tensor | None,
    weights: Any,
    *,
    heads: int,
    scale: float,
    activation: str,
    eps: tuple[float, float],
    causal: bool,
    pre_norm: bool,
) -> Tensor:
    """As :func:`fastattn.ops.encoder_layer.encoder_layer`, of the ops that a stock model calls."""
    w, (B, S, D) = weights, x.shape

    def attend(x: Tensor) -> Tensor:
        if w.wk is None:
            qkv = F.linear(x, w.wq, w.bq).chunk(3, -1)
        else:
            qkv = tuple(F.linear(x, p, b) for p, b in ((w.wq, w.bq), (w.wk, w.bk), (w.wv, w.bv)))
        q, k, v = (y.view(B, S, heads, D // heads).transpose(1, 2) for y in qkv)
        o = _sdpa(q, k, v, mask, causal, scale).transpose(1, 2).reshape(B, S, D)
        return F.linear(o, w.wo, w.bo)

    def feed(x: Tensor) -> Tensor:
        return F.linear(activate(F.linear(x, w.w1, w.b1), activation), w.w2, w.b2)

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), w.norm1_weight, w.norm1_bias, eps[0])

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), w.norm2_weight, w.norm2_bias, eps[1])

    if pre_norm:
        x = x + attend(norm1(x))
        return x + feed(norm2(x))
    x = norm1(x + attend(x))
    return norm2(x + feed(x))
