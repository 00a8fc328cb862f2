"""layernorm_ffn with backend="cuda" on CPU tensors: the shipped binding, launcher and kernels (as
sm_80 PTX, in the simulator) against the fp64 oracle, outputs and gradients.

A width is one of three sets of kernels, up to 64, 128 and 256 columns; what does not depend on it
is tried on the first. The simulator takes a minute to read the fp32 kernels of the widest.
"""

import re
from typing import Any

import pytest
import torch
from ffn_tools import Call, ffn, judge, run, scaled
from test_attention import in_layout
from test_layernorm_ffn import ACTIVATIONS, TRAINABLE
from tools import KINDS, values

import fastattn
from fastattn import reference
from sim import ptx
from sim.cudart import Device

pytestmark = [pytest.mark.usefixtures("gpu"), pytest.mark.sampled(2)]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
full = pytest.mark.full
# The simulator takes three times as long for fp32's products, and features are none of theirs.
TWO = [pytest.param(FP32, marks=full), BF16]


def kernels(gpu: Device) -> list[str]:
    """By their short names, in order."""
    return [re.findall(r"\dlayernorm_ffn_([a-z_]+)_kernel", x.kernel)[0] for x in gpu.launches]


def y_of(call: Call) -> torch.Tensor:
    """Of a call without gradients."""
    with torch.no_grad():
        return call.run(fastattn, call.leaves(), backend="cuda")["y"]


# ------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "d", "f", "dtype"),
    [
        (1, 8, 1, FP32),
        (7, 40, 33, FP32),
        (65, 64, 33, BF16),
        (7, 64, 200, FP16),
        (1, 40, 200, BF16),
        (3, 7, 3, BF16),
        pytest.param(65, 100, 33, BF16, marks=full),
        (7, 200, 33, BF16),
        pytest.param(65, 256, 200, BF16, marks=full),
        pytest.param(65, 200, 33, FP16, marks=full),
        pytest.param(7, 128, 200, FP32, marks=full),
        pytest.param(65, 200, 33, FP32, marks=full),
        pytest.param(1, 256, 1, FP32, marks=full),
    ],
)
def test_shapes(rows: int, d: int, f: int, dtype: torch.dtype, gated: bool) -> None:
    judge(ffn(rows, d=d, f=f, dtype=dtype, gated=gated), "cuda")


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_empty_and_single_rows(shape: tuple[int, ...]) -> None:
    got = judge(ffn(*shape, dtype=BF16, gated=True), "cuda")
    if shape:
        assert not any(g.any() for g in got.grads.values())


@full
def test_more_rows_than_a_grid_has_in_y() -> None:
    """65 536 rows and one: the grid's x takes them. Few hidden units, for the simulator's sake."""
    call = ffn(2**16 + 1, d=8, f=4, dtype=BF16)
    y = y_of(call)
    some = torch.tensor([0, 1, 2**15, 2**16 - 1, 2**16])
    few = Call(call.op, {**call.tensors, "x": call.tensors["x"][some]}, call.kwargs)
    assert torch.equal(y_of(few), y[some])


def test_another_width_out_without_residual() -> None:
    call = ffn(20, d=32, f=64, residual=False, dtype=BF16)
    call.tensors.update(w2=scaled((48, 64), BF16), b2=torch.randn(48).to(BF16))
    assert judge(call, "cuda").outputs["y"].shape == (20, 48)
    given = {n: torch.randn(48).to(BF16) for n in ("norm_weight", "norm_bias")}
    call.tensors.update(given)
    judge(call.with_(pre_norm=False), "cuda")


@pytest.mark.parametrize("dtype", TWO, ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    for x in (torch.randn(7, 3, 64)[..., ::2], torch.randn(7, 3, 64)[..., 31:63]):
        call = ffn(7, 3, dtype=dtype, x=in_layout(x, dtype))
        for name in ("w1", "w2"):
            call.tensors[name] = call.tensors[name].t().contiguous().t()
        judge(call, "cuda")
    call = ffn(7, 3, dtype=dtype)
    upstream = torch.randn(32).to(dtype).expand(7, 3, 32)
    wide = scaled((80, 64), dtype)[:, 15:47]  # a part of a larger weight, unaligned
    call.tensors["w1"] = wide
    judge(Call(call.op, call.tensors, call.kwargs, upstream=(upstream,)), "cuda")


# ------------------------------------------------------------------------------------ the features


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize(
    ("norm", "residual", "affine", "biases"),
    [
        ("layer", True, True, True),
        ("layer", False, False, True),
        ("rms", True, True, False),
        ("rms", True, False, True),
        (None, True, False, True),
        (None, False, False, False),
    ],
)
def test_structures(
    norm: str, residual: bool, affine: bool, biases: bool, pre_norm: bool, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"norm": norm, "pre_norm": pre_norm, "residual": residual}
    judge(ffn(20, d=32, f=48, dtype=dtype, affine=affine, biases=biases, **options), "cuda")


@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=full)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool, dtype: torch.dtype) -> None:
    call = ffn(10, d=32, f=48, dtype=dtype, gated=gated, activation=activation)
    if activation.startswith("relu"):  # away from the corner, where a rounding is a step
        corner = "b_gate" if gated else "b1"
        call.tensors["norm_weight"] *= 0.2
        call.tensors["norm_bias"] *= 0.2
        call.tensors[corner] = torch.randn(48).sign().to(dtype) * 3
    judge(call, "cuda")


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize(("p", "hidden_p"), [(0.0, 0.3), (0.3, 0.0), (0.2, 0.4)])
def test_dropout_is_the_references(p: float, hidden_p: float, dtype: torch.dtype) -> None:
    given = {"dropout_p": p, "hidden_dropout_p": hidden_p, "seed": 2**50 + 9}
    judge(ffn(20, d=36, f=45, dtype=dtype, **given), "cuda")
    judge(ffn(20, d=36, f=45, dtype=dtype, gated=True, pre_norm=False, **given), "cuda")


