"""layernorm_ffn and its parts as torch sees them: opcheck, compile, export, autocast, torch.func,
fake tensors, double backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ffn_tools import Call, ffn
from test_attention_ops import compiled, op_calls_of, same_as_eager
from test_bias_act import act_call
from test_layernorm import norm_call
from tools import fake_grads, on_fake_cuda
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastattn

CALLS: dict[str, Callable[[], Call]] = {
    "layer_norm": lambda: norm_call("layer_norm", 3, 5, 24),
    "rms_norm": lambda: norm_call("rms_norm", 3, 5, 24),
    "add_layer_norm": lambda: norm_call("add_layer_norm", 3, 5, 24),
    "add_dropout": lambda: norm_call(
        "add_layer_norm", 3, 5, 24, residual=False, dropout_p=0.3, seed=torch.tensor([4])
    ),
    "bias_act": lambda: act_call(3, 5, 24),
    "bias_act_gated": lambda: act_call(3, 5, 24, gated=True, dropout_p=0.3, seed=torch.tensor([4])),
    "ffn": lambda: ffn(3, 5),
    "ffn_gated": lambda: ffn(
        3, 5, gated=True, norm="rms", dropout_p=0.2, hidden_dropout_p=0.1, seed=torch.tensor([4])
    ),
    "ffn_post_all": lambda: ffn(3, 5, pre_norm=False, recompute="all", biases=False),
    "ffn_bf16": lambda: ffn(3, 5, d=32, f=64, dtype=torch.bfloat16, recompute="activation"),
}


def calls_of(name: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The ops that a call runs, forward and backward, with their arguments."""
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
        pairs = zip(real, faked, strict=True) if isinstance(real, tuple) else [(real, faked)]
        for r, f in pairs:
            assert f.device.type == "cuda"
            assert (f.shape, f.dtype) == (r.shape, r.dtype)
            assert r.numel() == 0 or f.stride() == r.stride()


@pytest.mark.filterwarnings("ignore::fastattn.backends.PerformanceWarning")
@pytest.mark.parametrize("name", CALLS)
def test_fake_cuda_public_functions(name: str) -> None:
    """No hidden .item(), no CPU tensor among the CUDA ones, forward and backward."""
    call = CALLS[name]()
    tensors = call.leaves()
    with FakeTensorMode():
        leaves = {n: on_fake_cuda(x).requires_grad_() for n, x in tensors.items()}
        given = {n: on_fake_cuda(x) for n, x in call.kwargs.items()}
        out = getattr(fastattn, call.op)(**leaves, **given)
        outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.grad_fn is not None]
        assert all(o.device.type == "cuda" for o in outputs)
        for grad, leaf in zip(
            fake_grads(outputs, [*leaves.values()]), leaves.values(), strict=True
        ):
            assert grad is not None
            assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)


def _plain_ffn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor, g: Tensor) -> Tensor:
    return fastattn.layernorm_ffn(x * 2, w1, b1, w2, b2, norm_weight=g)


def _gated(x: Tensor, w1: Tensor, w2: Tensor, wg: Tensor) -> Tensor:
    return fastattn.layernorm_ffn(
        x, w1, None, w2, None, w_gate=wg, norm="rms", activation="silu", pre_norm=False,
        dropout_p=0.3, seed=3,
    )  # fmt: skip


def _weights(*shapes: tuple[int, ...]) -> Callable[[int], list[Tensor]]:
    return lambda n: [torch.randn(2, n, 32), *(torch.randn(s) / 6 for s in shapes)]


COMPILED: dict[str, tuple[Callable, Callable[[int], list[Tensor]]]] = {
    "ffn": (_plain_ffn, _weights((64, 32), (32, 64), (64,), (32,), (32,))),
    "ffn_gated": (_gated, _weights((64, 32), (32, 64), (64, 32))),
    "layer_norm": (lambda x, w: fastattn.layer_norm(x.sin(), 32, w), _weights((32,))),
    "rms_norm": (lambda x: fastattn.rms_norm(x, (x.shape[-1],)).cos(), _weights()),
    "add_layer_norm": (lambda x, w: fastattn.add_layer_norm(x, x.sin(), w), _weights((32,))),
    "add_nothing": (lambda x: fastattn.add_layer_norm(x.sin())[0], _weights()),
    "bias_act": (lambda x, b: fastattn.bias_act(x, b, gate=x.cos()), _weights((32,))),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compile_full_graph_with_dynamic_shapes(case: str) -> None:
    fn, make = COMPILED[case]
    fast, counter = compiled(fn, dynamic=True)
    same_as_eager(fn, fast, make, 6)
    graphs = counter.frame_count
    for n in (10, 17):
        same_as_eager(fn, fast, make, n)
    assert counter.frame_count == graphs


def test_compile_with_inductor() -> None:
    """Without arithmetic of its own around the op: inductor has no C++ to compile."""
    torch._dynamo.reset()

    def fn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor, g: Tensor) -> Tensor:
        return fastattn.layernorm_ffn(x, w1, b1, w2, b2, norm_weight=g)

    fast = torch.compile(fn, fullgraph=True)
    for n in (8, 19):
        same_as_eager(fn, fast, COMPILED["ffn"][1], n)


