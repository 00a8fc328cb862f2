"""The Triton kernels' passes, each behind its first-use verdict (_guard.py): a pass that was found
wrong is made by plain PyTorch instead. layernorm_ffn is made of the same passes and torch's GEMMs,
so this is its check too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fastattn.kernels import layernorm_ffn as ffn
from fastattn.ops import _guard, layernorm_plain

_OPS = {
    "norm_forward": "add_layer_norm",
    "norm_backward": "add_layer_norm",
    "act_forward": "bias_act",
    "act_backward": "bias_act",
}


def _guarded(name: str, kernel: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    """A pass with the arguments of ``kernel``: by it, or by ``plain``."""

    def run(*tensors: Tensor | None, **how: Any) -> Any:
        device = next(x.device for x in tensors if x is not None)

        def check() -> tuple[str, Callable[[], str | None]]:
            from fastattn.ops import layernorm_first_use as check

            return check.variant(name, tensors, how), partial(
                check.check, name, kernel, plain, tensors, how
            )

        if _guard.may_run(_OPS[name], "triton", device, _key(name, tensors, how), check):
            return kernel(*tensors, **how)
        return plain(*tensors, **how)

    return run


def _key(name: str, tensors: tuple[Tensor | None, ...], how: dict[str, Any]) -> tuple[Any, ...]:
    """At least as fine as the variant's name."""
    kinds = tuple([None if x is None else x.dtype for x in tensors])
    columns = next(x.shape[-1] for x in tensors if x is not None)
    # Of the numbers eps and p change no code, and `out` is a tensor.
    rest = tuple([v for k, v in how.items() if k not in ("eps", "dropout_p", "out")])
    return (name, kinds, columns, how["dropout_p"] > 0, how.get("out") is None, rest)


def passes() -> ffn.Passes:
    """Those of the Triton kernels, checked at their first use."""
    made = {
        name: _guarded(name, kernel, getattr(layernorm_plain, name))
        for name, kernel in ffn.Passes()._asdict().items()
    }
    return ffn.Passes(**made)


def block_may_run(tensors: tuple[Tensor | None, ...], numbers: ffn.Numbers, save: int) -> bool:
    """Whether the kernel of the whole block may serve a call; else the passes and GEMMs do."""

    def check() -> tuple[str, Callable[[], str | None]]:
        from fastattn.ops import layernorm_block_first_use as check

        name = check.variant(tensors, numbers, save)
        return name, partial(check.check, tensors, numbers, save)

    x, w2 = tensors[0], tensors[3]
    assert x is not None
    assert w2 is not None
    kinds = tuple([None if t is None else t.dtype for t in tensors])
    drops = numbers.dropout_p > 0, numbers.hidden_dropout_p > 0
    rows = x.numel() // max(x.shape[-1], 1)
    key = (kinds, x.shape[-1], w2.shape[0], numbers[0], numbers[2:5], drops, save, size_of(rows))
    return _guard.may_run("layernorm_ffn", "triton", x.device, key, check)


def size_of(rows: int) -> int:
    """The most rows with the same tiles (kernels/layernorm_ffn_block.py)."""
    return 16 if rows <= 16 else 1024 if rows <= 1024 else 4096
