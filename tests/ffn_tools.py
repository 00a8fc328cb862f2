"""What the tests of layernorm_ffn and its parts share: calls by name, judged against the oracle.

A `Call` names an op and holds its arguments; `judge` runs it on a backend, forward and backward,
and holds every output and gradient to the rule of rule.py: error <= 2 x that of plain PyTorch in
the same dtype + floor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rule import Draws, assert_within, one_thread, unit
from tools import Result
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastattn

ROWS = ("x", "residual", "gate", "y", "s")  # what has rows; parameters have none


@dataclass(frozen=True)
class Call:
    """One call: tensors that may need gradients, and the rest. Tensors keep their strides."""

    op: str
    tensors: dict[str, Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    upstream: tuple[Tensor, ...] | None = None

    def with_(self, **kwargs: Any) -> "Call":
        return replace(self, kwargs={**self.kwargs, **kwargs})

    def leaves(self, cast: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
        return {
            n: cast(x.detach()).requires_grad_(n not in self.frozen)
            for n, x in self.tensors.items()
        }

    def run(self, where: Any, leaves: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
        """Outputs by name; `where` is fastattn or fastattn.reference."""
        given = dict(self.kwargs)
        if where is not fastattn:
            given.pop("recompute", None)
        out = getattr(where, self.op)(**leaves, **given, **more)
        return dict(zip(("y", "s"), out if isinstance(out, tuple) else (out,), strict=False))

    def gradients(
        self, outputs: dict[str, Tensor], leaves: dict[str, Tensor], cast: Any = lambda x: x
    ) -> dict[str, Tensor]:
        upstream = self.upstream_for(outputs)
        wanted = {n: x for n, x in leaves.items() if x.requires_grad}
        pairs = [
            (o, cast(g).to(o.dtype))
            for o, g in zip(outputs.values(), upstream, strict=True)
            if o.requires_grad
        ]
        grads = torch.autograd.grad(
            [o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs],
            allow_unused=True, materialize_grads=True, retain_graph=True,
        )  # fmt: skip
        return dict(zip(wanted, grads, strict=True))

    def upstream_for(self, outputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if self.upstream is not None:
            return self.upstream
        gen = torch.Generator().manual_seed(7)
        x = self.tensors.get("residual", self.tensors["x"])  # whose dtype the outputs have
        return tuple(torch.randn(o.shape, generator=gen).to(x.dtype) for o in outputs.values())


def run(call: Call, backend: str) -> Result:
    leaves = call.leaves()
    outputs = call.run(fastattn, leaves, backend=backend)
    return Result(outputs, call.gradients(outputs, leaves))


def by_reference(call: Call, cast: Callable[[Tensor], Tensor] = lambda x: x) -> Result:
    leaves = call.leaves(cast)
    outputs = call.run(fastattn.reference, leaves)
    return Result(outputs, call.gradients(outputs, leaves, cast))


def upside_down(call: Call) -> dict[str, Tensor]:
    """Plain PyTorch on the rows in another order."""

    def turn(x: Tensor, name: str) -> Tensor:
        return x.flip(0) if name.removeprefix("d") in ROWS and x.dim() > 1 else x

    outputs = call.run(fastattn.reference, call.leaves())
    turned = replace(
        call,
        tensors={n: turn(x, n) for n, x in call.tensors.items()},
        upstream=tuple(turn(g, "y") for g in call.upstream_for(outputs)),
    )
    return {n: turn(x, n) for n, x in by_reference(turned).all().items()}


def right_plus_error_of_another(call: Call, right: Result) -> dict[str, Tensor]:
    """Plain PyTorch's error on inputs a little different: a few elements are a small sample."""
    another = replace(
        call,
        tensors={n: (x * (1 + torch.randn(x.shape) / 64)).to(x.dtype) for n, x in
                 call.tensors.items()},
    )  # fmt: skip
    exact = by_reference(another, lambda x: x.double()).all()
    return {
        n: right.all()[n] + (x.double() - exact[n]) for n, x in by_reference(another).all().items()
    }


def norm_floors(call: Call, right: Result) -> dict[str, Tensor]:
    """ds = rstd (g - mean(g) - xhat mean(g xhat)) cancels where features are few, of one to 0: its
    terms are rounded. For the norms alone: one before or behind other work passes on more."""
    norm = {"layer_norm": "layer", "rms_norm": "rms"}.get(call.op, call.kwargs.get("norm", "layer"))
    if call.op not in ("layer_norm", "rms_norm", "add_layer_norm") or norm is None:
        return {}
    shape = call.kwargs.get("normalized_shape", 1)
    dims = tuple(range(-1 if isinstance(shape, int) else -len(shape), 0))
    x = right.outputs.get("s", call.tensors["x"]).detach().double()
    eps = call.kwargs.get("eps", None if call.op == "rms_norm" else 1e-5)
    eps = torch.finfo(call.tensors["x"].dtype).eps if eps is None else eps

    def mean(t: Tensor) -> Tensor:
        return t.mean(dims, keepdim=True)

    x = x - mean(x) if norm == "layer" else x
    rstd = (mean(x.square()) + eps).rsqrt()
    g = call.upstream_for(right.outputs)[0].double() * call.tensors.get("weight", torch.ones(()))
    terms = g.abs() + (x * rstd).abs() * mean((g * x * rstd).abs())
    floor = unit(torch.float32) * rstd * (terms + mean(g.abs()) if norm == "layer" else terms)
    return {"dx": floor / (1 - call.kwargs.get("dropout_p", 0.0)), "dresidual": floor}


