"""Packed batches: values and gradients against the oracle, and packed against padded."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_attention_ops import op_calls_of
from tools import DTYPES, cumulative, judge, packed, padded, run, values

import fastattn

LENS_Q, LENS_K = (17, 0, 64, 1, 130), (33, 5, 0, 70, 129)

FEATURES: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "plain": lambda t: {},
    "causal": lambda t: {"causal": True},
    "bottom_right": lambda t: {"causal": "bottom_right"},
    "window": lambda t: {"window": (9, 5)},
    "window_bottom_right": lambda t: {"window": (20, 3), "causal": "bottom_right"},
    "mask": lambda t: {"mask": torch.rand(5, 1, 130, 129) < 0.8},
    "bias": lambda t: {"bias": values((5, 4, 130, 129), t, "normal")},
    "bias_broadcast": lambda t: {"bias": values((4, 1, 129), t, "normal")},
    "alibi": lambda t: {"alibi_slopes": torch.rand(5, 4) * 0.2},
    "softcap": lambda t: {"softcap": 1.7},
    "sinks": lambda t: {"sinks": torch.randn(4)},
    "dropout": lambda t: {"dropout_p": 0.3, "seed": 11},
    "weights": lambda t: {"return_weights": True},
    "weights_mean": lambda t: {"return_weights": "mean", "dropout_p": 0.1, "seed": 2},
    "all": lambda t: {
        "mask": torch.rand(130, 129) < 0.9,
        "bias": values((1, 4, 1, 129), t, "normal"),
        "causal": "bottom_right",
        "window": (70, 2),
        "alibi_slopes": torch.rand(4) * 0.1,
        "softcap": 3.0,
        "sinks": torch.randn(4),
        "scale": 0.2,
        "dropout_p": 0.2,
        "seed": 5,
        "return_weights": True,
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(kernel: str, feature: str, dtype: torch.dtype) -> None:
    given = FEATURES[feature](dtype)
    judge(packed(LENS_Q, LENS_K, h=4, hk=2, d=40, dtype=dtype, **given), kernel)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "lens",
    [(5,), (1, 1, 1), (0, 0, 7), (7, 0, 0), (0,), (0, 0), (64, 64), (63, 65), (1, 500), (3,) * 40],
    ids=str,
)
def test_splits(kernel: str, lens: Sequence[int], cu_dtype: torch.dtype) -> None:
    judge(packed(lens, h=2, hk=1, d=24, causal=True, cu_dtype=cu_dtype), kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "dv"), [(1, 1), (13, 64), (64, 13), (128, 128), (256, 256)])
def test_head_dims(kernel: str, d: int, dv: int, dtype: torch.dtype) -> None:
    judge(packed((20, 45), (31, 17), d=d, dv=dv, dtype=dtype), kernel)


def test_tokens_behind_the_last_sequence(kernel: str) -> None:
    """Output 0, lse -inf, gradients 0, and nothing of them is read: they are NaN."""
    problem = packed((20, 45), (31, 17), h=2, d=16, slack=9)
    clean = run(problem, kernel)
    poisoned = replace(
        problem, **{n: getattr(problem, n).index_fill(0, tail, torch.nan) for n, tail in
                    (("q", torch.arange(65, 74)), ("k", torch.arange(48, 57)),
                     ("v", torch.arange(48, 57)))}
    )  # fmt: skip
    do = torch.randn(74, 2, 16)
    do[65:] = torch.nan
    dlse = torch.randn(2, 74)
    dlse[:, 65:] = torch.inf
    got = run(replace(poisoned, upstream={"o": do, "lse": dlse}), kernel)
    judge(replace(poisoned, upstream={"o": do, "lse": dlse}), kernel)
    assert torch.equal(got.outputs["o"], clean.outputs["o"])
    assert got.outputs["o"][65:].count_nonzero() == 0
    assert (got.outputs["lse"][:, 65:] == -torch.inf).all()
    for name, first in (("q", 65), ("k", 48), ("v", 48)):
        assert got.grads[name][first:].count_nonzero() == 0
        assert got.grads[name].isfinite().all()


def test_no_tokens_and_no_sequences(backend: str) -> None:
    for lens in ((0, 0), ()):
        problem = packed(lens, h=2, d=8, return_weights=True)
        got = run(problem, backend)
        assert got.outputs["o"].shape == (0, 2, 8)
        assert got.outputs["lse"].shape == (2, 0)
        assert got.outputs["weights"].shape == (len(lens), 2, 0, 0)
        assert got.grads["q"].shape == got.grads["k"].shape == (0, 2, 8)


def test_keys_without_rows_and_rows_without_keys(backend: str) -> None:
    got = run(packed((0, 5), (4, 0), h=2, d=8), backend)
    assert got.outputs["o"].count_nonzero() == 0
    assert (got.outputs["lse"] == -torch.inf).all()
    for grad in got.grads.values():
        assert grad.count_nonzero() == 0
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, "bottom_right"])
def test_equals_the_padded_call(kernel: str, causal: bool | str, dtype: torch.dtype) -> None:
    """Lengths in one, cu_seqlens in the other: same values to rounding, dropout and all."""
    lens_q, lens_k = torch.tensor([30, 0, 75]), torch.tensor([50, 20, 80])
    shape = {"b": 3, "h": 4, "hk": 2, "sq": 75, "sk": 80, "d": 32, "dtype": dtype}
    given = {
        "causal": causal,
        "window": (30, 9),
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
        "dropout_p": 0.25,
        "seed": 77,
        "return_weights": True,
    }
    dense = padded(**shape, **given).with_(q_lens=lens_q, k_lens=lens_k)
    valid_q = (torch.arange(75) < lens_q[:, None])[:, :, None, None]
    valid_k = (torch.arange(80) < lens_k[:, None])[:, :, None, None]

    def pack(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        return x.masked_select(valid.expand(x.shape)).view(-1, *x.shape[2:])

    parts = {"q": pack(dense.q, valid_q), "k": pack(dense.k, valid_k), "v": pack(dense.v, valid_k)}
    cu = (cumulative(lens_q.tolist()), cumulative(lens_k.tolist()))
    flat = packed(lens_q.tolist(), lens_k.tolist(), h=4, hk=2, dtype=dtype, **given)
    flat = replace(flat, **parts, cu_seqlens=cu)
    do, dw = torch.randn(3, 4, 75, 32).to(dtype), torch.randn(3, 4, 75, 80).to(dtype)
    a = run(replace(dense, upstream={"o": do, "weights": dw}), kernel)
    b = run(replace(flat, upstream={"o": pack(do, valid_q), "weights": dw}), kernel)
    close = {"rtol": 0.0, "atol": 8 * torch.finfo(dtype).eps * 4}
    torch.testing.assert_close(pack(a.outputs["o"], valid_q), b.outputs["o"], **close)
    torch.testing.assert_close(a.outputs["weights"], b.outputs["weights"], **close)
    dropped = a.outputs["weights"] == 0
    assert torch.equal(dropped, b.outputs["weights"] == 0)
    for name, valid in (("q", valid_q), ("k", valid_k), ("v", valid_k)):
        torch.testing.assert_close(pack(a.grads[name], valid), b.grads[name], **close)


def test_max_seqlen_may_be_larger(backend: str) -> None:
    problem = packed((20, 45), (31, 17), return_weights=True)
    tight = run(problem, backend)
    loose = run(problem.with_(max_seqlen_q=60, max_seqlen_k=40), backend)
    assert loose.outputs["weights"].shape == (2, 2, 60, 40)
    assert torch.equal(loose.outputs["o"], tight.outputs["o"])
    assert torch.equal(loose.outputs["weights"][:, :, :45, :31], tight.outputs["weights"])
    assert loose.outputs["weights"][:, :, 45:].count_nonzero() == 0


@pytest.mark.parametrize("layout", ["of_fused_qkv", "head_major", "expanded_heads"])
def test_any_strides(kernel: str, layout: str) -> None:
    make = {
        "of_fused_qkv": lambda: torch.randn(65, 3, 2, 16)[:, 1],
        "head_major": lambda: torch.randn(2, 65, 16).transpose(0, 1),
        "expanded_heads": lambda: torch.randn(65, 1, 16).expand(65, 2, 16),
    }[layout]
    problem = replace(packed((20, 45), d=16, causal=True), q=make(), k=make(), v=make())
    judge(problem, kernel)
    judge(replace(problem, upstream={"o": torch.ones(()).expand(65, 2, 16)}), kernel)


def test_many_short_sequences(kernel: str) -> None:
    lens = torch.randint(0, 12, (300,)).tolist()
    judge(packed(lens, h=2, d=16, causal=True), kernel)


def test_sequence_of_another_batch_changes_nothing(kernel: str) -> None:
    """Each sequence's result is that of a call on it alone, bit for bit or to rounding."""
    problem = packed((33, 70, 12), h=2, d=32, causal=True)
    together = run(problem, kernel).outputs["o"]
    rows = slice(33, 103)
    alone = [x[rows] for x in (problem.q, problem.k, problem.v)]
    cu = cumulative((70,))
    o = fastattn.attention_varlen(*alone, cu, cu, causal=True, backend=kernel)
    torch.testing.assert_close(together[rows], o, rtol=1e-6, atol=1e-6)


