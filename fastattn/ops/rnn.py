"""``fastattn.rnn`` and ``fastattn.rnn_cell``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.ops.layernorm_checks import check_choice
from fastattn.ops.recurrent import Options, run, run_cell
from fastattn.reference.recurrent import RNN_RELU, RNN_TANH

_CELLS = {"tanh": RNN_TANH, "relu": RNN_RELU}


def rnn(
    x: Tensor | PackedSequence,
    state: Tensor | None,
    weights: Sequence[Any],
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | Sequence[int] | None = None,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout_p: float = 0.0,
    recurrent_dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, Tensor]:
    """Elman's recurrent network over sequences: ``h = act(W_ih x + b_ih + W_hh h + b_hh)``.

    Elman, "Finding structure in time", Cognitive Science 14 (1990); recurrent dropout: Gal and
    Ghahramani, arXiv:1512.05287.

    Args:
        nonlinearity: "tanh" or "relu". Default "tanh".
        x, state, lengths, batch_first, bidirectional, dropout_p, recurrent_dropout_p, seed,
            backend: as :func:`fastattn.gru`.
        weights: an entry a layer and direction (layer 0 forward, layer 0 reverse, layer 1 forward,
            ...), each w_ih (H, I), w_hh (H, H), then b_ih and b_hh (H,) or neither; or torch's flat
            list of all these tensors.

    Returns:
        output (T, B, D H) in x's layout, h_n (L D, B, H). Saved for the backward: x and the output.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> w = [(torch.randn(8, 5), torch.randn(8, 8))]
    >>> y, h_n = fastattn.rnn(torch.randn(7, 3, 5), None, w, nonlinearity="relu")
    >>> torch.equal(h_n[0], y[-1])
    True
    """
    cell = check_choice("rnn", "nonlinearity", nonlinearity, _CELLS)
    return run("rnn", cell, x, state, None, weights, Options(
        lengths, batch_first, bidirectional, dropout_p, recurrent_dropout_p, seed, backend
    ))[:2]  # fmt: skip


def rnn_cell(
    x: Tensor,
    state: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str = "auto",
) -> Tensor:
    """One step of Elman's network; see :func:`fastattn.rnn`.

    Args:
        x: (B, I), or (I,) for one sequence; float32, bfloat16, float16 or float64.
        state: h, (B, H) or (H,); None = zeros.
        w_ih: (H, I). w_hh: (H, H). b_ih, b_hh: (H,) or None.
        nonlinearity: "tanh" or "relu". Default "tanh".
        backend: "auto", "cuda", "triton", "cpu", "reference" or "torch".

    Returns:
        h after the step, of x's dtype.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> fastattn.rnn_cell(torch.randn(5), None, torch.randn(4, 5), torch.randn(4, 4)).shape
    torch.Size([4])
    """
    cell = check_choice("rnn_cell", "nonlinearity", nonlinearity, _CELLS)
    return run_cell("rnn_cell", cell, x, state, None, (w_ih, w_hh, b_ih, b_hh), backend)[0]
