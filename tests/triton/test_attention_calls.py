"""The Triton attention backend as it is called: what is launched, autograd, compilers, modules."""

from dataclasses import replace
from typing import Any
from unittest import mock

import interpreter
import numpy as np
import pytest
import torch
from test_attention_interpreter import NOTHING, SMALL, numbers
from tools import (
    DIFFERENTIABLE,
    featured,
    judge,
    padded,
    run,
)

import fastattn
from fastattn import reference

pytestmark = pytest.mark.sampled(2)


@pytest.mark.parametrize("frozen", [1, 3, 5, 6, 7, 8, 11, 15, 19, 23, 24, 27, 28, 30])
def test_only_inputs_that_need_a_gradient_get_one(frozen: int) -> None:
    names = tuple(n for bit, n in enumerate(DIFFERENTIABLE) if frozen >> bit & 1)
    problem = featured("bias", b=1, h=2, sq=20, sk=18, d=16).with_(sinks=torch.randn(2))
    got = judge(replace(problem, frozen=names), "triton")
    assert set(got.grads) == set(DIFFERENTIABLE) - set(names)


@pytest.mark.parametrize("outputs", [("o",), ("lse",), ("weights",), ("lse", "weights")])
@pytest.mark.parametrize("mean", [False, True])
def test_upstream_gradient_of_some_outputs(outputs: tuple[str, ...], mean: bool) -> None:
    problem = featured("bias", b=2, h=2, sq=20, sk=18, d=16)
    problem = problem.with_(return_weights="mean" if mean else True, sinks=torch.randn(2))
    weights = (2, 20, 18) if mean else (2, 2, 20, 18)
    shapes = {"o": (2, 2, 20, 16), "lse": (2, 2, 20), "weights": weights}
    judge(replace(problem, upstream={n: torch.randn(shapes[n]) for n in outputs}), "triton")


def launches(call: Any) -> list[str]:
    """Names of the kernels that a call launches; they still run."""
    names = []
    inner = interpreter.launcher.hook

    def hook(kernel: Any, grid: Any, args: Any, meta: Any) -> bool:
        names.append(kernel.fn.__name__)
        assert len(grid) == 1
        assert len(args) == len(kernel.arg_names)
        return inner(kernel, grid, args, meta)

    with mock.patch.object(interpreter.launcher, "hook", hook):
        call()
    return names


def test_kernels_that_are_not_needed_are_not_launched() -> None:
    def names(frozen: tuple[str, ...], **given_: Any) -> list[str]:
        problem = replace(padded(b=1, h=1, sq=4, d=8, **given_), frozen=frozen)
        return launches(lambda: run(problem, "triton"))

    q = torch.randn(1, 1, 4, 8)

    forward, prepare = "forward_kernel", "prepare_kernel"
    keys, rows = "by_keys_kernel", "by_rows_kernel"
    assert launches(lambda: fastattn.attention(q, q, q, backend="triton")) == [forward]
    assert names(("k", "v")) == [forward, prepare, rows]
    assert names(("q",)) == [forward, prepare, keys]
    assert names(()) == [forward, prepare, keys, rows]
    assert names((), deterministic=False) == [forward, prepare, keys]
    qkv = ("q", "k", "v")
    assert names(qkv, bias=torch.randn(4, 4)) == [forward, prepare, rows]
    assert names(qkv, bias=torch.randn(4)) == [forward, prepare, keys]
    assert names(qkv, sinks=torch.randn(1)) == [forward, prepare, "dsinks_kernel"]


@pytest.mark.parametrize("feature", ["causal", "bias_fp32", "all"])
def test_bitwise_repeatable_in_any_order(feature: str) -> None:
    """No sum has two owners: the order of programs changes nothing, and no atomics run."""
    problem = featured(feature, **SMALL)
    first = run(problem, "triton").all()
    shuffled = np.random.RandomState(5).permutation
    with mock.patch.object(interpreter.Builder, "create_atomic_rmw", side_effect=AssertionError):
        with interpreter.interpreted(shuffled):
            for name, x in run(problem, "triton").all().items():
                assert torch.equal(x, first[name]), name


def test_the_order_shows_in_sums_that_are_shared() -> None:
    """The check above can fail: with atomics it does."""
    problem = padded(b=1, h=1, sq=20, sk=200, d=16)
    first = run(problem, "triton", deterministic=False).grads["q"]
    with interpreter.interpreted(lambda n: np.arange(n)[::-1]):
        assert not torch.equal(run(problem, "triton", deterministic=False).grads["q"], first)