def slope_terms(z: Tensor, activation: str) -> Tensor | None:
    """|F(z)| + |z F'(z)| where the activation is z F(z): its slope is their sum, which cancels near
    z = -0.75 (gelu) or -1.28 (silu)."""
    factor: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": torch.special.ndtr,
        "gelu_tanh": lambda t: torch.sigmoid((8 / math.pi) ** 0.5 * (t + 0.044715 * t**3)),
        "silu": torch.sigmoid,
    }
    if activation not in factor:
        return None
    z = z.detach().requires_grad_()
    f = factor[activation](z)
    (slope,) = torch.autograd.grad(f.sum(), z)
    return f.detach() + (z * slope).detach().abs()


def slope_floors(call: Call, right: Result) -> dict[str, Tensor]:
    """Of bias_act: both terms of a slope are rounded. Sums of rounded terms err by their 2-norm."""
    if call.op != "bias_act":
        return {}
    t = {n: x.detach().double() for n, x in call.tensors.items()}
    up = t["x"] + t.get("bias", 0.0)
    z = t["gate"] + t.get("gate_bias", 0.0) if "gate" in t else up
    terms = slope_terms(z, call.kwargs.get("activation", "gelu"))
    if terms is None:
        return {}
    g = call.upstream_for(right.outputs)[0].double() / (1 - call.kwargs.get("dropout_p", 0.0))
    floor = unit(torch.float32) * terms * (g * up if "gate" in t else g).abs()
    x, bias = ("dgate", "dgate_bias") if "gate" in t else ("dx", "dbias")
    return {x: floor, bias: floor.square().sum_to_size(floor.shape[-1:]).sqrt()}


class _OtherSide(TorchFunctionMode):
    """relu with the other slope wherever its argument, a sum of a product and a bias, is within the
    rounding of those two of 0: a kernel that keeps the product in the call's dtype rounds before it
    adds. (Plain PyTorch rounds the sum, which is never across.)"""

    def __init__(self, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.bias, self.unit = bias, unit(dtype)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.relu:
            return y
        z = args[0]
        terms = 2 * z.detach().abs() + (0.0 if self.bias is None else self.bias.double().abs())
        slope = (z.detach() <= 0).double()
        near = z.detach().abs() <= self.unit * terms
        return torch.where(near, y.detach() + (z - z.detach()) * slope, y)


def on_the_other_side(call: Call) -> dict[str, Tensor]:
    bias = call.tensors.get("b_gate" if "w_gate" in call.tensors else "b1")
    with _OtherSide(bias, call.tensors["x"].dtype):
        return by_reference(call, Tensor.double).all()


def judge(call: Call, backend: str = "cpu") -> Result:
    """Run the call; hold outputs and gradients to the rule."""
    got = run(call, backend)
    with one_thread():
        right = by_reference(call, lambda x: x.double())
    orders: list[Callable[[], dict[str, Tensor]]] = (
        [] if "seed" in call.kwargs else [partial(upside_down, call)]
    )
    if call.tensors["x"].numel() < 400:
        with one_thread():
            near = [right_plus_error_of_another(call, right) for _ in range(4)]
        orders += [partial(dict, x) for x in near]
    if call.op == "layernorm_ffn" and call.kwargs.get("activation") == "relu":
        orders += [partial(on_the_other_side, call)]
    plain = Draws(lambda cast: by_reference(call, cast).all(), *orders)
    floors = norm_floors(call, right) | slope_floors(call, right)
    for name, x in right.all().items():
        assert_within(name, got.all()[name], x, plain[name], floors.get(name, 0.0))
    for name, grad in got.grads.items():
        assert grad.dtype == call.tensors[name].dtype, name
        assert grad.shape == call.tensors[name].shape, name
    return got


def scaled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A weight (out, in) whose products keep the size of what goes in."""
    return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)


def ffn(
    *lead: int,
    d: int = 32,
    f: int = 80,
    dtype: torch.dtype = torch.float32,
    gated: bool = False,
    biases: bool = True,
    affine: bool = True,
    param_dtype: torch.dtype | None = None,
    x: Tensor | None = None,
    **kwargs: Any,
) -> Call:
    """A call of layernorm_ffn on (*lead, d)."""
    param_dtype = param_dtype or dtype
    norm = kwargs.get("norm", "layer")
    tensors = {
        "x": torch.randn(*lead, d).to(dtype) if x is None else x,
        "w1": scaled((f, d), dtype),
        "w2": scaled((d, f), dtype),
    }
    if gated:
        tensors["w_gate"] = scaled((f, d), dtype)
    sizes = {"b1": f, "b2": d} | ({"b_gate": f} if gated else {})
    given = {n: torch.randn(size).to(param_dtype) for n, size in sizes.items()}
    rest: dict[str, Any] = {}
    if biases:
        tensors |= given
    else:
        rest = {"b1": None, "b2": None}
    if affine and norm is not None:
        tensors["norm_weight"] = (1 + 0.2 * torch.randn(d)).to(param_dtype)
        tensors["norm_bias"] = torch.randn(d).to(param_dtype)
    return Call("layernorm_ffn", tensors, {**rest, **kwargs})
