"""Weights on demand: after dropout, differentiable, whole or averaged over the heads."""

import pytest
import torch
from tools import DTYPES, featured, judge, padded, run

import fastattn

FEATURES = (
    *("causal", "window_bottom_right", "mask", "bias", "lens_bottom_right", "alibi_batch"),
    *("softcap", "sinks", "dropout"),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [True, "mean"], ids=["full", "mean"])
@pytest.mark.parametrize("feature", FEATURES)
def test_beside_every_feature(
    kernel: str, feature: str, form: bool | str, dtype: torch.dtype
) -> None:
    """Values, and gradients from upstream gradients of o, lse and weights at once."""
    problem = featured(feature, b=2, h=4, hk=2, sq=67, sk=90, d=24, dtype=dtype)
    judge(problem.with_(return_weights=form), kernel)


@pytest.mark.parametrize("form", [True, "mean"], ids=["full", "mean"])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (1, 300), (300, 1), (64, 64), (129, 257)])
def test_shapes(kernel: str, sq: int, sk: int, form: bool | str) -> None:
    judge(padded(b=1, h=3, sq=sq, sk=sk, d=16, return_weights=form), kernel)


def test_rows_sum_to_one_and_hidden_keys_are_zero(kernel: str) -> None:
    problem = featured("lens_bottom_right", b=3, h=2, sq=40, sk=60, d=16)
    got = run(problem.with_(return_weights=True), kernel).outputs
    alive = got["lse"].isfinite()
    assert alive.any()
    torch.testing.assert_close(got["weights"].sum(-1), alive.float(), rtol=0, atol=1e-5)
    j, lens = torch.arange(60), problem.kwargs["k_lens"]
    hidden = (j >= lens[:, None])[:, None, None, :].expand(got["weights"].shape)
    assert got["weights"][hidden].count_nonzero() == 0


def test_sinks_take_their_share(kernel: str) -> None:
    q = torch.randn(1, 2, 30, 16)
    sinks = torch.tensor([0.5, -3.0])
    _, lse, weights = fastattn.attention(
        q, q, q, sinks=sinks, return_lse=True, return_weights=True, backend=kernel
    )
    share = torch.exp(sinks[:, None] - lse)
    torch.testing.assert_close(weights.sum(-1), 1 - share, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_asking_for_weights_changes_nothing_else(kernel: str, dtype: torch.dtype) -> None:
    problem = padded(b=2, h=3, sq=70, sk=80, d=32, dtype=dtype, causal=True)
    plain = run(problem, kernel)
    for form in (True, "mean"):
        got = run(problem.with_(return_weights=form), kernel)
        assert torch.equal(got.outputs["o"], plain.outputs["o"])
        assert torch.equal(got.outputs["lse"], plain.outputs["lse"])


def test_unused_weights_cost_no_gradient(kernel: str) -> None:
    """Weights returned but fed into nothing: the gradients of o, bit for bit."""
    grads = []
    for form in (False, True):
        q, k, v = (x.requires_grad_() for x in torch.ones(3, 1, 2, 40, 16).cumsum(3).sin())
        o = fastattn.attention(q, k, v, return_weights=form, backend=kernel)
        o = o[0] if form else o
        grads.append(torch.autograd.grad(o.square().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_entropy_regulariser_trains(kernel: str) -> None:
    """A loss on weights alone reaches q and k, and v not at all."""
    leaves = [torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3)]
    grads = []
    for backend, cast in ((kernel, torch.float32), ("reference", torch.float64)):
        xs = [x.to(cast) for x in leaves]
        _, w = fastattn.attention(*xs, causal=True, return_weights=True, backend=backend)
        loss = torch.special.entr(w.clamp_min(1e-9)).sum()
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert grads[0][2].count_nonzero() == 0
