"""The backward beyond its values: upstream gradients of any strides, inputs that need none, second
derivatives, bitwise repeatability, what is saved."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tools import DIFFERENTIABLE, DTYPES, FEATURES, Problem, featured, judge, packed, padded, run
from torch import Tensor

import fastattn

UPSTREAM = {
    # Of shape (B, H, S, D), as autograd hands them over.
    "ones_by_sum": lambda b, h, s, d: torch.ones(()).expand(b, h, s, d),
    "mean_over_rows": lambda b, h, s, d: torch.randn(b, h, 1, d).expand(b, h, s, d),
    "one_a_row": lambda b, h, s, d: torch.randn(b, h, s, 1).expand(b, h, s, d),
    "same_for_all_heads": lambda b, h, s, d: torch.randn(b, 1, s, d).expand(b, h, s, d),
    "bshd": lambda b, h, s, d: torch.randn(b, s, h, d).transpose(1, 2),
    "transposed": lambda b, h, s, d: torch.randn(b, h, d, s).transpose(2, 3),
    "every_second": lambda b, h, s, d: torch.randn(b, h, 2 * s, 2 * d)[:, :, 1::2, ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_upstream_gradient_of_any_strides(kernel: str, upstream: str, dtype: torch.dtype) -> None:
    problem = padded(b=2, h=3, sq=70, sk=80, d=32, dtype=dtype, causal="bottom_right")
    do = UPSTREAM[upstream](2, 3, 70, 32)
    once = tuple(slice(0, 1 if s == 0 else None) for s in do.stride())
    do = do[once].to(dtype).expand(do.shape) if 0 in do.stride() else do.to(dtype)
    judge(replace(problem, upstream={"o": do}), kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [("o",), ("lse",), ("weights",), ("lse", "weights")])
def test_upstream_gradient_of_some_outputs(
    kernel: str, outputs: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Of lse alone, of weights alone: the others' upstream gradients are not there at all."""
    problem = featured("bias", b=2, h=3, sq=40, sk=50, d=16, dtype=dtype)
    problem = problem.with_(return_weights=True, sinks=torch.randn(3))
    shapes = {"o": (2, 3, 40, 16), "lse": (2, 3, 40), "weights": (2, 3, 40, 50)}
    upstream = {
        n: torch.randn(shapes[n]).to(torch.float32 if n == "lse" else dtype) for n in outputs
    }
    judge(replace(problem, upstream=upstream), kernel)


def test_zero_stride_upstream_of_lse_and_weights(kernel: str) -> None:
    problem = padded(b=2, h=3, sq=40, sk=50, d=16, return_weights=True)
    upstream = {
        "lse": torch.ones(()).expand(2, 3, 40),
        "weights": torch.randn(2, 3, 40, 1).expand(2, 3, 40, 50),
    }
    judge(replace(problem, upstream=upstream), kernel)
    mean = problem.with_(return_weights="mean")
    judge(replace(mean, upstream={"weights": torch.randn(50).expand(2, 40, 50)}), kernel)


@pytest.mark.parametrize("frozen", range(1, 31))
def test_only_inputs_that_need_a_gradient_get_one(kernel: str, frozen: int) -> None:
    names = tuple(n for bit, n in enumerate(DIFFERENTIABLE) if frozen >> bit & 1)
    problem = featured("bias", b=1, h=2, sq=33, sk=40, d=16).with_(sinks=torch.randn(2))
    got = judge(replace(problem, frozen=names), kernel)
    assert set(got.grads) == set(DIFFERENTIABLE) - set(names)


def test_nothing_is_saved_without_need(kernel: str) -> None:
    """Bytes that autograd keeps: q, k, v, o and 8 a row; less for dv alone; none in inference."""
    q, k, v = (torch.randn(2, 4, 64, 32) for _ in range(3))

    def saved(*needing: Tensor, **given: Any) -> int:
        for x in (q, k, v):
            x.requires_grad_(any(x is n for n in needing))
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            fastattn.attention(q, k, v, backend=kernel, **given)
        return sum(sizes.values())

    one, lse = q.nbytes, 2 * 2 * 4 * 64 * 4  # lse and its remainder
    assert saved() == 0
    assert saved(q, k, v) <= 4 * one + lse
    assert saved(v) <= 3 * one + lse
    assert saved(q, dropout_p=0.5) <= 4 * one + lse + 8
    with torch.no_grad():
        assert saved(q, k, v) == 0


def test_sums_over_thousands_of_rows(kernel: str) -> None:
    """dk and dv of a key that 12000 rows see: a running fp32 sum is five times as wrong as plain
    PyTorch's."""
    judge(padded(b=1, h=8, hk=1, sq=1500, sk=20, d=8), kernel)


