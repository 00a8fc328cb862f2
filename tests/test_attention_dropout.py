"""Dropout: the mask that architecture.md fixes, on every backend, layout and thread count."""

import pytest
import torch
from tools import DTYPES, judge, packed, padded, run

import fastattn
from fastattn import reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_values_and_gradients(kernel: str, p: float, dtype: torch.dtype) -> None:
    problem = padded(b=2, h=3, sq=70, sk=133, d=32, dtype=dtype, dropout_p=p, seed=1234567)
    judge(problem, kernel)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, -1, -(2**63), 2**64 - 1])
def test_mask_is_the_philox_one(kernel: str, seed: int) -> None:
    """Weights are zero exactly where u32 < round(p * 2**32)."""
    q, k = torch.randn(2, 3, 67, 16), torch.randn(2, 3, 150, 16)
    _, weights = fastattn.attention(
        q, k, k, dropout_p=0.37, seed=seed, return_weights=True, backend=kernel
    )
    keep = reference.dropout_keep(seed, 0.37, 2, 3, 67, 150)
    assert torch.equal(weights != 0, keep)


def test_mask_does_not_depend_on_the_rest(kernel: str) -> None:
    """Not on dtype, causality, lengths, or what else is in the batch: coordinates decide."""
    q, k = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 70, 16)
    keep = reference.dropout_keep(9, 0.5, 2, 2, 40, 70)
    for dtype in DTYPES:
        for given in ({}, {"causal": True}, {"k_lens": torch.tensor([70, 31])}, {"window": (3, 9)}):
            found = fastattn.attention(
                q.to(dtype), k.to(dtype), k.to(dtype), **given, dropout_p=0.5, seed=9,
                return_weights=True, backend=kernel,
            )  # fmt: skip
            plain = fastattn.attention(
                q.to(dtype), k.to(dtype), k.to(dtype), **given, return_weights=True, backend=kernel
            )
            assert torch.equal(found[1] != 0, keep & (plain[1] != 0))


def test_weights_and_output_drop_the_same(kernel: str) -> None:
    """The output's pass and the weights' pass draw one mask: o = weights @ v."""
    problem = padded(b=2, h=2, sq=45, sk=77, d=16, dropout_p=0.6, seed=3, return_weights=True)
    got = run(problem, kernel).outputs
    want = got["weights"].double() @ problem.v.double()
    torch.testing.assert_close(got["o"].double(), want, rtol=1e-5, atol=1e-5)
    alone = run(problem.with_(return_weights=False), kernel).outputs["o"]
    torch.testing.assert_close(got["o"], alone, rtol=1e-6, atol=1e-6)


def test_mean_weights_average_the_dropped_ones(kernel: str) -> None:
    q = torch.randn(2, 4, 33, 16)
    given = {"dropout_p": 0.4, "seed": 8, "backend": kernel}
    _, full = fastattn.attention(q, q, q, return_weights=True, **given)
    _, mean = fastattn.attention(q, q, q, return_weights="mean", **given)
    torch.testing.assert_close(mean, full.mean(1), rtol=1e-6, atol=1e-7)


def test_threshold_is_exact_not_a_256th(kernel: str) -> None:
    """p right at an element's own number keeps it, the next 2**-32 drops it."""
    zero = torch.zeros(1, dtype=torch.int64)
    u32 = int(reference.philox_uniform_u32(5, zero, zero, torch.tensor([17])))
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 32, 8)
    for p, kept in ((u32 / 2**32, True), ((u32 + 1) / 2**32, False)):
        _, weights = fastattn.attention(
            q, k, k, dropout_p=p, seed=5, return_weights=True, backend=kernel
        )
        assert bool(weights[0, 0, 0, 17] != 0) is kept


def test_lse_is_that_without_dropout(kernel: str) -> None:
    q = torch.randn(1, 2, 50, 16)
    _, dropped = fastattn.attention(q, q, q, dropout_p=0.5, seed=1, return_lse=True, backend=kernel)
    _, lse = fastattn.attention(q, q, q, return_lse=True, backend=kernel)
    torch.testing.assert_close(dropped, lse, rtol=1e-6, atol=1e-6)


def test_mean_over_seeds_is_the_output_without(kernel: str) -> None:
    """Kept weights are scaled by 1 / (1 - p), so 400 masks average out; 6 standard errors."""
    q, k, v = (torch.randn(1, 1, 8, 8) for _ in range(3))
    draws = torch.stack(
        [fastattn.attention(q, k, v, dropout_p=0.3, seed=s, backend=kernel) for s in range(400)]
    )
    error = draws.std(0) / 400**0.5
    plain = fastattn.attention(q, k, v, backend=kernel)
    assert ((draws.mean(0) - plain).abs() <= 6 * error).all()


def test_seed_forms_agree(backend: str) -> None:
    q = torch.randn(1, 2, 30, 8)
    as_int = fastattn.attention(q, q, q, dropout_p=0.5, seed=41, backend=backend)
    for seed in (torch.tensor([41]), torch.tensor(41), torch.tensor([[41]])):
        o = fastattn.attention(q, q, q, dropout_p=0.5, seed=seed, backend=backend)
        assert torch.equal(o, as_int)
    wrapped = [
        fastattn.attention(q, q, q, dropout_p=0.5, seed=s, backend=backend) for s in (-1, 2**64 - 1)
    ]
    assert torch.equal(*wrapped)


def test_no_seed_draws_from_torchs_generator(backend: str) -> None:
    q = torch.randn(1, 2, 30, 8)

    def draw() -> torch.Tensor:
        return fastattn.attention(q, q, q, dropout_p=0.5, backend=backend)

    torch.manual_seed(3)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(), first)


def test_without_dropout_the_generator_stays(backend: str) -> None:
    q = torch.randn(1, 2, 30, 8)
    state = torch.get_rng_state()
    fastattn.attention(q, q, q, backend=backend)
    fastattn.attention(q, q, q, dropout_p=0.5, seed=1, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


def test_backward_uses_the_mask_of_its_forward(kernel: str) -> None:
    """With seed=None too: dv of sum(o) is the column sums of the dropped weights."""
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 50, 8)
    v = torch.randn(1, 2, 50, 8, requires_grad=True)
    o, weights = fastattn.attention(q, k, v, dropout_p=0.5, return_weights=True, backend=kernel)
    torch.manual_seed(99)  # the backward must not draw again
    (dv,) = torch.autograd.grad(o.sum(), v)
    want = weights.detach().sum(2)[..., None].expand_as(dv)
    torch.testing.assert_close(dv, want, rtol=1e-5, atol=1e-5)


def test_seed_tensor_changed_before_the_backward_is_noticed(kernel: str) -> None:
    """The seed is saved, not copied; autograd's version counter guards it."""
    q = torch.randn(1, 2, 30, 8, requires_grad=True)
    seed = torch.tensor([3])
    o = fastattn.attention(q, q, q, dropout_p=0.5, seed=seed, backend=kernel)
    seed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_packed_rows_count_from_their_sequence(kernel: str) -> None:
    problem = packed((40, 70), h=2, d=16, dropout_p=0.5, seed=6, return_weights=True)
    weights = run(problem, kernel).outputs["weights"]
    keep = reference.dropout_keep(6, 0.5, 2, 2, 70, 70)
    assert torch.equal(weights[0, :, :40, :40] != 0, keep[0, :, :40, :40])
    assert torch.equal(weights[1] != 0, keep[1])
