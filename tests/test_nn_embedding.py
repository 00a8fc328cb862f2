"""`fastattn.nn.Embedding` against torch's."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastattn.nn import Embedding
from fastattn.nn import embedding as module

V, N = 23, 12


def pair(**kwargs: Any) -> tuple[nn.Embedding, Embedding]:
    torch.manual_seed(3)
    stock = nn.Embedding(V, N, **kwargs)
    torch.manual_seed(3)
    return stock, Embedding(V, N, **kwargs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    record: list[Any] = []
    original = module.embedding

    def spy(*args: Any, **kwargs: Any) -> Any:
        record.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "embedding", spy)
    return record


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"padding_idx": 0}, {"padding_idx": -3}, {"scale_grad_by_freq": True},
     {"max_norm": 1.5}, {"max_norm": 2.0, "norm_type": 1.0}, {"dtype": torch.float64}],
    ids=str,
)  # fmt: skip
def test_is_torchs(kwargs: dict[str, Any], calls: list[Any]) -> None:
    stock, fused = pair(**kwargs)
    assert repr(fused) == repr(stock)
    assert torch.equal(fused.weight, stock.weight)
    ids = torch.randint(0, V, (4, 9))
    outputs = []
    for m in (stock, fused):
        y = m(ids)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
        outputs.append(y)
    assert len(calls) == 1
    assert torch.equal(*outputs)
    assert torch.equal(stock.weight, fused.weight)  # renormalised alike
    torch.testing.assert_close(fused.weight.grad, stock.weight.grad)


def test_sparse_goes_to_torch(calls: list[Any]) -> None:
    stock, fused = pair(sparse=True)
    ids = torch.randint(0, V, (5,))
    for m in (stock, fused):
        m(ids).sum().backward()
    assert not calls
    assert fused.weight.grad.is_sparse
    assert torch.equal(fused.weight.grad.to_dense(), stock.weight.grad.to_dense())


def test_state_dicts_and_constructors() -> None:
    stock, fused = pair()
    with torch.no_grad():
        stock.weight.add_(1)
    assert fused.load_state_dict(stock.state_dict()) == ([], [])
    assert stock.load_state_dict(fused.state_dict()) == ([], [])
    table = torch.randn(V, N)
    frozen = Embedding.from_pretrained(table, padding_idx=2)
    assert type(frozen) is Embedding
    assert not frozen.weight.requires_grad
    assert torch.equal(copy.deepcopy(frozen)(torch.arange(V)), table)


def test_gradient_of_16_bits_is_summed_in_32() -> None:
    """4096 times the same row: bf16 sums stop growing at 256."""
    _, fused = pair(dtype=torch.bfloat16)
    fused(torch.zeros(4096, dtype=torch.long)).sum().backward()
    assert (fused.weight.grad[0] == 4096).all()


def test_index_errors() -> None:
    for m in pair():
        with pytest.raises(IndexError):
            m(torch.tensor([V]))
