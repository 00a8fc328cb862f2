"""``fastattn.gru`` and ``fastattn.gru_cell``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.ops.recurrent import Options, run, run_cell
from fastattn.reference.recurrent import GRU


def gru(
    x: Tensor | PackedSequence,
    state: Tensor | None,
    weights: Sequence[Any],
    *,
    lengths: Tensor | Sequence[int] | None = None,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout_p: float = 0.0,
    recurrent_dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, Tensor]:
    """Gated recurrent units over sequences: L layers, D directions.

    ``r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)``, ``z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)``,
    ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``, ``h = (1 - z) n + z h``.

    Cho et al., arXiv:1406.1078, with r behind the product as cuDNN and torch have it; recurrent
    dropout: Gal and Ghahramani, arXiv:1512.05287. Products are summed, gates computed and h
    carried in fp32 whatever the dtype.

    T steps, B sequences, I inputs, H hidden features.

    Args:
        x: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) for one sequence, or a
            PackedSequence; float32, bfloat16, float16 or float64; any strides.
        state: h_0 (L D, B, H), for one sequence (L D, H), in the caller's order of sequences;
            None = zeros.
        weights: an entry a layer and direction (layer 0 forward, layer 0 reverse, layer 1 forward,
            ...), each w_ih (3 H, I), w_hh (3 H, H), then b_ih and b_hh (3 H,) or neither.
            Gates in torch's order, r z n. I is H D beyond the first layer. Also torch's flat
            list of all these tensors. All of x's dtype.
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
            generator; those between layers are then the ones torch.nn.GRU would draw.
        backend: "auto", "cuda", "triton", "cpu", "reference" or "torch".

    Returns:
        output, h_n: the h of the last layer (T, B, D H) in x's layout and dtype, and the last h of
        every layer and direction, in the shape and order of ``state``. The backward is bitwise
        repeatable whatever the thread count. Saved for it: x, the output and four gates a layer.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> w = [(torch.randn(24, 5), torch.randn(24, 8), torch.randn(24), torch.randn(24))]
    >>> x = torch.randn(7, 3, 5)
    >>> y, h_n = fastattn.gru(x, None, w, lengths=[7, 0, 4])
    >>> y.shape, torch.equal(h_n[0, 2], y[3, 2]), bool(y[4:, 2].any())
    (torch.Size([7, 3, 8]), True, False)
    """
    return run("gru", GRU, x, state, None, weights, Options(
        lengths, batch_first, bidirectional, dropout_p, recurrent_dropout_p, seed, backend
    ))[:2]  # fmt: skip


def gru_cell(
    x: Tensor,
    state: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One step of a GRU; see :func:`fastattn.gru`.

    Args:
        x: (B, I), or (I,) for one sequence; float32, bfloat16, float16 or float64.
        state: h, (B, H) or (H,); None = zeros.
        w_ih: (3 H, I). w_hh: (3 H, H). b_ih, b_hh: (3 H,) or None. Gates in the order r z n.
        backend: "auto", "cuda", "triton", "cpu", "reference" or "torch".

    Returns:
        h after the step, of x's dtype.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> x, h = torch.randn(2, 5), torch.zeros(2, 4)
    >>> fastattn.gru_cell(x, h, torch.randn(12, 5), torch.randn(12, 4)).shape
    torch.Size([2, 4])
    """
    return run_cell("gru_cell", GRU, x, state, None, (w_ih, w_hh, b_ih, b_hh), backend)[0]
