"""``fastattn.linear_cross_entropy``: the last projection of a language model and its loss, without
the (tokens, vocabulary) logits.

Rows whose target is ignored are dropped before the GEMM. The rest go by in chunks of at most
``_CHUNK`` bytes of logits: a GEMM, one pass that turns logits into losses and their gradient in
place (csrc/cpu/cross_entropy_rows.h; on other devices torch's ops), and two GEMMs from there. With
a scalar loss this happens in the forward, so there are three GEMMs as in plain PyTorch and nothing
of the logits is kept: the backward multiplies by the upstream scalar. Without reduction the
upstream gradient is a number a row, known only in the backward, which forms the logits again (four
GEMMs).

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
    autocast_dtype,
    below_autograd,
    differentiable_gradients,
    make_function,
    transformed,
    wants_grad,
)
from fastattn.ops._fakes import register_fake
from fastattn.ops.attention_checks import fail
from fastattn.ops.layernorm_op import lib
from fastattn.ops.products import mm, mm_bias

_NAME = "linear_cross_entropy"
_CHUNK = 32 << 20  # bytes of logits: they stay in a large L3
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_NAMES = {code: name for name, code in _REDUCTIONS.items()}
_DX, _DW, _DB = 1, 2, 4

_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor target"
_NUMBERS = "int ignore_index, float label_smoothing, int reduction, int need"
_TAGS = (torch.Tag.pt2_compliant_tag,)
lib.define(
    f"linear_cross_entropy_fwd({_TENSORS}, {_NUMBERS})"
    " -> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)",
    tags=_TAGS,
)
lib.define(
    f"linear_cross_entropy_bwd(Tensor dloss, {_TENSORS}, {_NUMBERS})"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    tags=_TAGS,
)
lib.define(
    "cross_entropy_(Tensor(a!) logits, Tensor? bias, Tensor target, Tensor? scale, float share, "
    "float label_smoothing, int need) -> (Tensor loss, Tensor dbias)"
)
_fwd = torch.ops.fastattn.linear_cross_entropy_fwd.default
_bwd = torch.ops.fastattn.linear_cross_entropy_bwd.default
_rows = torch.ops.fastattn.cross_entropy_.default


def _rows_by_torch(
    logits: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor | None, share: float,
    label_smoothing: float, need: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The losses of rows of logits, the sum of their gradients for bias, and with ``need`` the
    gradient in place of the logits: ``scale`` (default: ``share`` in every row) times
    ``softmax - (1 - label_smoothing) onehot - label_smoothing / V``."""
    p = logits.float()
    if bias is not None:
        p = p + bias
    lse = p.logsumexp(1)
    right = p.gather(1, target[:, None]).squeeze(1)
    loss = (1.0 - label_smoothing) * (lse - right)
    if label_smoothing:
        loss += label_smoothing * (lse - p.mean(1))
    nothing = p.new_empty(0)
    if not need:
        return loss, nothing
    if scale is None:
        scale = torch.full_like(lse, share)
    p = (p - lse[:, None]).exp_().mul_(scale[:, None])
    if label_smoothing:
        p.sub_((scale * (label_smoothing / p.shape[1]))[:, None])
    p.scatter_add_(1, target[:, None], (-(1.0 - label_smoothing) * scale)[:, None])
    logits.copy_(p)
    return loss, p.sum(0) if bias is not None and need & _DB else nothing


