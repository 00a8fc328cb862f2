"""Which modules of a model a swap may touch: ``only`` and ``skip``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

Pattern = str | type[torch.nn.Module]
Patterns = Pattern | Iterable[Pattern] | None


def _as_tuple(patterns: Patterns, argument: str) -> tuple[Pattern, ...]:
    if patterns is None:
        return ()
    if isinstance(patterns, (str, type)):
        patterns = (patterns,)
    takes = f"fastattn.swap: {argument} takes module-name globs and module classes, got"
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{takes} {patterns!r}")
    result = tuple(patterns)
    for pattern in result:
        if not isinstance(pattern, (str, type)):
            raise TypeError(f"{takes} {pattern!r}")
    return result


class Selection:
    """``only`` and ``skip``; a pattern that matches a module takes everything inside it too."""

    def __init__(self, model: torch.nn.Module, only: Patterns, skip: Patterns) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._only = None if only is None else _as_tuple(only, "only")
        self._skip = _as_tuple(skip, "skip")
        self.unmatched = [
            pattern
            for pattern in (*(self._only or ()), *self._skip)
            if not any(_matches(pattern, n, m) for n, m in self._modules.items())
        ]

    def why_not(self, name: str) -> str | None:
        """None if the module called ``name`` is selected, else the reason."""
        family = [(n, self._modules[n]) for n in lineage(name)]
        if any(_matches(p, n, m) for p in self._skip for n, m in family):
            return "excluded by skip"
        if self._only is None or any(_matches(p, n, m) for p in self._only for n, m in family):
            return None
        return "not matched by only"


def lineage(name: str) -> list[str]:
    """The names of a module and of all that contain it: "a.b" -> "", "a", "a.b"."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _matches(pattern: Pattern, name: str, module: torch.nn.Module) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern)
    return isinstance(module, pattern)
