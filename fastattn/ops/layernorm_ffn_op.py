"""The torch.library ops beneath ``fastattn.layernorm_ffn``: schema, fake, autograd.

The CPU kernels are in csrc/bindings/layernorm_ffn.cpp; ``layernorm_ffn_triton_*`` and
``layernorm_ffn_cuda_*`` are the same ops on Triton's (layernorm_triton.py) and the CUDA C++ kernels
(layernorm_ffn_cuda.py). What the forward saves follows from ``recompute`` and from what needs a
gradient: see :func:`save_flags`. The CUDA C++ kernels never write the hidden layer to memory: there
every ``recompute`` is "all", and u, g and a are empty.
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
    recording,
    transformed,
    wants_grad,
)
from fastattn.ops._fakes import register_fake
from fastattn.ops.layernorm_op import ACTIVATION_NAMES, NORM_NAMES, NORMS, lib

_TENSORS = (
    "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate, Tensor? b_gate, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? seed"
)
_NUMBERS = (
    "int norm, float eps, int act, bool pre_norm, bool residual, float dropout_p, "
    "float hidden_dropout_p"
)
_N_INPUTS, _N_TENSORS, _N_NUMBERS = 9, 10, 7
_SUFFIXES = {"cpu": "", "triton": "_triton", "cuda": "_cuda"}
_SAVE_NOTHING_HIDDEN = ("cuda",)
for _suffix in _SUFFIXES.values():
    lib.define(
        f"layernorm_ffn{_suffix}_fwd({_TENSORS}, {_NUMBERS}, int save) -> (Tensor y, Tensor s, "
        "Tensor mean, Tensor rstd, Tensor u, Tensor g, Tensor a)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    lib.define(
        f"layernorm_ffn{_suffix}_bwd(Tensor dy, {_TENSORS}, Tensor s, Tensor mean, Tensor rstd, "
        f"Tensor u, Tensor g, Tensor a, {_NUMBERS}, int need) -> (Tensor dx, Tensor dw1, "
        "Tensor db1, Tensor dw2, Tensor db2, Tensor dw_gate, Tensor db_gate, Tensor dnorm_weight, "
        "Tensor dnorm_bias)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
# What layernorm_ffn_cuda_fwd and _bwd run once their first-use checks allow it; not for callers.
lib.define(
    f"layernorm_ffn_cuda_kernel_fwd({_TENSORS}, {_NUMBERS}, int save) -> (Tensor y, Tensor s, "
    "Tensor mean, Tensor rstd, Tensor u, Tensor g, Tensor a)"
)
lib.define(
    f"layernorm_ffn_cuda_kernel_bwd(Tensor dy, {_TENSORS}, Tensor s, Tensor mean, Tensor rstd, "
    f"{_NUMBERS}, int need) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, "
    "Tensor dw_gate, Tensor db_gate, Tensor dnorm_weight, Tensor dnorm_bias)"
)

# Bits of `need`, in the order of the inputs and of the gradients.
_DX, _DW1, _DB1, _DW2, _DB2, _DWG, _DBG, _DNW, _DNB = (1 << i for i in range(_N_INPUTS))
SAVE_STATS, SAVE_U, SAVE_A = 1, 2, 4
RECOMPUTE = {"none": 0, "activation": 1, "all": 2}


class Numbers(NamedTuple):
    """In the schema's order."""

    norm: int
    eps: float
    act: int
    pre_norm: bool
    residual: bool
    dropout_p: float
    hidden_dropout_p: float


def save_flags(need: int, numbers: Numbers, gated: bool, recompute: int) -> int:
    """What the forward keeps: the pre-activations (u, and g where gated) where a gradient runs
    through the activation, the hidden layer a where w2 wants one, each unless it is recomputed."""
    if not need:
        return 0
    through = _DX | _DW1 | _DB1 | _DWG | _DBG | (_DNW | _DNB if numbers.pre_norm else 0)
    save = SAVE_STATS
    keep_a = bool(need & _DW2) and recompute == 0
    if recompute < 2 and (need & through or (need & _DW2 and not keep_a)):
        save |= SAVE_U
    return save | (SAVE_A if keep_a else 0)


