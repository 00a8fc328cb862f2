"""layer_norm, rms_norm, add_layer_norm: values and gradients against the fp64 oracle."""

import pytest
import torch
from ffn_tools import Call, judge, run
from tools import DTYPES, KINDS, values
from torch import Tensor

import fastattn
from fastattn.backends import cpu_isas, force_cpu_isa


def norm_call(
    op: str, *shape: int, dtype: torch.dtype = torch.float32, x: Tensor | None = None,
    params: torch.dtype | None = None, affine: bool = True, residual: bool = True, **kwargs: object,
) -> Call:  # fmt: skip
    n = shape[-1]
    tensors = {"x": torch.randn(shape).to(dtype) if x is None else x}
    if op == "add_layer_norm":
        if residual:
            tensors["residual"] = torch.randn(shape).to(dtype)
    else:
        kwargs = {"normalized_shape": (n,), **kwargs}
    if affine:
        tensors["weight"] = (1 + 0.3 * torch.randn(n)).to(params or dtype)
        if op != "rms_norm":
            tensors["bias"] = torch.randn(n).to(params or dtype)
    return Call(op, tensors, kwargs)


OPS = ("layer_norm", "rms_norm", "add_layer_norm")


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set(op: str, dtype: torch.dtype, isa: str) -> None:
    with force_cpu_isa(isa):
        for n in (1, 7, 16, 33, 64, 100, 384):
            judge(norm_call(op, 11, n, dtype=dtype, eps=1e-3))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_affine_or_not(op: str, affine: bool) -> None:
    judge(norm_call(op, 3, 5, 48, affine=affine))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_hostile_values(op: str, kind: str, dtype: torch.dtype) -> None:
    x = values((40, 192), dtype, kind, "k")
    judge(norm_call(op, 40, 192, dtype=dtype, x=x))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("scale", [1e30, 1e19, 1e-30, 1e-40, 0.0])
def test_the_ends_of_the_range(op: str, scale: float) -> None:
    """Squares that overflow, and denormals (scaled up they are rounded, so eps decides)."""
    x = (torch.randn(9, 70, dtype=torch.float64) * scale).float()
    call = norm_call(op, 9, 70, x=x, affine=False, eps=1e-5)
    leaves = call.leaves()
    y = call.run(fastattn, leaves, backend="cpu")["y"]
    exact = call.run(fastattn.reference, call.leaves(Tensor.double))["y"]
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    grad = torch.autograd.grad(y.square().sum(), leaves["x"])[0]
    assert grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1, -3e4])
def test_constant_rows_are_their_bias(value: float) -> None:
    x = torch.full((4, 384), value)
    bias = torch.randn(384)
    y = fastattn.layer_norm(x, 384, torch.randn(384), bias, backend="cpu")
    assert torch.equal(y, bias.expand_as(y))


def test_a_mean_of_1000_costs_no_digits() -> None:
    """E[x^2] - mean^2 would be wrong in the third digit."""
    x = torch.randn(64, 768, dtype=torch.float64)
    y = fastattn.layer_norm((x + 1000).float(), 768, backend="cpu")
    right = torch.nn.functional.layer_norm((x + 1000).float().double(), (768,))
    assert (y - right).abs().max() < 2e-4  # fp32 of x itself is 6e-5 apart


def test_nan_and_inf_stay_in_their_rows() -> None:
    x = torch.randn(3, 40)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    for y in (fastattn.layer_norm(x, 40), fastattn.rms_norm(x, 40)):
        assert y[2].isfinite().all()
        assert y[0].isnan().all()
        assert not y[1].isfinite().any() or y[1].isnan().any()


@pytest.mark.parametrize("op", OPS)
def test_mixed_dtypes(op: str) -> None:
    judge(norm_call(op, 6, 64, dtype=torch.bfloat16, params=torch.float32))


def test_fp32_residual_of_a_16_bit_sublayer() -> None:
    call = norm_call("add_layer_norm", 6, 64, dtype=torch.bfloat16, params=torch.float32)
    call.tensors["residual"] = torch.randn(6, 64)
    got = judge(call)
    assert got.outputs["s"].dtype == torch.float32


def test_sum_is_x_where_nothing_is_added() -> None:
    x = torch.randn(3, 8)
    y, s = fastattn.add_layer_norm(x, backend="cpu")
    assert s is x
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))


@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_references(dtype: torch.dtype, norm: str | None) -> None:
    for residual in (True, False):
        call = norm_call(
            "add_layer_norm", 2, 9, 50, dtype=dtype, residual=residual, affine=norm == "layer",
            norm=norm, dropout_p=0.4, seed=2**40 + 3,
        )  # fmt: skip
        got = judge(call)
        dropped = got.grads["x"] == 0
        assert 0.3 < dropped.float().mean() < 0.5
        if not residual:
            assert torch.equal(dropped, got.outputs["s"] == 0)


