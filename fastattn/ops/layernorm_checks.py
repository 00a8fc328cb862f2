"""What ``layernorm_ffn`` and its parts accept, checked before any kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention_checks import check_strided, fail

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_x(op: str, x: Any, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        fail(op, f"{name} must be a Tensor, got {type(x).__name__}", TypeError)
    check_strided(op, name, x)
    if x.dtype not in FLOATS:
        fail(op, f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}", TypeError)
    if x.dim() == 0:
        fail(op, f"{name} must have at least one dimension, got shape ()")


def check_like(op: str, name: str, given: Any, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """residual and gate: x's shape and device."""
    check_x(op, given, name)
    if given.dtype not in dtypes:
        want = " or ".join(str(d) for d in dict.fromkeys(dtypes))
        fail(op, f"{name} must be {want} to go with x {x.dtype}, got {given.dtype}", TypeError)
    if given.device != x.device:
        fail(op, f"{name} must be on x's device {x.device}, got {given.device}")
    if given.shape != x.shape:
        fail(op, f"{name} must have x's shape {tuple(x.shape)}, got {tuple(given.shape)}")


def check_parameter(
    op: str, name: str, given: Any, x: Tensor, shape: tuple[int, ...], of: str
) -> None:
    """A parameter of any float dtype (float64 only next to a float64 x) and of this very shape."""
    if not isinstance(given, Tensor):
        fail(op, f"{name} must be a Tensor or None, got {type(given).__name__}", TypeError)
    if given.dtype not in FLOATS:
        fail(op, f"{name} must be a float tensor, got {given.dtype}", TypeError)
    if (given.dtype == torch.float64) != (x.dtype == torch.float64):
        fail(op, f"{name} must go with x's dtype {x.dtype}, got {given.dtype}", TypeError)
    if given.device != x.device:
        fail(op, f"{name} must be on x's device {x.device}, got {given.device}")
    if tuple(given.shape) != tuple(shape):
        fail(op, f"{name} must have shape {tuple(shape)} to match {of}, got {tuple(given.shape)}")


def check_shape(op: str, x: Tensor, normalized_shape: Any) -> tuple[int, ...]:
    """normalized_shape as a tuple: the last dimensions of x."""
    if isinstance(normalized_shape, (int, torch.SymInt)) or hasattr(normalized_shape, "__index__"):
        normalized_shape = (normalized_shape,)
    try:  # a symbolic size must stay one
        shape: tuple[Any, ...] = tuple(
            n if isinstance(n, (int, torch.SymInt)) else index(n) for n in normalized_shape
        )
    except TypeError:
        fail(op, "normalized_shape must be an int or a sequence of ints, got "
             f"{normalized_shape!r}", TypeError)  # fmt: skip
    if not shape or 0 in shape:
        fail(op, f"normalized_shape must have elements, got {shape}")
    if tuple(x.shape[-len(shape) :]) != shape:
        fail(op, f"x must end in normalized_shape {shape}, got shape {tuple(x.shape)}")
    return shape


def check_number(op: str, name: str, given: Any) -> None:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        fail(op, f"{name} must be a float, got {given!r}", TypeError)
    if not given >= 0:
        fail(op, f"{name} must not be negative, got {given}")


def check_probability(op: str, name: str, p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        fail(op, f"{name} must be a float, got {p!r}", TypeError)
    if not 0.0 <= p < 1.0:
        fail(op, f"{name} must be in [0, 1), got {p}")


def check_int(op: str, name: str, given: Any) -> None:
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        fail(op, f"{name} must be an int, got {given!r}", TypeError)


def check_choice(op: str, name: str, given: Any, choices: Any) -> int:
    code = choices.get(given) if isinstance(given, (str, type(None))) else None
    if code is None:
        fail(op, f"{name} must be one of {[*choices]}, got {given!r}")
    return int(code)