def test_counts_of_sequences_are_compared_before_they_are_read() -> None:
    """Zero strides make cu_seqlens of any length: 2^40 numbers would be read for minutes."""
    calls = op_calls_of(lambda: run(packed((7, 12)), "cpu"))
    op, args = calls["attention_fwd"]
    at = next(i for i, x in enumerate(args) if x is not None and x.dim() == 1)
    endless = torch.zeros((), dtype=torch.int32).expand(2**40)
    for cu_q, cu_k in ((endless, args[at + 1]), (args[at], endless)):
        with pytest.raises(RuntimeError, match="cu_seqlens_k must have shape"):
            op(*args[:at], cu_q, cu_k, *args[at + 2 :])


@pytest.mark.parametrize("side", ["max_seqlen_q", "max_seqlen_k"])
def test_lengths_beyond_all_work_are_refused(side: str) -> None:
    """Work is shared out by them where there is a bias: a call with 2^62 did not end."""
    x = torch.randn(5, 2, 8)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    lengths = {"max_seqlen_q": 8, "max_seqlen_k": 8, side: 2**62}
    with pytest.raises(RuntimeError, match=f"{side} must be at most"):
        fastattn.attention_varlen(
            x, x, x, starts, starts, bias=torch.zeros(1, 2, 1, 1), backend="cpu", **lengths
        )
