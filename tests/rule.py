"""The rule that every value and gradient of the tests is held to.

    error <= 2 x the error of plain PyTorch in the same dtype + floor

against the fp64 oracle, both in the 2-norm and for the worst element. Floors are derived where they
are given; one is part of the rule: a rounding of the result.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
DRAWS = 64  # of a random call, see `Draws`


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """For oracle and baseline, which are small: threads of a busy machine wait for each other."""
    return threads(1)


Cast = Callable[[Tensor], Tensor]


def as_is(x: Tensor) -> Tensor:
    return x


_many = False


@contextmanager
def many_draws() -> Iterator[None]:
    """For random calls (tests/fuzz), thousands of which have a result of one element."""
    global _many
    before, _many = _many, True
    try:
        yield
    finally:
        _many = before


class Draws:
    """Plain PyTorch's results of a call, by name: of the call itself, then in other orders of its
    sums. Under `many_draws` more are drawn until the error is known.

    That error is a matter of chance: of one element it may be 0. So it is the largest of DRAWS
    then: those above, and the call on inputs a unit in the last place off, which are rounded anew,
    and whose error is added to the call's exact result. A single element of a kernel that is as
    good as plain PyTorch exceeds twice the largest of 64 normal errors once in 65 000 times, twice
    one error every third time (test_rule.py). A draw only widens the limit, so none is made once an
    error is within.

    run: the results by plain PyTorch, on the call's tensors each passed through the argument, in
    one order. orders: further results, such as the same sums in other orders. The last order is
    that of as many threads as the caller has: the library's products are other ones then.
    """

    def __init__(
        self,
        run: Callable[[Cast], dict[str, Tensor]],
        *orders: Callable[[], dict[str, Tensor]],
    ) -> None:
        self._run, self._orders = run, orders
        self._threads = torch.get_num_threads()
        self._fewest = 1 + len(orders) + (self._threads > 1)
        self._made: list[dict[str, Tensor]] = []
        self._exact: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._draw(0)

    def __getitem__(self, name: str) -> Iterator[Tensor]:
        return (self._draw(i)[name] for i in range(max(self._fewest, DRAWS * _many)))

    def _draw(self, i: int) -> dict[str, Tensor]:
        if i == len(self._made):
            with one_thread():
                made = self._first(i) if i < self._fewest else self._nudged(i)
            self._made.append({n: x.detach() for n, x in made.items()})
        return self._made[i]

    def _first(self, i: int) -> dict[str, Tensor]:
        if 0 < i <= len(self._orders):
            return self._orders[i - 1]()
        with threads(self._threads if i else 1):
            return self._run(as_is)

    def _nudged(self, seed: int) -> dict[str, Tensor]:
        def nudge(gen: torch.Generator) -> Cast:
            return lambda x: _nudged(x, gen)

        self._exact = self._exact or self._run(Tensor.double)
        plain = self._run(nudge(torch.Generator().manual_seed(seed)))
        gen = torch.Generator().manual_seed(seed)
        exact = self._run(lambda x: _nudged(x, gen).double())
        errors = {n: (x.double() - exact[n]).nan_to_num(0.0, 0.0, 0.0) for n, x in plain.items()}
        return {n: self._exact[n] + e for n, e in errors.items()}


def _nudged(x: Tensor, gen: torch.Generator) -> Tensor:
    """Every element a unit in the last place up, down, or as it was."""
    steps = torch.randint(-1, 2, x.shape, generator=gen, device="cpu").to(x.device)
    moved = (x.detach().double() * (1 + torch.finfo(x.dtype).eps * steps)).to(x.dtype)
    return torch.where(moved.isfinite(), moved, x.detach())


def unit(dtype: torch.dtype) -> float:
    """The floor, of a result: one rounding, of fp32 eight."""
    return 4 * EPS32 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def assert_within(
    name: str, got: Tensor, right: Tensor, plain: Iterable[Tensor], floor: Tensor | float = 0.0
) -> None:
    """`got` against `right` (fp64): error <= 2 x that of the worst of `plain` + floor.

    plain: taken one by one until that holds.
    """
    assert got.shape == right.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(right.shape)}"
    if right.numel() == 0:
        return
    got, right = got.detach(), right.detach()
    finite = right.isfinite()
    odd = torch.where(finite, 0.0, right)
    assert torch.equal(torch.where(finite, 0.0, got.double()), odd), (
        f"{name}: {(got.isfinite() != finite).sum()} of {got.numel()} values are not "
        f"(in)finite as they should be; NaN at {got.isnan().nonzero()[:3].tolist()}"
    )

    def errors(x: Tensor) -> Tensor:
        return torch.where(finite, x.double() - right, 0.0).abs()

    magnitude = torch.where(finite, right, 0.0).abs()
    spread = torch.broadcast_to(torch.as_tensor(floor, dtype=torch.float64), right.shape)
    # Subnormals of fp16: a value below them has only its absolute spacing.
    least = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    error = errors(got)
    measures = {"norm": torch.linalg.vector_norm, "max": torch.amax}
    rest = {
        m: unit(got.dtype) * float(f(magnitude)) + 2 * float(f(spread)) + least
        for m, f in measures.items()
    }
    worst = dict.fromkeys(measures, 0.0)
    made, over = 0, [*measures]
    for p in plain:
        made += 1
        worst = {m: max(worst[m], float(f(errors(p.detach())))) for m, f in measures.items()}
        over = [m for m, f in measures.items() if not float(f(error)) <= 2 * worst[m] + rest[m]]
        if not over:
            return
    at = (
        tuple(int(x) for x in torch.unravel_index(error.argmax(), error.shape))
        if error.dim()
        else ()
    )
    m = over[0]
    raise AssertionError(
        f"{name}: {m} of the error {float(measures[m](error)):.3e} > {2 * worst[m] + rest[m]:.3e} "
        f"(plain PyTorch {worst[m]:.3e}, the worst of {made}); worst at {at}: got "
        f"{got[at].item():.6e}, right {right[at].item():.6e}"
    )
