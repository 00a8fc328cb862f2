"""Random combinations of everything, forward and backward, against the oracle.

The seed is fixed: the same examples every run. `FASTATTN_FUZZ=n` takes n new ones (`make fuzz`).
"""

import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tools import DTYPES, Problem, judge, packed, padded, values

FUZZ = int(os.environ.get("FASTATTN_FUZZ", "0"))
BOUNDED = settings(
    max_examples=FUZZ or 150,
    derandomize=not FUZZ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
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
def problems(draw: Any) -> Problem:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(DTYPES))
    hk, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 5]))
    d, dv = draw(st.sampled_from([1, 5, 16, 32, 40, 64, 72, 128])), draw(st.integers(1, 70))
    kind = draw(st.sampled_from(["normal", "normal", "tiny", "outliers"]))
    shape = {"h": hk * group, "hk": hk, "d": d, "dv": dv, "dtype": dtype, "kind": kind}
    if draw(st.booleans()):
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


@BOUNDED
@given(problem=problems())
def test_any_combination(problem: Problem) -> None:
    try:
        judge(problem, "cpu")
    except AssertionError as error:
        error.add_note(describe(problem))
        raise
