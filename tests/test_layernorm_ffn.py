"""layernorm_ffn: values and gradients of every option against the fp64 oracle."""

import itertools
from typing import Any

import pytest
import torch
from ffn_tools import Call, ffn, judge, run, scaled
from test_attention import in_layout
from tools import DTYPES, KINDS, values

import fastattn
from fastattn.backends import cpu_isas, force_cpu_isa

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu")
RECOMPUTE = ("none", "activation", "all")

# Rows that reach each way of the CPU: dot products (1, 4, 16), tiles (5, 40, 300), the library's
# GEMM in one part and in two (600).
ROWS = (1, 4, 5, 16, 40, 300, 600)


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_every_way_on_every_instruction_set(rows: int, dtype: torch.dtype, isa: str) -> None:
    with force_cpu_isa(isa):
        judge(ffn(rows, d=64, f=288, dtype=dtype))
        judge(ffn(rows, d=64, f=288, dtype=dtype, gated=True, activation="silu", norm="rms"))


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("rows", [4, 9, 16, 144, 600])
def test_long_sums_round_no_more_than_the_librarys(rows: int, isa: str) -> None:
    """A sum of 3072 terms in one chain would be 3 to 5 times as far off."""
    with force_cpu_isa(isa):
        judge(ffn(rows, d=3072, f=48, norm=None, activation="relu2"))
        judge(ffn(rows, d=48, f=3072, norm=None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("norm", "pre_norm", "residual", "affine", "biases"),
    itertools.product(("layer", "rms", None), (True, False), (True, False), (True, False),
                      (True, False)),
)  # fmt: skip
def test_every_structure(
    norm: str, pre_norm: bool, residual: bool, affine: bool, biases: bool, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"norm": norm, "pre_norm": pre_norm, "residual": residual}
    for rows in (3, 33):
        judge(ffn(rows, d=32, f=96, dtype=dtype, affine=affine, biases=biases, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, gated: bool, dtype: torch.dtype) -> None:
    for rows in (2, 50):
        call = ffn(rows, d=32, f=160, dtype=dtype, gated=gated, activation=activation)
        if activation.startswith("relu"):  # away from the corner, where a rounding is a step
            corner = "b_gate" if gated else "b1"
            call.tensors["norm_weight"] *= 0.2
            call.tensors["norm_bias"] *= 0.2
            call.tensors[corner] = torch.randn(160).sign().to(dtype) * 3
        judge(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "f"), [(1, 1), (7, 3), (31, 33), (96, 32), (100, 257), (32, 512)])
def test_odd_widths(d: int, f: int, dtype: torch.dtype) -> None:
    for rows in (1, 3, 37):
        judge(ffn(rows, d=d, f=f, dtype=dtype))
        judge(ffn(rows, d=d, f=f, dtype=dtype, gated=True, pre_norm=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 40, 600])
@pytest.mark.parametrize(("p", "hidden_p"), [(0.0, 0.3), (0.3, 0.0), (0.2, 0.4)])
def test_dropout_is_the_references(
    p: float, hidden_p: float, rows: int, dtype: torch.dtype
) -> None:
    """The same elements on every way, whatever part of the rows it takes at once."""
    given = {"dropout_p": p, "hidden_dropout_p": hidden_p, "seed": 2**50 + 9}
    judge(ffn(rows, d=64, f=288, dtype=dtype, **given))
    judge(ffn(rows, d=64, f=288, dtype=dtype, gated=True, pre_norm=False, **given))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_changes_no_result(recompute: str, rows: int, gated: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        judge(ffn(rows, d=64, f=96, dtype=dtype, gated=gated, recompute=recompute,
                  hidden_dropout_p=0.2, seed=3))  # fmt: skip
        judge(ffn(rows, d=64, f=96, dtype=dtype, gated=gated, recompute=recompute, pre_norm=False))


@pytest.mark.parametrize("rows", [4, 40, 300])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_corner_of_relu_in_16_bits(recompute: str, rows: int) -> None:
    """Half of the hidden units lie within a rounding of their terms of the corner."""
    call = ffn(rows, d=32, f=160, norm=None, activation="relu", recompute=recompute,
               dtype=torch.bfloat16)  # fmt: skip
    call.tensors["x"] = call.tensors["x"][:1].repeat(rows, 1)
    products = call.tensors["x"][0].double() @ call.tensors["w1"].double().T
    call.tensors["b1"][::2] = -products[::2].to(torch.bfloat16)
    judge(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_values(kind: str, dtype: torch.dtype) -> None:
    x = values((40, 64), dtype, kind, "k")
    judge(ffn(40, d=64, f=128, dtype=dtype, x=x))
    judge(ffn(40, d=64, f=128, dtype=dtype, x=x, norm="rms", pre_norm=False))


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("gated", [False, True])
def test_mixed_dtypes(gated: bool, rows: int) -> None:
    """bf16 with fp32 norm and biases; and fp32 x with bf16 weights, as under autocast."""
    judge(ffn(rows, dtype=torch.bfloat16, param_dtype=torch.float32, gated=gated))
    call = ffn(rows, dtype=torch.bfloat16, param_dtype=torch.float32, gated=gated, dropout_p=0.1,
               seed=5)  # fmt: skip
    call.tensors["x"] = torch.randn(rows, 32)
    for pre_norm in (True, False):
        assert judge(call.with_(pre_norm=pre_norm)).outputs["y"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    for x in (
        torch.randn(3, 7, 32).transpose(0, 1),
        torch.randn(7, 3, 64)[..., ::2],
        torch.randn(7, 3, 64)[..., 32:],
        torch.randn(7, 1, 32).expand(7, 3, 32),
    ):
        judge(ffn(7, 3, dtype=dtype, x=in_layout(x, dtype), norm=None))
        call = ffn(7, 3, dtype=dtype, x=in_layout(x, dtype))
        for name in ("w1", "w2"):
            call.tensors[name] = call.tensors[name].t().contiguous().t()
        judge(call)
    call = ffn(7, 3, dtype=dtype)
    upstream = torch.randn(32).to(dtype).expand(7, 3, 32)
    judge(Call(call.op, call.tensors, call.kwargs, upstream=(upstream,)))
    wide = torch.randn(80, 64).to(dtype)[:, 16:48]  # a part of a larger weight
    call.tensors["w1"] = wide * 0.2 if dtype == torch.float32 else wide
    judge(call)


def test_another_width_out_without_residual() -> None:
    call = ffn(20, d=32, f=64, residual=False)
    call.tensors.update(w2=scaled((48, 64), torch.float32), b2=torch.randn(48))
    assert judge(call).outputs["y"].shape == (20, 48)
    call.tensors.update(norm_weight=torch.randn(48), norm_bias=torch.randn(48))
    judge(call.with_(pre_norm=False))


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_empty_and_single_rows(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        got = judge(ffn(*shape, dtype=dtype))
        if shape:
            assert not any(g.any() for n, g in got.grads.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 130])
def test_backward_is_bitwise_repeatable(rows: int, dtype: torch.dtype) -> None:
    call = ffn(rows, d=64, f=128, dtype=dtype, gated=True, hidden_dropout_p=0.1, seed=1)
    first, second = (run(call, "cpu").all() for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


TRAINABLE = ("x", "w1", "b1", "w2", "b2", "w_gate", "b_gate", "norm_weight", "norm_bias")


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("alone", TRAINABLE)
def test_each_gradient_alone_is_that_of_all(alone: str, recompute: str, pre_norm: bool) -> None:
    call = ffn(21, gated=True, recompute=recompute, pre_norm=pre_norm)
    full = run(call, "cpu").grads
    frozen = tuple(n for n in call.tensors if n != alone)
    (got,) = run(Call(call.op, call.tensors, call.kwargs, frozen), "cpu").grads.values()
    torch.testing.assert_close(got, full[alone], rtol=1e-6, atol=1e-6)


def saved_bytes(call: Call) -> int:
    """Bytes of what a forward saves beyond the tensors that it was given."""
    leaves = call.leaves()
    given = {x.untyped_storage().data_ptr() for x in leaves.values()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.numel() and x.untyped_storage().data_ptr() not in given:
            kept[x.untyped_storage().data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call.run(fastattn, leaves, backend="cpu")
    return sum(kept.values())


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("gated", [False, True])
def test_saved_bytes_are_those_of_the_docstring(gated: bool, rows: int) -> None:
    hidden = rows * 96 * 2
    for recompute, parts in zip(RECOMPUTE, ((3, 2, 0) if gated else (2, 1, 0)), strict=True):
        call = ffn(rows, d=64, f=96, dtype=torch.bfloat16, gated=gated, recompute=recompute)
        assert saved_bytes(call) == 8 * rows + parts * hidden
        behind = call.with_(pre_norm=False)
        assert saved_bytes(behind) == 8 * rows + parts * hidden + rows * 64 * 2


def test_nothing_is_saved_for_what_is_frozen() -> None:
    call = ffn(40, d=64, f=96)
    frozen = {n: n for n in call.tensors}
    hidden = 40 * 96 * 4

    def bytes_with(*trainable: str) -> int:
        still = tuple(n for n in frozen if n not in trainable)
        return saved_bytes(Call(call.op, call.tensors, call.kwargs, still))

    assert bytes_with() == 0
    assert bytes_with("b2") == 8 * 40  # through no product
    assert bytes_with("w2") == 8 * 40 + hidden  # the hidden layer alone
    assert bytes_with("x") == 8 * 40 + hidden  # the pre-activation alone
    assert bytes_with("x", "w2") == 8 * 40 + 2 * hidden


def test_inference_is_one_value_whatever_the_mode() -> None:
    call = ffn(30, d=64, f=96)
    trained = run(call, "cpu").outputs["y"].detach()
    with torch.no_grad():
        assert torch.equal(call.run(fastattn, call.leaves())["y"], trained)
    with torch.inference_mode():
        assert torch.equal(call.run(fastattn, call.leaves())["y"], trained)


def test_float64_is_the_reference() -> None:
    call = ffn(5, d=6, f=7, dtype=torch.float64, gated=True, pre_norm=False)
    y = call.run(fastattn, call.leaves())["y"]
    assert torch.equal(y, call.run(fastattn.reference, call.leaves())["y"])
    leaves = call.leaves()
    names = list(leaves)

    def fn(*xs: torch.Tensor) -> torch.Tensor:
        return fastattn.layernorm_ffn(**dict(zip(names, xs, strict=True)), **call.kwargs)

    assert torch.autograd.gradcheck(fn, tuple(leaves.values()))