def test_compiled_dropout_is_no_frozen_seed() -> None:
    fn = lambda x: fastattn.add_layer_norm(x, dropout_p=0.5)[1]  # noqa: E731
    fast, counter = compiled(fn)
    x = torch.randn(4, 64)
    torch.manual_seed(4)
    first = fast(x)
    graphs = counter.frame_count
    second = fast(x)
    torch.manual_seed(4)
    assert torch.equal(fast(x), first)
    assert not torch.equal(first, second)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("case", COMPILED)
def test_export(case: str) -> None:
    fn, make = COMPILED[case]

    class Module(torch.nn.Module):
        def forward(self, *xs: Tensor) -> Any:
            return fn(*xs)

    inputs = make(6)
    program = torch.export.export(Module(), tuple(inputs))
    ops = {str(n.target) for n in program.graph.nodes if "fastattn" in str(n.target)}
    assert ops
    torch.testing.assert_close(program.module()(*inputs), fn(*inputs))


@pytest.mark.parametrize("pre_norm", [True, False])
def test_autocast_multiplies_in_its_dtype_and_keeps_x(pre_norm: bool) -> None:
    call = ffn(9, d=32, f=64, pre_norm=pre_norm)
    leaves = call.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        y = call.run(fastattn, leaves)["y"]
    assert y.dtype == torch.float32
    grads = call.gradients({"y": y}, leaves)
    assert all(g.dtype == torch.float32 for g in grads.values())
    by_hand = {n: x.bfloat16() if n in ("w1", "w2") else x for n, x in call.tensors.items()}
    assert torch.equal(y, fastattn.layernorm_ffn(**by_hand, **call.kwargs))


@pytest.mark.parametrize(
    "name", ["layer_norm", "add_dropout", "bias_act_gated", "ffn", "ffn_gated"]
)
def test_double_backward(name: str) -> None:
    """Gradients of gradients are those of the reference."""
    call = CALLS[name]()
    found = []
    for backend in ("cpu", "reference"):
        leaves = call.leaves()
        y = call.run(fastattn, leaves, backend=backend)["y"]
        first = torch.autograd.grad(y.sin().sum(), [*leaves.values()], create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(total, [*leaves.values()], allow_unused=True,
                                         materialize_grads=True))  # fmt: skip
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "bias_act", "ffn"])
def test_torch_func(name: str) -> None:
    """vmap, grad and jvp agree with a loop and with the reference."""
    call = CALLS[name]()
    rest = {n: x for n, x in call.tensors.items() if n != "x"}

    def fn(x: Tensor, backend: str = "cpu") -> Tensor:
        return getattr(fastattn, call.op)(x, **rest, **call.kwargs, backend=backend)

    x = call.tensors["x"]
    torch.testing.assert_close(torch.func.vmap(fn)(x), fn(x), rtol=1e-4, atol=1e-5)
    grad = torch.func.grad(lambda x: fn(x).sin().sum())(x)
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(fn(leaf).sin().sum(), leaf)[0]
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(fn, (x,), (torch.ones_like(x),))
    _, right = torch.func.jvp(lambda x: fn(x, "reference"), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, right, rtol=1e-4, atol=1e-5)


def test_checkpoint_recomputes_the_same_mask() -> None:
    call = ffn(6, dropout_p=0.4, hidden_dropout_p=0.4)
    leaves = call.leaves()
    names = list(leaves)

    def fn(*xs: Tensor) -> Tensor:
        return fastattn.layernorm_ffn(**dict(zip(names, xs, strict=True)), **call.kwargs)

    results = []
    for wrapped in (False, True):
        torch.manual_seed(11)
        xs = [*leaves.values()]
        if wrapped:
            y = torch.utils.checkpoint.checkpoint(fn, *xs, use_reentrant=False)
        else:
            y = fn(*xs)
        results.append([y, *torch.autograd.grad(y.sum(), xs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
