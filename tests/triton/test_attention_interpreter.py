"""The Triton attention kernels in Triton's interpreter, every feature against the fp64 oracle.

Shapes are small: the interpreter takes a millisecond a tile. Its tiles are small and not square
(``configs.py``), so these shapes have several of them, whole, partial and skipped.
"""

from dataclasses import replace
from typing import Any
from unittest import mock

import interpreter
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import LAYOUTS, in_layout
from test_attention_backward import UPSTREAM
from tools import (
    DTYPES,
    FEATURES,
    KINDS,
    Problem,
    featured,
    judge,
    packed,
    padded,
    run,
    values,
)

import fastattn
from fastattn import reference
from fastattn.kernels import configs

pytestmark = pytest.mark.sampled(2)

SMALL = {"b": 2, "h": 2, "hk": 1, "sq": 37, "sk": 41, "d": 24, "dv": 20}
F32 = torch.float32
NOTHING = (None,) * 9


def numbers(sq: int, sk: int, causal: int = 0, weights: int = 0) -> tuple[Any, ...]:
    """The numbers of the ops' schema: scale, causal, window, softcap, dropout, weights, lengths."""
    return (0.25, causal, -1, -1, 0.0, 0.0, weights, sq, sk)


# ------------------------------------------------------------------------------------ the features


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, dtype: torch.dtype) -> None:
    judge(featured(feature, **SMALL, dtype=dtype), "triton")


@pytest.mark.parametrize("feature", ["plain", "bias", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_atomics(feature: str, dtype: torch.dtype) -> None:
    problem = featured(feature, **SMALL, dtype=dtype).with_(deterministic=False)
    judge_with_atomics(problem)


def judge_with_atomics(problem: Problem) -> None:
    """`judge`, with the check that atomics were indeed used."""
    with mock.patch.object(
        interpreter.Builder,
        "create_atomic_rmw",
        side_effect=interpreter.Builder.create_atomic_rmw,
        autospec=True,
    ) as atomic:
        judge(problem, "triton")
    assert atomic.called


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed(dtype: torch.dtype) -> None:
    bias = torch.randn(2, 1, 40).to(dtype)
    mask = torch.rand(4, 1, 37, 1) < 0.9
    given_ = {"bias": bias, "mask": mask, "sinks": torch.randn(2), "return_weights": True}
    problem = packed([9, 0, 37, 20], [5, 3, 40, 0], h=2, hk=1, d=24, dv=20, dtype=dtype, slack=3)
    judge(problem.with_(**given_, causal="bottom_right", dropout_p=0.2, seed=3), "triton")


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lens", [[40], [0], [1, 1, 1], [0, 0, 17, 0], [32, 64], [33, 31, 16], []])
def test_packed_lengths(lens: list[int], cu_dtype: torch.dtype) -> None:
    judge(packed(lens, h=2, d=16, slack=2, cu_dtype=cu_dtype, window=(12, 3)), "triton")


def test_packed_with_atomics() -> None:
    problem = packed([9, 0, 37], [5, 3, 40], h=2, hk=1, d=16, slack=3, bias=torch.randn(37, 40))
    judge_with_atomics(problem.with_(deterministic=False, causal=True))


def test_packed_weights_mean() -> None:
    judge(packed([9, 0, 37], [5, 3, 40], h=2, d=16, return_weights="mean", causal=True), "triton")


# ------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("d", "dv"), [(1, 1), (3, 5), (16, 16), (17, 33), (64, 64), (72, 128), (256, 130)]
)
def test_head_dims(d: int, dv: int, dtype: torch.dtype) -> None:
    judge(padded(b=1, h=1, sq=17, sk=33, d=d, dv=dv, dtype=dtype, causal=True), "triton")


@pytest.mark.parametrize(
    ("sq", "sk"),
    [(1, 1), (1, 40), (40, 1), (16, 16), (32, 32), (33, 64), (70, 15), (15, 70), (64, 33)],
)
def test_lengths_around_the_tiles(sq: int, sk: int) -> None:
    judge(padded(b=1, h=1, sq=sq, sk=sk, d=16, causal="bottom_right", window=(20, 9)), "triton")


@pytest.mark.parametrize(("b", "h", "hk"), [(1, 1, 1), (3, 1, 1), (1, 6, 2), (2, 4, 1), (1, 3, 3)])
def test_batches_and_grouped_heads(b: int, h: int, hk: int) -> None:
    judge(padded(b=b, h=h, hk=hk, sq=20, sk=18, d=16, alibi_slopes=torch.rand(h)), "triton")


@pytest.mark.parametrize(
    "shape",
    [
        *((0, 2, 4, 4, 8, 8), (2, 0, 4, 4, 8, 8), (2, 2, 0, 4, 8, 8), (2, 2, 4, 0, 8, 8)),
        (1, 2, 0, 0, 8, 8),
    ],
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_empty(shape: tuple[int, ...], deterministic: bool) -> None:
    b, h, sq, sk, d, dv = shape
    hk = None if h else 0
    q = torch.randn(b, h, sq, d)
    k, v = torch.randn(b, hk or h, sk, d), torch.randn(b, hk or h, sk, dv)
    problem = Problem(q, k, v, {"bias": torch.randn(1, 1, sq, sk), "sinks": torch.randn(h)})
    got = run(problem, "triton", deterministic=deterministic)
    right = run(problem, "reference")
    for name, x in right.all().items():
        torch.testing.assert_close(got.all()[name], x, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_values(kind: str, dtype: torch.dtype) -> None:
    judge(padded(b=1, h=1, sq=37, sk=41, d=24, dtype=dtype, kind=kind, causal=True), "triton")


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcap_is_as_exact_as_tanh(cap: float) -> None:
    """Near 0 and near the cap."""
    for scale in (0.001, 0.3, 20.0):
        judge(padded(b=1, h=2, sq=17, sk=33, d=16, softcap=cap, scale=scale), "triton")


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-42])
def test_scales_that_cannot_be_divided_by(scale: float) -> None:
    judge(padded(b=1, h=2, sq=17, sk=33, d=16, scale=scale), "triton")


# -------------------------------------------------------------------------------------- the bias


BIAS_SHAPES = [
    (2, 2, 37, 41), (2, 2, 37, 1), (2, 2, 1, 41), (2, 2, 1, 1), (2, 1, 37, 41), (2, 1, 1, 41),
    (1, 2, 37, 41), (1, 2, 37, 1), (1, 1, 37, 41), (37, 41), (41,), (),
]  # fmt: skip


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_bias_gradient_in_its_own_shape(shape: tuple[int, ...], deterministic: bool) -> None:
    dtype = torch.bfloat16 if deterministic else F32
    problem = padded(**SMALL, bias=values(shape, dtype, "normal"), causal=True)
    got = judge(problem.with_(deterministic=deterministic), "triton")
    assert got.grads["bias"].shape == shape


@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64], ids=str)
def test_bias_and_sinks_of_another_dtype(bias_dtype: torch.dtype) -> None:
    bias = values((1, 2, 37, 41), bias_dtype, "normal")
    sinks = values((2,), bias_dtype, "normal")
    judge(padded(**SMALL, dtype=torch.bfloat16, bias=bias, sinks=sinks), "triton")


