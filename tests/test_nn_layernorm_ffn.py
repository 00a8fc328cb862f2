"""LayerNorm, RMSNorm and LayerNormFFN as modules: torch's, on the fused ops."""

import copy
import pickle
from typing import Any

import pytest
import torch

import fastattn
from fastattn import nn


def twins(name: str, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Torch's module and ours, made from one seed."""
    made = []
    for where in (torch.nn, nn):
        torch.manual_seed(5)
        made.append(getattr(where, name)(*args, **kwargs))
    return made[0], made[1]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("LayerNorm", (16,), {}),
        ("LayerNorm", ((3, 16), 1e-3), {}),
        ("LayerNorm", (16,), {"bias": False}),
        ("LayerNorm", (16,), {"elementwise_affine": False}),
        ("RMSNorm", (16,), {}),
        ("RMSNorm", ((3, 16), 1e-3), {}),
        ("RMSNorm", (16,), {"elementwise_affine": False}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_torchs(name: str, args: Any, kwargs: Any, dtype: torch.dtype) -> None:
    stock, ours = twins(name, *args, **kwargs, dtype=dtype)
    assert isinstance(ours, type(stock))
    assert repr(ours) == repr(stock)
    assert [*ours.state_dict()] == [*stock.state_dict()]
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(4, 3, 16, dtype=dtype)
    results = []
    for module in (stock, ours):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=4e-2 if dtype != torch.float32 else 1e-4,
                                   atol=0.2 if dtype != torch.float32 else 1e-5)  # fmt: skip


def test_norms_copy_pickle_and_take_nested_input() -> None:
    norm = nn.LayerNorm(8, backend="cpu")
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is nn.LayerNorm
        assert other.backend == "cpu"
    parts = [torch.randn(n, 8) for n in (3, 5)]
    nested = torch.nested.nested_tensor(parts)
    torch.testing.assert_close(norm(nested).unbind()[1], norm(parts[1]))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_ffn_is_its_parts(norm: str, pre_norm: bool, gated: bool) -> None:
    module = nn.LayerNormFFN(
        16,
        40,
        activation="silu",
        gated=gated,
        norm=norm,
        pre_norm=pre_norm,  # type: ignore[arg-type]
    )
    x = torch.randn(3, 5, 16)
    normed = module.norm if module.norm is not None else torch.nn.Identity()
    inner = normed(x) if pre_norm else x
    hidden = module.linear1(inner)
    if module.gate is not None:
        hidden = torch.nn.functional.silu(module.gate(inner)) * hidden
    else:
        hidden = torch.nn.functional.silu(hidden)
    y = x + module.linear2(hidden)
    torch.testing.assert_close(module(x), y if pre_norm else normed(y), rtol=1e-4, atol=1e-5)


def test_ffn_drops_in_training_only() -> None:
    module = nn.LayerNormFFN(16, 40, dropout=0.5, hidden_dropout=0.2)
    x = torch.randn(8, 16)
    module.eval()
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert 0.3 < (first == x).float().mean() < 0.7  # dropped: x alone is left


def test_ffn_trains_and_keeps_its_state() -> None:
    module = nn.LayerNormFFN(16, 40, gated=True, recompute="all")
    names = {"norm.weight", "norm.bias"}
    names |= {f"{m}.{p}" for m in ("linear1", "gate", "linear2") for p in ("weight", "bias")}
    assert set(module.state_dict()) == names
    module(torch.randn(4, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    other = pickle.loads(pickle.dumps(module))
    x = torch.randn(2, 16)
    assert torch.equal(other(x), module(x))
    with pytest.raises(ValueError, match="norm"):
        nn.LayerNormFFN(4, 8, norm="batch")  # type: ignore[arg-type]
    assert fastattn.nn.LayerNormFFN is nn.LayerNormFFN
