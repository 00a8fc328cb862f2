"""The device that a command measures on."""

from collections.abc import Callable
from typing import Any

import torch

from fastattn.cli._mistakes import Mistake


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; without one the first GPU that torch sees, or else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise Mistake(f"--device {name} cannot be used here: {why}") from None
    if device.type not in ("cpu", "cuda"):
        raise Mistake(f"--device {name}: only cpu and cuda are measured")
    return device


def synchronized(fn: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`fn`, and the wait for what it launched: a GPU works behind the caller's back."""
    if device.type != "cuda":
        return fn

    def call() -> Any:
        result = fn()
        torch.cuda.synchronize(device)
        return result

    return call