def _fwd_fake(
    x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, w_gate: Any, b_gate: Any, norm_weight: Any,
    norm_bias: Any, seed: Any, norm: int, eps: float, act: int, pre_norm: bool, residual: bool,
    dropout_p: float, hidden_dropout_p: float, save: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    hidden, columns = w1.shape
    rows = x.numel() // columns
    stats = save & SAVE_STATS

    def kept(wanted: Any) -> Tensor:
        return w1.new_empty((rows, hidden) if wanted else (0,))

    out = (*x.shape[:-1], w2.shape[0])
    return (
        x.new_empty(out),
        x.new_empty(out if stats and norm and not pre_norm else (0,)),
        x.new_empty((rows if stats and norm == 1 else 0,), dtype=torch.float32),
        x.new_empty((rows if stats and norm else 0,), dtype=torch.float32),
        kept(save & SAVE_U),
        kept(save & SAVE_U and w_gate is not None),
        kept(save & SAVE_A),
    )


def _bwd_fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, need = args[:_N_INPUTS], args[-1]
    return tuple(
        x.new_empty(x.shape)
        if x is not None and need >> i & 1
        else dy.new_empty((0,), dtype=torch.float32)
        for i, x in enumerate(inputs)
    )


def _need(needs: Any) -> int:
    return sum(bool(n) << i for i, n in enumerate(needs))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.numbers = Numbers(*inputs[_N_TENSORS : _N_TENSORS + _N_NUMBERS])
    ctx.save_for_backward(*inputs[:_N_TENSORS], *output[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.need = _need(ctx.needs_input_grad[:_N_INPUTS])
    _remember(ctx, inputs, output)


class _Ops:
    """One backend's pair of ops: fake, autograd for the compilers, autograd for eager."""

    def __init__(self, suffix: str) -> None:
        self.fwd, self.bwd = (
            getattr(torch.ops.fastattn, f"layernorm_ffn{suffix}_{way}").default
            for way in ("fwd", "bwd")
        )
        self.function = make_function(
            "_LayerNormFFN", forward=self._eager_forward, backward=self._eager_backward
        )
        name = f"fastattn::layernorm_ffn{suffix}"
        register_fake(f"{name}_fwd", _fwd_fake, lib=lib)
        register_fake(f"{name}_bwd", _bwd_fake, lib=lib)
        torch.library.register_autograd(
            f"{name}_fwd", self._backward, setup_context=_setup, lib=lib
        )

    def _gradients(self, ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * _N_INPUTS
        need = ctx.need
        grads = self.bwd(dy, *ctx.saved_tensors, *ctx.numbers, need)
        return tuple(g if need >> i & 1 else None for i, g in enumerate(grads))

    def _backward(self, ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return (*self._gradients(ctx, dy), *(None,) * (2 + _N_NUMBERS))

    def _eager_forward(self, ctx: Any, *args: Any) -> Tensor:
        *inputs, (seed, numbers, recompute) = args
        ctx.need = need = _need(ctx.needs_input_grad[:_N_INPUTS])
        save = save_flags(need, numbers, inputs[5] is not None, recompute)
        every = (*inputs, seed, *numbers, save)
        output = below_autograd(self.fwd, every)
        _remember(ctx, every, output)
        return output[0]  # type: ignore[no-any-return]

    def _eager_backward(self, ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None or not torch.is_grad_enabled():
            return (*self._gradients(ctx, dy), None)
        *inputs, seed = ctx.saved_tensors[:_N_TENSORS]
        needs = tuple(bool(ctx.need >> i & 1) for i in range(_N_INPUTS))

        def formula(*tensors: Tensor | None) -> tuple[Tensor]:
            return (by_reference(tensors, seed, ctx.numbers),)

        return (*differentiable_gradients(formula, tuple(inputs), needs, (dy,)), None)


_OPS = {backend: _Ops(suffix) for backend, suffix in _SUFFIXES.items()}


def by_reference(inputs: tuple[Any, ...], seed: Tensor | None, n: Numbers) -> Tensor:
    x, w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias = inputs
    return reference.layernorm_ffn(
        x, w1, b1, w2, b2, norm=NORM_NAMES[n.norm], norm_weight=norm_weight, norm_bias=norm_bias,
        eps=n.eps, activation=ACTIVATION_NAMES[n.act], w_gate=w_gate, b_gate=b_gate,
        pre_norm=n.pre_norm, residual=n.residual, dropout_p=n.dropout_p,
        hidden_dropout_p=n.hidden_dropout_p, seed=seed,
    )  # fmt: skip


def forward_by_reference(
    inputs: tuple[Any, ...], seed: Tensor | None, n: Numbers, save: int
) -> tuple[Tensor, ...]:
    """The results of ``layernorm_ffn_cuda_fwd``, by plain PyTorch."""
    x, w1 = inputs[:2]
    y = by_reference(inputs, seed, n)
    s = x.new_empty((0,))
    mean = rstd = x.new_empty((0,), dtype=torch.float32)
    if save & SAVE_STATS and n.norm:
        of = x
        if not n.pre_norm:
            of = s = by_reference((*inputs[:7], None, None), seed, n._replace(norm=0))
        rows = of.reshape(-1, of.shape[-1]).double()
        if n.norm == NORMS["layer"]:
            mean = rows.mean(-1)
            rows = rows - mean[:, None]
            mean = mean.float()
        rstd = (rows.square().mean(-1) + n.eps).rsqrt().float()
    u, g, a = w1.new_empty((3, 0)).unbind()
    return y.contiguous(), s.contiguous(), mean.clone(), rstd.clone(), u, g, a


def backward_by_reference(
    dy: Tensor, inputs: tuple[Any, ...], seed: Tensor | None, n: Numbers, need: int
) -> tuple[Tensor, ...]:
    """The results of ``layernorm_ffn_cuda_bwd``, by plain PyTorch."""
    needs = tuple(bool(need >> i & 1) for i in range(_N_INPUTS))
    with recording():
        leaves = tuple(
            x.detach().requires_grad_() if k and x is not None else x
            for x, k in zip(inputs, needs, strict=True)
        )
        wanted = [x for x, k in zip(leaves, needs, strict=True) if k and x is not None]
        found = iter(torch.autograd.grad(by_reference(leaves, seed, n), wanted, dy))
    return tuple(
        next(found).contiguous() if k and x is not None else dy.new_empty((0,), dtype=torch.float32)
        for x, k in zip(inputs, needs, strict=True)
    )


def forward(
    inputs: tuple[Any, ...],
    seed: Tensor | None,
    numbers: Numbers,
    recompute: int,
    backend: str = "cpu",
) -> Tensor:
    """By a backend's kernels, with autograd; inputs: x, w1, b1, w2, b2, w_gate, b_gate,
    norm_weight, norm_bias."""
    ops = _OPS[backend]
    if backend in _SAVE_NOTHING_HIDDEN:
        recompute = RECOMPUTE["all"]
    if torch.compiler.is_compiling():
        # Which inputs need a gradient is not known to an op while compiling.
        save = save_flags(511, numbers, inputs[5] is not None, recompute)
        save = save if wants_grad(*inputs) else 0
        return ops.fwd(*inputs, seed, *numbers, save)[0]  # type: ignore[no-any-return]
    if transformed():
        return by_reference(inputs, seed, numbers)
    if wants_grad(*inputs):
        return ops.function.apply(*inputs, (seed, numbers, recompute))  # type: ignore[no-any-return]
    return below_autograd(ops.fwd, (*inputs, seed, *numbers, 0))[0]  # type: ignore[no-any-return]
