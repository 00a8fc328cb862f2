"""Swapping a module by changing its class and nothing else.

Parameters, buffers, hooks, flags, the module's identity and every reference to it stay.  What
undoes it lives in the module's ``__dict__`` under ``UNDO``, so it follows ``copy.deepcopy`` and
``pickle`` and any part of a model can be unswapped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

UNDO = "_fastattn_undo"


@dataclass(frozen=True)
class ClassUndo:
    """The class to give back, and attributes as they were."""

    former: type[torch.nn.Module]
    restore: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, module: torch.nn.Module) -> None:
        module.__class__ = self.former
        module.__dict__.pop("backend", None)
        for name, former in self.restore.items():
            setattr(module, name, former)


def _rebuild(fused: Any, former: Any) -> Any:
    cls = fused_class(fused, former)
    return cls.__new__(cls)


def _reduce_ex(self: torch.nn.Module, protocol: int) -> tuple[Any, ...]:
    fused, former = type(self).__bases__
    # Recurrent modules have a __getstate__; before Python 3.11 only they.
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _rebuild, (fused, former), state


@functools.cache
def fused_class(fused: Any, former: Any) -> Any:
    """``fused`` itself where ``former`` is the class that it is a drop-in for, else ``fused`` mixed
    into ``former``, which keeps everything else that it defines.

    A mixed class is made at run time under its former name (models find their parts by name), so
    pickle rebuilds it from the two.
    """
    if former in fused.__bases__:
        return fused
    members = {"__module__": former.__module__, "__reduce_ex__": _reduce_ex}
    return type(former.__name__, (fused, former), members)


def change_class(
    module: torch.nn.Module, fused: Any, backend: str, changes: Mapping[str, Any] | None = None
) -> None:
    """Make ``module`` fused in place, and set the attributes ``changes``."""
    former: Any = type(module)  # Any: mypy takes no class of modules for hashable
    changes = changes or {}
    restore = {name: getattr(module, name) for name in changes}
    module.__class__ = fused_class(fused, former)
    if backend != "auto":
        module.__dict__["backend"] = backend
    for name, value in changes.items():
        setattr(module, name, value)
    module.__dict__[UNDO] = ClassUndo(former, restore)


def why_not_changed(module: torch.nn.Module) -> str | None:
    """None if the class of the module can be changed, else the reason."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    return None
