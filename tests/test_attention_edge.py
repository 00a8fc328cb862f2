"""The corners: nothing to attend to, nothing at all, NaN behind a length, numbers at their ends."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tools import DTYPES, Problem, judge, padded, run
from torch import Tensor

import fastattn

INF = math.inf


def assert_dead(problem: Problem, backend: str, rows: Tensor, lse: float | Tensor = -INF) -> None:
    """Rows (bool (B, H, Sq)) have o = 0, the given lse and no gradient; nothing is NaN."""
    upstream = problem.upstream_for(
        {"o": torch.empty(*problem.q.shape[:3], problem.v.shape[-1]), "lse": rows.float()}
    )
    got = run(replace(problem, upstream=upstream), backend)
    for name, x in got.all().items():
        assert not x.isnan().any(), name
    assert got.outputs["o"][rows].count_nonzero() == 0
    want = torch.as_tensor(lse, dtype=torch.float32).expand(rows.shape)[rows]
    torch.testing.assert_close(got.outputs["lse"][rows], want)
    assert got.outputs["lse"][~rows].isfinite().all()
    assert got.grads["q"][rows].count_nonzero() == 0
    if "bias" in got.grads and got.grads["bias"].shape[2] > 1:
        assert got.grads["bias"][rows].count_nonzero() == 0
    if rows.all():
        for name in "kv":
            assert got.grads[name].count_nonzero() == 0


DEAD: dict[str, Any] = {
    # case: (arguments, which of 40 rows are dead), with 30 keys
    "mask_some": lambda: ({"mask": (torch.arange(40) % 3 > 0)[:, None]}, torch.arange(40) % 3 == 0),
    "mask_all": lambda: ({"mask": torch.zeros(40, 30, dtype=torch.bool)}, torch.ones(40) > 0),
    "no_keys": lambda: ({"k_lens": torch.tensor([0, 0])}, torch.ones(40) > 0),
    "bottom_right": lambda: ({"causal": "bottom_right"}, torch.arange(40) < 10),
    "window": lambda: ({"window": (2, 2)}, torch.arange(40) > 31),
    "window_and_lens": lambda: (
        {"window": (1, 0), "k_lens": torch.tensor([9, 9])},
        torch.arange(40) > 9,
    ),
    "bias_row": lambda: (
        {"bias": torch.randn(2, 2, 40, 30).index_fill(2, torch.arange(5, 9), -INF)},
        (torch.arange(40) >= 5) & (torch.arange(40) < 9),
    ),
    "bias_all": lambda: ({"bias": torch.full((2, 2, 40, 30), -INF)}, torch.ones(40) > 0),
    "bias_and_mask": lambda: (
        {
            "bias": torch.randn(2, 2, 40, 30).index_fill(3, torch.arange(15), -INF),
            "mask": (torch.arange(30) < 15) | (torch.arange(40)[:, None] > 20),
        },
        torch.arange(40) <= 20,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DEAD)
def test_rows_without_keys(backend: str, case: str, dtype: torch.dtype) -> None:
    given, dead = DEAD[case]()
    problem = padded(b=2, h=2, sq=40, sk=30, d=16, dtype=dtype, **given)
    rows = dead.expand(2, 2, 40)
    assert_dead(problem, backend, rows)
    sinks = torch.tensor([-1.5, 2.0])
    assert_dead(problem.with_(sinks=sinks), backend, rows, sinks[:, None])
    assert_dead(problem.with_(dropout_p=0.5, seed=1, softcap=5.0), backend, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", DEAD)
def test_rows_without_keys_by_the_oracle(kernel: str, case: str, dtype: torch.dtype) -> None:
    given, _ = DEAD[case]()
    problem = padded(b=2, h=2, sq=40, sk=30, d=16, dtype=dtype, return_weights=True, **given)
    judge(problem, kernel)
    judge(problem.with_(sinks=torch.randn(2), return_weights="mean"), kernel)


def test_oracle_keeps_upstream_nan_of_dead_rows_out() -> None:
    """Stronger than the contract, which allows 0 * NaN behind an elementwise mask."""
    alive = torch.arange(40) > 10
    problem = padded(b=1, h=2, sq=40, sk=30, d=16, mask=alive[:, None], return_weights=True)
    upstream = {
        "o": torch.randn(1, 2, 40, 16),
        "lse": torch.randn(1, 2, 40),
        "weights": torch.randn(1, 2, 40, 30),
    }
    clean = run(replace(problem, upstream=upstream), "reference")
    bad = {n: x.clone() for n, x in upstream.items()}
    for x, poison in zip(bad.values(), (torch.nan, torch.inf, torch.nan), strict=True):
        x[:, :, :11] = poison
    got = run(replace(problem, upstream=bad), "reference")
    for name, x in clean.grads.items():
        torch.testing.assert_close(got.grads[name], x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("causal", [False, "bottom_right"])
def test_nothing_beyond_a_length_is_used(
    backend: str, causal: bool | str, poison: float, dtype: torch.dtype
) -> None:
    """NaN and inf beyond q_lens and k_lens in q, k, v, bias and every upstream gradient."""
    q_lens, k_lens = torch.tensor([33, 0, 70]), torch.tensor([50, 65, 1])
    problem = padded(
        b=3, h=2, sq=70, sk=65, d=24, dtype=dtype, causal=causal, q_lens=q_lens, k_lens=k_lens,
        bias=torch.randn(3, 2, 70, 65).to(dtype), sinks=torch.randn(2), return_weights=True,
    )  # fmt: skip
    upstream = {
        "o": torch.randn(3, 2, 70, 24).to(dtype),
        "lse": torch.randn(3, 2, 70),
        "weights": torch.randn(3, 2, 70, 65).to(dtype),
    }
    clean = run(replace(problem, upstream=upstream), backend)
    rows = (torch.arange(70) >= q_lens[:, None])[:, None, :, None]
    keys = (torch.arange(65) >= k_lens[:, None])[:, None, :, None]
    both = rows | keys.transpose(2, 3)
    bad = replace(
        problem,
        q=problem.q.masked_fill(rows, poison),
        k=problem.k.masked_fill(keys, poison),
        v=problem.v.masked_fill(keys, poison),
        upstream={
            "o": upstream["o"].masked_fill(rows, poison),
            "lse": upstream["lse"].masked_fill(rows[..., 0], poison),
            "weights": upstream["weights"].masked_fill(both, poison),
        },
    ).with_(bias=problem.kwargs["bias"].masked_fill(both, poison))
    got = run(bad, backend)
    for name, x in clean.all().items():
        assert torch.equal(got.all()[name], x), name
    assert got.outputs["weights"].masked_select(both).count_nonzero() == 0
    assert got.outputs["o"].masked_select(rows).count_nonzero() == 0
    assert (got.outputs["lse"].masked_select(rows[..., 0]) == -INF).all()
    assert got.grads["q"].masked_select(rows).count_nonzero() == 0
    for name in "kv":
        assert got.grads[name].masked_select(keys).count_nonzero() == 0
    assert got.grads["bias"].masked_select(both).count_nonzero() == 0


EMPTY = [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (0, 0, 0, 0), (1, 1, 0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("extras", [False, True])
def test_empty(backend: str, extras: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, h, sq, sk = shape
    given: dict[str, Any] = {"return_weights": True}
    if extras:
        given |= {
            "bias": torch.randn(b, h, 1, sk),
            "sinks": torch.randn(h),
            "causal": "bottom_right",
            "dropout_p": 0.5,
            "seed": 1,
        }
    q, k, v = (torch.randn(b, h, n, d).to(dtype) for n, d in ((sq, 8), (sk, 8), (sk, 6)))
    got = run(Problem(q, k, v, given), backend)
    assert got.outputs["o"].shape == (b, h, sq, 6)
    assert got.outputs["weights"].shape == (b, h, sq, sk)
    assert got.outputs["o"].count_nonzero() == 0
    sink = given["sinks"][:, None] if extras else torch.tensor(-INF)
    assert torch.equal(got.outputs["lse"], sink.expand(b, h, sq))
    for name, leaf in Problem(q, k, v, given).leaves().items():
        assert got.grads[name].shape == leaf.shape
        if name != "sinks":
            assert got.grads[name].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_of_finfo_min_is_uniform(backend: str, dtype: torch.dtype) -> None:
    """As in torch: the lowest finite number is no -inf; what rounds to it is shared evenly.

    float16's lowest is -65504, which swallows no logit in the fp32 that logits live in.
    """
    low = torch.finfo(torch.float32 if dtype == torch.float16 else dtype).min
    problem = padded(b=1, h=2, sq=20, sk=33, d=16, dtype=dtype)
    bias = torch.zeros(20, 33)
    bias[::2] = low
    got = run(problem.with_(bias=bias), backend)
    mean = problem.v.double().mean(2, keepdim=True).expand(1, 2, 10, 16)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.outputs["o"][:, :, ::2].double(), mean, rtol=0, atol=tolerance)
    assert got.outputs["lse"].isfinite().all()
    for grad in got.grads.values():
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finfo_min_hides_beside_other_keys(kernel: str, dtype: torch.dtype) -> None:
    bias = torch.zeros(2, 1, 1, 90).to(dtype)
    bias[:, :, :, 60:] = torch.finfo(dtype).min
    judge(padded(b=2, h=2, sq=40, sk=90, d=16, dtype=dtype, bias=bias), kernel)
    judge(padded(b=2, h=2, sq=40, sk=90, d=16, dtype=dtype, bias=bias.flip(-1)), kernel)


def test_minus_inf_bias_in_whole_tiles(kernel: str) -> None:
    """The running maximum meets -inf first, last and in between."""
    for hidden in (slice(0, 200), slice(200, 400), slice(100, 300), slice(1, 400), slice(0, 399)):
        bias = torch.randn(1, 2, 1, 400)
        bias[..., hidden] = -INF
        judge(padded(b=1, h=2, sq=50, sk=400, d=16, bias=bias), kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_running_maximum_that_moves_every_tile(kernel: str, order: str, dtype: torch.dtype) -> None:
    bias = torch.linspace(-40, 40, 700)
    bias = bias if order == "rising" else bias.flip(0)
    judge(padded(b=1, h=2, sq=40, sk=700, d=16, dtype=dtype, bias=bias), kernel)


def test_nan_where_it_takes_part_is_not_hidden(backend: str) -> None:
    """A NaN key among those that take part must show, in every row that sees it and no other."""
    problem = padded(b=1, h=1, sq=40, sk=40, d=16, causal=True)
    problem.k[0, 0, 25, 3] = torch.nan
    o = run(problem, backend).outputs["o"]
    assert o[0, 0, 25:].isnan().all()
    assert o[0, 0, :25].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30, 40.0])
def test_scales(kernel: str, scale: float) -> None:
    judge(padded(b=1, h=2, sq=40, sk=50, d=16, scale=scale), kernel)


@pytest.mark.parametrize("softcap", [1e-3, 0.5, 50.0, 1e6])
def test_softcaps(kernel: str, softcap: float) -> None:
    judge(padded(b=1, h=2, sq=40, sk=50, d=16, softcap=softcap, kind="huge"), kernel)


@pytest.mark.parametrize("sink", [-INF, -200.0, 0.0, 80.0])
def test_sinks_of_every_size(kernel: str, sink: float) -> None:
    problem = padded(b=2, h=2, sq=40, sk=50, d=16, sinks=torch.full((2,), sink))
    got = judge(problem, kernel)
    assert got.grads["sinks"].isfinite().all()
    if sink == -INF:
        assert torch.equal(got.outputs["o"], run(padded_like(problem), kernel).outputs["o"])


def padded_like(problem: Problem) -> Problem:
    return replace(problem, kwargs={n: x for n, x in problem.kwargs.items() if n != "sinks"})


@pytest.mark.parametrize("slope", [0.0, 1e-3, 8.0, -0.5])
def test_alibi_slopes(kernel: str, slope: float) -> None:
    slopes = torch.tensor([slope, 0.1])
    judge(padded(b=1, h=2, sq=100, sk=130, d=16, alibi_slopes=slopes), kernel)


def test_inputs_are_left_alone(backend: str) -> None:
    problem = padded(b=2, h=2, sq=20, sk=20, bias=torch.randn(2, 2, 20, 20))
    problem = problem.with_(sinks=torch.randn(2), k_lens=torch.tensor([9, 20]))
    before = [x.clone() for x in (problem.q, problem.k, problem.v, *problem.kwargs.values())]
    run(problem, backend)
    after = (problem.q, problem.k, problem.v, *problem.kwargs.values())
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x, y)


def test_k_and_v_may_be_one_tensor(kernel: str) -> None:
    x = torch.randn(1, 2, 30, 16, requires_grad=True)
    o = fastattn.attention(x, x, x, causal=True, backend=kernel)
    do = torch.randn_like(o)
    (got,) = torch.autograd.grad(o, x, do)
    x64 = x.detach().double().requires_grad_()
    want = fastattn.reference.attention(x64, x64, x64, causal=True)
    (want_grad,) = torch.autograd.grad(want, x64, do.double())
    torch.testing.assert_close(got.double(), want_grad, rtol=1e-5, atol=1e-5)
