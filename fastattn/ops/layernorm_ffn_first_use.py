"""A small fixed call of layernorm_ffn with the features of a given one, and its comparison with the
reference: what `fastattn.first_use` runs before a GPU kernel's first call on a machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import _guard
from fastattn.ops import layernorm_ffn_op as op
from fastattn.ops.layernorm_op import ACTIVATION_NAMES, NORM_NAMES

# Gradients in the order of their bits in `need`.
_NAMES = ("dx", "dw1", "db1", "dw2", "db2", "dw_gate", "db_gate", "dnorm_weight", "dnorm_bias")
# Rows and hidden units: few rows, for which F is cut into parts; rows of several blocks, with so
# few hidden units that it is not. F % 8 decides how memory is read.
_WAYS = ((20, None), (300, 48))


def variant(inputs: tuple[Any, ...], n: op.Numbers, more: str) -> str:
    """What tells one set of compiled kernels, and the way through them, from another, in words."""
    x, w1, w2 = inputs[0], inputs[1], inputs[3]
    dtype = str(w1.dtype)[6:]
    words = [dtype if x.dtype == w1.dtype else f"{dtype} of {str(x.dtype)[6:]}"]
    words += [f"D{w1.shape[1]}" + (f"/{w2.shape[0]}" if w2.shape[0] != w1.shape[1] else "")]
    words += [f"F{w1.shape[0]}", ACTIVATION_NAMES[n.act]]
    if n.norm:
        words.append(f"{'pre' if n.pre_norm else 'post'} {NORM_NAMES[n.norm]}")
    given = {
        "gated": inputs[5] is not None,
        "alone": not n.residual,
        "dropout": n.dropout_p > 0,
        "hidden dropout": n.hidden_dropout_p > 0,
    }
    parameters = [
        f"{name} {str(p.dtype)[6:]}"
        for name, p in zip(("b1", "b2", "bg", "nw", "nb"), (*inputs[2:5:2], *inputs[6:9]),
                           strict=True)
        if p is not None
    ]  # fmt: skip
    return " ".join([*words, *(w for w, x in given.items() if x), *parameters, more])


class SmallCall:
    """Inputs on x's device, the same for every run."""

    def __init__(
        self, inputs: tuple[Any, ...], n: op.Numbers, rows: int, hidden: int | None
    ) -> None:
        x, w1, _, w2 = inputs[:4]
        self.gen = torch.Generator().manual_seed(1)
        F, D = w1.shape
        width = w2.shape[0]
        if hidden is not None:
            F = min(F, hidden + F % 8)
        normed = D if n.pre_norm else width
        shapes = ((rows, D), (F, D), (F,), (width, F), (width,), (F, D), (F,), (normed,), (normed,))

        def random(like: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
            if like is None:
                return None
            size = shape[-1] ** -0.5 if len(shape) == 2 and like is not x else 1.0
            return (torch.randn(shape, generator=self.gen) * size).to(like.device, like.dtype)

        self.inputs = tuple(random(t, s) for t, s in zip(inputs, shapes, strict=True))
        self.n = n._replace(
            dropout_p=0.25 if n.dropout_p else 0.0,
            hidden_dropout_p=0.25 if n.hidden_dropout_p else 0.0,
        )
        self.seed = torch.tensor([12345], device=x.device)

    def forward(self, run: Any, save: int) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = run(*self.inputs, self.seed, *self.n, save)
        return results

    def by_reference(
        self, dtype: torch.dtype | None, dy: Tensor | None, need: int
    ) -> dict[str, Tensor]:
        """y, or the wanted gradients, on the CPU; dtype None = each tensor's own."""

        def host(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.cpu().to(dtype or t.dtype)

        inputs, seed = tuple(host(t) for t in self.inputs), self.seed.cpu()
        if dy is None:
            return {"y": op.by_reference(inputs, seed, self.n)}
        upstream = host(dy)
        assert upstream is not None
        found = op.backward_by_reference(upstream, inputs, seed, self.n, need)
        return self.wanted(found, need)

    def wanted(self, grads: tuple[Tensor, ...], need: int) -> dict[str, Tensor]:
        return {
            name: g
            for i, (name, g, t) in enumerate(zip(_NAMES, grads, self.inputs, strict=True))
            if need >> i & 1 and t is not None
        }


def check_forward(run: Any, inputs: tuple[Any, ...], n: op.Numbers) -> str | None:
    """Run ``run`` (a backend's, with the op's arguments) on small calls; what is wrong, or None."""
    for rows, hidden in _WAYS:
        small = SmallCall(inputs, n, rows, hidden)
        found = {"y": small.forward(run, 0)[0]}
        right, plain = (small.by_reference(dtype, None, 0) for dtype in (torch.float64, None))
        wrong = _guard.differences(found, right, plain)
        if wrong:
            return f"{wrong} ({rows} rows)"
    return None


def check_backward(
    run: Any, run_backward: Any, inputs: tuple[Any, ...], n: op.Numbers, need: int
) -> str | None:
    """The same for ``run_backward``, on the forward's own results."""
    for rows, hidden in _WAYS:
        small = SmallCall(inputs, n, rows, hidden)
        y, *saved = small.forward(run, op.SAVE_STATS)
        dy = torch.randn(y.shape, generator=small.gen).to(y)
        grads = run_backward(dy, *small.inputs, small.seed, *saved, *small.n, need)
        right, plain = (small.by_reference(dtype, dy, need) for dtype in (torch.float64, None))
        wrong = _guard.differences(small.wanted(grads, need), right, plain)
        if wrong:
            return f"{wrong} ({rows} rows)"
    return None
