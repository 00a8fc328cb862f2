"""``fastattn.layernorm_ffn``: check, choose a backend, launch, return."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastattn.backends import of_part, select_layernorm_ffn
from fastattn.ops import layernorm_checks as check
from fastattn.ops import layernorm_ffn_cuda  # noqa: F401  registers implementations
from fastattn.ops import layernorm_ffn_op as op
from fastattn.ops._eager import autocast_dtype, wants_grad
from fastattn.ops._guard import as_named
from fastattn.ops.attention_checks import check_bool, fail, seed_tensor
from fastattn.ops.layernorm import ACTIVATIONS, Activation, NormName
from fastattn.ops.layernorm_op import NORMS
from fastattn.ops.stock import row_choice

_NAME = "layernorm_ffn"


def layernorm_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    norm: NormName | None = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: Activation = "gelu",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    pre_norm: bool = True,
    residual: bool = True,
    dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    recompute: Literal["none", "activation", "all"] = "none",
    backend: str = "auto",
) -> Tensor:
    """The feed-forward block of a transformer in one call.

    ``y = x + dropout(W2 hidden_dropout(act(W1 norm(x) + b1)) + b2)``, or with ``pre_norm=False``
    ``y = norm(x + dropout(W2 hidden_dropout(act(W1 x + b1)) + b2))``. Gated (``w_gate`` given), the
    hidden layer is ``act(Wg norm(x) + bg) * (W1 norm(x) + b1)``: SwiGLU, GEGLU, ReGLU of
    arXiv:2002.05202.

    M rows (tokens), D features, F hidden features.

    Args:
        x: (*, D), float32, bfloat16, float16 or float64; any strides.
        w1: (F, D), b1: (F,) or None, w2: (D, F), b2: (D,) or None, as nn.Linear stores them.
            Weights have x's dtype, or are 16-bit next to a float32 x (autocast: products in their
            dtype, norm and residual in float32). Biases may have any float dtype.
            Without residual w2 may have another number of rows.
        norm: "layer", "rms" or None.
        norm_weight, norm_bias: (D,) or None; may be float32 next to a 16-bit x.
        eps: added to the variance. Default 1e-5.
        activation: "gelu" (erf), "gelu_tanh", "relu", "relu2", "silu".
        w_gate: (F, D), b_gate: (F,): the gate's; w1 is then the "up" projection.
        pre_norm: the norm is of x (True) or of the result (False).
        residual: add x. Default True.
        dropout_p: of the result, before the residual. hidden_dropout_p: of the hidden layer.
        seed: int or 1-element int64 tensor that fixes both masks; None draws one from torch.
        recompute: what the backward computes again instead of reading it, see below.
        backend: "auto", "cpu", "cuda", "triton", "reference" or "torch". "cuda" is one kernel for
            the whole block, for up to 256 columns of x and y; it never writes the hidden layer to
            memory.

    Returns:
        (*, D) in x's dtype, contiguous.

    Saved for the backward: x, the parameters, 8 bytes a row, with a norm behind also its input
    (M D), and of the hidden layer, in the weights' dtype:

    * ``"none"``: pre-activation and activation, 2 M F elements (gated 3 M F);
    * ``"activation"``: the pre-activation, M F (gated 2 M F);
    * ``"all"``: nothing; the backward repeats the first GEMM (gated: the first two).

    The activation is kept only if w2 wants a gradient, the pre-activation only if a gradient runs
    through it; nothing is computed for frozen inputs and parameters. Under ``torch.compile`` both
    are kept, whatever is frozen. With backend "cuda" every ``recompute`` is ``"all"``.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> x = torch.randn(2, 10, 32, requires_grad=True)
    >>> w1, b1, w2, b2 = torch.randn(64, 32), torch.zeros(64), torch.randn(32, 64), torch.zeros(32)
    >>> y = fastattn.layernorm_ffn(x, w1, b1, w2, b2, norm_weight=torch.ones(32))
    >>> y.sum().backward()
    >>> y.shape, x.grad.shape
    (torch.Size([2, 10, 32]), torch.Size([2, 10, 32]))
    """
    x, w1, w2, w_gate = _autocast(x, w1, w2, w_gate)
    _check_weights(x, w1, w2, w_gate, residual)
    hidden, columns = w1.shape
    for name, p, n, of in (
        ("b1", b1, hidden, "w1"),
        ("b2", b2, w2.shape[0], "w2"),
        ("b_gate", b_gate, hidden, "w_gate"),
    ):
        if p is not None:
            check.check_parameter(_NAME, name, p, x, (n,), of)
    if b_gate is not None and w_gate is None:
        fail(_NAME, "b_gate needs w_gate, got None")
    if norm_weight is not None or norm_bias is not None:
        if norm is None:
            fail(_NAME, "norm_weight and norm_bias belong to a norm, got norm=None")
        normed, of = (columns, "x") if pre_norm else (w2.shape[0], "w2")
        for name, p in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if p is not None:
                check.check_parameter(_NAME, name, p, x, (normed,), of)
    check.check_number(_NAME, "eps", eps)
    check_bool(_NAME, "pre_norm", pre_norm)
    check_bool(_NAME, "residual", residual)
    if seed is not None or dropout_p or hidden_dropout_p:
        check.check_probability(_NAME, "dropout_p", dropout_p)
        check.check_probability(_NAME, "hidden_dropout_p", hidden_dropout_p)
        seed = seed_tensor(_NAME, seed, dropout_p or hidden_dropout_p, x)
    numbers = op.Numbers(
        check.check_choice(_NAME, "norm", norm, NORMS),
        eps,
        check.check_choice(_NAME, "activation", activation, ACTIVATIONS),
        pre_norm,
        residual,
        dropout_p,
        hidden_dropout_p,
    )
    again = check.check_choice(_NAME, "recompute", recompute, op.RECOMPUTE)
    inputs = (x, w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias)
    rows, width = x.numel() // columns, max(columns, w2.shape[0])
    training = wants_grad(*inputs)
    drops = bool(dropout_p or hidden_dropout_p)
    fixed = (hidden, w2.shape[0], norm, activation, pre_norm, residual, again, drops)
    # recompute is a promise about memory, which torch's ops do not keep.
    plain = not drops and not (again and training)
    chosen = row_choice(_NAME, backend, x, columns, inputs[1:], plain, fixed, width)
    if chosen is None:
        chosen = select_layernorm_ffn(backend, x.device.type, x.dtype, rows, width, training)
    if chosen in ("reference", "torch"):  # torch's ops, where nothing is dropped
        return op.by_reference(inputs, seed, numbers)
    with as_named(backend, chosen):
        return op.forward(inputs, seed, numbers, again, chosen)


def ffn_backend(backend: str, columns: int) -> str:
    """The backend of layernorm_ffn as a part of a module: see fastattn.backends.of_part."""
    return of_part(_NAME, backend, columns)


def _check_weights(x: Any, w1: Any, w2: Any, w_gate: Any, residual: bool) -> None:
    check.check_x(_NAME, x)
    weights = [("w1", w1), ("w2", w2)]
    if w_gate is not None:
        weights.append(("w_gate", w_gate))
    for name, w in weights:
        if not isinstance(w, Tensor):
            fail(_NAME, f"{name} must be a Tensor, got {type(w).__name__}", TypeError)
        if w.dim() != 2 or 0 in w.shape:
            fail(_NAME, f"{name} must have shape (out, in), got {tuple(w.shape)}")
        if w.dtype != w1.dtype:
            fail(_NAME, f"{name} must have w1's dtype {w1.dtype}, got {w.dtype}", TypeError)
        if w.device != x.device:
            fail(_NAME, f"{name} must be on x's device {x.device}, got {w.device}")
    mixed = x.dtype == torch.float32 and w1.dtype in (torch.bfloat16, torch.float16)
    if w1.dtype != x.dtype and not mixed:
        fail(_NAME, f"w1 must have x's dtype {x.dtype}, got {w1.dtype}", TypeError)
    if x.shape[-1] != w1.shape[1]:
        fail(_NAME, f"x must have w1's {w1.shape[1]} columns, got shape {tuple(x.shape)} and w1 "
             f"{tuple(w1.shape)}")  # fmt: skip
    if w2.shape[1] != w1.shape[0]:
        fail(_NAME, f"w2 must have w1's {w1.shape[0]} rows as columns, got {tuple(w2.shape)} and "
             f"w1 {tuple(w1.shape)}")  # fmt: skip
    if residual and w2.shape[0] != x.shape[-1]:
        fail(_NAME, f"w2 must have x's {x.shape[-1]} columns as rows for the residual, got "
             f"{tuple(w2.shape)} and x {tuple(x.shape)}")  # fmt: skip
    if w_gate is not None and w_gate.shape != w1.shape:
        fail(_NAME, f"w_gate must have w1's shape {tuple(w1.shape)}, got {tuple(w_gate.shape)}")


def _autocast(
    x: Any, w1: Any, w2: Any, w_gate: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Under autocast the products are in its dtype; x (norm and residual) keeps its own, unless it
    is 16-bit of another kind."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x, w1, w2, w_gate
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x, w1, w2, w_gate
    w1, w2, w_gate = (w.to(dtype) if isinstance(w, Tensor) else w for w in (w1, w2, w_gate))
    if x.dtype not in (torch.float32, dtype):
        x = x.to(dtype)
    return x, w1, w2, w_gate
