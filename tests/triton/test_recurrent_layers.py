"""Whole layers on backend="triton", through the public functions: GEMMs, biases and gradients of
weights around the recurrence, in Triton's interpreter; and the first-use check of a layer."""

from typing import Any

import pytest
import torch
from recurrent_layers import judge, make

from fastattn.ops import recurrent_gpu, recurrent_triton

pytestmark = pytest.mark.sampled(2)

CASES: dict[str, dict[str, Any]] = {
    "two_directions": {"D": 2, "L": 2},
    "lengths": {"B": 3, "lengths": [2, 5, 0], "D": 2},
    "packed": {"B": 3, "packed": (2, 5, 1)},
    "no_bias": {"bias": False, "T": 2},
    "masked": {"recurrent_dropout_p": 0.3, "seed": 5, "T": 3},
}


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("name", CASES)
def test_layers(name: str, cell: str) -> None:
    judge(make(cell, **CASES[name]), "triton")


def test_projection() -> None:
    judge(make("lstm", proj=3, T=3, D=2), "triton")


def arguments(cell: int, H: int = 5, D: int = 2, B: int = 3) -> tuple[Any, ...]:
    G = (4, 3, 1, 1)[cell]
    w_hh, b_hn = [torch.randn(G * H, H)] * D, [torch.randn(H)] * D if cell == 1 else []
    c0 = torch.zeros(D, B, H) if cell == 0 else None
    return w_hh, b_hn, [], torch.zeros(D, B, H), c0, None, None, None, 7, cell, D - 1 << 1


@pytest.mark.parametrize("cell", [0, 1, 2, 3])
def test_the_first_use_check_passes(cell: int) -> None:
    assert recurrent_gpu._check("triton", arguments(cell)) is None


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_the_first_use_check_sees(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong value in any result is named."""
    right = getattr(recurrent_triton, way)

    def wrong(*args: Any) -> Any:
        first, *rest = right(*args)
        first = first.clone()
        first.view(-1)[3] += 0.01
        return (first, *rest)

    monkeypatch.setattr(recurrent_triton, way, wrong)
    said = recurrent_gpu._check("triton", arguments(1))
    assert said is not None
    assert said.startswith("y is off" if way == "forward" else "dgx is off")
