"""The Triton kernels of layer_norm, rms_norm, add_layer_norm and bias_act in Triton's interpreter,
through the public functions, against the fp64 oracle.

Its tiles are small (kernels/layernorm.py): 40 columns are a whole row, 150 several tiles of one; 11
rows are two tiles, 40 several strips of several.
"""

from typing import Any
from unittest import mock

import interpreter
import numpy as np
import pytest
import torch
from ffn_tools import Call, judge, run
from test_bias_act import ACTIVATIONS, act_call
from test_layernorm import LAYOUTS, OPS, norm_call
from tools import DTYPES, KINDS, values
from torch import Tensor

import fastattn

pytestmark = pytest.mark.sampled(2)

WIDE = 150  # columns that do not fit a tile


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_widths(op: str, dtype: torch.dtype) -> None:
    for n in (1, 33, 128, WIDE) if dtype == torch.float32 else (33, WIDE):
        judge(norm_call(op, 11, n, dtype=dtype, eps=1e-3), "triton")


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_numbers_of_rows(rows: int) -> None:
    judge(norm_call("add_layer_norm", rows, 24), "triton")
    judge(norm_call("layer_norm", rows, WIDE), "triton")
    judge(act_call(rows, 40, gated=True, activation="silu"), "triton")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_affine_or_not(op: str, affine: bool) -> None:
    for n in (48, WIDE):
        judge(norm_call(op, 3, 5, n, affine=affine), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_hostile_values(op: str, kind: str, dtype: torch.dtype) -> None:
    n = WIDE if op == "add_layer_norm" else 96
    judge(norm_call(op, 13, n, dtype=dtype, x=values((13, n), dtype, kind, "k")), "triton")


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("scale", [1e38, 1e30, 1e19, 1e-40, 0.0])
def test_the_ends_of_the_range(op: str, scale: float) -> None:
    """Squares and sums that overflow, denormals, and an ordinary row in their midst."""
    for n in (70, WIDE):
        x = (torch.randn(9, n, dtype=torch.float64).clamp(-1, 1) * scale).float()
        x[4] = torch.randn(n)
        x[5] = scale
        call = norm_call(op, 9, n, x=x, affine=False, eps=1e-5)
        leaves = call.leaves()
        y = call.run(fastattn, leaves, backend="triton")["y"]
        exact = call.run(fastattn.reference, call.leaves(Tensor.double))["y"]
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
        grad = torch.autograd.grad(y.square().sum(), leaves["x"])[0]
        assert grad.isfinite().all(), grad


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1, -3e4, 1e30])
@pytest.mark.parametrize("n", [100, WIDE])
def test_constant_rows_are_their_bias(n: int, value: float) -> None:
    x, bias = torch.full((4, n), value), torch.randn(n)
    y = fastattn.layer_norm(x, n, torch.randn(n), bias, backend="triton")
    assert torch.equal(y, bias.expand_as(y))


@pytest.mark.parametrize("n", [128, 768])
def test_a_mean_of_1000_costs_no_digits(n: int) -> None:
    x = (torch.randn(20, n, dtype=torch.float64) + 1000).float()
    y = fastattn.layer_norm(x, n, backend="triton")
    right = torch.nn.functional.layer_norm(x.double(), (n,))
    assert (y - right).abs().max() < 2e-4


@pytest.mark.parametrize("n", [40, WIDE])
def test_nan_and_inf_stay_in_their_rows(n: int) -> None:
    x = torch.randn(3, n)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    for y in (
        fastattn.layer_norm(x, n, backend="triton"),
        fastattn.rms_norm(x, n, backend="triton"),
    ):
        assert y[2].isfinite().all()
        assert y[0].isnan().all()
        assert y[1, 5].isnan()


@pytest.mark.parametrize("op", OPS)
def test_mixed_dtypes(op: str) -> None:
    judge(norm_call(op, 6, 64, dtype=torch.bfloat16, params=torch.float32), "triton")
    judge(norm_call(op, 6, 64, params=torch.float16), "triton")