def test_bias_of_finfo_min_is_a_row_like_others() -> None:
    """A row that adds finfo.min everywhere keeps log l only in lse_lo."""
    bias = torch.zeros(37, 41)
    bias[::3] = torch.finfo(F32).min
    judge(padded(**SMALL, bias=bias), "triton")
    judge(padded(**SMALL, bias=bias, sinks=torch.randn(2)), "triton")  # which such a row is below


# ---------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    problem = padded(b=2, h=2, sq=20, sk=20, d=16, dtype=torch.bfloat16, causal=True)
    for name in "qkv":
        shape = getattr(problem, name).shape
        tensor = in_layout(LAYOUTS[layout](*shape), torch.bfloat16)
        problem = replace(problem, **{name: tensor})
    judge(problem, "triton")


@pytest.mark.parametrize("upstream", UPSTREAM)
def test_upstream_gradient_of_any_strides(upstream: str) -> None:
    problem = padded(b=2, h=2, sq=20, sk=33, d=16)
    do = UPSTREAM[upstream](2, 2, 20, 16)
    lse = torch.ones(()).expand(2, 2, 20)
    judge(replace(problem, upstream={"o": do, "lse": lse}), "triton")


def test_strides_of_mask_bias_weights_slopes_and_sinks() -> None:
    problem = padded(b=2, h=2, sq=20, sk=24, d=16, return_weights=True)
    bias = torch.randn(2, 2, 24, 20).transpose(-1, -2)
    mask = torch.rand(2, 1, 40, 48)[:, :, ::2, ::2] < 0.8
    slopes, sinks = torch.rand(2, 2).t(), torch.randn(4)[::2]
    upstream = {
        "o": torch.randn(2, 2, 20, 16),
        "lse": torch.randn(2, 20, 2).transpose(1, 2),
        "weights": torch.randn(2, 2, 20, 1).expand(2, 2, 20, 24),
    }
    problem = problem.with_(bias=bias, mask=mask, alibi_slopes=slopes, sinks=sinks)
    judge(replace(problem, upstream=upstream), "triton")


