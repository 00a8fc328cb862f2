"""embedding as torch sees it: opcheck, fakes, compile, torch.func, double backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attention_ops import op_calls_of
from test_embedding import EmbeddingCall, P, V, embedding_call
from tools import on_fake_cuda
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastattn

CALLS: dict[str, Callable[[], EmbeddingCall]] = {
    "words": lambda: embedding_call(3, 5, tables="w", norm=None),
    "bert": lambda: embedding_call(3, 5, explicit=False, padding_idx=0),
    "explicit": lambda: embedding_call(3, 5, norm="rms", scale=2.0),
    "dropped": lambda: embedding_call(3, 5, dropout_p=0.3, seed=torch.tensor([4])),
}


def calls_of(name: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    call = CALLS[name]()

    def run() -> None:
        leaves = call.leaves()
        outputs = call.run(fastattn, leaves, backend="cpu")
        call.gradients(outputs, leaves)

    return op_calls_of(run)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    calls = calls_of(name)
    assert len(calls) == 2
    for op, (func, args) in calls.items():
        floats = tuple(
            a.requires_grad_(op.endswith("fwd"))
            if isinstance(a, Tensor) and a.is_floating_point()
            else a
            for a in args
        )
        result = torch.library.opcheck(func, floats)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CALLS)
def test_fakes_are_what_the_kernels_give(name: str) -> None:
    for func, args in calls_of(name).values():
        real = func(*args)
        with FakeTensorMode():
            faked = func(*(on_fake_cuda(a) for a in args))
        for r, f in zip(real, faked, strict=True):
            assert f.device.type == "cuda"
            assert (f.shape, f.dtype) == (r.shape, r.dtype)


@pytest.mark.parametrize("name", CALLS)
def test_compile(name: str) -> None:
    """One graph, forward and backward, and the same bits as eager."""
    call = CALLS[name]()
    torch._dynamo.reset()
    results = []
    for function in (fastattn.embedding, torch.compile(fastattn.embedding, fullgraph=True,
                                                       backend="aot_eager")):  # fmt: skip
        leaves = call.leaves()
        y = function(**leaves, **call.kwargs)
        results.append([y, *call.gradients({"y": y}, leaves).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dynamic_shapes_and_sinusoids() -> None:
    weight = torch.randn(V, 16)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def f(ids: Tensor) -> Tensor:
        return fastattn.embedding(ids, weight, position_weight="sinusoidal", norm="layer")

    for s in (5, 9, 13):
        ids = torch.randint(0, V, (2, s))
        right = fastattn.embedding(ids, weight, position_weight="sinusoidal", norm="layer")
        torch.testing.assert_close(f(ids), right)


def test_vmap_and_double_backward() -> None:
    call = CALLS["bert"]()
    ids = torch.randint(0, V, (4, 3, 5))
    leaves = call.leaves()
    kwargs = {n: x for n, x in call.kwargs.items() if n != "ids"}

    def f(ids: Tensor) -> Tensor:
        return fastattn.embedding(ids, **leaves, **kwargs)

    torch.testing.assert_close(torch.func.vmap(f)(ids), f(ids))
    y = f(ids[0])
    (first,) = torch.autograd.grad(y.square().sum(), leaves["weight"], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaves["position_weight"])
    wide = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    y = fastattn.reference.embedding(ids[0], **wide, **kwargs)
    (right,) = torch.autograd.grad(y.square().sum(), wide["weight"], create_graph=True)
    (right2,) = torch.autograd.grad(right.square().sum(), wide["position_weight"])
    torch.testing.assert_close(first.double(), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.double(), right2, rtol=1e-3, atol=1e-3)
    assert P > 5