@pytest.mark.parametrize("n", [64, WIDE])
def test_fp32_residual_of_a_16_bit_sublayer(n: int) -> None:
    call = norm_call("add_layer_norm", 6, n, dtype=torch.bfloat16, params=torch.float32)
    call.tensors["residual"] = torch.randn(6, n)
    assert judge(call, "triton").outputs["s"].dtype == torch.float32


@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_references(dtype: torch.dtype, norm: str | None) -> None:
    for residual, n in ((False, 50), (True, WIDE)):
        call = norm_call(
            "add_layer_norm", 2, 3, n, dtype=dtype, residual=residual, affine=norm == "layer",
            norm=norm, dropout_p=0.4, seed=2**40 + 3,
        )  # fmt: skip
        got = judge(call, "triton")
        if not residual:
            assert torch.equal(got.grads["x"] == 0, got.outputs["s"] == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_any_strides(op: str, layout: str) -> None:
    call = norm_call(op, 3, 4, 40, x=LAYOUTS[layout](3, 4, 40))
    outputs = call.run(fastattn, call.leaves())
    upstream = tuple(LAYOUTS[layout](3, 4, 40) for _ in outputs)
    judge(Call(op, call.tensors, call.kwargs, upstream=upstream), "triton")
    judge(act_call(3, 4, 40, x=LAYOUTS[layout](3, 4, 40), gated=True), "triton")


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_more_than_one_normalised_dimension(op: str) -> None:
    call = norm_call(op, 5, 12, affine=False)
    call.tensors.update(x=torch.randn(5, 3, 4), weight=torch.randn(3, 4))
    judge(call.with_(normalized_shape=(3, 4)), "triton")


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (1, 1, 1)])
@pytest.mark.parametrize("op", OPS)
def test_empty_and_small_shapes(op: str, shape: tuple[int, ...]) -> None:
    got = judge(norm_call(op, *shape), "triton")
    if 0 in shape:
        assert not got.grads["weight"].any()
    judge(act_call(*shape, gated=True), "triton")
    judge(act_call(*shape[:-1], 0), "triton")


def test_only_what_is_wanted_gets_a_gradient() -> None:
    for call, others in (
        (norm_call("add_layer_norm", 5, 24, dropout_p=0.2, seed=1),
         (("x",), ("residual",), ("weight", "bias"), ("x", "residual", "bias"))),
        (act_call(5, 24, gated=True),
         (("x",), ("gate",), ("bias", "gate_bias"), ("x", "gate", "bias"))),
    ):  # fmt: skip
        full = run(call, "triton").grads
        for frozen in others:
            some = run(Call(call.op, call.tensors, call.kwargs, frozen), "triton").grads
            assert set(some) == set(full) - set(frozen)
            assert all(torch.equal(some[n], full[n]) for n in some)


def test_gradient_of_one_output_alone() -> None:
    leaves = norm_call("add_layer_norm", 5, 24).leaves()
    y, s = fastattn.add_layer_norm(**leaves, backend="triton")
    (dx,) = torch.autograd.grad(s.sum(), leaves["x"], retain_graph=True)
    assert torch.equal(dx, torch.ones_like(dx))
    (dw,) = torch.autograd.grad(s.sum(), leaves["weight"], retain_graph=True, allow_unused=True,
                                materialize_grads=True)  # fmt: skip
    assert not dw.any()
    assert torch.autograd.grad(y.sum(), leaves["bias"])[0].eq(5).all()


