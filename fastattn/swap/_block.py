"""What the blocks of Hugging Face models that a swap knows have in common.

Each is a class to mix into one of transformers (see ``_classes``) that overrides what it fuses.
``PARTS`` names the submodules whose work the fused call does itself.  Where one of them is not what
it was (another class, hooks, a forward of its own, an activation the op has not), the block runs as
transformers wrote it, module by module; so hooks, adapters and quantised layers keep working.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.nn._plain import activation_name, anyone_hooks_all, hooked
from fastattn.ops._eager import autocast_dtype

_TORCH = {
    "linear": ("torch.nn.modules.linear", ("Linear",)),
    "dropout": ("torch.nn.modules.dropout", ("Dropout",)),
    "embedding": ("torch.nn.modules.sparse", ("Embedding",)),
    "conv1d": ("transformers.pytorch_utils", ("Conv1D",)),
}


def _is(module: Any, what: str, home: str) -> bool:
    """Whether a part is of the class that a block expects, by its home and name (a class mixed
    by a swap keeps both), and calling it would do nothing else.

    ``what``: a key of ``_TORCH``, "norm" (LayerNorm), "activation", or a class of the block's own
    module of transformers, ``home``.
    """
    if module is None:
        return False
    if what == "activation":
        return activation_name(module) is not None
    cls: Any = type(module)
    if what == "norm":
        known = cls is torch.nn.LayerNorm or cls.__module__ == "fastattn.nn.layer_norm"
    else:
        where, names = _TORCH.get(what, (home, (what,)))
        known = cls.__module__ == where and cls.__name__ in names
    return known and not hooked(module) and "forward" not in module.__dict__


def part(module: Any, path: tuple[str, ...]) -> Any:
    """A submodule, None where it is missing; by ``_modules``, for attribute access is slow."""
    for name in path:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


class Block:
    """What the mixed-in classes share."""

    backend: str = "auto"
    KIND = "feed-forward"
    OP = "fastattn.layernorm_ffn"
    # The parameters of the forward that this code stands for.
    FORWARD: tuple[str, ...] = ()
    PARTS: tuple[tuple[tuple[str, ...], str], ...] = ()

    @classmethod
    def odd_part(cls, module: Any) -> str | None:
        """The first part that is not as expected."""
        home = type(module).__module__
        for path, what in cls.PARTS:
            if not _is(part(module, path), what, home):
                return ".".join(path)
        return None

    def ready(self, x: Tensor | None = None) -> bool:
        """Whether the parts can be fused in this call: as expected, and weights of x's dtype
        (autocast casts them) where there is one."""
        if self.odd_part(self) is not None or anyone_hooks_all():
            return False
        if x is None:
            return True
        dtypes = {
            part(self, path).weight.dtype
            for path, what in self.PARTS
            if what in ("linear", "conv1d")
        }
        if autocast_dtype(x.device) is not None:
            return len(dtypes) <= 1
        return dtypes <= {x.dtype}


def parts_of(**kinds: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    """``a__b="linear"``: the submodule a.b is a Linear."""
    return tuple((tuple(path.split("__")), what) for path, what in kinds.items())
