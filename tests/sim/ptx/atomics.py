"""Read-modify-write on an array, one lane after the other where they hit the same place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import floats

Array = NDArray[Any]


def apply_atomic(
    op: str, kind: str, view: Array, at: Array, values: list[Array]
) -> tuple[Array, bool]:
    """Returns what each lane found, and whether anything changed. `view` holds unsigned words."""
    before = np.empty(len(at), view.dtype)
    changed = False
    values = [v.astype(view.dtype, copy=False) for v in values]
    for turn in _turns(at):
        where = at[turn]
        old = view[where]
        new = _new(op, kind, old, [v[turn] for v in values])
        before[turn] = old
        view[where] = new
        changed = changed or bool((new != old).any())
    return before, changed


def _turns(at: Array) -> list[Array]:
    """Lanes in turns of which each hits a place once, in the order of the lanes."""
    order = np.argsort(at, kind="stable")
    where = at[order]
    first = np.r_[True, where[1:] != where[:-1]]
    if first.all():
        return [np.arange(len(at))]
    start = np.maximum.accumulate(np.where(first, np.arange(len(at)), 0))
    rank = np.arange(len(at)) - start
    return [np.sort(order[rank == k]) for k in range(int(rank.max()) + 1)]


def _new(op: str, kind: str, old: Array, values: list[Array]) -> Array:
    v = values[0]
    if op == "exch":
        return v
    if op == "cas":
        return np.where(old == v, values[1], old)
    if op in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op](old, v)
    if op == "inc":
        return np.where(old >= v, old.dtype.type(0), old + old.dtype.type(1))
    if op == "dec":
        one = old.dtype.type(1)
        return np.where((old == 0) | (old > v), v, old - one)
    if op in ("min", "max"):
        typed = f"{'i' if kind[0] == 's' else 'u'}{old.dtype.itemsize}"
        pick = np.minimum if op == "min" else np.maximum
        return pick(old.view(typed), v.view(typed)).view(old.dtype)
    assert op == "add"
    if kind[0] in "us":
        return old + v
    if kind in ("f32", "f64"):
        typed = kind.replace("f32", "f4").replace("f64", "f8")
        return (old.view(typed) + v.view(typed)).view(old.dtype)
    form = kind.removesuffix("x2")
    if kind.endswith("x2"):
        return floats.pair_op(lambda a, b: floats.half_op(form, "add", "rn", a, b), old, v)
    return floats.half_op(form, "add", "rn", old, v)