# ----------------------------------------------------------------------------------- activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool, dtype: torch.dtype) -> None:
    for n in (1, 70):
        judge(act_call(9, n, dtype=dtype, gated=gated, activation=activation), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hostile_activations(activation: str, kind: str, dtype: torch.dtype) -> None:
    x = values((8, 48), dtype, kind, "k")
    if dtype == torch.float16 and activation == "relu2":
        x = x.clamp(-200, 200)
    judge(act_call(8, 48, dtype=dtype, x=x, bias=False, activation=activation), "triton")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_ends(activation: str) -> None:
    """No NaN out of exp, and slopes that are exactly 0 or 1 where they should be."""
    big = 1e18 if activation == "relu2" else 1e38
    x = torch.tensor([-big, -1e5, -200.0, -0.0, 0.0, 200.0, 1e5, big], requires_grad=True)
    y = fastattn.bias_act(x, activation=activation, backend="triton")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert torch.equal(y[:3], torch.zeros(3))
    assert torch.equal(dx[:3], torch.zeros(3))
    if activation != "relu2":
        assert torch.equal(y[5:], x[5:])
        assert torch.equal(dx[5:], torch.ones(3))


def test_gelu_keeps_its_digits_in_the_lower_tail() -> None:
    x = torch.linspace(-12, 0, 1001)
    y = fastattn.bias_act(x, backend="triton").double()
    right = 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)
    some = right.abs() > 1e-30
    assert ((y - right).abs()[some] / right.abs()[some]).max() < 3e-5  # |x| ulp in the exponent


def test_swiglu_near_the_overflow_of_fp16() -> None:
    """The product is formed in fp32: what fits fp16 comes out, what does not is inf, never NaN."""
    gate = torch.tensor([[200.0, 250.0, 300.0, -60000.0, 60000.0]]).half()
    up = torch.tensor([[300.0, 262.0, 300.0, 60000.0, 0.0]]).half()
    y = fastattn.bias_act(up, gate=gate, activation="silu", backend="triton")
    assert torch.equal(y, (torch.nn.functional.silu(gate.double()) * up.double()).half())
    assert y[0, 2].isinf()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_of_the_hidden_layer(dtype: torch.dtype, gated: bool) -> None:
    call = act_call(3, 3, 60, dtype=dtype, gated=gated, activation="silu", dropout_p=0.25, seed=-9)
    got = judge(call, "triton")
    assert 0.15 < (got.outputs["y"] == 0).float().mean() < 0.35


def test_mixed_dtypes_of_an_activation() -> None:
    judge(act_call(5, 40, dtype=torch.bfloat16, params=torch.float32, gated=True), "triton")


# ------------------------------------------------------------------------------------- launches


def launches(call: Any) -> list[str]:
    """Names of the kernels that a call launches; they still run."""
    names = []
    inner = interpreter.launcher.hook

    def hook(kernel: Any, grid: Any, args: Any, meta: Any) -> bool:
        names.append(kernel.fn.__name__)
        assert len(grid) == 1
        return inner(kernel, grid, args, meta)

    with mock.patch.object(interpreter.launcher, "hook", hook):
        call()
    return names


def test_kernels_that_are_not_needed_are_not_launched() -> None:
    def names(call: Call, *frozen: str) -> list[str]:
        call = Call(call.op, call.tensors, call.kwargs, frozen)
        return launches(lambda: run(call, "triton"))

    forward, backward, sums = "norm_forward_kernel", "norm_backward_kernel", "sum_parts_kernel"
    layer = norm_call("layer_norm", 5, 24)
    assert names(layer) == [forward, backward, sums]
    assert names(layer, "weight", "bias") == [forward, backward]
    with torch.no_grad():
        assert launches(lambda: fastattn.layer_norm(torch.randn(3, 8), 8, backend="triton")) == [
            forward
        ]
    wide = norm_call("layer_norm", 5, WIDE)
    assert names(wide) == [forward, "norm_row_sums_kernel", backward, sums]
    act = act_call(5, 24)
    assert names(act) == ["act_forward_kernel", "act_backward_kernel", sums]
    assert names(act, "bias") == ["act_forward_kernel", "act_backward_kernel"]


CALLS = {
    "norm": lambda: norm_call("add_layer_norm", 40, 24, dropout_p=0.2, seed=4),
    "wide": lambda: norm_call("layer_norm", 11, WIDE),
    "act": lambda: act_call(20, 40, gated=True, dropout_p=0.2, seed=4),
}


