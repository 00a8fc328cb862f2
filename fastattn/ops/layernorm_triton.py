"""The Triton implementations of the ops of layernorm_op.py and layernorm_ffn_op.py, under the CUDA
key, and under the CPU key for tests (Triton's interpreter, or a hook that takes the launches over).

Triton is imported at the first call: `import fastattn` needs none. Every pass is checked at its
first use (layernorm_guard.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import select, whole_block
from fastattn.ops.layernorm_op import _DTYPE_CODES, KEEP_STATS, KEEP_SUM

_DX, _DRESIDUAL, _DWEIGHT, _DBIAS = 1, 2, 4, 8
_DTYPES = {code: dtype for dtype, code in _DTYPE_CODES.items()}


@cache
def _passes() -> Any:
    from fastattn.ops.layernorm_guard import passes

    return passes()


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


def _or_empty(
    x: Tensor | None, like: Tensor, shape: Any = None, dtype: torch.dtype | None = None
) -> Tensor:
    """A result in its shape; an empty one of ``like``'s dtype where it is not wanted."""
    if x is None:
        return like.new_empty((0,), dtype=dtype or like.dtype)
    return x if shape is None else x.view(shape)


def norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    seed: Tensor | None, norm: int, eps: float, dropout_p: float, columns: int, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    from fastattn.kernels import layernorm_checks as check
    from fastattn.kernels.rows import as_rows

    check.check_rows(check.NORM, "x", x, columns)
    check.check_same(check.NORM, "residual", residual, x)
    check.check_vector(check.NORM, "weight", weight, columns)
    check.check_vector(check.NORM, "bias", bias, columns)
    check.check_dropout(check.NORM, dropout_p, seed)
    check.check(norm in (0, 1, 2), check.NORM, "norm must be 0, 1 or 2")
    like = x if residual is None else residual
    sums = (residual is not None or dropout_p > 0) and bool(norm) and bool(keep & KEEP_SUM)
    y, s, mean, rstd = _passes().norm_forward(
        as_rows(x, columns), None if residual is None else as_rows(residual, columns), None,
        _vector(weight), _vector(bias), seed, norm=norm, eps=eps, dropout_p=dropout_p,
        y_dtype=like.dtype, want_sum=sums, want_stats=bool(keep & KEEP_STATS),
    )  # fmt: skip
    f32 = torch.float32
    return (
        y.view(x.shape),
        _or_empty(s, like, x.shape),
        _or_empty(mean, like, dtype=f32),
        _or_empty(rstd, like, dtype=f32),
    )