@pytest.mark.parametrize("seed", [3, 2**40 + 11, -(2**62)])
def test_masks_are_those_of_the_reference_bit_by_bit(seed: int) -> None:
    """W1 and W2 are identities: what is 0 was dropped."""
    eye, ones = torch.eye(40), torch.ones(70, 40)
    for name, site in (("hidden_dropout_p", 1), ("dropout_p", 2)):
        y = fastattn.layernorm_ffn(
            ones, eye, None, eye, None, norm=None, activation="relu", residual=False, seed=seed,
            backend="cuda", **{name: 0.3},
        )  # fmt: skip
        keep = reference.dropout_keep(seed, 0.3, 1, 1, 70, 40, site=site)[0, 0]
        assert torch.equal(y != 0, keep)


@pytest.mark.parametrize("gated", [False, True])
def test_mixed_dtypes(gated: bool) -> None:
    """bf16 with fp32 norm and biases; and fp32 x with bf16 weights, as under autocast."""
    judge(ffn(20, dtype=BF16, param_dtype=FP32, gated=gated), "cuda")
    call = ffn(20, dtype=BF16, param_dtype=FP32, gated=gated, dropout_p=0.1, seed=5)
    call.tensors["x"] = torch.randn(20, 32)
    for pre_norm in (True, False):
        assert judge(call.with_(pre_norm=pre_norm), "cuda").outputs["y"].dtype == FP32


@pytest.mark.parametrize("alone", TRAINABLE)
def test_each_gradient_alone_is_that_of_all(alone: str, gpu: Device) -> None:
    for pre_norm in (True, False):
        call = ffn(21, d=24, f=40, gated=True, pre_norm=pre_norm, dtype=BF16)
        whole = run(call, "cuda").grads
        gpu.launches.clear()
        frozen = tuple(n for n in call.tensors if n != alone)
        (got,) = run(Call(call.op, call.tensors, call.kwargs, frozen), "cuda").grads.values()
        assert torch.equal(got, whole[alone])
        made = {k.removeprefix("bwd_") for k in kernels(gpu) if k.startswith("bwd_")}
        norm = alone.startswith("norm")
        by_rows = alone == "x" or (norm and pre_norm)
        by_hidden = alone in ("w1", "b1", "w2", "w_gate", "b_gate")
        sums = set() if alone == "x" else {"sum"}
        assert made == {"prepare"} | sums | ({"rows"} if by_rows else set()) | (
            {"weights"} if by_hidden else set()
        )


# -------------------------------------------------------------------------------- few rows, many


def test_few_rows_cut_the_hidden_units(gpu: Device) -> None:
    y_of(ffn(7, d=32, f=600, dtype=BF16))
    assert kernels(gpu) == ["fwd", "end"]
    assert gpu.launches[0].grid[0] == 5  # of 4 tiles of 32 units each, the last of 3
    judge(ffn(7, d=32, f=600, dtype=BF16, pre_norm=False, dropout_p=0.2, seed=3), "cuda")


def test_many_rows_are_one_kernel(gpu: Device) -> None:
    """Blocks of rows enough for the multiprocessors: as many as a GPU with one."""
    gpu._library.stand_in_play(8, 0, 1, 163 << 10, 164 << 10)
    y_of(ffn(130, d=32, f=300, dtype=BF16))
    assert kernels(gpu) == ["fwd"]
    assert gpu.launches[0].grid[0] == 3
    judge(ffn(130, d=32, f=300, dtype=BF16), "cuda")


def test_chunks_of_rows(gpu: Device) -> None:
    judge(ffn(600, d=16, f=40, dtype=BF16, gated=True, hidden_dropout_p=0.1, seed=4), "cuda")
    weights = [x for x in gpu.launches if "bwd_weights" in x.kernel]
    assert weights[0].grid[0] == 3 * 3  # three results of three chunks


