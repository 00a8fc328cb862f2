"""bias_act: values and gradients against the fp64 oracle."""

import math

import pytest
import torch
from ffn_tools import Call, by_reference, judge, run, slope_terms
from rule import EPS32
from tools import DTYPES, KINDS, values
from torch import Tensor

import fastattn
from fastattn.backends import cpu_isas, force_cpu_isa

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu")


def act_call(
    *shape: int, dtype: torch.dtype = torch.float32, gated: bool = False, bias: bool = True,
    params: torch.dtype | None = None, x: Tensor | None = None, **kwargs: object,
) -> Call:  # fmt: skip
    tensors = {"x": torch.randn(shape).to(dtype) if x is None else x}
    names = ["bias"]
    if gated:
        tensors["gate"] = torch.randn(shape).to(dtype) if x is None else x.flip(0)
        names.append("gate_bias")
    if bias:
        tensors |= {n: torch.randn(shape[-1]).to(params or dtype) for n in names}
    return Call("bias_act", tensors, kwargs)


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_instruction_set(activation: str, gated: bool, dtype: torch.dtype, isa: str) -> None:
    with force_cpu_isa(isa):
        for n in (1, 7, 33, 200):
            judge(act_call(9, n, dtype=dtype, gated=gated, activation=activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hostile_values(activation: str, kind: str, dtype: torch.dtype) -> None:
    x = values((20, 96), dtype, kind, "k")
    if dtype == torch.float16 and activation == "relu2":
        x = x.clamp(-200, 200)
    judge(act_call(20, 96, dtype=dtype, x=x, bias=False, activation=activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_ends(activation: str) -> None:
    """No NaN out of exp, and slopes that are exactly 0 or 1 where they should be."""
    big = 1e18 if activation == "relu2" else 1e38
    x = torch.tensor([-big, -1e5, -200.0, -0.0, 0.0, 200.0, 1e5, big], requires_grad=True)
    y = fastattn.bias_act(x, activation=activation, backend="cpu")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert torch.equal(y[:3], torch.zeros(3))
    assert torch.equal(dx[:3], torch.zeros(3))
    if activation != "relu2":
        assert torch.equal(y[5:], x[5:])
        assert torch.equal(dx[5:], torch.ones(3))


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_slopes_next_to_their_zeros(activation: str, isa: str) -> None:
    """Where the two terms of a slope cancel, no more is lost than four roundings of each."""
    x = torch.linspace(-1.5, -0.5, 4001)
    call = Call("bias_act", {"x": x}, {"activation": activation}, upstream=(torch.ones_like(x),))
    with force_cpu_isa(isa):
        got = run(call, "cpu").grads["x"].double()
    terms = slope_terms(x.double(), activation)
    assert terms is not None
    error = (got - by_reference(call, Tensor.double).grads["x"]).abs()
    assert (error <= 2 * EPS32 * terms).all()


def test_gelu_keeps_its_digits_in_the_lower_tail() -> None:
    x = torch.linspace(-12, 0, 4001)
    y = fastattn.bias_act(x, backend="cpu")
    right = torch.tensor([0.5 * v * math.erfc(-v / 2**0.5) for v in x.double().tolist()])
    some = right.abs() > 1e-30
    assert ((y - right).abs()[some] / right.abs()[some]).max() < 3e-5  # |x| ulp in the exponent
    near = x > -2
    assert ((y - right).abs()[near] <= 4e-7 * right.abs()[near] + 1e-12).all()


def test_swiglu_near_the_overflow_of_fp16() -> None:
    """The product is formed in fp32: what fits fp16 comes out, what does not is inf, never NaN."""
    gate = torch.tensor([[200.0, 250.0, 300.0, -60000.0, 60000.0]]).half()
    up = torch.tensor([[300.0, 262.0, 300.0, 60000.0, 0.0]]).half()
    y = fastattn.bias_act(up, gate=gate, activation="silu", backend="cpu")
    right = (torch.nn.functional.silu(gate.double()) * up.double()).half()
    assert torch.equal(y, right)
    assert y[0, 2].isinf()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_references(dtype: torch.dtype, gated: bool) -> None:
    call = act_call(3, 7, 60, dtype=dtype, gated=gated, activation="silu", dropout_p=0.25, seed=-9)
    got = judge(call)
    assert 0.15 < (got.outputs["y"] == 0).float().mean() < 0.35


def test_mixed_dtypes() -> None:
    judge(act_call(5, 40, dtype=torch.bfloat16, params=torch.float32, gated=True))


def test_any_strides() -> None:
    for x in (
        torch.randn(40, 3, 4).permute(1, 2, 0),
        torch.randn(3, 4, 80)[..., ::2],
        torch.randn(3, 1, 40).expand(3, 4, 40),
    ):
        judge(act_call(3, 4, 40, x=x, gated=True))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (5,)])
def test_empty_and_small_shapes(shape: tuple[int, ...]) -> None:
    judge(act_call(*shape, gated=True))


def test_backward_is_bitwise_the_same_for_every_thread_count() -> None:
    call = act_call(777, 130, gated=True, dropout_p=0.1, seed=4)
    found = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        found.append(run(call, "cpu").all())
    for other in found[1:]:
        assert all(torch.equal(found[0][n], other[n]) for n in other)


def test_only_what_is_wanted_gets_a_gradient() -> None:
    call = act_call(5, 24, gated=True)
    full = run(call, "cpu").grads
    for frozen in (("x",), ("gate",), ("bias", "gate_bias"), ("x", "gate", "bias")):
        some = run(Call(call.op, call.tensors, call.kwargs, frozen), "cpu").grads
        assert set(some) == set(full) - set(frozen)
        assert all(torch.equal(some[n], full[n]) for n in some)
