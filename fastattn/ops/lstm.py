"""``fastattn.lstm`` and ``fastattn.lstm_cell``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.ops.recurrent import Options, pair, run, run_cell
from fastattn.reference.recurrent import LSTM


def lstm(
    x: Tensor | PackedSequence,
    state: tuple[Tensor, Tensor] | None,
    weights: Sequence[Any],
    *,
    lengths: Tensor | Sequence[int] | None = None,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout_p: float = 0.0,
    recurrent_dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Long short-term memory over sequences: L layers, D directions.

    ``i, f, g, o = W_ih x + b_ih + W_hh h + b_hh``; ``c = sigmoid(f) c + sigmoid(i) tanh(g)``;
    ``h = sigmoid(o) tanh(c)``, with a projection ``h = W_hr (sigmoid(o) tanh(c))``.

    Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (1997); projection:
    Sak et al., arXiv:1402.1128; recurrent dropout: Gal and Ghahramani, arXiv:1512.05287. Products
    are summed, gates computed and c and h carried in fp32 whatever the dtype.

    T steps, B sequences, I inputs, H hidden features, P features of h (H without a projection).

    Args:
        x: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) for one sequence, or a
            PackedSequence; float32, bfloat16, float16 or float64; any strides.
        state: h_0 (L D, B, P) and c_0 (L D, B, H), for one sequence (L D, P) and (L D, H), in the
            caller's order of sequences; None = zeros.
        weights: an entry a layer and direction (layer 0 forward, layer 0 reverse, layer 1 forward,
            ...), each w_ih (4 H, I), w_hh (4 H, P), then b_ih and b_hh (4 H,) or neither, then
            w_hr (P, H) where h is projected. Gates in torch's order, i f g o. I is P D beyond the
            first layer. Also torch's flat list of all these tensors. All of x's dtype.
        lengths: (B,) int32 or int64, or a sequence of ints, each in [0, T], in any order: how many
            steps of each sequence there are. What lies beyond is neither read nor computed, and
            may be NaN; the output is 0 there, the last state is that of the last step there is (of
            none: the initial one), and a reverse direction starts at that step. On the CPU only the
            steps that exist cost time.
        batch_first: x and the output are (B, T, ...); the states never are. Default False.
        bidirectional: two directions a layer. Default False.
        dropout_p: probability in [0, 1] with which what goes from layer to layer is dropped.
        recurrent_dropout_p: probability in [0, 1) with which a feature of h is dropped where it
            enters W_hh h, in all steps alike: one mask a layer, sequence and call.
        seed: int or 1-element int64 tensor that fixes the masks. None draws them from torch's
            generator; those between layers are then the ones torch.nn.LSTM would draw.
        backend: "auto", "cuda", "triton", "cpu", "reference" or "torch".

    Returns:
        output, (h_n, c_n): the h of the last layer (T, B, D P) in x's layout and dtype, and the
        last states of every layer and direction, in the shapes and order of ``state``. The
        backward is bitwise repeatable whatever the thread count. Saved for it: x, the output, c
        and four gates a layer.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> w = [(torch.randn(32, 5), torch.randn(32, 8), torch.randn(32), torch.randn(32))]
    >>> x = torch.randn(7, 3, 5)
    >>> y, (h_n, c_n) = fastattn.lstm(x, None, w, lengths=torch.tensor([7, 0, 4]))
    >>> y.shape, torch.equal(h_n[0, 2], y[3, 2]), bool(y[4:, 2].any())
    (torch.Size([7, 3, 8]), True, False)
    """
    h, c = pair("lstm", state)
    y, h_n, c_n = run("lstm", LSTM, x, h, c, weights, Options(
        lengths, batch_first, bidirectional, dropout_p, recurrent_dropout_p, seed, backend
    ))  # fmt: skip
    return y, (h_n, c_n)


def lstm_cell(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM; see :func:`fastattn.lstm`.

    Args:
        x: (B, I), or (I,) for one sequence; float32, bfloat16, float16 or float64.
        state: h and c, (B, H) or (H,); None = zeros.
        w_ih: (4 H, I). w_hh: (4 H, H). b_ih, b_hh: (4 H,) or None. Gates in the order i f g o.
        backend: "auto", "cuda", "triton", "cpu", "reference" or "torch".

    Returns:
        h, c after the step, of x's dtype.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> x, state = torch.randn(2, 5), (torch.zeros(2, 4), torch.zeros(2, 4))
    >>> h, c = fastattn.lstm_cell(x, state, torch.randn(16, 5), torch.randn(16, 4))
    >>> h.shape
    torch.Size([2, 4])
    """
    h, c = pair("lstm_cell", state)
    return run_cell("lstm_cell", LSTM, x, h, c, (w_ih, w_hh, b_ih, b_hh), backend)
