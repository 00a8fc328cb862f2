"""One case of the fuzzer, and what may come of it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rule import many_draws
from torch import Tensor

REFUSALS = (TypeError, ValueError, IndexError, NotImplementedError)


class MismatchError(AssertionError):
    """The library did not do what it says."""


@dataclass(frozen=True)
class Valid:
    """A call that the library must serve: what judges it, and its arguments for those who spoil
    them or look at the ops below."""

    fn: Callable[..., Any]
    args: dict[str, Any]
    judge: Callable[[], Any]  # raises AssertionError
    roles: dict[str, Any] = field(default_factory=dict)  # argument -> ways to spoil it
    # Forward and backward, for the ops below. None: fn(**args), with a gradient to every float
    passes: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    kind: str  # valid, invalid, raw
    about: Callable[[], str]
    run: Callable[[], str]  # "accepted" or "rejected"; raises MismatchError


def served(valid: Valid) -> Case:
    def run() -> str:
        try:
            with many_draws():
                valid.judge()
        except AssertionError as wrong:
            raise MismatchError(str(wrong)) from None
        except Exception as refusal:
            raise MismatchError(f"refused: {type(refusal).__name__}: {refusal}") from refusal
        return "accepted"

    return Case("valid", lambda: told(valid.fn, valid.args), run)


def refused(valid: Valid, name: str, how: str, bad: Any) -> Case:
    """The call with ``name=bad``."""
    args = {**valid.args, name: bad}

    def run() -> str:
        try:
            valid.fn(**args)
        except REFUSALS as refusal:
            if not re.search(rf"\b{re.escape(name)}", str(refusal)):
                raise MismatchError(
                    f"{name}={how}: the message does not name it: {type(refusal).__name__}: "
                    f"{refusal}"
                ) from refusal
            return "rejected"
        except Exception as error:
            raise MismatchError(f"{name}={how}: {type(error).__name__}: {error}") from error
        raise MismatchError(f"{name}={how} was accepted")

    return Case("invalid", lambda: f"{told(valid.fn, args)} # {name}: {how}", run)


def told(fn: Any, args: dict[str, Any]) -> str:
    name = getattr(fn, "__name__", str(fn))
    return f"{name}({', '.join(f'{n}={said(x)}' for n, x in args.items())})"


def said(x: Any) -> str:
    if isinstance(x, Tensor):
        if x.numel() <= 4 and x.device.type == "cpu":
            return f"tensor({x.tolist()}, {x.dtype})"
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}/{list(x.stride())}"
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(said, x))}]"
    text = repr(x)
    return text if len(text) < 80 else text[:77] + "..."


def backward_of(outputs: Any) -> None:
    """A backward through whatever a call returned."""
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    flat: list[Tensor] = []
    todo = list(outputs)
    while todo:
        x = todo.pop()
        if isinstance(x, (list, tuple)):
            todo += x
        elif isinstance(x, Tensor) and x.requires_grad:
            flat.append(x)
    if flat:
        torch.autograd.backward(flat, [torch.ones_like(x) for x in flat])