@pytest.mark.parametrize("pre_norm", [True, pytest.param(False, marks=full)])
def test_bitwise_repeatable_in_any_order(gpu: Device, pre_norm: bool) -> None:
    call = ffn(
        70, d=40, f=200, dtype=BF16, gated=True, hidden_dropout_p=0.1, seed=1, pre_norm=pre_norm
    )
    first = run(call, "cuda").all()
    try:
        for order in ("reverse", "random"):
            gpu.schedule = ptx.Schedule(seed=3, order=order)
            again = run(call, "cuda").all()
            assert all(torch.equal(again[n], first[n]) for n in first), order
    finally:
        gpu.schedule = None


@pytest.mark.parametrize("d", [64, pytest.param(128, marks=full), pytest.param(256, marks=full)])
def test_fragments_meet_no_bank_conflict(d: int, gpu: Device) -> None:
    gpu.schedule = ptx.Schedule(traffic=True)
    try:
        run(ffn(64, d=d, f=64, dtype=BF16, gated=True), "cuda")
    finally:
        gpu.schedule = None
    for name in ("fwd", "rows", "weights"):
        (launch,) = [x for x in gpu.launches if f"_{name}_kernel" in x.kernel]
        reads = [t for t in launch.report.traffic if "ldmatrix" in t.site]
        assert reads
        assert [(t.site, t.ratio) for t in reads if t.ratio > 1] == []


# --------------------------------------------------------------------------------- hostile inputs


@pytest.mark.parametrize("dtype", [FP32, *(pytest.param(t, marks=full) for t in (BF16, FP16))])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_values(kind: str, dtype: torch.dtype) -> None:
    x = values((10, 40), dtype, kind, "k")
    judge(ffn(10, d=40, f=24, dtype=dtype, x=x), "cuda")
    judge(ffn(10, d=40, f=24, dtype=dtype, x=x, norm="rms", pre_norm=False), "cuda")


def test_rows_that_fp32_cannot_square(gpu: Device) -> None:
    """1e30, where squares overflow; subnormals; equal elements, of any size."""
    rows = {
        "huge": torch.randn(40) * 1e30,
        "one huge": torch.where(torch.arange(40) == 7, 3e38, torch.randn(40)),
        "subnormal": torch.randn(40) * 1e-41,
        "equal": torch.full((40,), 1000.1),
        "equal and huge": torch.full((40,), 1e30),
        "zero": torch.zeros(40),
    }
    x = torch.stack(list(rows.values()))
    for norm in ("layer", "rms"):
        call = ffn(len(rows), d=40, f=48, x=x, norm=norm, residual=False)
        y = y_of(call)
        cast = {n: t.double() for n, t in call.tensors.items()}
        right = reference.layernorm_ffn(**cast, **call.kwargs)
        assert y.isfinite().all()
        torch.testing.assert_close(y.double(), right, rtol=2e-5, atol=2e-5)


def test_a_nan_stays_in_its_row() -> None:
    call = ffn(20, d=40, f=48, dtype=BF16)
    clean = y_of(call)
    call.tensors["x"][3, 5], call.tensors["x"][9, 0] = float("nan"), float("inf")
    for norm in ("layer", "rms"):
        y = y_of(call.with_(norm=norm))
        assert y[[3, 9]].isnan().all()
        assert y[[0, 1, 2, *range(4, 9)]].isfinite().all()
    y = y_of(call)
    others = [i for i in range(20) if i not in (3, 9)]
    assert torch.equal(y[others], clean[others])


def test_what_lies_beyond_a_tensor_is_not_read() -> None:
    """Tails of rows, columns and hidden units, with NaN behind each."""
    call = ffn(7, d=40, f=48, dtype=BF16)
    right = run(call, "cuda").all()
    for name in ("x", "w1", "w2"):
        t = call.tensors[name]
        room = torch.full((t.shape[0] + 3, t.shape[1] + 8), float("nan"), dtype=t.dtype)
        room[: t.shape[0], : t.shape[1]] = t
        call.tensors[name] = room[: t.shape[0], : t.shape[1]]
    got = run(call, "cuda").all()
    assert all(torch.equal(got[n], right[n]) for n in right)


def test_swiglu_near_the_end_of_fp16() -> None:
    """u and act(g) of 200 each: their product is within fp16, and what is left of it is summed in
    fp32."""
    call = ffn(20, d=32, f=48, dtype=FP16, gated=True, activation="silu", norm=None, residual=False)
    for name in ("b1", "b_gate"):
        call.tensors[name] = torch.full((48,), 200.0, dtype=FP16)
    call.tensors["w2"] = call.tensors["w2"] * 2**-6
    judge(call, "cuda")


def test_a_hidden_layer_that_overflows_leaves_no_nan_in_empty_rows() -> None:
    """b1 = 300 squared is beyond fp16; rows that are not there must not make NaN of it."""
    call = ffn(5, d=32, f=48, dtype=FP16, activation="relu2", norm=None)
    call.tensors["b1"] = torch.full((48,), 300.0, dtype=FP16)
    call.tensors["x"] = -call.tensors["x"].abs()
    call.tensors["w1"] = torch.full((48, 32), 20.0, dtype=FP16)  # pulls u of every row below 0
    grads = run(call, "cuda").grads
    assert all(g.isfinite().all() for g in grads.values())
