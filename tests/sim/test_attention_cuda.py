"""backend="cuda" on CPU tensors: the shipped binding, launcher and kernels (their sm_80 PTX, in the
simulator) against the fp64 oracle, every feature, outputs and gradients.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_attention import LAYOUTS, in_layout
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
from fastattn.ops.attention_op import Shared
from sim import ptx
from sim.cudart import Device

pytestmark = [pytest.mark.usefixtures("gpu"), pytest.mark.sampled(3)]

SMALL = {"b": 2, "h": 2, "hk": 1, "sq": 37, "sk": 41, "d": 24, "dv": 20}
TWO = [torch.float32, torch.bfloat16]


def outputs(problem: Problem) -> dict[str, torch.Tensor]:
    """Of a call without gradients."""
    fn = fastattn.attention if problem.cu_seqlens is None else fastattn.attention_varlen
    leaves = {n: x.detach() for n, x in problem.leaves().items()}
    return problem.call(fn, leaves, backend="cuda")


# ------------------------------------------------------------------------------------ the features


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, dtype: torch.dtype) -> None:
    judge(featured(feature, **SMALL, dtype=dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed(dtype: torch.dtype) -> None:
    bias = torch.randn(2, 1, 40).to(dtype)
    mask = torch.rand(4, 1, 37, 1) < 0.9
    given = {"bias": bias, "mask": mask, "sinks": torch.randn(2), "return_weights": True}
    problem = packed([9, 0, 37, 20], [5, 3, 40, 0], h=2, hk=1, d=24, dv=20, dtype=dtype, slack=3)
    judge(problem.with_(**given, causal="bottom_right", dropout_p=0.2, seed=3), "cuda")


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lens", [[40], [0], [1, 1, 1], [0, 0, 17, 0], [64, 128], [65, 63, 16], []])
def test_packed_lengths(lens: list[int], cu_dtype: torch.dtype) -> None:
    judge(packed(lens, h=2, d=16, slack=2, cu_dtype=cu_dtype, window=(12, 3)), "cuda")


def test_packed_weights_mean() -> None:
    judge(packed([9, 0, 37], [5, 3, 40], h=2, d=16, return_weights="mean", causal=True), "cuda")


# ------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize(
    ("d", "dv"),
    [(8, 8), (1, 1), (3, 5), (17, 33), (64, 64), (80, 96), (72, 128), (128, 65), (130, 256)],
)
def test_head_dims(d: int, dv: int, dtype: torch.dtype) -> None:
    judge(padded(b=1, h=1, sq=17, sk=33, d=d, dv=dv, dtype=dtype, causal=True), "cuda")


@pytest.mark.parametrize(
    ("sq", "sk"), [(1, 1), (1, 70), (70, 1), (64, 64), (128, 64), (65, 129), (130, 15), (15, 130)]
)
def test_lengths_around_the_tiles(sq: int, sk: int) -> None:
    problem = padded(b=1, h=1, sq=sq, sk=sk, d=16, dtype=torch.bfloat16, causal="bottom_right")
    judge(problem.with_(window=(70, 9)), "cuda")


@pytest.mark.parametrize(("b", "h", "hk"), [(1, 1, 1), (3, 1, 1), (1, 6, 2), (2, 4, 1), (1, 3, 3)])
def test_batches_and_grouped_heads(b: int, h: int, hk: int) -> None:
    judge(padded(b=b, h=h, hk=hk, sq=20, sk=18, d=16, alibi_slopes=torch.rand(h)), "cuda")


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 4, 4, 8, 8), (2, 0, 4, 4, 8, 8), (2, 2, 0, 4, 8, 8), (2, 2, 4, 0, 8, 8)],
)
def test_empty(shape: tuple[int, ...]) -> None:
    b, h, sq, sk, d, dv = shape
    q, k, v = torch.randn(b, h, sq, d), torch.randn(b, h, sk, d), torch.randn(b, h, sk, dv)
    problem = Problem(q, k, v, {"bias": torch.randn(1, 1, sq, sk), "sinks": torch.randn(h)})
    problem = problem.with_(return_weights=True)
    got, right = run(problem, "cuda"), run(problem, "reference")
    for name, x in right.all().items():
        torch.testing.assert_close(got.all()[name], x, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_values(kind: str, dtype: torch.dtype) -> None:
    judge(padded(b=1, h=1, sq=37, sk=70, d=24, dtype=dtype, kind=kind, causal=True), "cuda")


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-42])
def test_scales_that_cannot_be_divided_by(scale: float) -> None:
    judge(padded(b=1, h=2, sq=17, sk=33, d=16, scale=scale), "cuda")


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcap_is_as_exact_as_tanh(cap: float) -> None:
    for scale in (0.001, 0.3, 20.0):
        judge(padded(b=1, h=2, sq=17, sk=33, d=16, softcap=cap, scale=scale), "cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    problem = padded(b=2, h=2, sq=20, sk=20, d=16, dtype=torch.bfloat16, causal=True)
    for name in "qkv":
        tensor = in_layout(LAYOUTS[layout](*getattr(problem, name).shape), torch.bfloat16)
        problem = replace(problem, **{name: tensor})
    got = judge(problem, "cuda")
    contiguous = problem.q.is_contiguous()
    assert (got.outputs["o"] if contiguous else got.outputs["o"].transpose(1, 2)).is_contiguous()


def test_strides_of_mask_bias_slopes_sinks_and_lengths() -> None:
    problem = padded(b=2, h=2, sq=20, sk=24, d=16, return_weights=True)
    bias = torch.randn(2, 2, 24, 20).transpose(-1, -2)
    mask = torch.rand(2, 1, 40, 48)[:, :, ::2, ::2] < 0.8
    slopes, sinks = torch.rand(2, 2).t(), torch.randn(4)[::2]
    lens = torch.tensor([20, 99, 7, 99])[::2]
    judge(
        problem.with_(bias=bias, mask=mask, alibi_slopes=slopes, sinks=sinks, q_lens=lens), "cuda"
    )


@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64], ids=str)
def test_bias_and_sinks_of_another_dtype(bias_dtype: torch.dtype) -> None:
    bias = values((1, 2, 37, 41), bias_dtype, "normal")
    sinks = values((2,), bias_dtype, "normal")
    judge(padded(**SMALL, dtype=torch.bfloat16, bias=bias, sinks=sinks), "cuda")


def test_bias_of_finfo_min_is_a_row_like_others() -> None:
    bias = torch.zeros(37, 41)
    bias[::3] = torch.finfo(torch.float32).min
    judge(padded(**SMALL, bias=bias), "cuda")
    judge(padded(**SMALL, bias=bias, sinks=torch.randn(2)), "cuda")  # which such a row is below


@pytest.mark.parametrize(
    ("p", "seed"), [(1e-6, 3), (0.3, 2**40 + 11), (0.5, -(2**62)), (1 - 2**-33, 0)]
)
def test_dropout_mask_is_that_of_the_reference(p: float, seed: int) -> None:
    """Bit by bit, padded and packed; the seed is 64 bits, negative ones too."""
    q, k = torch.zeros(2, 2, 20, 8), torch.zeros(2, 2, 41, 8)
    given: dict[str, Any] = {"dropout_p": p, "seed": seed, "return_weights": True}
    keep = reference.dropout_keep(seed, p, 2, 2, 20, 41)
    _, w = fastattn.attention(q, k, k, **given, backend="cuda")
    assert torch.equal(w != 0, keep)
    q, k = torch.zeros(40, 2, 8), torch.zeros(82, 2, 8)
    cu_q, cu_k = torch.tensor([0, 20, 40]), torch.tensor([0, 41, 82])
    _, w = fastattn.attention_varlen(q, k, k, cu_q, cu_k, **given, backend="cuda")
    assert torch.equal(w != 0, keep)


# --------------------------------------------------------------------------------- hostile inputs


@pytest.mark.parametrize("dtype", TWO, ids=str)
def test_nan_beyond_the_lengths_never_leaks(dtype: torch.dtype) -> None:
    clean = padded(**SMALL, dtype=dtype, softcap=2.0, sinks=torch.randn(2))
    q_lens, k_lens = torch.tensor([20, 37]), torch.tensor([33, 7])
    q, k, v = (x.clone() for x in (clean.q, clean.k, clean.v))
    for b in range(2):
        q[b, :, q_lens[b] :], k[b, :, k_lens[b] :] = float("nan"), float("nan")
        v[b, :, k_lens[b] :] = float("inf")
    given = {**clean.kwargs, "q_lens": q_lens, "k_lens": k_lens, "return_lse": True}
    right = fastattn.attention(clean.q, clean.k, clean.v, **given, backend="cuda")
    for x, y in zip(fastattn.attention(q, k, v, **given, backend="cuda"), right, strict=True):
        assert torch.equal(x, y)
        assert not x.isnan().any()


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys(sinks: bool) -> None:
    mask = torch.rand(2, 1, 37, 41) < 0.7
    mask[0, 0, 3:20] = False
    mask[1] = False
    bias = torch.zeros(37, 41)
    bias[30] = float("-inf")
    problem = padded(**SMALL, mask=mask, bias=bias, return_weights=True)
    if sinks:
        problem = problem.with_(sinks=torch.tensor([0.5, -2.0]))
    got = judge(problem, "cuda")
    assert got.outputs["o"][1].eq(0).all()


def test_values_that_are_nan_where_no_key_is_seen() -> None:
    """A hidden key's v is multiplied by 0 and must not show: rows without keys are exactly 0."""
    problem = padded(**SMALL)
    problem.v.fill_(float("nan"))
    o = fastattn.attention(
        problem.q, problem.k, problem.v, mask=torch.zeros(37, 41, dtype=torch.bool), backend="cuda"
    )
    assert o.eq(0).all()


