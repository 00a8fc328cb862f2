"""The torch.library ops beneath ``fastattn.embedding``: schema, fake, autograd.

The CPU kernels are in csrc/bindings/embedding.cpp. Saved for the backward: the inputs, which are
gathered again, and 8 bytes a token of a norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import reference
from fastattn.ops._eager import (
    below_autograd,
    differentiable_gradients,
    make_function,
    transformed,
    wants_grad,
)
from fastattn.ops._fakes import register_fake
from fastattn.ops.layernorm_op import NORM_NAMES, lib

_TENSORS = (
    "Tensor ids, Tensor weight, Tensor? positions, Tensor? position_weight, Tensor? segments, "
    "Tensor? segment_weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed"
)
_NUMBERS = (
    "SymInt offset, float scale, int norm, float eps, float dropout_p, int padding_idx, "
    "int position_padding_idx, bool by_count"
)
_N_TENSORS, _N_NUMBERS = 9, 8
_DIFFERENTIABLE = (1, 3, 5, 6, 7)  # of the tensors; in the order of the gradients
lib.define(
    f"embedding_fwd({_TENSORS}, {_NUMBERS}, bool keep) -> (Tensor y, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
lib.define(
    "embedding_bwd(Tensor dy, " + _TENSORS + f", Tensor mean, Tensor rstd, {_NUMBERS}, int need)"
    " -> (Tensor dweight, Tensor dposition_weight, Tensor dsegment_weight, Tensor dnorm_weight, "
    "Tensor dnorm_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_fwd = torch.ops.fastattn.embedding_fwd.default
_bwd = torch.ops.fastattn.embedding_bwd.default


class Numbers(NamedTuple):
    """In the schema's order; a padding index of -1 is none."""

    offset: int
    scale: float
    norm: int
    eps: float
    dropout_p: float
    padding_idx: int
    position_padding_idx: int
    by_count: bool


def _fwd_fake(ids: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    norm, keep = rest[_N_TENSORS], rest[-1]
    tokens = ids.numel()
    stats = [
        weight.new_empty((tokens if keep and wanted else 0,), dtype=torch.float32)
        for wanted in (norm == 1, norm != 0)
    ]
    return weight.new_empty((*ids.shape, weight.shape[1])), *stats


def _bwd_fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    need = args[-1]
    tables = [args[i] for i in _DIFFERENTIABLE]
    return tuple(
        x.new_empty(x.shape)
        if x is not None and need >> i & 1
        else dy.new_empty((0,), dtype=torch.float32)
        for i, x in enumerate(tables)
    )


def _remember(ctx: Any, needs: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.need = sum(bool(n) << i for i, n in enumerate(needs))
    ctx.numbers = Numbers(*args[_N_TENSORS : _N_TENSORS + _N_NUMBERS])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*args[:_N_TENSORS], *output[1:])


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the two kinds of weights, in the order of ``_DIFFERENTIABLE``."""
    if dy is None:
        return (None,) * 5
    need = ctx.need
    grads = _bwd(dy, *ctx.saved_tensors, *ctx.numbers, need)
    return tuple(g if need >> i & 1 else None for i, g in enumerate(grads))


def _placed(grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    placed: list[Tensor | None] = [None] * _N_TENSORS
    for i, grad in zip(_DIFFERENTIABLE, grads, strict=True):
        placed[i] = grad
    return placed


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    needs = ctx.needs_input_grad
    _remember(ctx, [needs[i] for i in _DIFFERENTIABLE], inputs, output)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (*_placed(_gradients(ctx, dy)), *(None,) * (_N_NUMBERS + 1))


def _eager_forward(ctx: Any, *args: Any) -> Tensor:
    *tensors, numbers = args
    every = (*tensors, *numbers, True)
    output = below_autograd(_fwd, every)
    _remember(ctx, [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE], every, output)
    return output[0]  # type: ignore[no-any-return]


def _eager_backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None or not torch.is_grad_enabled():
        return (*_placed(_gradients(ctx, dy)), None)
    tensors = list(ctx.saved_tensors[:_N_TENSORS])
    needs = tuple(bool(ctx.need >> i & 1) for i in range(len(_DIFFERENTIABLE)))

    def formula(*weights: Tensor | None) -> tuple[Tensor]:
        every = list(tensors)
        for i, x in zip(_DIFFERENTIABLE, weights, strict=True):
            every[i] = x
        return (by_reference(tuple(every), ctx.numbers),)

    inputs = tuple(tensors[i] for i in _DIFFERENTIABLE)
    return (*_placed(differentiable_gradients(formula, inputs, needs, (dy,))), None)


def by_reference(tensors: tuple[Any, ...], n: Numbers) -> Tensor:
    ids, weight, positions, position_weight, segments, segment_weight, *norm, seed = tensors
    return reference.embedding(
        ids, weight, positions=positions, position_weight=position_weight,
        position_offset=n.offset, segments=segments, segment_weight=segment_weight, scale=n.scale,
        norm=NORM_NAMES[n.norm], norm_weight=norm[0], norm_bias=norm[1], eps=n.eps,
        dropout_p=n.dropout_p, seed=seed, padding_idx=n.padding_idx if n.padding_idx >= 0 else None,
        position_padding_idx=n.position_padding_idx if n.position_padding_idx >= 0 else None,
        scale_grad_by_freq=n.by_count,
    )  # fmt: skip


_Function = make_function("_Embedding", forward=_eager_forward, backward=_eager_backward)


def forward(tensors: tuple[Any, ...], numbers: Numbers) -> Tensor:
    """By the kernels, with autograd; tensors in the schema's order."""
    weights = [tensors[i] for i in _DIFFERENTIABLE]
    if torch.compiler.is_compiling():
        return _fwd(*tensors, *numbers, wants_grad(*weights))[0]  # type: ignore[no-any-return]
    if transformed():
        return by_reference(tensors, numbers)
    if wants_grad(*weights):
        return _Function.apply(*tensors, numbers)  # type: ignore[no-any-return]
    return below_autograd(_fwd, (*tensors, *numbers, False))[0]  # type: ignore[no-any-return]


register_fake("fastattn::embedding_fwd", _fwd_fake, lib=lib)
register_fake("fastattn::embedding_bwd", _bwd_fake, lib=lib)
torch.library.register_autograd("fastattn::embedding_fwd", _backward, setup_context=_setup, lib=lib)
