"""Bugs planted in the CPU kernels of attention, one at a time: some case must fail for each.

What proves the tests of the kernels: a case that no bug can fail checks nothing. The cases are
fp32, on the portable instruction set, and held to the rule of `tools.judge`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from mutation_lab import Lab, check_names, check_place
from mutations import MUTATIONS, Mutation, sample
from tools import (
    Problem,
    Result,
    compare,
    featured,
    one_thread,
    oracle,
    packed,
    padded,
    plain_results,
)

# --------------------------------------------------------------------------------------- cases


def with_nan_beyond_lengths() -> Problem:
    problem = padded(b=3, h=4, hk=2, sq=21, sk=34, d=11, causal="bottom_right")
    q_lens, k_lens = torch.tensor([21, 7, 0]), torch.tensor([19, 34, 5])
    for b in range(3):
        problem.q[b, :, q_lens[b] :] = torch.nan
        problem.k[b, :, k_lens[b] :] = torch.nan
        problem.v[b, :, k_lens[b] :] = torch.nan
    upstream = {"o": torch.randn(3, 4, 21, 11), "lse": torch.randn(3, 4, 21)}
    for b in range(3):
        for x in upstream.values():
            x[b, :, q_lens[b] :] = torch.nan
    return replace(problem, upstream=upstream).with_(q_lens=q_lens, k_lens=k_lens)


def with_lowest_bias() -> Problem:
    """Rows whose every key has the bias finfo.min, as models mask: fp32 lse cannot hold log l."""
    problem = padded(b=1, h=2, sq=9, sk=40, d=16)
    bias = torch.randn(1, 1, 9, 40)
    bias[:, :, ::2] = torch.finfo(torch.float32).min
    return problem.with_(bias=bias)


# Name -> (problem, threads of the plan). A tile is 48 x 192.
CASES: dict[str, tuple[Any, int]] = {
    "tails": (partial(padded, b=2, h=2, sq=53, sk=211, d=19, dv=7), 1),
    "causal_gqa": (partial(padded, b=1, h=6, hk=2, sq=61, d=24, causal=True), 1),
    "bottom_right": (partial(padded, b=1, h=2, sq=37, sk=50, d=8, causal="bottom_right"), 1),
    "empty_rows": (
        lambda: padded(b=1, h=2, sq=70, sk=13, d=8, causal="bottom_right", sinks=torch.randn(2)),
        1,
    ),
    "window": (partial(featured, "window", b=1, h=2, sq=60, sk=70, d=8), 1),
    "mask": (partial(featured, "mask", b=2, h=2, sq=21, sk=40, d=8), 1),
    "bias": (partial(featured, "bias", b=2, h=2, sq=20, sk=230, d=8), 1),
    "bias_per_batch": (
        lambda: padded(b=2, h=2, sq=20, sk=230, d=8, bias=torch.randn(2, 1, 20, 230)),
        1,
    ),
    "bias_per_row": (
        lambda: padded(b=2, h=2, sq=20, sk=30, d=8, bias=torch.randn(2, 20, 1)),
        1,
    ),
    "lowest_bias": (with_lowest_bias, 1),
    "alibi": (partial(featured, "alibi_batch", b=2, h=2, sq=20, sk=31, d=8), 1),
    "softcap": (partial(featured, "softcap", b=1, h=2, sq=20, sk=31, d=8), 1),
    "sinks": (
        lambda: padded(b=2, h=3, sq=20, sk=31, d=8, sinks=torch.tensor([0.5, 100.0, -100.0])),
        1,
    ),
    "dropout": (
        partial(padded, b=2, h=2, sq=53, sk=40, d=8, dropout_p=0.3, seed=2**40 + 11),
        1,
    ),
    "weights": (
        partial(padded, b=2, h=2, sq=20, sk=230, d=8, causal=True, return_weights=True),
        1,
    ),
    "weights_mean_dropout": (
        partial(
            padded, b=1, h=4, hk=2, sq=20, sk=31, d=8, dropout_p=0.3, seed=3, return_weights="mean"
        ),
        1,
    ),
    "lengths": (with_nan_beyond_lengths, 1),
    "packed": (partial(packed, (13, 0, 40), (20, 3, 40), h=4, hk=2, d=12, causal=True), 1),
    "all": (partial(featured, "all", b=2, h=4, hk=2, sq=30, sk=41, d=8), 1),
    "decode": (partial(padded, b=2, h=4, hk=2, sq=1, sk=75, d=22), 1),
    "split_keys": (partial(padded, b=1, h=1, sq=12, sk=1024, d=64), 8),
    "bias_in_parts": (
        lambda: padded(b=1, h=6, sq=40, sk=230, d=8, bias=torch.randn(40, 230)),
        3,
    ),
    "bias_in_slices": (
        lambda: padded(b=3, h=2, sq=40, sk=230, d=8, bias=torch.randn(1, 2, 40, 230)),
        2,
    ),
    "two_passes": (
        lambda: padded(b=2, h=2, hk=1, sq=130, sk=230, d=16, bias=torch.randn(130, 230)),
        8,
    ),
}


class Case:
    """A problem with its oracle, and its arguments as mutant_attention.py takes them."""

    def __init__(self, problem: Problem, threads: int) -> None:
        self.problem = problem
        with one_thread():
            self.right, self.floors = oracle(problem)
            self.plain = plain_results(problem)
        self.arrays = {n: np.asarray(x) for n, x in self._arguments(threads).items()}

    def _arguments(self, threads: int) -> dict[str, Any]:
        p, given = self.problem, dict(self.problem.kwargs)
        upstream = p.upstream_for(self.right.outputs)
        left, right = given.get("window", (None, None))
        slopes = given.get("alibi_slopes")
        skips = {"mask", "q_lens", "k_lens", "causal", "window"} & given.keys() or p.cu_seqlens
        found: dict[str, Any] = {n: getattr(p, n) for n in "qkv"}
        found |= {n: given[n] for n in ("mask", "bias", "sinks") if n in given}
        if slopes is not None:
            found["alibi"] = slopes
        if p.cu_seqlens is not None:
            for side, cu in zip("qk", p.cu_seqlens, strict=True):
                found[f"{side}_start"], found[f"{side}_len"] = cu[:-1].long(), cu.diff().long()
            sq, sk = (int(cu.diff().max()) for cu in p.cu_seqlens)
        else:
            found |= {f"{s}_len": given[f"{s}_lens"].long() for s in "qk" if f"{s}_lens" in given}
            sq, sk = p.q.shape[2], p.k.shape[2]
        target = (p.q.shape[0], p.q.shape[1], sq, sk)
        return found | {
            "batch": len(p.q) if p.cu_seqlens is None else len(p.cu_seqlens[0]) - 1,
            "Sq": sq,
            "Sk": sk,
            "threads": threads,
            "d_o": upstream["o"],
            "dlse": upstream["lse"],
            "dweights": upstream.get("weights", torch.zeros(0)),
            "alibi_b": p.q.shape[1] if slopes is not None and slopes.dim() == 2 else 0,
            "causal": (False, True, "bottom_right").index(given.get("causal", False)),
            "window_left": -1 if left is None else left,
            "window_right": -1 if right is None else right,
            "seed": given.get("seed", 0),
            "weights_mode": (False, True, "mean").index(given.get("return_weights", False)),
            "dbias_once": not skips and "bias" in given and given["bias"].shape == target,
            "scale": given.get("scale", p.q.shape[-1] ** -0.5),
            "softcap": given.get("softcap", 0.0),
            "dropout_p": given.get("dropout_p", 0.0),
        }

    def verdict(self, results: dict[str, np.ndarray]) -> str | None:
        """None where the results are right, else what is wrong with them."""
        got = {n: torch.from_numpy(x) for n, x in results.items()}
        outputs = {n: got[n] for n in self.right.outputs}
        grads = {n: got[f"d{n}"] for n in self.right.grads}
        try:
            compare(self.problem, Result(outputs, grads), self.right, self.floors, self.plain)
        except AssertionError as error:
            return str(error).splitlines()[0]
        return None


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    torch.manual_seed(0)
    cases = {n: Case(make(), threads) for n, (make, threads) in CASES.items()}
    recipe = {"source": "attention_portable.cpp"}
    return Lab(tmp_path_factory.mktemp("mutants"), "attention", MUTATIONS, cases, recipe)


# ---------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_has_its_place(mutation: Mutation) -> None:
    check_place(mutation)


def test_names_are_unique() -> None:
    check_names(MUTATIONS)


def test_the_kernels_themselves_pass(lab: Lab) -> None:
    assert lab.failures(None) == {}


@pytest.mark.slow
def test_a_sample_of_mutations_is_caught(lab: Lab) -> None:
    assert lab.survivors(sample(lab.mutations)) == []


@pytest.mark.full
def test_every_mutation_is_caught(lab: Lab) -> None:
    assert lab.survivors(lab.mutations) == []
