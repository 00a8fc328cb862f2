"""LayerNorm + FFN as a composition: torch's GEMMs with fused passes before, between and behind.

    xn = norm(x)                        norm pass          y = post(x + dropout(z + b2))   norm pass
    u = xn W1^T  (g = xn Wg^T)          GEMM
    a = dropout(act(u + b1))            act pass           gated: dropout(act(g + bg) * (u + b1))
    z = a W2^T                          GEMM

M rows (tokens), D features, F hidden features. 4 M D F FLOPs forward (gated 6), in the library's
GEMMs; the passes move what is between them once: 2 M D + 2 M F elements in front of z's. On an
H100 that is about 9 % of the GEMMs' time at D = 4096 and 34 % at D = 1024 (estimate from peaks, see
backends.py), of which plain PyTorch's separate bias, act, dropout and residual kernels take two
to three times as much. The backward: five GEMMs (gated eight), the passes' backwards between.

Memory: the hidden layer is M F elements of the weights' dtype. Where the backward does not want the
pre-activation, the act pass writes over it. Gradients da and du share one buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels import bias_act, layernorm
from fastattn.kernels.layernorm import NORM_NONE
from fastattn.kernels.layernorm_checks import check_ffn, check_ffn_saved
from fastattn.kernels.rows import as_rows

SAVE_STATS, SAVE_U, SAVE_A = 1, 2, 4
# Bits of `need`, in the order of the gradients.
_DX, _DW1, _DB1, _DW2, _DB2, _DWG, _DBG, _DNW, _DNB = (1 << i for i in range(9))


class Passes(NamedTuple):
    """Who makes the passes: these kernels, or what checks them first (fastattn/ops)."""

    norm_forward: Callable[..., Any] = layernorm.norm_forward
    norm_backward: Callable[..., Any] = layernorm.norm_backward
    act_forward: Callable[..., Any] = bias_act.act_forward
    act_backward: Callable[..., Any] = bias_act.act_backward


class Numbers(NamedTuple):
    """In the schema's order."""

    norm: int
    eps: float
    act: int
    pre_norm: bool
    residual: bool
    dropout_p: float
    hidden_dropout_p: float