@pytest.mark.parametrize("name", CALLS)
def test_bitwise_repeatable_in_any_order(name: str) -> None:
    """No sum has two owners: the order of programs changes nothing, and no atomics run."""
    call = CALLS[name]()
    first = run(call, "triton").all()
    shuffled = np.random.RandomState(5).permutation
    with mock.patch.object(interpreter.Builder, "create_atomic_rmw", side_effect=AssertionError):
        with interpreter.interpreted(shuffled):
            for what, x in run(call, "triton").all().items():
                assert torch.equal(x, first[what]), what


def test_an_explicit_backend_that_cannot_serve_says_why(not_interpreted: None) -> None:
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="layer_norm: backend='triton' cannot serve.*CUDA tensors"):
        fastattn.layer_norm(x, 8, backend="triton")
    with pytest.raises(
        ValueError, match="bias_act: backend='cuda' cannot serve.*no kernel of bias"
    ):
        fastattn.bias_act(x, backend="cuda")
    with pytest.raises(ValueError, match="cannot serve"):
        torch.ops.fastattn.bias_act_triton_fwd(x, None, None, None, None, 0, 0.0)


def refused() -> list[tuple[str, Any, tuple[Any, ...]]]:
    """What a direct call of an op may not have: the words of the error, the op, its arguments."""
    ops = torch.ops.fastattn
    x, w, f = torch.randn(4, 8), torch.randn(8), torch.zeros(4)
    no = (None,) * 4
    norm, norm_back = ops.add_layer_norm_triton_fwd, ops.add_layer_norm_triton_bwd
    act, act_back = ops.bias_act_triton_fwd, ops.bias_act_triton_bwd
    numbers = (1, 1e-5, 0.0, 8, 3)
    return [
        ("last dimensions of x", norm, (x, *no, 1, 1e-5, 0.0, 7, 3)),
        ("residual must have x's shape", norm, (x, x[:3], None, None, None, *numbers)),
        ("weight must have 8", norm, (x, None, w[:7], None, None, *numbers)),
        ("bias must have 8", norm, (x, None, None, w[:7], None, *numbers)),
        ("needs seed", norm, (x, *no, 1, 1e-5, 0.5, 8, 3)),
        ("needs seed", norm, (x, None, None, None, f, 1, 1e-5, 0.5, 8, 3)),
        ("in .0, 1", norm, (x, *no, 1, 1e-5, 1.0, 8, 3)),
        ("norm must be", norm, (x, *no, 3, 1e-5, 0.0, 8, 3)),
        ("float32, bfloat16", norm, (x.double(), *no, *numbers)),
        ("dy must have s's shape", norm_back, (x[:3], None, x, f, f, *no[:3], 1, 0.0, 8, 0, 3)),
        ("must be the forward's", norm_back, (x, None, x, f, f[:3], *no[:3], 1, 0.0, 8, 0, 3)),
        ("must be the forward's", norm_back, (x, None, x, f[:3], f, *no[:3], 1, 0.0, 8, 0, 3)),
        ("x_dtype", norm_back, (x, None, x, f, f, *no[:3], 1, 0.0, 8, 5, 3)),
        ("bias must have 8", act, (x, w[:7], None, None, None, 0, 0.0)),
        ("gate must have x's shape", act, (x, None, x[:3], None, None, 0, 0.0)),
        ("gate must have x's dtype", act, (x, None, x.half(), None, None, 0, 0.0)),
        ("act must be", act, (x, *no, 6, 0.0)),
        ("upstream gradient must have", act_back, (x[:3], x, *no, 0, 0.0, 15)),
    ]


def test_a_direct_call_stays_inside_its_tensors() -> None:
    """Whatever the op is called with: an error before any launch."""
    with mock.patch.object(interpreter.launcher, "hook", side_effect=AssertionError("launched")):
        for words, op, args in refused():
            with pytest.raises(ValueError, match=words):
                op(*args)