def test_few_rows_of_large_logits(kernel: str) -> None:
    """The backward's logits are the forward's to the last bit, whichever way a decoding forward
    took: P = exp(logit - lse) is off by as much as the logit."""
    problem = padded(b=2, h=10, hk=2, sq=1, sk=64, d=72, dv=55, softcap=30.0, return_weights=True)
    judge(replace(problem, q=problem.q * 12), kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", ["plain", "causal", "bias", "all"])
def test_bitwise_repeatable(kernel: str, feature: str, dtype: torch.dtype) -> None:
    problem = featured(feature, b=2, h=4, hk=2, sq=200, sk=333, d=64, dtype=dtype)
    first = run(problem, kernel).all()
    for _ in range(4):
        for name, x in run(problem, kernel).all().items():
            assert torch.equal(x, first[name]), name


def test_bitwise_repeatable_packed(kernel: str) -> None:
    problem = packed([100, 0, 37, 160], h=4, hk=1, causal=True, bias=torch.randn(1, 4, 1, 160))
    first = run(problem, kernel).all()
    for _ in range(4):
        for name, x in run(problem, kernel).all().items():
            assert torch.equal(x, first[name]), name


# ------------------------------------------------------------------------------- second derivatives


def second(problem: Problem, attention: Any, cast: Any, **more: Any) -> dict[str, Tensor]:
    """Gradients of a random contraction of the gradients, by name."""
    leaves = problem.leaves(cast)
    outputs = problem.call(attention, leaves, **more)
    gen = torch.Generator(problem.q.device).manual_seed(3)

    def random_like(x: Tensor) -> Tensor:
        return cast(torch.randn(x.shape, generator=gen)).to(x.dtype)

    upstream = {n: random_like(x).requires_grad_() for n, x in outputs.items()}
    first = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), list(upstream.values()), create_graph=True
    )
    inputs = {**leaves, **{f"upstream_{n}": x for n, x in upstream.items()}}
    grads = torch.autograd.grad(
        first,
        list(inputs.values()),
        [random_like(x) for x in first],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))


@pytest.mark.parametrize(
    "feature",
    [
        *("plain", "bottom_right", "bias", "sinks", "softcap", "lens_bottom_right", "dropout"),
        *("weights", "weights_mean", "alibi", "mask", "all"),
    ],
)
def test_double_backward(kernel: str, feature: str) -> None:
    problem = featured(feature, b=2, h=4, hk=2, sq=19, sk=23, d=8)
    got = second(problem, fastattn.attention, lambda x: x, backend=kernel)
    want = second(problem, fastattn.reference.attention, lambda x: x.double())
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name].double(), x, rtol=1e-4, atol=1e-4, msg=name)


def test_double_backward_packed(kernel: str) -> None:
    problem = packed([9, 0, 14], [5, 3, 20], h=4, hk=2, d=8, causal=True, sinks=torch.randn(4))
    got = second(problem, fastattn.attention_varlen, lambda x: x, backend=kernel)
    want = second(problem, fastattn.reference.attention_varlen, lambda x: x.double())
    for name, x in want.items():
        torch.testing.assert_close(got[name].double(), x, rtol=1e-4, atol=1e-4, msg=name)


def test_gradient_penalty_trains(kernel: str) -> None:
    """The usual reason for second derivatives: a penalty on the gradient, in one backward."""
    leaves = [torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)]
    by_backend = []
    for backend, xs in ((kernel, leaves), ("reference", [x.double() for x in leaves])):
        o = fastattn.attention(*xs, causal=True, backend=backend)
        (dq,) = torch.autograd.grad(o.square().sum(), xs[0], create_graph=True)
        loss = o.sum() + dq.square().sum()
        by_backend.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*by_backend, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradient_accumulates_and_graph_can_be_kept(kernel: str) -> None:
    q = torch.randn(1, 2, 20, 16, requires_grad=True)
    o = fastattn.attention(q, q, q, backend=kernel)
    o.sum().backward(retain_graph=True)
    once = q.grad.clone()
    o.sum().backward()
    assert torch.equal(q.grad, 2 * once)


def test_saved_tensor_changed_in_place_is_noticed(kernel: str) -> None:
    q = torch.randn(1, 2, 20, 16, requires_grad=True)
    k = torch.randn(1, 2, 20, 16)
    o = fastattn.attention(q, k, k, backend=kernel)
    k.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_features_cover_every_argument() -> None:
    """A feature added to the public function must join FEATURES."""
    import inspect

    given = {name for f in FEATURES.values() for name in f(2, 2, 5, 5, torch.float32)}
    known = set(inspect.signature(fastattn.attention).parameters)
    assert known - given == {"q", "k", "v", "return_lse", "deterministic", "backend"}


@pytest.mark.parametrize("hk", [0, 2])
def test_no_query_heads(kernel: str, hk: int) -> None:
    """Keys that no query reads have the gradient 0, whatever lay in their memory."""
    q, k, v = (
        torch.randn(2, h, s, 32, requires_grad=True) for h, s in ((0, 9), (hk, 40), (hk, 40))
    )
    for _ in range(3):
        full = [torch.full_like(k, torch.nan) for _ in range(4)]
        del full
        o = fastattn.attention(q, k, v, backend=kernel)
        assert o.shape == (2, 0, 9, 32)
        for gradient in torch.autograd.grad(o.sum(), (k, v)):
            assert gradient.eq(0).all()
