"""Letting TorchDynamo trace our recurrent modules.

Dynamo breaks the graph at every instance of torch.nn.LSTM, GRU and RNN (its
``config.allow_rnn = False``), since it would unroll what torch computes for them. Ours are
instances of them too, and are one op a layer. So while Dynamo looks at one of ours, and only then,
the switch is on; the user's other recurrent modules break the graph as before. Importing Dynamo
takes seconds, so this waits until somebody does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_BUILDER = "torch._dynamo.variables.builder"


def admit(cls: type) -> None:
    """Make Dynamo trace modules of this class, now or as soon as it is imported."""
    if _BUILDER in sys.modules:
        _patch(sys.modules[_BUILDER], cls)
    else:
        sys.meta_path.insert(0, _AfterImport(cls))


def _patch(builder: Any, cls: type) -> None:
    stock = getattr(getattr(builder, "VariableBuilder", None), "wrap_module", None)
    config = sys.modules.get("torch._dynamo.config")
    if stock is None or not hasattr(config, "allow_rnn"):
        return  # another Dynamo: if it still refuses, it says how to allow it

    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, cls):
            return stock(self, value)
        with config.patch(allow_rnn=True):  # type: ignore[union-attr]
            return stock(self, value)

    builder.VariableBuilder.wrap_module = wrap_module


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing; patches the one module right after it was executed."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader, cls = spec.loader, self._cls
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _patch(module, cls)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
