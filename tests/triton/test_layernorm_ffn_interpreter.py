"""layernorm_ffn in Triton's interpreter, through the public function, every option against the fp64
oracle: as passes and torch's GEMMs, and as one kernel (``block``)."""

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from ffn_tools import Call, ffn, judge, run, scaled
from test_layernorm_ffn import ACTIVATIONS, RECOMPUTE, TRAINABLE
from test_layernorm_interpreter import launches
from tools import DTYPES

import fastattn
from fastattn import nn
from fastattn.backends import whole_block
from fastattn.ops import layernorm_triton

pytestmark = pytest.mark.sampled(2)


@pytest.fixture(autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the block is made: by passes, unless the test has asked for ``block``."""
    found = getattr(request, "param", "passes")
    with mock.patch.object(layernorm_triton, "whole_block", return_value=found == "block"):
        yield found


both_ways = pytest.mark.parametrize("way", ["passes", "block"], indirect=True)
one_kernel = pytest.mark.parametrize("way", ["block"], indirect=True)

STRUCTURES = [
    *itertools.product(("layer", "rms"), (True, False), (True, False), (True,)),
    ("layer", False, True, False),
    (None, True, True, True),
    (None, True, False, False),
]


@pytest.mark.parametrize(
    ("way", "dtype"), [("passes", torch.float32), ("block", torch.bfloat16)], indirect=["way"]
)
@pytest.mark.parametrize(("norm", "pre_norm", "residual", "rest"), STRUCTURES)
def test_structure(
    norm: str, pre_norm: bool, residual: bool, rest: bool, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"norm": norm, "pre_norm": pre_norm, "residual": residual}
    judge(ffn(11, d=24, f=40, dtype=dtype, affine=rest, biases=rest, **options), "triton")


@both_ways
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation: str) -> None:
    call = ffn(5, d=16, f=40, dtype=torch.float16, gated=activation == "silu",
               activation=activation)  # fmt: skip
    if activation.startswith("relu"):  # away from the corner, where a rounding is a step
        call.tensors["norm_weight"] *= 0.2
        call.tensors["norm_bias"] *= 0.2
        call.tensors["b1"] = torch.randn(40).sign().half() * 3
    judge(call, "triton")


@pytest.mark.parametrize(
    ("way", "dtype"), [*zip(("passes", "block", "passes"), DTYPES, strict=True)], indirect=["way"]
)
def test_dropout_is_the_references(dtype: torch.dtype) -> None:
    given = {"dropout_p": 0.2, "hidden_dropout_p": 0.4, "seed": 2**50 + 9}
    judge(ffn(9, d=24, f=40, dtype=dtype, **given), "triton")
    judge(ffn(9, d=24, f=40, dtype=dtype, gated=True, pre_norm=False, **given), "triton")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_changes_no_result(recompute: str, gated: bool) -> None:
    options = {"recompute": recompute, "hidden_dropout_p": 0.2, "seed": 3}
    for pre_norm in (True, False):
        judge(ffn(9, d=24, f=40, gated=gated, pre_norm=pre_norm, **options), "triton")


@pytest.mark.parametrize(("way", "gated"), [("passes", True), ("block", False)], indirect=["way"])
def test_mixed_dtypes(gated: bool) -> None:
    """bf16 with fp32 norm and biases; and fp32 x with bf16 weights, as under autocast."""
    mixed: dict[str, Any] = {"dtype": torch.bfloat16, "param_dtype": torch.float32}
    judge(ffn(9, d=24, f=40, gated=gated, **mixed), "triton")
    for norm, pre_norm in (("layer", True), ("rms", False), (None, True)):
        call = ffn(9, d=24, f=40, gated=gated, norm=norm, pre_norm=pre_norm, **mixed)
        call.tensors["x"] = torch.randn(9, 24)
        assert judge(call, "triton").outputs["y"].dtype == torch.float32


@both_ways
def test_any_strides() -> None:
    for x in (torch.randn(3, 4, 32).transpose(0, 1), torch.randn(4, 3, 64)[..., ::2]):
        call = ffn(4, 3, f=40, x=x)
        for name in ("w1", "w2"):
            call.tensors[name] = call.tensors[name].t().contiguous().t()
        judge(call, "triton")
    upstream = torch.randn(32).expand(4, 3, 32)
    call = ffn(4, 3, f=40, norm=None)
    judge(Call(call.op, call.tensors, call.kwargs, upstream=(upstream,)), "triton")


@both_ways
def test_another_width_out_without_residual() -> None:
    call = ffn(9, d=32, f=40, residual=False)
    call.tensors.update(w2=scaled((24, 40), torch.float32), b2=torch.randn(24))
    assert judge(call, "triton").outputs["y"].shape == (9, 24)
    call.tensors.update(norm_weight=torch.randn(24), norm_bias=torch.randn(24))
    judge(call.with_(pre_norm=False), "triton")


@both_ways
@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_empty_and_single_rows(shape: tuple[int, ...]) -> None:
    got = judge(ffn(*shape, d=16, f=24), "triton")
    if shape:
        assert not any(g.any() for g in got.grads.values())


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("alone", TRAINABLE)
def test_each_gradient_alone_is_that_of_all(alone: str, pre_norm: bool) -> None:
    # With a norm behind and nothing kept, the pre-activations are made for what asks for them.
    recompute = "none" if pre_norm else "all"
    call = ffn(6, d=16, f=24, gated=True, recompute=recompute, pre_norm=pre_norm)
    full = run(call, "triton").grads
    frozen = tuple(n for n in call.tensors if n != alone)
    (got,) = run(Call(call.op, call.tensors, call.kwargs, frozen), "triton").grads.values()
    torch.testing.assert_close(got, full[alone], rtol=1e-6, atol=1e-6)


@both_ways
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_saved_bytes_are_those_of_the_docstring(recompute: str) -> None:
    parts = (3, 2, 0)[RECOMPUTE.index(recompute)]
    for pre_norm in (True, False):
        call = ffn(9, d=24, f=40, gated=True, recompute=recompute, pre_norm=pre_norm)
        leaves = call.leaves()
        given = {x.untyped_storage().data_ptr() for x in leaves.values()}
        kept: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.numel() and x.untyped_storage().data_ptr() not in given:  # noqa: B023
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()  # noqa: B023
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            call.run(fastattn, leaves, backend="triton")
        behind = 0 if pre_norm else 9 * 24 * 4
        assert sum(kept.values()) == 8 * 9 + parts * 9 * 40 * 4 + behind


@both_ways
def test_inference_is_the_value_of_training() -> None:
    for pre_norm in (True, False):
        call = ffn(9, d=24, f=40, dtype=torch.bfloat16, pre_norm=pre_norm)
        trained = run(call, "triton").outputs["y"].detach()
        with torch.no_grad():
            inferred = call.run(fastattn, call.leaves(), backend="triton")["y"]
        assert torch.equal(inferred, trained)


def test_the_passes_are_fused() -> None:
    """One launch before, between and behind the GEMMs; backward the same, and sums over rows."""
    forward = ["norm_forward_kernel", "act_forward_kernel", "norm_forward_kernel"]
    call = ffn(5, d=16, f=24, dropout_p=0.1, hidden_dropout_p=0.1, seed=1)
    with torch.no_grad():
        assert launches(lambda: call.run(fastattn, call.leaves(), backend="triton")) == forward
    sums = "sum_parts_kernel"
    both = launches(lambda: run(call, "triton"))
    # The norm of x once more, for dw1; db2; db1; the norm's own parameters.
    assert both == [
        *forward, "norm_forward_kernel", "norm_backward_kernel", sums, "act_backward_kernel", sums,
        "norm_backward_kernel", sums,
    ]  # fmt: skip


@one_kernel
@pytest.mark.parametrize(("d", "f", "rows"), [(1, 1, 1), (7, 33, 20), (40, 70, 5)])
def test_shapes_of_the_block(d: int, f: int, rows: int) -> None:
    """One slice of the hidden features or several, tails on every side."""
    judge(ffn(rows, d=d, f=f, gated=True, hidden_dropout_p=0.2, seed=1), "triton")
    judge(ffn(rows, d=d, f=f, dtype=torch.bfloat16, norm="rms", pre_norm=False), "triton")


@one_kernel
def test_the_block_is_one_launch_or_two() -> None:
    """Many rows: one kernel. Few: the hidden features are split, and a second one adds up."""
    one, two = ["ffn_block_kernel"], ["ffn_block_kernel", "ffn_block_finish_kernel"]
    for rows, expected in ((100, one), (5, two)):
        call = ffn(rows, d=16, f=40, dropout_p=0.1, hidden_dropout_p=0.1, seed=1)
        leaves = {n: x.detach() for n, x in call.leaves().items()}
        assert launches(lambda: call.run(fastattn, leaves, backend="triton")) == expected  # noqa: B023


def test_which_way_is_taken() -> None:
    assert whole_block(1024, 256, 256, torch.bfloat16)
    assert whole_block(4096, 128, 128, torch.float16)
    assert whole_block(4096, 64, 64, torch.float32)
    for rows, d, out, dtype in (
        (4097, 64, 64, torch.bfloat16),
        (1025, 128, 129, torch.bfloat16),
        (1, 257, 256, torch.float16),
        (1, 256, 257, torch.bfloat16),
        (1, 65, 64, torch.float32),
    ):
        assert not whole_block(rows, d, out, dtype)


def test_a_module_on_triton() -> None:
    layer = nn.LayerNormFFN(16, 24, backend="triton")
    x = torch.randn(3, 16, requires_grad=True)
    other = nn.LayerNormFFN(16, 24, backend="reference")
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-5)


def test_double_backward() -> None:
    call = ffn(4, d=8, f=12, gated=True, activation="silu")

    def second(backend: str) -> list[torch.Tensor]:
        leaves = call.leaves()
        y = call.run(fastattn, leaves, backend=backend)["y"]
        first = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves.values()))

    for got, want in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_direct_call_stays_inside_its_tensors() -> None:
    call = ffn(4, d=8, f=12).tensors
    x, w1, b1, w2, b2 = (call[n] for n in ("x", "w1", "b1", "w2", "b2"))
    numbers = (1, 1e-5, 0, True, True, 0.0, 0.0)
    fwd, bwd = (getattr(torch.ops.fastattn, f"layernorm_ffn_triton_{d}") for d in ("fwd", "bwd"))

    def tensors(**given: Any) -> tuple[Any, ...]:
        all_ = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2} | given
        rest = ("w_gate", "b_gate", "norm_weight", "norm_bias", "seed")
        return (*(all_[n] for n in ("x", "w1", "b1", "w2", "b2")), *(all_.get(n) for n in rest))

    for words, given in (
        ("w2 must have 12", {"w2": w2[:, :11]}),
        ("x must have 8", {"x": x[:, :7]}),
        ("the residual needs", {"w2": w2[:7], "b2": None}),
        ("w2 must have w1's dtype", {"w2": w2.half()}),
        ("x must be float32 or", {"x": x.half()}),
        ("w_gate must have w1's shape", {"w_gate": w1[:11]}),
        ("b1 must have 12", {"b1": b1[:11]}),
        ("b2 must have 8", {"b2": b2[:7]}),
        ("norm_weight must have 8", {"norm_weight": b1}),
    ):
        with pytest.raises(ValueError, match=words):
            fwd(*tensors(**given), *numbers, 7)
    with pytest.raises(ValueError, match="needs seed"):
        fwd(*tensors(), 1, 1e-5, 0, True, True, 0.1, 0.0, 7)
    y, *saved = fwd(*tensors(), *numbers, 7)
    for at, words in enumerate(("", "mean and rstd", "mean and rstd", "u must", "", "a must")):
        if words:
            wrong = [*saved[:at], saved[at][:-1], *saved[at + 1 :]]
            with pytest.raises(ValueError, match=words):
                bwd(y, *tensors(), *wrong, *numbers, 511)
    with pytest.raises(ValueError, match="dy must have"):
        bwd(y[:3], *tensors(), *saved, *numbers, 511)
