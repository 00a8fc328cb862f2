"""Ways to spoil an argument: by its role, each a name and a function of the right value."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Ways = dict[str, Callable[[Any], Any]]
_ODD = 7919  # no size of a fuzzed call


def constants(*values: Any) -> Ways:
    return {repr(v): lambda _, v=v: v for v in values}


def longer(x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x.new_zeros(_ODD)
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + _ODD)


_NO_TENSOR: Ways = {
    "a list": lambda x: [1.0, 2.0],
    "a numpy array": lambda x: x.detach().float().numpy(),
    "a string": lambda x: "nonsense",
    "an object": lambda x: object(),
    "complex": lambda x: x.detach().to(torch.complex64),
}
DEEPER: Ways = {"a dimension more": lambda x: x[None]}
LONGER: Ways = {"longer": longer}
META: Ways = {"on another device": lambda x: torch.empty_like(x, device="meta")}
# A tensor of floats: the one all others go with, and the others.
FLOAT: Ways = {**_NO_TENSOR, "ints": lambda x: x.detach().to(torch.int32)}
PARAM: Ways = {**FLOAT, **META}
VECTOR: Ways = {**PARAM, **LONGER}
INDEX: Ways = {**_NO_TENSOR, **META, "floats": lambda x: x.double()}
MASK: Ways = {**_NO_TENSOR, **META, **LONGER, "floats": lambda x: x.float()}

_NO_NUMBER = constants("nonsense", [1.0], math.nan)
NUMBER: Ways = {**_NO_NUMBER, "an object": lambda _: object()}
POSITIVE: Ways = {**NUMBER, **constants(-1.0)}
PROBABILITY: Ways = {**NUMBER, **constants(-0.1, 1.5, math.inf)}
INT: Ways = constants("nonsense", 1.5, [3])
FLAG: Ways = constants("yes", 2, [True])
CHOICE: Ways = constants("nonsense", 7, ["gelu"])
SEED: Ways = constants("nonsense", 1.5, [3], 2**70)
# Nothing on a CPU can serve the GPU's.
BACKEND: Ways = constants("tpu", 3, ["cpu"], "triton", "cuda")


def applicable(ways: Ways, right: Any) -> Ways:
    """Those that can be done to it: of no tensor there is none with a dimension more."""
    return {n: f for n, f in ways.items() if isinstance(right, Tensor) or _can(f, right)}


def _can(way: Callable[[Any], Any], right: Any) -> bool:
    try:
        way(right)
    except (TypeError, AttributeError):
        return False
    return True
