"""``fastattn.layer_norm``, ``rms_norm``, ``add_layer_norm``, ``bias_act``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends import of_part, select
from fastattn.ops import layernorm_checks as check
from fastattn.ops import layernorm_op as op
from fastattn.ops import layernorm_triton  # noqa: F401  registers implementations
from fastattn.ops._guard import as_named
from fastattn.ops.attention_checks import fail, seed_tensor
from fastattn.ops.stock import rms_norm as stock_rms_norm
from fastattn.ops.stock import row_choice

NormName = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]

ACTIVATIONS = {n: c for n, c in op.ACTIVATIONS.items() if n != "identity"}


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimensions, as F.layer_norm.

    Ba et al., "Layer Normalization", arXiv:1607.06450. Statistics are fp32 whatever x is, in two
    passes, never E[x^2] - mean^2; a row whose squares overflow fp32 is done again without
    (in fp64 on the CPU, scaled on a GPU).

    Args:
        x: (*, *normalized_shape), float32, bfloat16, float16 or float64; any strides.
        normalized_shape: the last dimensions of x, an int for one.
        weight, bias: of normalized_shape, of any float dtype beside a 16-bit x.
        eps: added to the variance. Default 1e-5.
        backend: "auto", "cpu", "triton", "reference" or "torch".

    Returns:
        x's shape and dtype, contiguous. Saved for the backward: x, weight, and 8 bytes a row.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> x = torch.randn(2, 5, 64, requires_grad=True)
    >>> y = fastattn.layer_norm(x, 64, torch.ones(64), torch.zeros(64))
    >>> torch.allclose(y, torch.nn.functional.layer_norm(x, (64,)), atol=1e-5)
    True
    """
    name = "layer_norm"
    shape = _check(name, x, normalized_shape, weight, bias, eps)
    columns = math.prod(shape)
    chosen = row_choice(name, backend, x, columns, (weight, bias), True, ())
    chosen = chosen or select(name, backend, x.device.type, x.dtype)
    if chosen in ("reference", "torch"):  # it is F.layer_norm
        return reference.layer_norm(x, shape, weight, bias, eps)
    with as_named(backend, chosen):
        return op.add_norm(x, None, weight, bias, None, 1, eps, 0.0, columns, backend=chosen)[0]


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimensions, as F.rms_norm.

    Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Args:
        x: (*, *normalized_shape), float32, bfloat16, float16 or float64; any strides.
        normalized_shape: the last dimensions of x, an int for one.
        weight: of normalized_shape, of any float dtype beside a 16-bit x.
        eps: added to the mean square. Default (None): ``torch.finfo(x.dtype).eps``, as torch.
        backend: "auto", "cpu", "triton", "reference" or "torch".

    Returns:
        x's shape and dtype, contiguous. Saved for the backward: x, weight, and 4 bytes a row.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> fastattn.rms_norm(torch.full((2, 8), 3.0), 8).round(decimals=4).sum(-1)
    tensor([8., 8.])
    """
    name = "rms_norm"
    if eps is None and isinstance(x, Tensor) and x.is_floating_point():
        eps = torch.finfo(x.dtype).eps
    shape = _check(name, x, normalized_shape, weight, None, eps)
    assert eps is not None
    columns = math.prod(shape)
    chosen = row_choice(name, backend, x, columns, (weight,), True, ())
    chosen = chosen or select(name, backend, x.device.type, x.dtype)
    if chosen == "reference":
        return reference.rms_norm(x, shape, weight, eps)
    if chosen == "torch":
        return stock_rms_norm(x, shape, weight, eps)
    with as_named(backend, chosen):
        return op.add_norm(x, None, weight, None, None, 2, eps, 0.0, columns, backend=chosen)[0]


def _check(
    name: str,
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> tuple[int, ...]:
    check.check_x(name, x)
    shape = check.check_shape(name, x, normalized_shape)
    if weight is not None:
        check.check_parameter(name, "weight", weight, x, shape, "normalized_shape")
    if bias is not None:
        check.check_parameter(name, "bias", bias, x, shape, "normalized_shape")
    check.check_number(name, "eps", eps)
    return shape


def norm_backend(backend: str) -> str:
    """The backend of add_layer_norm as a part of a module: see fastattn.backends.of_part."""
    return of_part("add_layer_norm", backend)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: NormName | None = "layer",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``s = residual + dropout(x)`` and ``norm(s)``, in one pass over memory.

    Args:
        x: (*, D), what a sublayer returned; any strides.
        residual: (*, D), x's dtype or float32; None = zero.
        weight, bias: (D,), the norm's; of any float dtype beside a 16-bit x.
        norm: "layer", "rms" or None.
        eps: added to the variance. Default 1e-5.
        dropout_p: probability in [0, 1) with which an element of x is dropped.
        seed: int or 1-element int64 tensor that fixes the mask; None draws one from torch.
        backend: "auto", "cpu", "triton", "reference" or "torch".

    Returns:
        norm(s) and s, of residual's dtype (x's without one). Both are differentiable. s is x itself
        where nothing is added or dropped, and both are one tensor for norm=None. Saved for the
        backward: s, weight, and 8 bytes a row.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> x, residual = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    >>> y, s = fastattn.add_layer_norm(x, residual)
    >>> torch.equal(s, residual + x)
    True
    """
    name = "add_layer_norm"
    check.check_x(name, x)
    if residual is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        check.check_like(name, "residual", residual, x, (x.dtype, wide))
    columns = x.shape[-1]
    if not columns:
        fail(name, f"x must have columns, got shape {tuple(x.shape)}")
    for what, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            check.check_parameter(name, what, p, x, (columns,), "x's last dimension")
    code = check.check_choice(name, "norm", norm, op.NORMS)
    if code == 0 and (weight is not None or bias is not None):
        fail(name, "weight and bias belong to a norm, got norm=None")
    check.check_number(name, "eps", eps)
    if seed is not None or dropout_p != 0.0:
        check.check_probability(name, "dropout_p", dropout_p)
        seed = seed_tensor(name, seed, dropout_p, x)
    others, fixed = (residual, weight, bias), (norm, bool(dropout_p))
    chosen = row_choice(name, backend, x, columns, others, not dropout_p, fixed)
    chosen = chosen or select(name, backend, x.device.type, x.dtype)
    if chosen in ("reference", "torch"):  # torch's ops, where nothing is dropped
        return reference.add_layer_norm(
            x, residual, weight, bias, norm=norm, eps=eps, dropout_p=dropout_p, seed=seed
        )
    with as_named(backend, chosen):
        return op.add_norm(
            x, residual, weight, bias, seed, code, eps, dropout_p, columns, backend=chosen
        )


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "gelu",
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``dropout(act(x + bias))``, or gated ``dropout(act(gate + gate_bias) * (x + bias))``.

    Gated units: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202 (SwiGLU = "silu",
    GEGLU = "gelu", ReGLU = "relu"). The product is formed in fp32.

    Args:
        x: (*, F), float32, bfloat16, float16 or float64; any strides.
        bias: (F,), of any float dtype beside a 16-bit x.
        activation: "gelu" (erf), "gelu_tanh", "relu", "relu2" (square of relu), "silu".
        gate: x's shape and dtype.
        gate_bias: (F,), only with gate.
        dropout_p: probability in [0, 1) with which an element is dropped.
        seed: int or 1-element int64 tensor that fixes the mask; None draws one from torch.
        backend: "auto", "cpu", "triton", "reference" or "torch".

    Returns:
        x's shape and dtype, contiguous. Saved for the backward: the inputs.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.

    >>> import torch, fastattn
    >>> x = torch.randn(3, 8)
    >>> y = fastattn.bias_act(x, torch.ones(8), activation="relu2")
    >>> torch.allclose(y, torch.relu(x + 1).square())
    True
    """
    name = "bias_act"
    check.check_x(name, x)
    width = (x.shape[-1],)
    if bias is not None:
        check.check_parameter(name, "bias", bias, x, width, "x's last dimension")
    if gate is not None:
        check.check_like(name, "gate", gate, x, (x.dtype,))
    if gate_bias is not None:
        if gate is None:
            fail(name, "gate_bias needs gate, got None")
        check.check_parameter(name, "gate_bias", gate_bias, x, width, "x's last dimension")
    code = check.check_choice(name, "activation", activation, ACTIVATIONS)
    if seed is not None or dropout_p != 0.0:
        check.check_probability(name, "dropout_p", dropout_p)
        seed = seed_tensor(name, seed, dropout_p, x)
    others, fixed = (bias, gate, gate_bias), (activation, bool(dropout_p))
    chosen = row_choice(name, backend, x, width[0], others, not dropout_p, fixed)
    chosen = chosen or select(name, backend, x.device.type, x.dtype)
    if chosen in ("reference", "torch"):  # torch's ops, where nothing is dropped
        return reference.bias_act(
            x, bias, activation=activation, gate=gate, gate_bias=gate_bias, dropout_p=dropout_p,
            seed=seed,
        )  # fmt: skip
    with as_named(backend, chosen):
        return op.bias_act(x, bias, gate, gate_bias, seed, code, dropout_p, chosen)