def norm_bwd(
    dy: Tensor | None, ds: Tensor | None, s: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, norm: int, dropout_p: float,
    columns: int, x_dtype: int, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    from fastattn.kernels import layernorm_checks as check
    from fastattn.kernels.rows import as_rows

    check.check_rows(check.NORM, "s", s, columns)
    check.check_same(check.NORM, "dy", dy, s, "s")
    check.check_same(check.NORM, "ds", ds, s, "s")
    check.check_vector(check.NORM, "weight", weight, columns)
    check.check_vector(check.NORM, "bias", bias, columns)
    check.check_dropout(check.NORM, dropout_p, seed)
    check.check_stats(check.NORM, norm, mean, rstd, s.numel() // columns)
    check.check(x_dtype in _DTYPES, check.NORM, "x_dtype must be 0, 1 or 2")
    dtype = _DTYPES[x_dtype]
    # One tensor serves both where they are equal.
    apart = dropout_p > 0 or dtype != s.dtype
    want_dx = bool(need & _DX) and (apart or not need & _DRESIDUAL)
    dx, dresidual, totals = _passes().norm_backward(
        None if dy is None else as_rows(dy, columns), None if ds is None else as_rows(ds, columns),
        as_rows(s, columns), mean if norm == 1 else None, rstd if norm else None, _vector(weight),
        seed, norm=norm, dropout_p=dropout_p, dx_dtype=dtype if want_dx else None,
        dresidual_dtype=s.dtype if need & _DRESIDUAL else None,
        sums=(
            weight.dtype if weight is not None and need & _DWEIGHT else None,
            bias.dtype if bias is not None and need & _DBIAS else None,
            None,
        ),
    )  # fmt: skip
    f32 = torch.float32
    return (
        _or_empty(dx, s, s.shape, dtype),
        _or_empty(dresidual, s, s.shape),
        _or_empty(totals[0], s, None if weight is None else weight.shape, f32),
        _or_empty(totals[1], s, None if bias is None else bias.shape, f32),
    )


def _check_act(
    x: Tensor, bias: Any, gate: Any, gate_bias: Any, seed: Any, act: int, dropout_p: float
) -> int:
    from fastattn.kernels import layernorm_checks as check

    check.check(x.dim() > 0, check.ACT, "x must have a dimension")
    columns = x.shape[-1]
    if x.numel():
        check.check_rows(check.ACT, "x", x, columns)
    check.check_same(check.ACT, "gate", gate, x)
    check.check(gate is None or gate.dtype == x.dtype, check.ACT, "gate must have x's dtype")
    check.check_vector(check.ACT, "bias", bias, columns)
    check.check_vector(check.ACT, "gate_bias", gate_bias, columns)
    check.check_dropout(check.ACT, dropout_p, seed)
    check.check(0 <= act <= 5, check.ACT, "act must be in [0, 5], got ", act)
    return columns


def act_fwd(
    x: Tensor, bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    seed: Tensor | None, act: int, dropout_p: float,
) -> Tensor:  # fmt: skip
    from fastattn.kernels.rows import as_rows

    columns = _check_act(x, bias, gate, gate_bias, seed, act, dropout_p)
    if not x.numel():
        return x.new_empty(x.shape)
    a: Tensor = _passes().act_forward(
        as_rows(x, columns), None if gate is None else as_rows(gate, columns), _vector(bias),
        _vector(gate_bias), seed, act=act, dropout_p=dropout_p,
    )  # fmt: skip
    return a.view(x.shape)


def act_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    seed: Tensor | None, act: int, dropout_p: float, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    from fastattn.kernels import layernorm_checks as check
    from fastattn.kernels.rows import as_rows

    columns = _check_act(x, bias, gate, gate_bias, seed, act, dropout_p)
    check.check_same(check.ACT, "the upstream gradient", dy, x)
    wanted = (
        bias.dtype if bias is not None and need & 2 else None,
        gate_bias.dtype if gate_bias is not None and need & 8 else None,
    )
    want_dg = gate is not None and bool(need & 4)
    if x.numel():
        dx, dg, _, totals = _passes().act_backward(
            as_rows(dy, columns), as_rows(x, columns),
            None if gate is None else as_rows(gate, columns), _vector(bias), _vector(gate_bias),
            seed, act=act, dropout_p=dropout_p, want_dx=bool(need & 1), want_dg=want_dg,
            want_a=False, sums=wanted,
        )  # fmt: skip
    else:
        dx, dg = x.new_empty(x.shape) if need & 1 else None, x.new_empty(x.shape)
        dg = dg if want_dg else None
        totals = [None if t is None else x.new_zeros((columns,), dtype=t) for t in wanted]
    f32 = torch.float32
    return (
        _or_empty(dx, x, x.shape),
        _or_empty(totals[0], x, None if bias is None else bias.shape, f32),
        _or_empty(dg, x, x.shape),
        _or_empty(totals[1], x, None if gate_bias is None else gate_bias.shape, f32),
    )


def ffn_fwd(*args: Any) -> tuple[Tensor, ...]:
    """The arguments of ``layernorm_ffn_triton_fwd``."""
    from fastattn.kernels.layernorm_ffn import Numbers, ffn_forward
    from fastattn.kernels.layernorm_ffn_block import ffn_block_forward
    from fastattn.ops.layernorm_guard import block_may_run

    tensors, numbers, save = args[:10], Numbers(*args[10:-1]), args[-1]
    x, w2 = tensors[0], tensors[3]
    found: tuple[Tensor, ...]
    rows = x.numel() // max(x.shape[-1], 1)
    whole = whole_block(rows, x.shape[-1], w2.shape[0], w2.dtype)
    if whole and block_may_run(tensors, numbers, save):
        found = ffn_block_forward(tensors, numbers, save)
    else:
        found = ffn_forward(tensors, numbers, save, _passes())
    return found


def ffn_bwd(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The arguments of ``layernorm_ffn_triton_bwd``."""
    from fastattn.kernels.layernorm_ffn import Numbers, ffn_backward

    tensors, saved, (*numbers, need) = args[:10], args[10:16], args[16:]
    grads: tuple[Tensor, ...] = ffn_backward(dy, tensors, saved, Numbers(*numbers), need, _passes())
    return grads


def _on_cpu(op: str, function: Any, of: int) -> Any:
    def run(*args: Any) -> Any:
        select(op, "triton", "cpu", args[of].dtype)  # raises where nothing would run it
        return function(*args)

    return run


_lib = torch.library.Library("fastattn", "IMPL")
for _op, _name, _function, _x in (
    ("add_layer_norm", "add_layer_norm_triton_fwd", norm_fwd, 0),
    ("add_layer_norm", "add_layer_norm_triton_bwd", norm_bwd, 2),
    ("bias_act", "bias_act_triton_fwd", act_fwd, 0),
    ("bias_act", "bias_act_triton_bwd", act_bwd, 1),
    ("layernorm_ffn", "layernorm_ffn_triton_fwd", ffn_fwd, 0),
    ("layernorm_ffn", "layernorm_ffn_triton_bwd", ffn_bwd, 1),
):
    _lib.impl(_name, _function, "CUDA")
    _lib.impl(_name, _on_cpu(_op, _function, _x), "CPU")