class _Pass:
    """Chunk by chunk over the rows that count; what it adds up of weight and bias is fp32."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
        smoothing: float, need: int,
    ) -> None:  # fmt: skip
        self.x, self.bias, self.smoothing, self.need = x, bias, smoothing, need
        self.weight, self.w = weight, weight.to(x.dtype)
        self.kept = (target != ignore_index).nonzero().squeeze(1)
        self.target = target[self.kept]
        if self.target.numel() and target.device.type == "cpu":
            self._check_target(ignore_index)
        self.losses = x.new_zeros(x.shape[0], dtype=torch.float32)
        self.dx = x.new_zeros(x.shape if need & _DX else (0,))
        self.dw, self.db = self.losses.new_empty(0), self.losses.new_empty(0)

    def _check_target(self, ignore_index: int) -> None:
        least, most = (int(t) for t in self.target.aminmax())
        classes = self.weight.shape[0]
        if least < 0 or most >= classes:
            fail(_NAME, f"target must be in [0, {classes}) or ignore_index = {ignore_index}, got "
                 f"{least if least < 0 else most}")  # fmt: skip

    def run(self, scale: Tensor | None, share: float) -> None:
        n, vocabulary = self.kept.numel(), self.w.shape[0]
        step = max(16, _CHUNK // (self.x.element_size() * max(vocabulary, 1)))
        logits = self.x.new_empty((min(n, step), vocabulary))
        # 16 bits: logits are rounded once, with their bias, as torch's are.
        bias = self.bias
        inside = bias
        if bias is not None and not bias.dtype == self.x.dtype != torch.float32:
            inside = None
        rest = bias if inside is None else torch.zeros_like(inside)
        for i in range(0, n, step):
            at = self.kept[i : i + step]
            rows, here = self.x[at], logits[: at.numel()]
            if inside is None:
                mm(rows, self.w.t(), out=here)
            else:
                mm_bias(rows, self.w.t(), inside, here)
            of_rows = None if scale is None else scale[at].float()
            self.losses[at], db = _rows(
                here, rest, self.target[i : i + step], of_rows, share, self.smoothing,
                self.need,
            )  # fmt: skip
            if self.need:
                self._add(at, rows, here, db)

    def _add(self, at: Tensor, rows: Tensor, d: Tensor, db: Tensor) -> None:
        first = not self.dw.numel()
        if db.numel():
            self.db = self.db + db if self.db.numel() else db
        if self.dx.numel():
            self.dx[at] = mm(d, self.w)
        if not self.need & _DW:
            return
        if first:
            self.dw = mm(d.t(), rows).float()
        elif rows.dtype == torch.float32:
            self.dw.addmm_(d.t(), rows)
        else:
            self.dw += mm(d.t(), rows)

    def gradients(self, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        need, bias, weight = self.need, self.bias, self.weight
        dw, db = self.dw, self.db
        if need & _DW:
            dw = dw.to(weight.dtype) if dw.numel() else torch.zeros_like(weight)
        if bias is not None and need & _DB:
            db = db.to(bias_dtype) if db.numel() else torch.zeros_like(bias, dtype=bias_dtype)
        return self.dx, dw, db


def _fwd_impl(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
    label_smoothing: float, reduction: int, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    need = need if reduction else 0
    work = _Pass(x, weight, bias, target, ignore_index, label_smoothing, need)
    n = work.kept.numel()
    work.run(None, 1.0 / max(n, 1) if reduction == 1 else 1.0)
    loss = work.losses
    if reduction:
        loss = loss.sum()
        # The mean over no rows is NaN, as torch's.
        loss = loss / n if reduction == 1 else loss
    # The bias's is small: it stays float32 until dloss has multiplied it, and is rounded once.
    return loss, *work.gradients(torch.float32)


def _bwd_impl(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    ignore_index: int, label_smoothing: float, reduction: int, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    work = _Pass(x, weight, bias, target, ignore_index, label_smoothing, need)
    work.run(dloss, 1.0)
    return work.gradients(None if bias is None else bias.dtype)


def _grads_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, need: int, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide: dict[str, Any] = {"dtype": torch.float32}
    return (
        x.new_empty(x.shape if need & _DX else (0,)),
        weight.new_empty(weight.shape) if need & _DW else weight.new_empty((0,), **wide),
        bias.new_empty(bias.shape, dtype=bias_dtype)
        if bias is not None and need & _DB
        else weight.new_empty((0,), **wide),
    )


def _fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
    label_smoothing: float, reduction: int, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = x.shape[0]
    loss = x.new_empty(() if reduction else (rows,), dtype=torch.float32)
    return loss, *_grads_fake(x, weight, bias, need if reduction else 0, torch.float32)


def _bwd_fake(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    ignore_index: int, label_smoothing: float, reduction: int, need: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _grads_fake(x, weight, bias, need, None if bias is None else bias.dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers = inputs[4:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _gradients(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias."""
    if dloss is None:
        return None, None, None
    x, weight, bias, target, *grads = ctx.saved_tensors
    *_, reduction, need = ctx.numbers
    if reduction:
        # dloss as it is, in float32: rounded to 16 bits it would be off in every element alike.
        found = [g * dloss for g in grads]
        if bias is not None:
            found[2] = found[2].to(bias.dtype)
    else:
        found = _bwd(dloss, x, weight, bias, target, *ctx.numbers)
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
lib.impl("cross_entropy_", _rows_by_torch, "CUDA")
register_fake("fastattn::linear_cross_entropy_fwd", _fwd_fake, lib=lib)
register_fake("fastattn::linear_cross_entropy_bwd", _bwd_fake, lib=lib)
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
    and the gradient of weight are summed in float32.

    Args:
        x: (*, D), float32, bfloat16, float16 or float64; any strides.
        weight: (V, D) of x's dtype, as nn.Linear stores it, or float32 next to a 16-bit x: the
            products are in x's dtype, the gradient is in float32. bias: (V,) of any float dtype,
            or None.
        target: (*,) int64, in [0, V) or ``ignore_index``.
        ignore_index: target of rows that do not count. Default -100.
        label_smoothing: in [0, 1]; this share of the target is spread over all V classes.
        reduction: "mean" over the rows that count, "sum", or "none" for (*,).
        backend: "auto", "cpu" or "reference".

    Returns:
        The loss, float32 (float64 for float64 inputs). The mean over no rows is NaN, as torch's.

    Saved for the backward: with a scalar loss the gradients themselves, which the forward makes
    chunk by chunk where they are wanted; with "none" the inputs.

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
    x, weight = _autocast(x, weight)
    _check(x, weight, target, bias)
    check.check_int(_NAME, "ignore_index", ignore_index)
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


