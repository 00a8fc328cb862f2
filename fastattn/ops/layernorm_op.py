"""The torch.library ops beneath ``layer_norm``, ``rms_norm``, ``add_layer_norm`` and ``bias_act``:
schema, fake, autograd.

``add_layer_norm_fwd`` is one pass, ``s = residual + dropout(x)``, ``y = norm(s)``; layer_norm and
rms_norm are calls of it without a residual. The last dimensions, ``columns`` elements of them, are
one row. The CPU kernels are in csrc/bindings/layernorm.cpp; ``*_triton_*`` are the same ops on the
Triton kernels (layernorm_triton.py), and everything here serves both.
"""

from __future__ import annotations

from typing import Any

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
from fastattn.reference.layernorm_ffn import OUTPUT_SITE, dropout

NORMS: dict[str | None, int] = {None: 0, "layer": 1, "rms": 2}
NORM_NAMES = {code: name for name, code in NORMS.items()}
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "relu2": 3, "silu": 4, "identity": 5}
ACTIVATION_NAMES = {code: name for name, code in ACTIVATIONS.items()}

KEEP_STATS, KEEP_SUM = 1, 2
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

lib = torch.library.Library("fastattn", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
# The C++ kernels behind the CPU key, and the Triton kernels (layernorm_triton.py): one schema.
_SUFFIXES = {"cpu": "", "triton": "_triton"}
for _suffix in _SUFFIXES.values():
    lib.define(
        f"add_layer_norm{_suffix}_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
        "Tensor? seed, int norm, float eps, float dropout_p, SymInt columns, int keep)"
        " -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
        tags=_TAGS,
    )
    lib.define(
        f"add_layer_norm{_suffix}_bwd(Tensor? dy, Tensor? ds, Tensor s, Tensor mean, Tensor rstd, "
        "Tensor? weight, Tensor? bias, Tensor? seed, int norm, float dropout_p, SymInt columns, "
        "int x_dtype, int need)"
        " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
        tags=_TAGS,
    )
    lib.define(
        f"bias_act{_suffix}_fwd(Tensor x, Tensor? bias, Tensor? gate, Tensor? gate_bias, "
        "Tensor? seed, int act, float dropout_p) -> Tensor",
        tags=_TAGS,
    )
    lib.define(
        f"bias_act{_suffix}_bwd(Tensor dy, Tensor x, Tensor? bias, Tensor? gate, "
        "Tensor? gate_bias, Tensor? seed, int act, float dropout_p, int need)"
        " -> (Tensor dx, Tensor dbias, Tensor dgate, Tensor dgate_bias)",
        tags=_TAGS,
    )


def _op(name: str, suffix: str, direction: str) -> Any:
    return getattr(torch.ops.fastattn, f"{name}{suffix}_{direction}").default


_DX, _DRESIDUAL, _DWEIGHT, _DBIAS = 1, 2, 4, 8  # of both backwards, in the order of the results


# ------------------------------------------------------------------------------------------ norm


def _norm_fwd_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    seed: Tensor | None, norm: int, eps: float, dropout_p: float, columns: int, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    like = x if residual is None else residual
    rows = x.numel() // columns
    y = like.new_empty(x.shape)
    summed = (residual is not None or dropout_p > 0) and norm and keep & KEEP_SUM
    s = like.new_empty(x.shape if summed else (0,))
    stats = [
        x.new_empty((rows if keep & KEEP_STATS and wanted else 0,), dtype=torch.float32)
        for wanted in (norm == 1, norm != 0)
    ]
    return y, s, *stats


def _norm_bwd_fake(
    dy: Tensor | None, ds: Tensor | None, s: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, norm: int, dropout_p: float,
    columns: int, x_dtype: int, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = next(t for t, code in _DTYPE_CODES.items() if code == x_dtype)
    apart = dropout_p > 0 or dtype != s.dtype
    want_dx = bool(need & _DX) and (apart or not need & _DRESIDUAL)
    return (
        s.new_empty(s.shape if want_dx else (0,), dtype=dtype),
        s.new_empty(s.shape if need & _DRESIDUAL else (0,)),
        _like_or_nothing(weight, need & _DWEIGHT, s),
        _like_or_nothing(bias, need & _DBIAS, s),
    )


def _like_or_nothing(x: Tensor | None, wanted: int, other: Tensor) -> Tensor:
    if x is not None and wanted:
        return x.new_empty(x.shape)
    return other.new_empty((0,), dtype=torch.float32)


def _norm_remember(ctx: Any, needs: tuple[bool, ...], args: Any, output: Any) -> None:
    """args: those of add_layer_norm_fwd; needs: x, residual, weight, bias."""
    x, residual, weight, bias, seed, norm, eps, dropout_p, columns, _ = args
    y, s, mean, rstd = output
    dx, dres, dw, db = needs
    ctx.need = dx | dres << 1 | dw << 2 | db << 3
    ctx.numbers = norm, dropout_p, columns, x.dtype
    ctx.eps = eps
    ctx.set_materialize_grads(False)
    if residual is None and not dropout_p:
        s = x
    elif not norm:
        s = y
    ctx.save_for_backward(s, mean, rstd, weight, bias, seed)


def _norm_gradients(bwd: Any, ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Any, ...]:
    """Of x, residual, weight, bias, by the kernels of the op ``bwd``."""
    if dy is None and ds is None:
        return (None,) * 4
    s, mean, rstd, weight, bias, seed = ctx.saved_tensors
    norm, dropout_p, columns, x_dtype = ctx.numbers
    need = ctx.need
    dx, dres, dw, db = bwd(
        dy, ds, s, mean, rstd, weight, bias, seed, norm, dropout_p, columns, _DTYPE_CODES[x_dtype],
        need,
    )  # fmt: skip
    if need & _DX and need & _DRESIDUAL and not dropout_p and x_dtype == s.dtype:
        dx = dres  # one gradient for both
    grads = zip((dx, dres, dw, db), (_DX, _DRESIDUAL, _DWEIGHT, _DBIAS), strict=True)
    return tuple(g if need & bit else None for g, bit in grads)


def _norm_gradients_again(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Any, ...]:
    """The same by plain PyTorch, differentiable: s is a function of x and residual already."""
    s, _, _, weight, bias, seed = ctx.saved_tensors
    norm, dropout_p, columns, x_dtype = ctx.numbers
    need = ctx.need

    def formula(s: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor]:
        return (_reference_norm(s, NORM_NAMES[norm], weight, bias, ctx.eps, columns),)

    of_s, dw, db = (None, None, None)
    if dy is not None:
        needs = (bool(need & (_DX | _DRESIDUAL)), bool(need & _DWEIGHT), bool(need & _DBIAS))
        of_s, dw, db = differentiable_gradients(formula, (s, weight, bias), needs, (dy,))
    with torch.enable_grad():
        if ds is not None:
            of_s = ds if of_s is None else of_s + ds
        dx = None
        if need & _DX and of_s is not None:
            flat = dropout(of_s.reshape(-1, columns), dropout_p, seed, OUTPUT_SITE)
            dx = flat.view(s.shape).to(x_dtype)
    return dx, of_s if need & _DRESIDUAL else None, dw, db


def _reference_norm(
    s: Tensor,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    columns: int,
) -> Tensor:
    flat = [None if p is None else p.reshape(columns) for p in (weight, bias)]
    y, _ = reference.add_layer_norm(s.reshape(-1, columns), None, *flat, norm=norm, eps=eps)
    return y.view(s.shape)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    _norm_remember(ctx, tuple(ctx.needs_input_grad[:4]), inputs, output)


class _NormOps:
    """One backend's pair of ops: fake, autograd for the compilers, autograd for eager."""

    def __init__(self, suffix: str) -> None:
        self.fwd, self.bwd = (_op("add_layer_norm", suffix, way) for way in ("fwd", "bwd"))
        self.function = make_function(
            "_AddLayerNorm", forward=self._eager_forward, backward=self._eager_backward
        )
        name = f"fastattn::add_layer_norm{suffix}"
        register_fake(f"{name}_fwd", _norm_fwd_fake, lib=lib)
        register_fake(f"{name}_bwd", _norm_bwd_fake, lib=lib)
        torch.library.register_autograd(
            f"{name}_fwd", self._backward, setup_context=_norm_setup, lib=lib
        )

    def _backward(self, ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if ds is not None and ds.numel() == 0:  # s is not there: see _norm_fwd_fake
            ds = None
        return (*_norm_gradients(self.bwd, ctx, dy, ds), *(None,) * 6)

    def _eager_forward(
        self, ctx: Any, x: Any, residual: Any, weight: Any, bias: Any, rest: Any
    ) -> Any:
        args = (x, residual, weight, bias, *rest)
        output = below_autograd(self.fwd, args)
        _norm_remember(ctx, ctx.needs_input_grad[:4], args, output)
        # Without a sum of its own there is one result.
        return output[:2] if output[1].numel() else output[0]

    def _eager_backward(self, ctx: Any, dy: Any, ds: Any = None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return (*_norm_gradients_again(ctx, dy, ds), None)
        return (*_norm_gradients(self.bwd, ctx, dy, ds), None)


_NORM_OPS = {backend: _NormOps(suffix) for backend, suffix in _SUFFIXES.items()}


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    seed: Tensor | None, norm: int, eps: float, dropout_p: float, columns: int,
    want_sum: bool = True, backend: str = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and s by a backend's kernels, with autograd; without want_sum s may be anything."""
    ops = _NORM_OPS[backend]
    if norm == 0 and residual is None and not dropout_p:
        return x, x
    rest = (seed, norm, eps, dropout_p, columns)
    if torch.compiler.is_compiling():
        y, s, _, _ = ops.fwd(x, residual, weight, bias, *rest, KEEP_STATS | KEEP_SUM)
    elif transformed():
        flat = [None if p is None else p.reshape(columns) for p in (weight, bias)]
        other = None if residual is None else residual.reshape(-1, columns)
        y, s = reference.add_layer_norm(
            x.reshape(-1, columns), other, *flat, norm=NORM_NAMES[norm], eps=eps,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        y, s = y.view(x.shape), s.view(x.shape)
    elif wants_grad(x, residual, weight, bias):
        found = ops.function.apply(x, residual, weight, bias, (*rest, KEEP_STATS | KEEP_SUM))
        y, s = found if isinstance(found, tuple) else (found, found)
    else:
        keep = KEEP_SUM if want_sum else 0
        y, s, _, _ = below_autograd(ops.fwd, (x, residual, weight, bias, *rest, keep))
    if residual is None and not dropout_p:
        return y, x
    return y, s if norm else y


# ------------------------------------------------------------------------------------- activation


def _act_fwd_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _act_bwd_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    seed: Tensor | None, act: int, dropout_p: float, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        x.new_empty(x.shape if need & 1 else (0,)),
        _like_or_nothing(bias, need & 2, x),
        x.new_empty(x.shape if gate is not None and need & 4 else (0,)),
        _like_or_nothing(gate_bias, need & 8, x),
    )


def _act_remember(ctx: Any, needs: tuple[bool, ...], args: tuple[Any, ...]) -> None:
    ctx.need = sum(bool(n) << i for i, n in enumerate(needs))
    ctx.numbers = args[5:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*args[:5])


def _act_gradients(bwd: Any, ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 4
    need = ctx.need
    grads = bwd(dy, *ctx.saved_tensors, *ctx.numbers, need)
    return tuple(g if need >> i & 1 else None for i, g in enumerate(grads))


def _act_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _act_remember(ctx, tuple(ctx.needs_input_grad[:4]), inputs)


class _ActOps:
    """One backend's pair of ops: fake, autograd for the compilers, autograd for eager."""

    def __init__(self, suffix: str) -> None:
        self.fwd, self.bwd = (_op("bias_act", suffix, way) for way in ("fwd", "bwd"))
        self.function = make_function(
            "_BiasAct", forward=self._eager_forward, backward=self._eager_backward
        )
        name = f"fastattn::bias_act{suffix}"
        register_fake(f"{name}_fwd", _act_fwd_fake, lib=lib)
        register_fake(f"{name}_bwd", _act_bwd_fake, lib=lib)
        torch.library.register_autograd(
            f"{name}_fwd", self._backward, setup_context=_act_setup, lib=lib
        )

    def _backward(self, ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        return (*_act_gradients(self.bwd, ctx, dy), None, None, None)

    def _eager_forward(self, ctx: Any, *args: Any) -> Any:
        inputs = (*args[:4], *args[4])
        _act_remember(ctx, ctx.needs_input_grad[:4], inputs)
        return below_autograd(self.fwd, inputs)

    def _eager_backward(self, ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None or not torch.is_grad_enabled():
            return (*_act_gradients(self.bwd, ctx, dy), None)
        *inputs, seed = ctx.saved_tensors
        needs = tuple(bool(ctx.need >> i & 1) for i in range(4))

        def formula(*tensors: Any) -> tuple[Tensor]:
            x, bias, gate, gate_bias = tensors
            return (_reference_act(x, bias, gate, gate_bias, seed, *ctx.numbers),)

        return (*differentiable_gradients(formula, tuple(inputs), needs, (dy,)), None)


def _reference_act(
    x: Tensor, bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    seed: Tensor | None, act: int, dropout_p: float,
) -> Tensor:  # fmt: skip
    return reference.bias_act(
        x, bias, activation=ACTIVATION_NAMES[act], gate=gate, gate_bias=gate_bias,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


_ACT_OPS = {backend: _ActOps(suffix) for backend, suffix in _SUFFIXES.items()}


def bias_act(
    x: Tensor, bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    seed: Tensor | None, act: int, dropout_p: float, backend: str = "cpu",
) -> Tensor:  # fmt: skip
    """By a backend's kernels, with autograd."""
    ops = _ACT_OPS[backend]
    args = (x, bias, gate, gate_bias, seed, act, dropout_p)
    if torch.compiler.is_compiling():
        return ops.fwd(*args)  # type: ignore[no-any-return]
    if transformed():
        return _reference_act(*args)
    if wants_grad(x, bias, gate, gate_bias):
        return ops.function.apply(  # type: ignore[no-any-return]
            x, bias, gate, gate_bias, (seed, act, dropout_p)
        )
    return below_autograd(ops.fwd, args)  # type: ignore[no-any-return]
