"""Every op's fake is for tensors without memory alone: it must not pass for a result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attention_ops import op_calls_of
from torch import Tensor, nn

import fastattn
from fastattn.ops import encoder_layer


def backward(y: Any) -> None:
    y = y[0] if isinstance(y, tuple) else y
    y.sum().backward()


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def generation() -> None:
    cache = torch.zeros(2, 2, 8, 4)
    with torch.no_grad():
        fastattn.attention_with_kv_cache(
            torch.randn(2, 2, 1, 4), cache, cache.clone(), cache_lens=torch.tensor([3, 5]),
            k=torch.randn(2, 2, 1, 4), v=torch.randn(2, 2, 1, 4),
        )  # fmt: skip


RUNS: dict[str, Callable[[], Any]] = {
    "attention": lambda: backward(fastattn.attention(*(leaf(2, 2, 5, 4) for _ in "qkv"))),
    "attention_kv_cache": generation,
    "add_layer_norm": lambda: backward(
        fastattn.add_layer_norm(leaf(3, 8), leaf(3, 8), leaf(8), leaf(8))
    ),
    "bias_act": lambda: backward(fastattn.bias_act(leaf(3, 8), leaf(8))),
    "layernorm_ffn": lambda: backward(
        fastattn.layernorm_ffn(leaf(3, 8), leaf(16, 8), leaf(16), leaf(8, 16), leaf(8))
    ),
    "embedding": lambda: backward(fastattn.embedding(torch.tensor([1, 2]), leaf(5, 8))),
    "linear_cross_entropy": lambda: backward(
        fastattn.linear_cross_entropy(leaf(3, 8), leaf(5, 8), torch.tensor([1, 2, 4]))
    ),
    "recurrent_layer": lambda: backward(fastattn.nn.LSTM(4, 6)(leaf(5, 2, 4))),
}


@pytest.mark.filterwarnings("ignore::fastattn.backends.PerformanceWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_tensor_without_memory_among_others_is_refused(name: str) -> None:
    found = {op: call for op, call in op_calls_of(RUNS[name]).items() if op.startswith(name)}
    assert found
    for function, args in found.values():
        refuses(function, args)


def test_of_an_encoder_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(op: Any, args: tuple[Any, ...]) -> Any:
        calls.append((op, args))
        return op(*args)

    monkeypatch.setattr(encoder_layer, "below_autograd", spy)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    fastattn.swap(layer)
    with torch.no_grad():
        layer(torch.randn(2, 3, 8))
    ((op, args),) = calls
    refuses(op, args)


def refuses(op: Any, args: tuple[Any, ...]) -> None:
    places = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
    assert len(places) > 1
    for i in places:
        spoilt = list(args)
        spoilt[i] = args[i].to("meta")
        with torch.no_grad(), pytest.raises(RuntimeError, match="tensors on (cpu|meta) and"):
            op(*spoilt)
