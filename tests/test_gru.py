"""gru and gru_cell: its own bias of the hidden n gate, and wrong calls."""

from typing import Any

import pytest
import torch
from recurrent_layers import judge, make, weights_for
from tools import DTYPES
from torch import nn

import fastattn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_hidden_bias_of_n_is_within_r(dtype: torch.dtype, kernel: str) -> None:
    """Large biases, of which r lets a part through: outside of r the result is another."""
    call = make("gru", dtype=dtype, B=4, lengths=[5, 0, 3, 2], D=2)
    big = [w * 8 if w.dim() == 1 else w for w in call.weights]
    judge(type(call)(call.op, call.x, big, call.state, call.kwargs), kernel)


def test_values_of_torch(backend: str) -> None:
    stock = nn.GRU(4, 7, num_layers=2, bidirectional=True)
    x, h = torch.randn(5, 3, 4), torch.randn(4, 3, 7)
    y, h_n = fastattn.gru(x, h, stock.all_weights, bidirectional=True, backend=backend)
    right = stock(x, h)
    torch.testing.assert_close(y, right[0])
    torch.testing.assert_close(h_n, right[1])


W = weights_for("gru", 4, 6)
X = torch.randn(5, 3, 4)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "pair": ({"state": (X, X)}, TypeError, "state must be a Tensor, got tuple"),
    "state": ({"state": X}, ValueError, r"state must have shape \(1, 3, 6\)"),
    "projection": (
        {"weights": [(*W, torch.randn(6, 6))]}, ValueError, "a projection, belongs to the LSTM",
    ),
    "gates": ({"weights": weights_for("lstm", 4, 6)}, ValueError, "w_hh must have 6 columns|w_hh"),
    "half_biases": ({"weights": [W[0], W[1][:, :4]]}, ValueError, "without a projection"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    given, kind, message = WRONG[name]
    kwargs = {"x": X, "state": None, "weights": W} | given
    with pytest.raises(kind, match=f"^fastattn::gru: .*({message})"):
        fastattn.gru(kwargs["x"], kwargs["state"], kwargs["weights"])


def test_wrong_calls_of_the_cell() -> None:
    x, h = X[0], torch.randn(3, 6)
    with pytest.raises(ValueError, match=r"fastattn::gru_cell: h must have shape \(3, 6\)"):
        fastattn.gru_cell(x, h[:2], *W)
    with pytest.raises(ValueError, match="fastattn::gru_cell: w_hh must have 3 H rows"):
        fastattn.gru_cell(x, h, *weights_for("lstm", 4, 6))
    with pytest.raises(ValueError, match="fastattn::rnn: nonlinearity must be one of"):
        fastattn.rnn(X, None, weights_for("rnn", 4, 6), nonlinearity="gelu")
