"""``fastattn.linear_cross_entropy``: the last projection of a language model and its loss, without
the (tokens, vocabulary) logits.

Rows whose target is ignored are dropped before the GEMM. The rest go by in chunks of at most
``_CHUNK`` bytes of logits. With a scalar loss a chunk gives its part of the gradients at once, so
there are three GEMMs as in plain PyTorch and nothing of the logits is kept: the backward multiplies
by the upstream scalar. Without reduction the upstream gradient is a number a row, known only in the
backward, which therefore forms the logits again from 4 saved bytes a row (four GEMMs).

Everything is torch's own ops in place on the chunk, so it runs on every device.

N rows kept, D features, V vocabulary. FLOPs 6 N D V; bytes beyond the operands: a chunk, dx, dW.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends import select
from fastattn.ops import layernorm_checks as check
from fastattn.ops._eager import (
    below_autograd,
    differentiable_gradients,
    make_function,
    transformed,
    wants_grad,
)
from fastattn.ops.attention_checks import fail
from fastattn.ops.layernorm_op import lib

_NAME = "linear_cross_entropy"
_CHUNK = 32 << 20  # bytes of fp32 logits: they stay in a large L3
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_NAMES = {code: name for name, code in _REDUCTIONS.items()}
_DX, _DW, _DB = 1, 2, 4

_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor target"
_NUMBERS = "int ignore_index, float label_smoothing, int reduction, int need"
_TAGS = (torch.Tag.pt2_compliant_tag,)
lib.define(
    f"linear_cross_entropy_fwd({_TENSORS}, {_NUMBERS})"
    " -> (Tensor loss, Tensor lse, Tensor dx, Tensor dweight, Tensor dbias)",
    tags=_TAGS,
)
lib.define(
    f"linear_cross_entropy_bwd(Tensor dloss, {_TENSORS}, Tensor lse, {_NUMBERS})"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    tags=_TAGS,
)
_fwd = torch.ops.fastattn.linear_cross_entropy_fwd.default
_bwd = torch.ops.fastattn.linear_cross_entropy_bwd.default


class _Sums:
    """The gradients, filled chunk by chunk; dweight and dbias are summed in fp32."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, need: int) -> None:
        wide: dict[str, Any] = {"dtype": torch.float32}
        rows = x.shape[0]
        self.dx = x.new_zeros((rows, x.shape[1]) if need & _DX else (0,))
        self.dw = weight.new_zeros(weight.shape if need & _DW else (0,), **wide)
        some = bias is not None and need & _DB
        self.db = weight.new_zeros((weight.shape[0],) if some else (0,), **wide)
        self.weight, self.bias = weight, bias

    def add(self, at: Tensor | slice, x: Tensor, dlogits: Tensor) -> None:
        """dlogits (n, V) fp32, of the rows `at`."""
        if self.db.numel():
            self.db += dlogits.sum(0)
        d = dlogits.to(x.dtype)
        if self.dx.numel():
            self.dx[at] = d @ self.weight
        if self.dw.numel():
            if x.dtype == torch.float32:
                self.dw.addmm_(d.t(), x)
            else:
                self.dw += d.t() @ x

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        db = self.db if self.bias is None or not self.db.numel() else self.db.to(self.bias.dtype)
        dw = self.dw.to(self.weight.dtype) if self.dw.numel() else self.dw
        return self.dx, dw, db


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = (x @ weight.t()).float()
    return logits if bias is None else logits.add_(bias)