class Call:
    """The arguments that both directions share, checked, as the passes want them.

    tensors: x, w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias, seed.
    """

    def __init__(self, tensors: tuple[Any, ...], numbers: Numbers, passes: Passes) -> None:
        x, w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias, seed = tensors
        check_ffn(tensors, numbers)
        self.tensors, self.n, self.passes, self.seed = tensors, numbers, passes, seed
        self.w1, self.w2, self.w_gate = w1, w2, w_gate
        self.F, self.D = w1.shape
        self.Dout = w2.shape[0]
        self.dtype, self.x_dtype = w1.dtype, x.dtype
        self.x = as_rows(x, self.D)
        self.M = self.x.shape[0]
        self.shape, self.out_shape = x.shape, (*x.shape[:-1], self.Dout)
        self.b1, self.b2, self.b_gate, self.norm_weight, self.norm_bias = (
            None if v is None else v.contiguous() for v in (b1, b2, b_gate, norm_weight, norm_bias)
        )
        self.pre = numbers.norm if numbers.pre_norm else NORM_NONE
        self.post = NORM_NONE if numbers.pre_norm else numbers.norm

    def new(self, rows: int, columns: int) -> Tensor:
        return self.w1.new_empty((rows, columns))

    def norm_of_x(self, want_stats: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the first GEMM reads: x itself where there is nothing to do; mean and rstd."""
        if self.pre == NORM_NONE and self.x_dtype == self.dtype:
            return self.x, None, None
        affine = (self.norm_weight, self.norm_bias) if self.pre else (None, None)
        xn, _, mean, rstd = self.passes.norm_forward(
            self.x, None, None, *affine, None, norm=self.pre, eps=self.n.eps, dropout_p=0.0,
            y_dtype=self.dtype, want_sum=False, want_stats=want_stats,
        )  # fmt: skip
        return xn, mean, rstd

    def activation(self, u: Tensor, g: Tensor | None, out: Tensor | None) -> Tensor:
        a: Tensor = self.passes.act_forward(
            u, g, self.b1, self.b_gate, self.seed, act=self.n.act,
            dropout_p=self.n.hidden_dropout_p, out=out,
        )  # fmt: skip
        return a


def ffn_forward(
    tensors: tuple[Any, ...], numbers: Numbers, save: int, passes: Passes
) -> tuple[Tensor, ...]:
    """y, s, mean, rstd, u, g, a of ``fastattn::layernorm_ffn_fwd``; what ``save`` does not name is
    empty. u, g: pre-activations without bias; s: what a norm behind was of."""
    c = Call(tensors, numbers, passes)
    stats, saved_u = bool(save & SAVE_STATS), bool(save & SAVE_U)
    xn, mean, rstd = c.norm_of_x(stats and c.pre != NORM_NONE)
    u = torch.mm(xn, c.w1.t(), out=c.new(c.M, c.F))
    g = None if c.w_gate is None else torch.mm(xn, c.w_gate.t(), out=c.new(c.M, c.F))
    a = c.activation(u, g, None if saved_u else u)
    z = torch.mm(a, c.w2.t(), out=c.new(c.M, c.Dout))
    affine = (c.norm_weight, c.norm_bias) if c.post else (None, None)
    post_stats = stats and c.post != NORM_NONE
    y, s, *behind = passes.norm_forward(
        z, c.x if numbers.residual else None, c.b2, *affine, c.seed, norm=c.post, eps=numbers.eps,
        dropout_p=numbers.dropout_p, y_dtype=c.x_dtype, sum_dtype=c.x_dtype, want_sum=post_stats,
        want_stats=post_stats,
    )  # fmt: skip
    if post_stats:
        mean, rstd = behind
    nothing, none = c.w1.new_empty((0,)), c.w1.new_empty((0,), dtype=torch.float32)
    return (
        y.view(c.out_shape),
        c.x.new_empty((0,)) if s is None else s.view(c.out_shape),
        none if mean is None else mean,
        none.clone() if rstd is None else rstd,
        u if saved_u else nothing,
        g if saved_u and g is not None else nothing.clone(),
        a if save & SAVE_A else nothing.clone(),
    )


def ffn_backward(
    dy: Tensor,
    tensors: tuple[Any, ...],
    saved: tuple[Tensor, ...],
    numbers: Numbers,
    need: int,
    passes: Passes,
) -> tuple[Tensor, ...]:
    """dx, dw1, db1, dw2, db2, dw_gate, db_gate, dnorm_weight, dnorm_bias; those that ``need`` does
    not ask for are empty. saved: s, mean, rstd, u, g, a of the forward."""
    c = Call(tensors, numbers, passes)
    check_ffn_saved(dy, saved, c)
    return _Backward(c, as_rows(dy, c.Dout), saved, need).run()


class _Backward:
    def __init__(self, c: Call, dy: Tensor, saved: tuple[Tensor, ...], need: int) -> None:
        self.c, self.dy, self.need = c, dy, need
        s, mean, rstd, *hidden = saved
        self.s = as_rows(s, c.Dout) if c.post != NORM_NONE else dy
        self.mean, self.rstd = (x if x.numel() else None for x in (mean, rstd))
        self.u, self.g, self.a = (x if x.numel() else None for x in hidden)
        self.results: dict[int, Tensor | None] = {}
        norm = _DNW | _DNB if c.n.pre_norm else 0
        # Beyond the second GEMM: du and what it leads to.
        self.through_act = bool(need & (_DX | _DW1 | _DB1 | _DWG | _DBG | norm))
        self.to_x = bool(need & (_DX | norm))

    def run(self) -> tuple[Tensor, ...]:
        c = self.c
        wants_u = self.through_act or (self.need & _DW2 and self.a is None)
        again = wants_u and self.u is None
        xn = None
        if again or self.need & (_DW1 | _DWG):
            xn = c.norm_of_x(want_stats=False)[0]
        if again:  # recompute="all"
            self.u = torch.mm(xn, c.w1.t(), out=c.new(c.M, c.F))
            if c.w_gate is not None:
                self.g = torch.mm(xn, c.w_gate.t(), out=c.new(c.M, c.F))
        dz, ds = self.behind()
        if self.through_act:
            du, dg = self.act(dz)
            if self.need & _DW1:
                self.results[_DW1] = self.weight_grad(du, xn)
            if dg is not None and self.need & _DWG:
                self.results[_DWG] = self.weight_grad(dg, xn)
            if self.to_x:
                self.front(du, dg, ds)
        elif self.need & _DW2 and self.a is None:
            self.a = c.activation(self.u, self.g, None)
        if self.need & _DW2:
            self.results[_DW2] = self.weight_grad(dz, self.a)
        return tuple(self.result(1 << i, x) for i, x in enumerate(c.tensors[:9]))

    def result(self, bit: int, like: Tensor | None) -> Tensor:
        found = self.results.get(bit)
        if like is None or found is None or not self.need & bit:
            return self.dy.new_empty((0,), dtype=torch.float32)
        return found.view(like.shape)

    def wanted(self, bit: int, parameter: Tensor | None) -> torch.dtype | None:
        return parameter.dtype if parameter is not None and self.need & bit else None

    def weight_grad(self, d: Tensor, inputs: Any) -> Tensor:
        """(out, in) = d^T inputs, in the weights' dtype."""
        return torch.mm(d.t(), inputs, out=self.c.new(d.shape[1], inputs.shape[1]))

    def behind(self) -> tuple[Any, Tensor | None]:
        """From dy to dz, the gradient of the second GEMM's result, and the residual sum's."""
        c = self.c
        norm_wanted = (
            (self.wanted(_DNW, c.norm_weight), self.wanted(_DNB, c.norm_bias))
            if c.post != NORM_NONE
            else (None, None)
        )
        sums = (*norm_wanted, self.wanted(_DB2, c.b2))
        residual = c.n.residual and bool(self.need & _DX)
        needed = self.through_act or bool(self.need & _DW2)
        as_it_is = c.post == NORM_NONE and not c.n.dropout_p and c.x_dtype == c.dtype
        dz: Tensor | None = self.dy if as_it_is else None
        ds = self.dy if residual and c.post == NORM_NONE else None
        want_dz = needed and not as_it_is
        want_ds = residual and c.post != NORM_NONE
        if want_dz or want_ds or any(dtype is not None for dtype in sums):
            made, summed, totals = c.passes.norm_backward(
                self.dy, None, self.s, self.mean, self.rstd, c.norm_weight if c.post else None,
                c.seed, norm=c.post, dropout_p=c.n.dropout_p,
                dx_dtype=c.dtype if want_dz else None,
                dresidual_dtype=c.x_dtype if want_ds else None, sums=sums,
            )  # fmt: skip
            dz = made if want_dz else dz
            ds = summed if want_ds else ds
            if c.post != NORM_NONE:
                self.results[_DNW], self.results[_DNB] = totals[:2]
            self.results[_DB2] = totals[2]
        return dz, ds

    def act(self, dz: Tensor) -> tuple[Tensor, Tensor | None]:
        """du (and dg) from da = dz W2; a again where it is not saved."""
        c = self.c
        da = torch.mm(dz, c.w2, out=c.new(c.M, c.F))
        want_a = bool(self.need & _DW2) and self.a is None
        du, dg, a, totals = c.passes.act_backward(
            da, self.u, self.g, c.b1, c.b_gate, c.seed, act=c.n.act,
            dropout_p=c.n.hidden_dropout_p, want_dx=True, want_dg=self.g is not None,
            want_a=want_a, sums=(self.wanted(_DB1, c.b1), self.wanted(_DBG, c.b_gate)),
            over_da=True,
        )  # fmt: skip
        self.a = a if want_a else self.a
        self.results[_DB1], self.results[_DBG] = totals
        return du, dg

    def front(self, du: Tensor, dg: Tensor | None, ds: Tensor | None) -> None:
        """From du to dx, and the parameters of a norm in front."""
        c = self.c
        dxn = torch.mm(du, c.w1, out=c.new(c.M, c.D))
        if dg is not None:
            dxn.addmm_(dg, c.w_gate)
        pre = c.pre != NORM_NONE
        wants_dx = bool(self.need & _DX)
        dx, _, totals = c.passes.norm_backward(
            dxn, ds if wants_dx else None, c.x, self.mean if pre else None,
            self.rstd if pre else None, c.norm_weight if pre else None, None, norm=c.pre,
            dropout_p=0.0, dx_dtype=c.x_dtype if wants_dx else None, dresidual_dtype=None,
            sums=(self.wanted(_DNW, c.norm_weight), self.wanted(_DNB, c.norm_bias), None)
            if pre
            else (None, None, None),
        )  # fmt: skip
        self.results[_DX] = dx
        if pre:
            self.results[_DNW], self.results[_DNB] = totals[:2]
