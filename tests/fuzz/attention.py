"""Calls of attention and attention_varlen: every feature, alone and together."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from tools import DTYPES, Problem, judge, packed, padded, run, values

import fastattn
from fuzz import spoil
from fuzz.case import Valid

SIZES = st.one_of(st.integers(0, 8), st.integers(9, 80), st.sampled_from([64, 128, 129, 200]))
WINDOW_SIDE = st.one_of(st.none(), st.integers(0, 90))


@st.composite
def features(draw: Any, b: int, h: int, m: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments that packed and padded calls share."""
    given_: dict[str, Any] = {"causal": draw(st.sampled_from([False, True, "bottom_right"]))}

    def broadcast() -> list[int]:
        shape = [draw(st.sampled_from([size, 1])) for size in (b, h, m, n)]
        return shape[draw(st.integers(0, 4)) :]

    for name, make in (
        ("mask", lambda: torch.rand(broadcast()) < draw(st.sampled_from([0.3, 0.9, 1.0]))),
        (
            "bias",
            lambda: values(broadcast(), draw(st.sampled_from([dtype, torch.float32])), "normal"),
        ),
        ("window", lambda: (draw(WINDOW_SIDE), draw(WINDOW_SIDE))),
        ("alibi_slopes", lambda: torch.rand(draw(st.sampled_from([(h,), (b, h)]))) * 0.5),
        ("softcap", lambda: draw(st.sampled_from([0.7, 5.0, 30.0]))),
        ("sinks", lambda: torch.randn(h)),
        ("scale", lambda: draw(st.sampled_from([0.05, 0.5, -0.2]))),
        ("return_weights", lambda: draw(st.sampled_from([True, "mean"]))),
    ):
        if draw(st.integers(0, 3)) == 0:
            given_[name] = make()
    if draw(st.integers(0, 3)) == 0:
        given_ |= {"dropout_p": draw(st.sampled_from([0.1, 0.5])), "seed": draw(st.integers(0, 9))}
    return given_


@st.composite
def problems(draw: Any, kind: str = "any") -> Problem:
    """kind: "packed", "padded" or "any"."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(DTYPES))
    hk, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 5]))
    d, dv = draw(st.sampled_from([1, 5, 16, 32, 40, 64, 72, 128])), draw(st.integers(1, 70))
    value = draw(st.sampled_from(["normal", "normal", "tiny", "outliers"]))
    shape = {"h": hk * group, "hk": hk, "d": d, "dv": dv, "dtype": dtype, "kind": value}
    if draw(st.booleans()) if kind == "any" else kind == "packed":
        lens = draw(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4))
        problem = packed(*zip(*lens, strict=True), slack=draw(st.integers(0, 3)), **shape)
        m, n = (max(column) for column in zip(*lens, strict=True))
        b = len(lens)
    else:
        b, m, n = draw(st.integers(1, 3)), draw(SIZES), draw(SIZES)
        problem = padded(b=b, sq=m, sk=n, **shape)
        for name, longest in (("q_lens", m), ("k_lens", n)):
            if draw(st.integers(0, 2)) == 0:
                problem = problem.with_(**{name: torch.randint(0, longest + 1, (b,))})
    return problem.with_(**draw(features(b, hk * group, m, n, dtype)))


def describe(problem: Problem) -> str:
    shapes = {
        n: (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) and x.numel() > 5 else x
        for n, x in {"q": problem.q, "k": problem.k, "v": problem.v, **problem.kwargs}.items()
    }
    return f"{shapes} cu_seqlens={problem.cu_seqlens}"


@st.composite
def restrided(draw: Any, problem: Problem) -> Problem:
    """The same values in other memory."""

    def lay(x: torch.Tensor) -> torch.Tensor:
        how = draw(st.sampled_from(["as it is", "as it is", "heads inside", "apart", "shifted"]))
        if how == "heads inside":
            return x.transpose(-3, -2).contiguous().transpose(-3, -2)
        if how == "apart":
            return x.repeat_interleave(2, -1)[..., ::2]
        if how == "shifted":  # aligned to an element alone
            flat = x.new_zeros(x.numel() + 1)
            flat[1:] = x.reshape(-1)
            return flat[1:].view(x.shape)
        return x

    return replace(problem, q=lay(problem.q), k=lay(problem.k), v=lay(problem.v))


BAD_LENS: spoil.Ways = {
    "negative": lambda x: torch.full_like(x, -1),
    "too large": lambda x: torch.full_like(x, 10**6),
}
_BAD_CU: spoil.Ways = {
    "not from 0": lambda x: x + 1,
    "falling": lambda x: -torch.arange(len(x)).to(x.dtype),
    "too far": lambda x: torch.cat([x[:-1], x[-1:] + 10**6]),
    "a matrix": lambda x: x[None],
}
WINDOW: spoil.Ways = spoil.constants(5, "nonsense", (1, 2, 3), (1.5, None), (-1, 0), [True, 1])
_ROLES: dict[str, spoil.Ways] = {
    "q": {**spoil.FLOAT, **spoil.DEEPER},
    "k": {**spoil.VECTOR, **spoil.DEEPER},
    "v": {**spoil.PARAM, **spoil.DEEPER},
    "mask": spoil.MASK,
    "bias": spoil.VECTOR,
    "sinks": spoil.VECTOR,
    "alibi_slopes": spoil.VECTOR,
    "q_lens": {**spoil.INDEX, **spoil.LONGER, **BAD_LENS},
    "k_lens": {**spoil.INDEX, **spoil.LONGER, **BAD_LENS},
    "cu_seqlens_q": {**spoil.INDEX, **spoil.LONGER, **_BAD_CU},
    "cu_seqlens_k": {**spoil.INDEX, **spoil.LONGER, **_BAD_CU},
    "causal": spoil.CHOICE,
    "window": WINDOW,
    "softcap": {**spoil.POSITIVE, **spoil.constants(0.0)},
    "scale": spoil.NUMBER,
    "dropout_p": spoil.PROBABILITY,
    "seed": spoil.SEED,
    "return_lse": spoil.FLAG,
    "return_weights": spoil.CHOICE,
    "deterministic": spoil.FLAG,
    "backend": spoil.BACKEND,
}
_OF_ONE = {"q_lens", "k_lens"}, {"cu_seqlens_q", "cu_seqlens_k"}


@st.composite
def _valid(draw: Any, kind: str) -> Valid:
    problem = draw(restrided(draw(problems(kind))))
    args = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.kwargs}
    if problem.cu_seqlens is not None:
        args |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), problem.cu_seqlens, strict=True))
    others = _OF_ONE[kind == "padded"]
    return Valid(
        fastattn.attention_varlen if kind == "packed" else fastattn.attention,
        args,
        lambda: judge(problem, "cpu"),
        {n: ways for n, ways in _ROLES.items() if n not in others},
        lambda: run(problem, "cpu"),
    )


attention = _valid("padded")
attention_varlen = _valid("packed")