def _autocast(x: Any, weight: Any) -> tuple[Any, Any]:
    """Under autocast the products are in its dtype; a float32 weight stays, with its gradient."""
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return x, weight
    dtype = autocast_dtype(x.device)
    if dtype is None or x.dtype not in check.FLOATS[:3]:
        return x, weight
    if weight.dtype not in (torch.float32, dtype):
        weight = weight.to(dtype)
    return x.to(dtype), weight


def _check(x: Any, weight: Any, target: Any, bias: Any) -> None:
    check.check_x(_NAME, x)
    for name, t in (("weight", weight), ("target", target)):
        if not isinstance(t, Tensor):
            fail(_NAME, f"{name} must be a Tensor, got {type(t).__name__}", TypeError)
        if t.device != x.device:
            fail(_NAME, f"{name} must be on x's device {x.device}, got {t.device}")
    mixed = weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    if weight.dtype != x.dtype and not mixed:
        fail(_NAME, f"weight must have x's dtype {x.dtype}, got {weight.dtype}", TypeError)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        fail(_NAME, f"weight must be (V, {x.shape[-1]}) to match x {tuple(x.shape)}, got "
             f"{tuple(weight.shape)}")  # fmt: skip
    if 0 in weight.shape:
        fail(_NAME, f"weight must have classes and columns, got {tuple(weight.shape)}")
    if target.dtype != torch.int64:
        fail(_NAME, f"target must be int64, got {target.dtype}", TypeError)
    if target.shape != x.shape[:-1]:
        fail(_NAME, f"target must have shape {tuple(x.shape[:-1])} to match x {tuple(x.shape)}, "
             f"got {tuple(target.shape)}")  # fmt: skip
    if bias is not None:
        check.check_parameter(_NAME, "bias", bias, x, (weight.shape[0],), "weight")
