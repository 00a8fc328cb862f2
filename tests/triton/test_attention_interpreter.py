"""The Triton attention kernels in Triton's interpreter, every feature against the fp64 oracle.

Shapes are small: the interpreter takes a millisecond a tile. Its tiles are small and not square
(``configs.py``), so these shapes have several of them, whole, partial and skipped.
"""

from dataclasses import replace
from typing import Any
from unittest import mock

import interpreter
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import LAYOUTS, in_layout
from test_attention_backward import UPSTREAM
from tools import (
    DIFFERENTIABLE,
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
from fastattn.kernels import attention as kernels
from fastattn.kernels import configs

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


# ----------------------------------------------------------------------------------- hostile inputs


def poisoned(problem: Problem, q_lens: torch.Tensor, k_lens: torch.Tensor) -> Problem:
    """NaN and inf in all that lies beyond the lengths, upstream too."""
    q, k, v = (x.clone() for x in (problem.q, problem.k, problem.v))
    do = torch.randn(*q.shape[:-1], v.shape[-1]).to(q.dtype)
    dlse = torch.randn(q.shape[:-1])
    for b, (m, n) in enumerate(zip(q_lens.tolist(), k_lens.tolist(), strict=True)):
        q[b, :, m:], k[b, :, n:], v[b, :, n:] = float("nan"), float("nan"), float("inf")
        do[b, :, m:], dlse[b, :, m:] = float("nan"), float("nan")
    problem = replace(problem, q=q, k=k, v=v, upstream={"o": do, "lse": dlse})
    return problem.with_(q_lens=q_lens, k_lens=k_lens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
def test_nan_beyond_the_lengths_never_leaks(deterministic: bool, dtype: torch.dtype) -> None:
    clean = padded(**SMALL, dtype=dtype, softcap=2.0, sinks=torch.randn(2))
    dirty = poisoned(clean, torch.tensor([20, 37]), torch.tensor([33, 7]))
    zero = {n: torch.nan_to_num(x, 0.0, 0.0, 0.0) for n, x in dirty.upstream.items()}
    clean = replace(dirty, q=clean.q, k=clean.k, v=clean.v, upstream=zero)
    got = run(dirty, "triton", deterministic=deterministic).all()
    right = run(clean, "triton", deterministic=deterministic).all()
    for name, x in right.items():
        assert torch.equal(got[name], x), name
        assert not x.isnan().any(), name


def test_tokens_of_no_sequence() -> None:
    """Behind cu_seqlens[-1]: o 0, lse -inf, gradients 0, whatever is stored there."""
    problem = packed([5, 30], [40, 3], h=2, d=16, slack=4)
    for x in (problem.q, problem.k, problem.v):
        x[-4:] = float("nan")
    for deterministic in (True, False):
        got = run(problem, "triton", deterministic=deterministic)
        assert got.outputs["o"][-4:].eq(0).all()
        assert got.outputs["lse"][:, -4:].eq(float("-inf")).all()
        for name in "qkv":
            assert got.grads[name][-4:].eq(0).all(), name
            assert got.grads[name].isfinite().all(), name


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
    got = judge(problem, "triton")
    assert got.outputs["o"][1].eq(0).all()
    assert got.grads["q"][1].eq(0).all()


def test_sinks_that_drown_the_keys_and_are_drowned() -> None:
    judge(padded(**SMALL, sinks=torch.tensor([60.0, -60.0]), scale=0.5), "triton")


def test_lengths_are_clamped_on_the_device() -> None:
    """Nobody reads them on the host, so what lies is clamped: results stay those of right ones."""
    q, k, v = (torch.randn(3, 2, 20, 16) for _ in range(3))
    wild, tame = torch.tensor([-5, 7, 10**6]), torch.tensor([0, 7, 20])
    for at in (2, 3):  # q_lens, k_lens
        outs = []
        for lens in (wild, tame):
            shared = (*NOTHING[:at], lens, *NOTHING[at + 1 :], *numbers(20, 20))
            o, lse, lo, _ = kernels.attention_forward(q, k, v, *shared)
            grads = kernels.attention_backward(
                o, lse, None, q, k, v, o, lse, lo, *shared, need=7, deterministic=True
            )
            outs.append((o, *grads[:3]))
        for got, right in zip(*outs, strict=True):
            assert torch.equal(got, right)


def test_wild_cu_seqlens_stay_inside() -> None:
    """Beyond the tokens, decreasing, negative: only clamped values are ever used as an index."""
    q = torch.randn(20, 2, 16)
    for wild in ([0, 50, 60], [0, 15, 5], [-7, 10, 20], [30, 40, 50]):
        cu = torch.tensor(wild)
        shared = (*NOTHING[:4], cu, cu, *NOTHING[6:], *numbers(20, 20))
        seen: list[int] = []
        spy_on_addresses(q, seen, lambda s=shared: kernels.attention_forward(q, q, q, *s))
        assert all(0 <= at < q.nbytes for at in seen), wild


def spy_on_addresses(x: torch.Tensor, seen: list[int], call: Any) -> None:
    """Byte offsets into x of every load that is let through by its mask."""
    original = interpreter._masked_load

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        if ptrs.data.size > 512 and ptrs.get_element_ty() == interpreter.tl.float32:
            at = ptrs.data.astype(np.int64) - x.data_ptr()
            seen.extend(at[np.broadcast_to(mask.data, at.shape)].ravel().tolist())
        return original(self, ptrs, mask, *rest)

    with mock.patch.object(interpreter, "_masked_load", load):
        call()


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


# --------------------------------------------------------------------------------- what is computed


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
    assert names == ["forward_kernel", "prepare_kernel", "by_keys_kernel", "by_rows_kernel"]


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