def test_skipped_tiles_are_not_read() -> None:
    """Causality, windows and lengths are bounds of the loops: work follows what is seen."""

    def dots(**given_: Any) -> int:
        problem = padded(b=1, h=1, sq=128, sk=128, d=8, **given_)
        original = interpreter._dot
        calls = 0

        def count(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*args)

        with mock.patch.object(interpreter, "_dot", count):
            run(problem, "triton")
        return calls

    everything = dots()
    assert dots(causal=True) < 0.7 * everything
    assert dots(window=(16, 0)) < 0.45 * everything
    assert dots(k_lens=torch.tensor([32])) < 0.4 * everything
    assert dots(q_lens=torch.tensor([32])) < 0.4 * everything


# ------------------------------------------------------------------------------------ autograd, API


@pytest.mark.parametrize("feature", ["bottom_right", "bias", "sinks", "dropout", "weights"])
def test_double_backward(feature: str) -> None:
    from test_attention_backward import second

    problem = featured(feature, b=1, h=2, hk=1, sq=19, sk=18, d=8)
    got = second(problem, fastattn.attention, lambda x: x, backend="triton")
    want = second(problem, reference.attention, lambda x: x.double())
    for name, x in want.items():
        torch.testing.assert_close(got[name].double(), x, rtol=1e-4, atol=1e-4, msg=name)


def test_torch_func() -> None:
    q, k, v = (torch.randn(3, 1, 2, 9, 8) for _ in range(3))

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
        return fastattn.attention(q, k, v, causal=True, backend=backend).square().sum()

    got, want = (
        torch.func.vmap(torch.func.grad(lambda *x, b=b: loss(*x, b), argnums=(0, 1, 2)))(q, k, v)
        for b in ("triton", "reference")
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("deterministic", [True, False])
def test_opcheck(deterministic: bool) -> None:
    ops = torch.ops.fastattn
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    shared = (None, torch.randn(9, 9), *NOTHING[2:], *numbers(9, 9, 1, 1), deterministic)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.attention_triton_fwd, (q, k, v, *shared), test_utils=tests)
    o, lse, lo, w = ops.attention_triton_fwd(q, k, v, *shared)
    args = (o, lse, w, q, k, v, o, lse, lo, *shared, 31)
    torch.library.opcheck(ops.attention_triton_bwd, args, test_utils=tests)


def test_compiles_without_a_graph_break() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, k, v, causal=True, backend="triton", deterministic=False)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)),
        torch.autograd.grad(f(q, k, v).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_module_and_swap() -> None:
    """End to end: a swapped encoder layer trains on the Triton kernels."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 7, 16)
    want = layer(x)
    fastattn.swap(layer, backend="triton")
    names = []

    def call() -> None:
        out = layer(x)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        out.sum().backward()

    names = launches(call)
    attention = ["forward_kernel", "prepare_kernel", "by_keys_kernel", "by_rows_kernel"]
    assert [n for n in names if n in attention] == attention
    # The rest of the layer: residual + norm, and the feed-forward block.
    assert {"norm_forward_kernel", "ffn_block_kernel", "norm_backward_kernel"} <= set(names)


def test_without_an_interpreter_the_cpu_is_refused(not_interpreted: None) -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"fastattn::attention: backend='triton'.*CUDA tensors"):
        fastattn.attention(q, q, q, backend="triton")
    with pytest.raises(ValueError, match="CUDA tensors"):
        torch.ops.fastattn.attention_triton_fwd(q, q, q, *NOTHING, *numbers(4, 4), True)
    row = {b.name: b for b in fastattn.backends()}["triton"]
    assert row.usable == torch.cuda.is_available()
    assert row.usable or "no GPU" in row.why


def test_what_it_cannot_serve_is_named() -> None:
    q = torch.randn(1, 1, 4, 257)
    with pytest.raises(ValueError, match="head_dim up to 256, got 257"):
        fastattn.attention(q, q, q, backend="triton")
    with pytest.raises(ValueError, match="head_dim up to 256, got 300"):
        fastattn.attention(q[..., :8], q[..., :8], torch.randn(1, 1, 4, 300), backend="triton")
    with pytest.raises(ValueError, match="float32, bfloat16 and float16, got q.dtype"):
        fastattn.attention(*(q[..., :8].double(),) * 3, backend="triton")
    assert {b.name: b for b in fastattn.backends()}["triton"].usable
