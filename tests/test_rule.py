"""The rule itself: what `Draws` says of its chances is so, and what it must refuse it refuses."""

import math
from collections.abc import Callable
from functools import reduce

import pytest
import torch
from rule import (
    DRAWS,
    Cast,
    Draws,
    _nudged,
    as_is,
    assert_within,
    many_draws,
    one_thread,
    threads,
    unit,
)
from torch import Tensor


def falsely_refused(draws: int) -> float:
    """P(|x| > 2 max |y_i|) of `draws` y and x, all normal with one deviation."""
    t = torch.linspace(0, 9, 900_001, dtype=torch.float64)
    below = torch.erf(t / math.sqrt(2))
    density = math.sqrt(2 / math.pi) * torch.exp(-t * t / 2)
    beyond = torch.erfc(2 * t / math.sqrt(2))
    return float(torch.trapezoid(draws * density * below ** (draws - 1) * beyond, t))


def test_the_chances() -> None:
    assert falsely_refused(1) == pytest.approx(2 / math.pi * math.atan(0.5), rel=1e-6)
    assert 1 / falsely_refused(1) == pytest.approx(3.4, abs=0.05)
    assert 1 / falsely_refused(DRAWS) == pytest.approx(65_000, rel=0.01)


def dot(x: Tensor, w: Tensor) -> Callable[[Cast], dict[str, Tensor]]:
    """One number, term by term."""
    return lambda cast: {"y": reduce(torch.add, cast(x) * cast(w)).view(1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_element_that_plain_pytorch_has_right_by_luck(dtype: torch.dtype) -> None:
    """Its error is nothing to measure by; that of its neighbours is."""
    for seed in range(500):
        torch.manual_seed(seed)
        x, w = torch.randn(12).to(dtype), torch.randn(12).to(dtype)
        plain, right = dot(x, w)(as_is)["y"], dot(x, w)(Tensor.double)["y"]
        got = dot(x.flip(0), w.flip(0))(as_is)["y"]  # as good, in another order
        floor = 1.1 * unit(dtype) * right.abs()  # more than the rule's own
        if float((got - right).abs()) > 2 * float((plain - right).abs()) + float(floor):
            break
    else:
        raise AssertionError("no such sum was found")
    with pytest.raises(AssertionError, match="the worst of 1"):
        assert_within("y", got, right, [plain])
    draws = Draws(dot(x, w))
    with pytest.raises(AssertionError, match="the worst of 1"):
        assert_within("y", got, right, draws["y"])
    with many_draws():
        judged_by_many(got, right, draws, floor)


def judged_by_many(got: Tensor, right: Tensor, draws: Draws, floor: Tensor) -> None:
    assert_within("y", got, right, draws["y"])
    typical = max(float((y.double() - right).abs()) for y in draws["y"])
    with pytest.raises(AssertionError, match=f"the worst of {DRAWS}"):
        assert_within("y", (right + 3 * typical + 2 * floor).to(got.dtype), right, draws["y"])


def test_no_draw_more_than_is_needed() -> None:
    made = []

    def run(cast: Cast) -> dict[str, Tensor]:
        made.append(cast)
        return {"y": cast(torch.ones(3))}

    draws = Draws(run)
    assert "y" in draws
    assert "z" not in draws
    assert_within("y", torch.ones(3), torch.ones(3, dtype=torch.float64), draws["y"])
    assert made == [as_is]


def test_an_order_of_its_own_is_drawn_before_neighbours() -> None:
    with one_thread():
        draws = Draws(lambda cast: {"y": cast(torch.zeros(1))}, lambda: {"y": torch.ones(1)})
    assert [float(y) for y in draws["y"]] == [0.0, 1.0]
    with many_draws():
        found = [float(y) for y in draws["y"]]
    assert len(found) == DRAWS
    assert found[:2] == [0.0, 1.0]
    assert not any(found[2:])


def test_one_order_is_that_of_the_callers_threads() -> None:
    with threads(3):
        draws = Draws(
            lambda cast: {"y": torch.tensor(torch.get_num_threads())},
            lambda: {"y": torch.tensor(-torch.get_num_threads())},
        )
    assert [int(y) for y in draws["y"]] == [1, -1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neighbours_are_a_unit_away(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.max, info.min, math.inf, -math.inf, math.nan]
    x = torch.cat([torch.randn(1000), torch.tensor(special)]).to(dtype)
    y = _nudged(x, torch.Generator().manual_seed(0))
    assert y.dtype == dtype
    assert torch.equal(y[-7:].isfinite(), x[-7:].isfinite())
    off = ((y[:1000].double() - x[:1000].double()) / x[:1000].double()).abs()
    assert off.max() <= 1.5 * info.eps
    assert 0.5 < float((off > 0).double().mean()) < 0.8


def test_where_a_neighbour_is_infinite_it_says_nothing() -> None:
    x = torch.tensor([-torch.inf, 1.0])
    draws = Draws(lambda cast: {"y": cast(x) * 3})
    for y in draws["y"]:
        assert y[0] == -torch.inf
        assert y[1].isfinite()


def test_nan_is_refused() -> None:
    right = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="got nan"):
        assert_within("y", torch.tensor([1.0, torch.nan]), right, [right])
