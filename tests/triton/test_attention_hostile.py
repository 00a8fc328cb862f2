"""The Triton attention kernels on what must not leak, be read or crash, in the interpreter."""

from dataclasses import replace
from typing import Any
from unittest import mock

import interpreter
import numpy as np
import pytest
import torch
from refused_calls import refused, refused_backward
from test_attention_interpreter import NOTHING, SMALL, numbers
from tools import (
    Problem,
    judge,
    packed,
    padded,
    run,
)

from fastattn.kernels import attention as kernels

pytestmark = pytest.mark.sampled(2)


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


def test_a_direct_call_stays_inside_its_tensors() -> None:
    """Whatever the op is called with: an error before any launch."""
    ops = torch.ops.fastattn
    with mock.patch.object(kernels, "launch", side_effect=AssertionError("launched")):
        for words, args in refused():
            with pytest.raises(ValueError, match=words):
                ops.attention_triton_fwd(*args)
        for words, args in refused_backward():
            with pytest.raises(ValueError, match=words):
                ops.attention_triton_bwd(*args)
