"""What an outside reviewer broke, each once."""

import sys
import time
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import fastattn

SHARED = (None,) * 9
NUMBERS = (1.0, 0, -1, -1, 0.0, 0.0, 0)


@pytest.mark.parametrize("low", [-1e4, -1e9, -1e18, torch.finfo(torch.float32).min])
def test_sink_above_a_row_of_very_negative_logits(kernel: str, low: float) -> None:
    q, k, v = (torch.randn(1, 1, 3, 8) for _ in range(3))
    sinks = torch.tensor([1.5], requires_grad=True)
    bias = torch.full((3, 1), low)
    _, lse = fastattn.attention(q, k, v, sinks=sinks, bias=bias, return_lse=True, backend=kernel)
    lse.sum().backward()
    torch.testing.assert_close(lse, torch.full((1, 1, 3), 1.5))
    torch.testing.assert_close(sinks.grad, torch.tensor([3.0]), rtol=1e-4, atol=0)


def test_nan_upstream_of_lse_on_a_row_without_keys(backend: str) -> None:
    q, k, v = (torch.randn(1, 1, 3, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    o, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    dlse = torch.ones(1, 1, 3)
    dlse[0, 0, 1] = float("nan")
    grads = torch.autograd.grad([o, lse], (q, k, v), [torch.ones_like(o), dlse])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
@pytest.mark.parametrize("far", [sys.maxsize, 2**63])
def test_a_window_as_wide_as_integers_go(backend: str, causal: object, far: int) -> None:
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 3, 8)
    want = fastattn.attention(q, k, k, causal=causal, backend=backend)
    got = fastattn.attention(q, k, k, causal=causal, window=(far, far), backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("lse", [False, True])
def test_forward_mode(lse: bool, backend: str) -> None:
    """By the formula: against differences, in what torch has of it."""
    q, k, tangent = (torch.randn(1, 2, 5, 8) for _ in range(3))
    options = {"causal": True, "softcap": 3.0, "backend": backend}

    def f(x: torch.Tensor) -> torch.Tensor:
        if lse:
            return fastattn.attention(x, k, x, return_lse=True, **options)[1]
        return fastattn.attention(x, k, x, **options)

    right = torch.autograd.functional.jacobian(f, q).flatten(-4) @ tangent.flatten()
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(q, tangent)))
    torch.testing.assert_close(dual.tangent, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dual.primal, f(q), rtol=1e-5, atol=1e-5)
    _, by_func = torch.func.jvp(f, (q,), (tangent,))
    torch.testing.assert_close(by_func, right, rtol=1e-4, atol=1e-5)


def test_forward_mode_of_sequences_side_by_side(backend: str) -> None:
    x, tangent = torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)

    def f(x: torch.Tensor) -> torch.Tensor:
        return fastattn.attention_varlen(x, x, x, cu, cu, backend=backend)

    right = torch.autograd.functional.jacobian(f, x).flatten(-3) @ tangent.flatten()
    torch.testing.assert_close(torch.func.jvp(f, (x,), (tangent,))[1], right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("B", [1, 2])
def test_jacobian_by_vmap(B: int, backend: str) -> None:
    """Of one batch what the backward maps over expands lse, which is no copy then."""
    x = torch.randn(B, 2, 4, 16)
    found = torch.func.jacrev(lambda x: fastattn.attention(x, x, x, backend=backend))(x)
    right = torch.func.jacrev(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x))
    torch.testing.assert_close(found, right(x), rtol=1e-4, atol=1e-5)


def test_meta_tensors() -> None:
    x = torch.randn(1, 2, 5, 8, device="meta")
    with warnings.catch_warnings():  # nothing is computed, so nothing is slow
        warnings.simplefilter("error")
        assert fastattn.attention(x, x, x).shape == x.shape


def test_direct_call_with_a_bool_bias() -> None:
    q = torch.randn(1, 1, 40, 8)
    given = list(SHARED)
    given[1] = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="bias"):
        torch.ops.fastattn.attention_fwd(q, q, q, *given, *NUMBERS, 40, 40)


def test_direct_call_with_odd_strides_of_lse() -> None:
    q = torch.randn(1, 1, 512, 8)
    o, lse, lo, _ = torch.ops.fastattn.attention_fwd(q, q, q, *SHARED, *NUMBERS, 512, 512)
    want = torch.ops.fastattn.attention_bwd(
        q, None, None, q, q, q, o, lse, lo, *SHARED, *NUMBERS, 512, 512, 7
    )
    lse, lo = (x.as_strided(x.shape, (1, 512, 1)) for x in (lse, lo))
    got = torch.ops.fastattn.attention_bwd(
        q, None, None, q, q, q, o, lse, lo, *SHARED, *NUMBERS, 512, 512, 7
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("lens", [False, True])
def test_vmap_over_nothing(kernel: str, lens: bool) -> None:
    given = {"k_lens": torch.tensor([2, 5])} if lens else {}
    fn = torch.vmap(lambda a: fastattn.attention(a, a, a, backend=kernel, **given))
    assert fn(torch.randn(0, 2, 2, 5, 4)).shape == (0, 2, 2, 5, 4)


@pytest.mark.parametrize("given", [{"scale": 1e39}, {"softcap": 1e39}, {"softcap": 1e-46}], ids=str)
def test_numbers_that_float32_cannot_hold(given: dict[str, float]) -> None:
    q = torch.randn(1, 1, 2, 8)
    with pytest.raises(ValueError, match="float32"):
        fastattn.attention(q, q, q, **given)


def test_steep_slopes_cost_no_subnormal_arithmetic(kernel: str) -> None:
    """Weights below 2^-126 used to make a call nine times slower."""
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 4, 512, 64) for _ in range(3))
    flat, steep = torch.full((4,), 1e-3), torch.full((4,), 0.5)

    def seconds(slopes: torch.Tensor) -> float:
        start = time.thread_time()  # of this thread alone: other tests run at the same time
        fastattn.attention(q, k, v, alibi_slopes=slopes, backend=kernel)
        return time.thread_time() - start

    pairs = [(seconds(steep), seconds(flat)) for _ in range(15)]
    assert min(a for a, _ in pairs) < 3 * min(b for _, b in pairs)
