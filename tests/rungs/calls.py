"""Attention calls for the rungs: a `Problem` of tests/tools.py, straight into the Triton launchers.

The public function adds nothing that a GPU would see; without it a rung needs no backend that
serves CPU tensors, and a mutant that fails to launch is not hidden by a fallback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from tools import Problem, Result, compare, one_thread, oracle, plain_results
from torch import Tensor

from fastattn.kernels import attention as kernels
from fastattn.kernels import configs

FAMILIES = {
    "sm_80": "sm80",
    "sm_86": "sm86",
    "sm_89": "sm86",
    "sm_90": "sm90",
    "sm_100": "sm100",
    "sm_120": "sm120",
    "gfx942": "gfx9",
}
_CAUSAL = {False: 0, True: 1, "top_left": 1, "bottom_right": 2}
_WEIGHTS = {False: 0, True: 1, "mean": 2}


@contextmanager
def tiles_of(arch: str) -> Iterator[None]:
    """Launchers choose the tiles of an architecture, whatever tensors they are given."""
    with mock.patch.object(configs, "family_of", return_value=FAMILIES[arch]):
        yield


def shared_arguments(problem: Problem) -> tuple[Any, ...]:
    given = dict(problem.kwargs)
    left, right = given.get("window") or (None, None)
    cu_q, cu_k = problem.cu_seqlens or (None, None)
    p = given.get("dropout_p", 0.0)
    seed = torch.tensor([given["seed"]], dtype=torch.int64) if p else None

    def longest(cu: Tensor | None) -> int:
        return 0 if cu is None or len(cu) < 2 else int(cu.diff().max())

    return (
        given.get("mask"), given.get("bias"), given.get("q_lens"), given.get("k_lens"), cu_q, cu_k,
        given.get("alibi_slopes"), given.get("sinks"), seed,
        given.get("scale", problem.q.shape[-1] ** -0.5), _CAUSAL[given.get("causal", False)],
        -1 if left is None else left, -1 if right is None else right,
        given.get("softcap", 0.0), p, _WEIGHTS[given.get("return_weights", False)],
        longest(cu_q), longest(cu_k),
    )  # fmt: skip


def attend(problem: Problem, *, backward: bool = True, deterministic: bool = True) -> Result:
    """Outputs, and gradients by the names of the inputs, from the launchers."""
    q, k, v = problem.q, problem.k, problem.v
    shared = shared_arguments(problem)
    o, lse, lse_lo, weights = kernels.attention_forward(q, k, v, *shared)
    outputs = {"o": o, "lse": lse}
    if problem.kwargs.get("return_weights"):
        outputs["weights"] = weights
    if not backward:
        return Result(outputs, {})
    up = problem.upstream_for(outputs)
    given = [problem.kwargs.get(n) for n in ("bias", "sinks")]
    names = [
        "q",
        "k",
        "v",
        *(n for n, x in zip(("bias", "sinks"), given, strict=True) if x is not None),
    ]
    bits = {"q": 1, "k": 2, "v": 4, "bias": 8, "sinks": 16}
    need = sum(bits[n] for n in names if n not in problem.frozen)
    grads = kernels.attention_backward(
        up.get("o"), up.get("lse"), up.get("weights"), q, k, v, o, lse, lse_lo, *shared,
        need=need, deterministic=deterministic,
    )  # fmt: skip
    by_name = dict(zip(bits, grads, strict=True))
    return Result(outputs, {n: by_name[n] for n in names})


def check(problem: Problem, *, backward: bool = True, deterministic: bool = True) -> None:
    """AssertionError unless `attend` is as near to the fp64 oracle as plain PyTorch is (x 2)."""
    torch.manual_seed(1)
    got = attend(problem, backward=backward, deterministic=deterministic)
    with one_thread():
        right, floors = oracle(problem)
        plain = plain_results(problem)
    if not backward:
        right = Result(right.outputs, {})
    compare(problem, got, right, floors, plain)
