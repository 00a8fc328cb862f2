"""The tests' own test: a planted mistake of every kind must be seen by `tools.judge`.

Each mutant is right but for one thing; a judge that lets it pass would let a kernel with it pass.
"""

from collections.abc import Callable
from typing import Any

import pytest
import tools
import torch
from tools import Problem, fake_grads, featured, judge, packed, padded
from torch import Tensor

import fastattn
from fastattn import reference


def changed(**rules: Callable[[Any], Any]) -> Callable:
    """The reference with some arguments altered on their way in."""

    def attention(*args: Any, **given: Any) -> Any:
        given = {n: rules[n](x) if n in rules else x for n, x in given.items()}
        return reference.attention(*args, **given)

    return attention


def output_changed(index: int, alter: Callable[[Tensor], Tensor]) -> Callable:
    def attention(*args: Any, **given: Any) -> Any:
        out = list(reference.attention(*args, **given))
        out[index] = alter(out[index])
        return tuple(out)

    return attention


class _WrongGradient(torch.autograd.Function):
    """The identity with another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alter: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.alter = alter
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.alter(grad), None


def gradient_changed(name: str, alter: Callable[[Tensor], Tensor]) -> Callable:
    def attention(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
        tensors = {"q": q, "k": k, "v": v, **given}
        tensors[name] = _WrongGradient.apply(tensors[name], alter)
        return reference.attention(**tensors)

    return attention


def last_row_zero(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, -1] = 0.0
    return x


def one_element_off(x: Tensor) -> Tensor:
    at = torch.arange(x.numel()).view(x.shape) == x.numel() // 2
    return torch.where(at, x + 0.05 * x.detach().abs().max(), x)


# The mutant, and the feature of tools.FEATURES on which it must be caught.
MUTANTS: dict[str, tuple[str, Callable]] = {
    "causal_off_by_one": ("causal", changed(causal=lambda _: False)),
    "wrong_alignment": ("bottom_right", changed(causal=lambda _: True)),
    "window_one_wider": ("window", changed(window=lambda w: (w[0] + 1, w[1]))),
    "window_one_narrower": ("window", changed(window=lambda w: (w[0], w[1] - 1))),
    "a_key_too_many": ("k_lens", changed(k_lens=lambda n: (n + 1).clamp(max=131))),
    "a_row_too_few": ("q_lens", changed(q_lens=lambda n: (n - 1).clamp(min=0))),
    "scale_one_percent_off": ("scale", changed(scale=lambda s: s * 1.01)),
    "softcap_ignored": ("softcap", changed(softcap=lambda _: None)),
    "sinks_ignored": ("sinks", changed(sinks=lambda s: s - 1e4)),
    "slopes_of_other_heads": ("alibi", changed(alibi_slopes=lambda s: s.flip(0))),
    "another_seed": ("dropout", changed(seed=lambda s: s + 1)),
    "seed_cut_to_32_bits": ("dropout", changed(seed=lambda s: s % 2**32)),
    "mask_inverted": ("mask", changed(mask=lambda m: ~m)),
    "bias_of_row_before": ("bias", changed(bias=lambda b: b.roll(1, 2))),
    "last_row_missing": ("plain", output_changed(0, last_row_zero)),
    "one_output_off": ("plain", output_changed(0, one_element_off)),
    "lse_in_log2": ("plain", output_changed(1, lambda x: x * 1.4427)),
    "weights_scaled": ("weights", output_changed(2, lambda x: x * 1.02)),
    "dq_unscaled": ("plain", gradient_changed("q", lambda g: g * 1.02)),
    "dk_last_row_missing": ("plain", gradient_changed("k", last_row_zero)),
    "dv_one_element": ("plain", gradient_changed("v", one_element_off)),
    "dbias_twice": ("bias", gradient_changed("bias", lambda g: g * 2)),
    "dsinks_sign": ("sinks", gradient_changed("sinks", lambda g: -g)),
    "dq_nan": ("plain", gradient_changed("q", lambda g: g / (g != g.max()))),
}  # fmt: skip


def with_mutant(monkeypatch: pytest.MonkeyPatch, mutant: Callable) -> None:
    def attention(*args: Any, backend: str, **given: Any) -> Any:
        return mutant(*args, **given)

    monkeypatch.setattr(fastattn, "attention", attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    feature, mutant = MUTANTS[name]
    problem = featured(feature, b=3, h=4, hk=2, sq=67, sk=131, d=40, dtype=dtype)
    with_mutant(monkeypatch, reference.attention)
    judge(problem, "none")
    with_mutant(monkeypatch, mutant)
    with pytest.raises(AssertionError):
        judge(problem, "none")


@pytest.mark.parametrize("name", ["dq_unscaled", "dk_last_row_missing", "last_row_missing"])
def test_mutant_is_caught_next_to_sdpa(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    problem = featured("plain", b=3, h=4, hk=2, sq=67, sk=131, d=40)
    with_mutant(monkeypatch, reference.attention)
    judge(problem, "none", against="sdpa")
    with_mutant(monkeypatch, MUTANTS[name][1])
    with pytest.raises(AssertionError):
        judge(problem, "none", against="sdpa")


@pytest.mark.parametrize("case", ["o", "lse", "grads"])
def test_judge_refuses_the_results_of_a_lower_precision(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """fp32 inputs computed in bf16 are not within twice fp32's error."""

    def rough(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
        o, lse = reference.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **given)
        exact_o, exact_lse = reference.attention(q, k, v, **given)
        if case == "o":
            return o.float(), exact_lse
        if case == "lse":
            return exact_o, lse
        return exact_o.detach() + (o - o.detach()).float(), exact_lse

    with_mutant(monkeypatch, rough)
    with pytest.raises(AssertionError):
        judge(padded(b=1, h=2, sq=40, sk=40), "none")


def test_judge_measures_packed_problems_too(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = packed((9, 20), h=2, d=16, causal=True)

    def shifted(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **given: Any) -> Any:
        del given["backend"]
        return reference.attention_varlen(q, k, v, a, b + (b == 9).to(b.dtype), **given)

    monkeypatch.setattr(fastattn, "attention_varlen", shifted)
    with pytest.raises(AssertionError):
        judge(problem, "none")


def test_fake_engine_gives_the_engines_gradients() -> None:
    """On real tensors `fake_grads` and autograd's own engine agree."""
    problem: Problem = featured("all", b=2, h=4, hk=2, sq=9, sk=13, d=8)
    leaves = {n: x.double().detach().requires_grad_() for n, x in problem.leaves().items()}
    outputs = problem.call(reference.attention, leaves)
    outs = [outputs["o"] * 1.0, outputs["weights"]]
    want = torch.autograd.grad([x.sum() for x in outs], list(leaves.values()), retain_graph=True)
    for got, w in zip(fake_grads(outs, list(leaves.values())), want, strict=True):
        torch.testing.assert_close(got, w)


def test_kinds_of_values_are_what_they_say() -> None:
    shape = (2, 3, 50, 16)
    assert tools.values(shape, torch.float32, "offset", "k").mean() > 990
    assert tools.values(shape, torch.float32, "tiny").abs().max() < 1e-3
    assert tools.values(shape, torch.float32, "huge", "v").abs().max() > 1000
    assert tools.values(shape, torch.float32, "outliers").abs().max() > 20
