"""A small fixed pass of the norm or the act kernels, with the features of a given one, and its
comparison with plain PyTorch in fp64: what `fastattn.first_use` runs before a kernel's first call
on a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.layernorm_op import ACTIVATION_NAMES, NORM_NAMES

# Elements of the small call: at most so many that every program of a backward has two tiles.
_ELEMENTS = 1 << 21
_NAMES = {
    "norm_forward": ("y", "s", "mean", "rstd"),
    "norm_backward": ("dx", "dresidual", "dweight", "dbias", "dx_bias"),
    "act_forward": ("a",),
    "act_backward": ("dx", "dgate", "a", "dbias", "dgate_bias"),
}
# Which tensors of a pass are rows, statistics of rows, vectors of columns, the seed.
_ROLES = {
    "norm_forward": ("rows", "rows", "vector", "vector", "vector", "seed"),
    "norm_backward": ("rows", "rows", "rows", "mean", "rstd", "vector", "seed"),
    "act_forward": ("rows", "rows", "vector", "vector", "seed"),
    "act_backward": ("rows", "rows", "rows", "vector", "vector", "seed"),
}


def variant(name: str, tensors: tuple[Tensor | None, ...], how: dict[str, Any]) -> str:
    """What tells one set of compiled kernels from another, in words."""
    first = next(x for x in tensors if x is not None)
    kinds = [
        "-" if x is None else short(x.dtype)
        for role, x in zip(_ROLES[name], tensors, strict=True)
        if role != "seed"
    ]
    words = [name.replace("_", " "), f"N{first.shape[-1]}", ".".join(kinds)]
    if "norm" in how:
        words.append(f"norm={NORM_NAMES[how['norm']]}")
    if "act" in how:
        words.append(ACTIVATION_NAMES[how["act"]])
    if how["dropout_p"] > 0:
        words.append("dropout")
    for key, value in how.items():
        if key.startswith("want_") and value:
            words.append(key[5:])
        elif isinstance(value, torch.dtype):
            words.append(f"{key}={short(value)}")
        elif key == "sums":
            words.append("sums=" + ".".join("-" if t is None else short(t) for t in value))
        elif key in ("out", "over_da") and value is not None and value is not False:
            words.append(key)
    return " ".join(words)


def short(dtype: torch.dtype) -> str:
    return str(dtype)[6:].replace("float", "f")


def check(
    name: str,
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    tensors: tuple[Tensor | None, ...],
    how: dict[str, Any],
) -> str | None:
    """Run ``kernel`` on a small call like the given one; what is wrong, or None."""
    how = dict(how)
    if how["dropout_p"]:
        how["dropout_p"] = 0.25
    small = _small(name, tensors, how)
    right = _flat(plain(*small, **_without_aliases(how)))
    if how.get("out") is not None:  # over what it reads
        how["out"] = small[0]
    found = _flat(kernel(*small, **how))
    complaints = []
    for what, x, r in zip(_NAMES[name], found, right, strict=True):
        if (x is None) != (r is None):
            complaints.append(f"{what} is missing or was not asked for")
        elif x is not None and r is not None:
            complaints += wrong(what, x, r)
    return "; ".join(complaints) or None


def _without_aliases(how: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in how.items() if k not in ("out", "over_da")}


def _small(
    name: str, tensors: tuple[Tensor | None, ...], how: dict[str, Any]
) -> tuple[Tensor | None, ...]:
    """Values like the given tensors', the same for every run, of as many columns."""
    gen = torch.Generator().manual_seed(1)
    roles = _ROLES[name]
    pairs = list(zip(roles, tensors, strict=True))
    like = next(x for role, x in pairs if role == "rows" and x is not None)
    columns = like.shape[-1]
    rows = max(5, min(_ELEMENTS // columns, 33_000)) + 3

    def make(role: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if role == "seed":
            return torch.tensor([12345], device=x.device)
        shape = (columns,) if role == "vector" else (rows, columns) if role == "rows" else (rows,)
        value = torch.randn(shape, generator=gen)
        if role == "rstd":
            value = value.abs() + 0.5
        return value.to(like.device, x.dtype)

    return tuple(make(role, x) for role, x in pairs)


def _flat(results: Any) -> list[Tensor | None]:
    if isinstance(results, Tensor):
        return [results]
    found: list[Tensor | None] = []
    for x in results:
        found += x if isinstance(x, list) else [x]
    return found


def wrong(what: str, found: Tensor, right: Tensor, more: float = 0.0) -> list[str]:
    """What differs by more than rounding (or ``more``); arithmetic is fp32 and the results are
    rounded once."""
    got, r = found.double(), right.double()
    finite = r.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return [f"{what} is not finite where it should be, or the reverse"]
    size = r[finite].norm() + 1e-30
    error = float((got - r)[finite].norm() / size)
    allowed = max(2 * torch.finfo(found.dtype).eps, 2e-5, more)
    return [] if error <= allowed else [f"{what} is off by {error:.1e}, {allowed:.1e} allowed"]