def test_sinks_that_drown_the_keys_and_are_drowned() -> None:
    judge(padded(**SMALL, sinks=torch.tensor([60.0, -60.0]), scale=0.5), "cuda")


def test_tokens_of_no_sequence() -> None:
    problem = packed([5, 30], [40, 3], h=2, d=16, slack=4)
    for x in (problem.q, problem.k, problem.v):
        x[-4:] = float("nan")
    got = outputs(problem)
    assert got["o"][-4:].eq(0).all()
    assert got["lse"][:, -4:].eq(float("-inf")).all()
    assert got["o"].isfinite().all()


# What follows calls the op itself: the public function checks values, which on a device it cannot.


def op_arguments(**given: Any) -> tuple[Any, ...]:
    names = Shared.__slots__[:9]
    numbers = {"scale": 0.25, "causal": 0, "left": -1, "right": -1, "softcap": 0.0}
    numbers |= {"dropout_p": 0.0, "weights": 0, "max_q": 20, "max_k": 20, "deterministic": True}
    tensors = tuple(given.pop(n, None) for n in names)
    return (*tensors, *(numbers | given).values())


@pytest.mark.parametrize("name", ["q_lens", "k_lens"])
def test_lengths_are_clamped_on_the_device(name: str) -> None:
    q, k, v = (torch.randn(3, 2, 20, 16) for _ in range(3))
    results = []
    for lens in ([-5, 7, 10**6], [0, 7, 20]):
        shared = op_arguments(**{name: torch.tensor(lens)}, weights=1)
        results.append(torch.ops.fastattn.attention_cuda_fwd(q, k, v, *shared))
    for got, right in zip(*results, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("wild", [[0, 50, 60], [0, 15, 5], [-7, 10, 20], [30, 40, 50], [9, 4, 2]])
def test_wild_cu_seqlens_stay_inside(wild: list[int]) -> None:
    """The simulator fails a launch that leaves its tensors; bias and weights bound the lengths."""
    q = torch.randn(20, 2, 16)
    cu, tame = torch.tensor(wild), torch.tensor([0, 12, 20])
    for cu_q, cu_k in ((cu, cu), (tame, cu), (cu, tame)):
        shared = op_arguments(
            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, bias=torch.randn(9, 9), weights=1, max_q=9,
            max_k=9,
        )  # fmt: skip
        o, _, _, w = torch.ops.fastattn.attention_cuda_fwd(q, q, q, *shared)
        assert o.isfinite().all()
        assert w.isfinite().all()


@pytest.mark.parametrize("feature", ["causal", "bias_fp32", "all"])
def test_bitwise_the_same_in_any_order(gpu: Device, feature: str) -> None:
    problem = featured(feature, **SMALL)
    first = outputs(problem)
    try:
        for order in ("reverse", "random"):
            gpu.schedule = ptx.Schedule(seed=3, order=order)
            for name, x in outputs(problem).items():
                assert torch.equal(x, first[name]), (order, name)
    finally:
        gpu.schedule = None


def test_long_rows_of_few_heads() -> None:
    """More tiles of keys than a pipeline has stages."""
    judge(padded(b=1, h=1, sq=33, sk=700, d=32, dtype=torch.bfloat16), "cuda")
