"""A small fixed call of the whole block's kernel, with the features of a given one, and its
comparison with the passes of plain PyTorch: see layernorm_first_use.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import layernorm_plain as plain
from fastattn.ops.layernorm_first_use import short, wrong
from fastattn.ops.layernorm_guard import size_of
from fastattn.ops.layernorm_op import ACTIVATION_NAMES, NORM_NAMES

_INPUTS = ("x", "w1", "b1", "w2", "b2", "w_gate", "b_gate", "norm_weight", "norm_bias", "seed")
_RESULTS = ("y", "s", "mean", "rstd", "u", "g", "a")
# Several slices and blocks of hidden features, with a partial one.
_HIDDEN = 2 * 64 + 24
# Fewest rows with the same tiles as up to so many, and several of them.
_ROWS = {16: 13, 1024: 77, 4096: 1100}


def variant(tensors: tuple[Tensor | None, ...], n: Any, save: int) -> str:
    """What tells one set of compiled kernels from another, in words."""
    x, w2 = tensors[0], tensors[3]
    assert x is not None
    assert w2 is not None
    kinds = ".".join("-" if t is None else short(t.dtype) for t in tensors[:9])
    given = {
        "behind": not n.pre_norm,
        "residual": n.residual,
        "dropout": n.dropout_p,
        "hidden_dropout": n.hidden_dropout_p,
    }
    rows = size_of(x.numel() // max(x.shape[-1], 1))
    words = [f"block D{x.shape[-1]}/{w2.shape[0]}", kinds, f"norm={NORM_NAMES[n.norm]}"]
    words += [ACTIVATION_NAMES[n.act], *(word for word, there in given.items() if there)]
    return " ".join([*words, f"save={save}", f"rows<={rows}"])


def check(tensors: tuple[Tensor | None, ...], numbers: Any, save: int) -> str | None:
    """Run the kernel on a small call; what is wrong, or None."""
    from fastattn.kernels.layernorm_ffn import Passes, ffn_forward
    from fastattn.kernels.layernorm_ffn_block import ffn_block_forward

    small = _small(tensors)
    p, hidden_p = (0.25 if p else 0.0 for p in (numbers.dropout_p, numbers.hidden_dropout_p))
    numbers = numbers._replace(dropout_p=p, hidden_dropout_p=hidden_p)
    passes = Passes(plain.norm_forward, plain.norm_backward, plain.act_forward, plain.act_backward)
    right = ffn_forward(small, numbers, save, passes)
    found = ffn_block_forward(small, numbers, save)
    complaints = []
    for what, got, want in zip(_RESULTS, found, right, strict=True):
        if got.shape != want.shape:
            complaints.append(f"{what} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
        elif got.numel():
            # The GEMMs round u, a and z to the weights' dtype on the way.
            dtype = small[1].dtype if small[1] is not None else torch.float32
            complaints += wrong(what, got, want, 4 * torch.finfo(dtype).eps)
    return "; ".join(complaints) or None


def _small(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    gen = torch.Generator().manual_seed(1)
    x, w1, w2 = tensors[0], tensors[1], tensors[3]
    assert x is not None
    assert w1 is not None
    assert w2 is not None
    hidden, features = min(w1.shape[0], _HIDDEN), w1.shape[1]
    out = w2.shape[0]
    rows = _ROWS[size_of(x.numel() // max(features, 1))]
    shapes: dict[str, tuple[int, ...]] = {
        "x": (rows, features), "w1": (hidden, features), "w_gate": (hidden, features),
        "w2": (out, hidden), "b1": (hidden,), "b_gate": (hidden,), "b2": (out,),
    }  # fmt: skip

    def make(name: str, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        if name == "seed":
            return torch.tensor([12345], device=t.device)
        value = torch.randn(shapes.get(name, tuple(t.shape)), generator=gen)
        if name.startswith("w"):  # products of the inputs' size
            value = value * value.shape[1] ** -0.5
        return value.to(t.device, t.dtype)

    return tuple(make(name, t) for name, t in zip(_INPUTS, tensors, strict=True))