def _to_gradient(
    p: Tensor, target: Tensor, scale: Tensor, smoothing: float, total: Tensor
) -> Tensor:
    """exp(logits - shift), in place, to scale * (softmax - (1 - s) onehot - s / V)."""
    p.mul_((scale / total)[:, None])
    if smoothing:
        p.sub_((scale * (smoothing / p.shape[1]))[:, None])
    return p.scatter_add_(1, target[:, None], (-(1.0 - smoothing) * scale)[:, None])


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(16, _CHUNK // (4 * max(vocabulary, 1)))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _fwd_impl(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
    label_smoothing: float, reduction: int, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    kept = (target != ignore_index).nonzero().squeeze(1)
    losses = weight.new_zeros(x.shape[0], dtype=torch.float32)
    lse_of = torch.zeros_like(losses) if need and not reduction else losses.new_empty(0)
    sums = _Sums(x, weight, bias, need if reduction else 0)
    n = kept.numel()
    share = 1.0 / max(n, 1) if reduction == 1 else 1.0
    for part in _chunks(n, weight.shape[0]):
        at = kept[part]
        rows, t = x[at], target[at]
        logits = _logits(rows, weight, bias)
        right = logits.gather(1, t[:, None]).squeeze(1)
        mean = logits.mean(1) if label_smoothing else right
        top = logits.amax(1)
        p = logits.sub_(top[:, None]).exp_()
        total = p.sum(1)
        lse = total.log() + top
        losses[at] = (1.0 - label_smoothing) * (lse - right) + label_smoothing * (lse - mean)
        if lse_of.numel():
            lse_of[at] = lse
        if need and reduction:
            scale = torch.full_like(total, share)
            sums.add(at, rows, _to_gradient(p, t, scale, label_smoothing, total))
    if reduction:
        loss = losses.sum()
        # The mean over no rows is NaN, as torch's.
        losses = loss / n if reduction == 1 else loss
    return losses, lse_of, *sums.results()


def _bwd_impl(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, reduction: int, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    kept = (target != ignore_index).nonzero().squeeze(1)
    sums = _Sums(x, weight, bias, need)
    for part in _chunks(kept.numel(), weight.shape[0]):
        at = kept[part]
        rows, t, scale = x[at], target[at], dloss[at].float()
        p = _logits(rows, weight, bias).sub_(lse[at][:, None]).exp_()
        gradient = _to_gradient(p, t, scale, label_smoothing, torch.ones_like(scale))
        sums.add(at, rows, gradient)
    return sums.results()


def _grads_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, need: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide: dict[str, Any] = {"dtype": torch.float32}
    return (
        x.new_empty(x.shape if need & _DX else (0,)),
        weight.new_empty(weight.shape) if need & _DW else weight.new_empty((0,), **wide),
        bias.new_empty(bias.shape)
        if bias is not None and need & _DB
        else weight.new_empty((0,), **wide),
    )


def _fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
    label_smoothing: float, reduction: int, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = x.shape[0]
    loss = x.new_empty(() if reduction else (rows,), dtype=torch.float32)
    lse = x.new_empty((rows if need and not reduction else 0,), dtype=torch.float32)
    return loss, lse, *_grads_fake(x, weight, bias, need if reduction else 0)


def _bwd_fake(dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
              lse: Tensor, ignore_index: int, label_smoothing: float, reduction: int, need: int,
              ) -> tuple[Tensor, ...]:  # fmt: skip
    return _grads_fake(x, weight, bias, need)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers = inputs[4:]
    ctx.set_materialize_grads(False)
    _, lse, *grads = output
    ctx.save_for_backward(*inputs[:4], lse, *grads)


def _gradients(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias."""
    if dloss is None:
        return None, None, None
    x, weight, bias, target, lse, *grads = ctx.saved_tensors
    *_, reduction, need = ctx.numbers
    if reduction:
        found = [g * dloss.to(g.dtype) for g in grads]
    else:
        found = _bwd(dloss, x, weight, bias, target, lse, *ctx.numbers)
    wanted = ctx.needs_input_grad[:3]  # while compiling `need` says more
    return tuple(
        g if need >> i & 1 and n else None
        for i, (g, n) in enumerate(zip(found, wanted, strict=True))
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _remember(ctx, inputs, output)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (*_gradients(ctx, dloss), *(None,) * 5)


def _eager_forward(ctx: Any, x: Any, weight: Any, bias: Any, rest: Any) -> Tensor:
    needs = ctx.needs_input_grad
    need = needs[0] * _DX + needs[1] * _DW + (needs[2] * _DB if bias is not None else 0)
    inputs = (x, weight, bias, *rest, need)
    output = below_autograd(_fwd, inputs)
    _remember(ctx, inputs, output)
    return output[0]  # type: ignore[no-any-return]


def _eager_backward(ctx: Any, dloss: Tensor | None) -> tuple[Any, ...]:
    if dloss is None or not torch.is_grad_enabled():
        return (*_gradients(ctx, dloss), None)
    x, weight, bias, target = ctx.saved_tensors[:4]
    *numbers, need = ctx.numbers

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        return (_by_reference(x, weight, bias, target, *numbers),)

    needs = tuple(bool(need >> i & 1) for i in range(3))
    return (*differentiable_gradients(formula, (x, weight, bias), needs, (dloss,)), None)


def _by_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
    label_smoothing: float, reduction: int,
) -> Tensor:  # fmt: skip
    return reference.linear_cross_entropy(
        x, weight, target, bias, ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction=_NAMES[reduction],
    )  # fmt: skip


_Function = make_function("_LinearCrossEntropy", forward=_eager_forward, backward=_eager_backward)

for _key in ("CPU", "CUDA"):
    lib.impl("linear_cross_entropy_fwd", _fwd_impl, _key)
    lib.impl("linear_cross_entropy_bwd", _bwd_impl, _key)
torch.library.register_fake("fastattn::linear_cross_entropy_fwd", _fwd_fake, lib=lib)
torch.library.register_fake("fastattn::linear_cross_entropy_bwd", _bwd_fake, lib=lib)
torch.library.register_autograd(
    "fastattn::linear_cross_entropy_fwd", _backward, setup_context=_setup, lib=lib
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    backend: str = "auto",
) -> Tensor:
    """``F.cross_entropy(F.linear(x, weight, bias), target)`` without the logits in memory.

    Rows whose target is ``ignore_index`` cost nothing: they are dropped before the GEMM. Losses
    and the gradient of weight are summed in float32. What it saves is memory: in bfloat16 on the
    CPU, with no row ignored, it takes longer than the two functions (measured: 1.6 times).

    Args:
        x: (*, D), float32, bfloat16, float16 or float64; any strides.
        weight: (V, D) of x's dtype, as nn.Linear stores it. bias: (V,) of any float dtype, or None.
        target: (*,) int64, in [0, V) or ``ignore_index``.
        ignore_index: target of rows that do not count. Default -100.
        label_smoothing: in [0, 1]; this share of the target is spread over all V classes.
        reduction: "mean" over the rows that count, "sum", or "none" for (*,).
        backend: "auto", "cpu" or "reference".

    Returns:
        The loss, float32 (float64 for float64 inputs). The mean over no rows is NaN, as torch's.

    Saved for the backward: with a scalar loss the gradients themselves, which the forward makes
    chunk by chunk where they are wanted; with "none" the inputs and 4 bytes a row.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> x, w = torch.randn(2, 5, 16, requires_grad=True), torch.randn(100, 16)
    >>> target = torch.randint(100, (2, 5))
    >>> target[0] = -100
    >>> fastattn.linear_cross_entropy(x, w, target).backward()
    >>> x.grad[0].abs().sum()
    tensor(0.)
    """
    _check(x, weight, target, bias)
    check.check_number(_NAME, "label_smoothing", label_smoothing)
    if label_smoothing > 1:
        fail(_NAME, f"label_smoothing must be in [0, 1], got {label_smoothing}")
    code = check.check_choice(_NAME, "reduction", reduction, _REDUCTIONS)
    numbers = (ignore_index, float(label_smoothing), code)
    rows, flat = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    if select(_NAME, backend, x.device.type, x.dtype) == "reference":
        loss = _by_reference(rows, weight, bias, flat, *numbers)
    elif torch.compiler.is_compiling():
        need = 7 if wants_grad(x, weight, bias) else 0
        loss = _fwd(rows, weight, bias, flat, *numbers, need)[0]
    elif transformed():
        loss = _by_reference(rows, weight, bias, flat, *numbers)
    elif wants_grad(x, weight, bias):
        loss = _Function.apply(rows, weight, bias, (flat, *numbers))
    else:
        loss = below_autograd(_fwd, (rows, weight, bias, flat, *numbers, 0))[0]
    return loss if code else loss.view(target.shape)


def _check(x: Any, weight: Any, target: Any, bias: Any) -> None:
    check.check_x(_NAME, x)
    for name, t in (("weight", weight), ("target", target)):
        if not isinstance(t, Tensor):
            fail(_NAME, f"{name} must be a Tensor, got {type(t).__name__}", TypeError)
        if t.device != x.device:
            fail(_NAME, f"{name} must be on x's device {x.device}, got {t.device}")
    if weight.dtype != x.dtype:
        fail(_NAME, f"weight must have x's dtype {x.dtype}, got {weight.dtype}", TypeError)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        fail(_NAME, f"weight must be (V, {x.shape[-1]}) to match x {tuple(x.shape)}, got "
             f"{tuple(weight.shape)}")  # fmt: skip
    if target.dtype != torch.int64:
        fail(_NAME, f"target must be int64, got {target.dtype}", TypeError)
    if target.shape != x.shape[:-1]:
        fail(_NAME, f"target must have shape {tuple(x.shape[:-1])} to match x {tuple(x.shape)}, "
             f"got {tuple(target.shape)}")  # fmt: skip
    if bias is not None:
        check.check_parameter(_NAME, "bias", bias, x, (weight.shape[0],), "weight")