def test_results_are_laid_out_as_promised() -> None:
    """From (B, S, H, D) memory the output comes back in such memory, and so do gradients."""
    q, k, v = (torch.randn(2, 9, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    o = fastattn.attention(q, k, v, backend="triton")
    assert o.transpose(1, 2).is_contiguous()
    for grad in torch.autograd.grad(o, (q, k, v), torch.randn_like(o)):
        assert grad.transpose(1, 2).is_contiguous()


def test_offsets_beyond_31_bits() -> None:
    """A row, a head, a bias row 2**31 elements further; the memory between is never touched."""
    far = 2**31 + 8
    room = torch.empty(far + 4096, dtype=torch.float16)
    assert room.untyped_storage().nbytes() > 2**32

    def view(shape: tuple[int, ...], dim: int, x: torch.Tensor, at: int) -> torch.Tensor:
        strides = list(torch.empty(shape).stride())
        strides[dim] = far
        y = room.as_strided(shape, strides, at)
        y.copy_(x)
        return y

    problem = padded(b=1, h=2, sq=2, sk=2, d=4, dtype=torch.float16, kind="normal")
    q = view((1, 2, 2, 4), 2, problem.q, 0)
    k = view((1, 2, 2, 4), 2, problem.k, 64)
    v = view((1, 2, 2, 4), 1, problem.v, 128)
    bias = view((2, 2), 0, torch.randn(2, 2), 192)
    problem = Problem(q, k, v, {"bias": bias})
    # The executor would copy the whole storage back onto itself.
    with mock.patch.object(interpreter.core.GridExecutor, "_restore_args_dev"):
        judge(problem, "triton")


# ----------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    ("p", "seed"),
    [(1e-6, 3), (0.3, 2**40 + 11), (0.5, -(2**62)), (0.99, 2**63 - 1), (1 - 2**-33, 0)],
)
def test_dropout_mask_is_that_of_the_reference(p: float, seed: int) -> None:
    """Bit by bit, padded and packed; the seed is 64 bits, negative ones too."""
    q, k = torch.zeros(1, 2, 20, 8), torch.zeros(1, 2, 41, 8)
    given_ = {"dropout_p": p, "seed": seed, "return_weights": True, "backend": "triton"}
    keep = reference.dropout_keep(seed, p, 2, 2, 20, 41)
    _, w = fastattn.attention(*(x.expand(2, -1, -1, -1) for x in (q, k, k)), **given_)
    assert torch.equal(w != 0, keep)
    q, k = torch.zeros(40, 2, 8), torch.zeros(82, 2, 8)
    cu_q, cu_k = torch.tensor([0, 20, 40]), torch.tensor([0, 41, 82])
    _, w = fastattn.attention_varlen(q, k, k, cu_q, cu_k, **given_)
    assert torch.equal(w != 0, keep)


# ------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize("work", configs.WORKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", configs.FAMILIES)
def test_tiles_are_what_kernels_can_take(family: str, dtype: torch.dtype, work: str) -> None:
    for d in (1, 16, 17, 64, 100, 129, 256):
        m, n, warps, stages = configs.config(family, dtype, d, 1, work)
        assert (m, n, warps, stages) == configs.config(family, dtype, 1, d, work)
        assert m in (16, 32, 64, 128)
        assert n in (16, 32, 64, 128)
        assert warps in (1, 2, 4, 8)
        assert 1 <= stages <= 4
        laden = configs.config(family, dtype, d, 1, work, True)
        assert m * n >= laden.BLOCK_M * laden.BLOCK_N
        if dtype == torch.float32 and family not in ("cpu", "gfx9"):
            wide = configs.config(family, torch.bfloat16, d, 1, work)
            assert m * n <= wide.BLOCK_M * wide.BLOCK_N
    with pytest.raises(ValueError, match="at most 256, got 257"):
        configs.config(family, dtype, 8, 257, work)


# --------------------------------------------------------------------------------------------- fuzz


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_combination(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    hk, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    shape = {
        "b": draw(st.integers(1, 2)), "h": hk * group, "hk": hk,
        "sq": draw(st.integers(1, 40)), "sk": draw(st.integers(1, 40)),
        "d": draw(st.integers(1, 40)), "dv": draw(st.integers(1, 40)),
        "dtype": draw(st.sampled_from(DTYPES)),
    }  # fmt: skip
    names = draw(st.lists(st.sampled_from(sorted(FEATURES)), min_size=2, max_size=4))
    problem = padded(**shape)
    for name in names:
        b, h, sq, sk = shape["b"], shape["h"], shape["sq"], shape["sk"]
        problem = problem.with_(**FEATURES[name](b, h, sq, sk, shape["dtype"]))
    judge(problem.with_(deterministic=draw(st.booleans())), "triton")