LAYOUTS = {
    "transposed": lambda a, b, n: torch.randn(n, b, a).permute(2, 1, 0),
    "rows_swapped": lambda a, b, n: torch.randn(b, a, n).transpose(0, 1),
    "part_of_columns": lambda a, b, n: torch.randn(a, b, 2 * n)[..., :n],
    "every_second": lambda a, b, n: torch.randn(a, b, 2 * n)[..., ::2],
    "expanded": lambda a, b, n: torch.randn(1, 1, n).expand(a, b, n),
    "odd_offset": lambda a, b, n: torch.randn(a * b * n + 1)[1:].view(a, b, n),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_any_strides(op: str, layout: str) -> None:
    x = LAYOUTS[layout](3, 4, 40)
    call = norm_call(op, 3, 4, 40, x=x)
    outputs = call.run(fastattn, call.leaves())
    upstream = tuple(LAYOUTS[layout](3, 4, 40) for _ in outputs)
    judge(Call(op, call.tensors, call.kwargs, upstream=upstream))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_more_than_one_normalised_dimension(op: str) -> None:
    call = norm_call(op, 5, 12, affine=False)
    call.tensors.update(x=torch.randn(5, 3, 4), weight=torch.randn(3, 4))
    judge(call.with_(normalized_shape=(3, 4)))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (1, 1, 1)])
@pytest.mark.parametrize("op", OPS)
def test_empty_and_small_shapes(op: str, shape: tuple[int, ...]) -> None:
    got = judge(norm_call(op, *shape))
    if 0 in shape:
        assert not got.grads["weight"].any()


def test_more_rows_than_16_bits() -> None:
    judge(norm_call("layer_norm", 2**16 + 3, 8))


@pytest.mark.parametrize("op", OPS)
def test_backward_is_bitwise_the_same_for_every_thread_count(op: str) -> None:
    call = norm_call(op, 1003, 96)
    found = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        found.append(run(call, "cpu").all())
    for other in found[1:]:
        assert all(torch.equal(found[0][n], other[n]) for n in other)


def test_only_what_is_wanted_gets_a_gradient() -> None:
    call = norm_call("add_layer_norm", 5, 24, dropout_p=0.2, seed=1)
    full = run(call, "cpu").grads
    for frozen in (("x",), ("residual",), ("weight", "bias"), ("x", "residual", "bias")):
        some = run(Call(call.op, call.tensors, call.kwargs, frozen), "cpu").grads
        assert set(some) == set(full) - set(frozen)
        assert all(torch.equal(some[n], full[n]) for n in some)


def test_gradient_of_one_output_alone() -> None:
    leaves = norm_call("add_layer_norm", 5, 24).leaves()
    y, s = fastattn.add_layer_norm(**leaves)
    (dx,) = torch.autograd.grad(s.sum(), leaves["x"], retain_graph=True)
    assert torch.equal(dx, torch.ones_like(dx))
    (dw,) = torch.autograd.grad(s.sum(), leaves["weight"], retain_graph=True, allow_unused=True,
                                materialize_grads=True)  # fmt: skip
    assert not dw.any()
    assert torch.autograd.grad(y.sum(), leaves["bias"])[0].eq(5).all()


def test_float64_is_the_reference() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fastattn.add_layer_norm(x, x.sin()), (x,))
    assert torch.autograd.gradcheck(lambda x: fastattn.rms_norm(x, 8), (x,))


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_as_torch_rounds(dtype: torch.dtype, isa: str) -> None:
    """Bit by bit: ties, what rounds up to infinity, subnormals, signed zeros, NaN."""
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, -info.tiny, info.tiny / 8,
                            torch.inf, -torch.inf, torch.nan, 1.0, 1 + info.eps])  # fmt: skip
    every = torch.randn(37, 67).mul(torch.randn(37, 67).mul(4).exp())
    every[:24, :12] = special.repeat(24, 1)
    x, residual = every.to(dtype), every.flip(0).roll(1, 1).mul(info.eps * 1.5).to(dtype)
    residual[:12, :12] = special[:, None].expand(12, 12).to(dtype)
    with force_cpu_isa(isa):
        s = fastattn.add_layer_norm(x, residual, backend="cpu")[1]
    right = (x.float() + residual.float()).to(dtype)
    assert torch.equal(s.isnan(), right.isnan())
    number = ~right.isnan()
    assert torch.equal(s.view(torch.int16)[number], right.view(torch.int16)[number])
