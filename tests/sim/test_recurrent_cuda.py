"""The recurrence by CUDA C++ on CPU tensors: the shipped binding, launchers and kernels (as sm_80
PTX, in the simulator) against the fp64 oracle, values and gradients, for every tier."""

import re
from dataclasses import replace
from typing import Any

import pytest
import recurrent_layers as layers
import torch
from recurrence_calls import (
    GRU,
    LSTM,
    RNN_RELU,
    RNN_TANH,
    backward,
    call,
    cuda,
    forward,
    judge,
    run,
)  # fmt: skip

from fastattn.ops import recurrent_gpu
from fastattn.ops.recurrent_cuda import BLOCK, GRID, STEP, tier_of
from sim import ptx
from sim.cudart import Device

pytestmark = [pytest.mark.usefixtures("gpu"), pytest.mark.sampled(2)]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS = torch.ops.fastattn
full = pytest.mark.full
BOTH: dict[str, Any] = {"D": 2, "reverse": 2}
RAGGED = [4, 1, 0, 3, 2]


def kernels(gpu: Device) -> list[str]:
    """By their short names, in order; those that keep W_hh have a cell for argument."""
    found = []
    for x in gpu.launches:
        of_cell = re.search(r"\drecurrent_(fwd|bwd)_kernelIN\w*?\d(Lstm|Gru|Rnn)CellE", x.kernel)
        if of_cell:
            found.append(f"{of_cell[2].lower()}_{of_cell[1]}")
        else:
            found += re.findall(r"\d(recurrent_\w+?)_kernel", x.kernel)[:1]
    return found


# ------------------------------------------------------------------------------- cells and dtypes


@pytest.mark.parametrize("tier", [BLOCK, GRID, STEP])
@pytest.mark.parametrize(
    ("cell", "dtype"),
    [
        (LSTM, BF16),
        (GRU, FP16),
        (RNN_TANH, FP32),
        *(
            pytest.param(c, d, marks=full)
            for c in (LSTM, GRU, RNN_TANH, RNN_RELU)
            for d in (BF16, FP16, FP32)
            if (c, d) not in ((LSTM, BF16), (GRU, FP16), (RNN_TANH, FP32))
        ),
    ],
)
def test_cells(cell: int, dtype: torch.dtype, tier: int, gpu: Device) -> None:
    judge(call(cell, dtype=dtype, H=20, T=3, mask=True, **BOTH), cuda(tier))
    name = {LSTM: "lstm", GRU: "gru"}.get(cell, "rnn")
    if tier == STEP:
        assert kernels(gpu) == 3 * ["recurrent_step_fwd"] + 4 * ["recurrent_step_bwd"]
    else:
        assert kernels(gpu) == [f"{name}_fwd", f"{name}_bwd"]
        assert [x.cooperative for x in gpu.launches] == 2 * [tier == GRID]


@pytest.mark.parametrize("tier", [BLOCK, GRID, STEP])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", [LSTM, pytest.param(GRU, marks=full)])
def test_lengths_and_packed_rows(cell: int, packed: bool, tier: int) -> None:
    rows = {"packed": [4, 3, 2, 1, 1]} if packed else {"lengths": RAGGED}
    judge(call(cell, dtype=BF16, H=20, **rows, **BOTH), cuda(tier))


@pytest.mark.parametrize(
    ("options", "tier"),
    [
        ({"H": 1, "B": 1, "T": 1}, GRID),
        ({"H": 1, "B": 1, "T": 2}, BLOCK),
        ({"H": 33, "B": 17, "T": 2}, GRID),  # two tiles of sequences where groups have no room
        ({"H": 128, "B": 9, "T": 2}, BLOCK),
        ({"H": 20, "B": 3, "T": 2, "P": 1}, STEP),
        ({"H": 20, "B": 5, "P": 7, "lengths": RAGGED, "mask": True, **BOTH}, STEP),
        ({"H": 20, "P": 24, "packed": [4, 3, 3, 1, 1]}, STEP),
        pytest.param({"H": 300, "B": 3, "T": 2}, GRID, marks=full),
        pytest.param({"H": 128, "B": 40, "T": 3, "cell": GRU}, BLOCK, marks=full),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP32, marks=full)], ids=str)
def test_shapes(options: dict[str, Any], tier: int, dtype: torch.dtype) -> None:
    judge(call(dtype=dtype, **options), cuda(tier))


@full
def test_columns_beyond_the_registers() -> None:
    """fp32 LSTM: 384 columns in registers, the others in shared memory; 26 blocks."""
    judge(call(H=410, B=2, T=2), cuda(GRID))


@pytest.mark.parametrize("tier", [BLOCK, GRID, STEP])
@pytest.mark.parametrize("cell", [LSTM, GRU])
def test_nothing_to_do(cell: int, tier: int, gpu: Device) -> None:
    """No step, no sequence: the states go through, without a launch."""
    for sizes in ({"T": 0}, {"B": 0}):
        made = call(cell, dtype=BF16, H=8, **sizes)
        got, up = run(made, cuda(tier)), made.upstreams()
        assert torch.equal(got["h_n"], made.tensors["h0"])
        assert torch.equal(got["dh0"], up["h_n"])
        if cell == LSTM:
            assert torch.equal(got["c_n"], made.tensors["c0"])
            assert torch.equal(got["dc0"], up["c_n"])
    assert not gpu.launches


# ---------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("tier", [BLOCK, GRID, STEP])
def test_nan_of_rows_that_nobody_has_goes_nowhere(tier: int) -> None:
    made = call(dtype=BF16, H=20, lengths=RAGGED, **BOTH)
    clean = run(made, cuda(tier))
    made.tensors["gx"][:, ~made.there()] = torch.nan
    for name, x in run(replace(made, poison=True), cuda(tier)).items():
        assert torch.equal(x, clean[name]), name


@pytest.mark.parametrize("tier", [BLOCK, GRID])
def test_a_nan_stays_in_its_sequence(tier: int) -> None:
    made = call(dtype=BF16, H=20, B=5)
    clean = run(made, cuda(tier))
    made.tensors["h0"][0, 3, 5] = torch.nan
    got = run(made, cuda(tier))
    others = [0, 1, 2, 4]
    assert got["h_n"][:, 3].isnan().any()
    for name in ("h_n", "c_n", "dh0"):
        assert torch.equal(got[name][:, others], clean[name][:, others]), name


@pytest.mark.parametrize("tier", [BLOCK, GRID, STEP])
def test_offsets_of_anybody_stay_inside_the_tensors(tier: int) -> None:
    made = call(dtype=BF16, H=20, packed=[3, 2, 2, 1])
    for offsets in ([0, 10**12, -5, 3], [-7, 4, 2, 10**9]):
        wild = replace(made, offsets=torch.tensor(offsets))
        y, _, _, gates, cells = forward(wild, kernels=cuda(tier))
        backward(wild, (y, gates, cells), cuda(tier))


# ----------------------------------------------------------------------------- order, bits, banks


@pytest.mark.parametrize("tier", [BLOCK, GRID])
def test_bitwise_repeatable_in_any_order(gpu: Device, tier: int) -> None:
    made = call(dtype=BF16, H=36, B=9, T=3, **BOTH)
    first = run(made, cuda(tier))
    try:
        for order in ("reverse", "random"):
            gpu.schedule = ptx.Schedule(seed=3, order=order)
            again = run(made, cuda(tier))
            assert all(torch.equal(again[n], first[n]) for n in first), order
    finally:
        gpu.schedule = None


def test_no_bank_conflicts_of_operands_and_sums(gpu: Device) -> None:
    """Weights and h in shared memory: 16-byte reads that take the wavefronts they must."""
    gpu.schedule = ptx.Schedule(traffic=True)
    try:
        run(call(dtype=BF16, H=128, B=8, T=2), cuda(BLOCK))
    finally:
        gpu.schedule = None
    for launch in gpu.launches:
        found = [t for t in launch.report.traffic if t.space == "shared" and "v4" in t.site]
        assert found, "no vector access of shared memory was seen"
        assert [(t.site, t.ratio) for t in found if t.ratio > 1] == []


# --------------------------------------------------------------------------- tiers, launches, words


def test_the_tier_follows_from_sizes_and_gpu(gpu: Device) -> None:
    def tiers_here(*hidden: int, cell: int = LSTM, dtype: torch.dtype = BF16) -> list[int]:
        like = torch.empty(0, dtype=dtype)
        return [tier_of(like, 16, H, H, 1, cell, False) for H in hidden]

    def tiers(arch: str, cell: int, dtype: torch.dtype, *hidden: int) -> list[int]:
        with gpu.playing(arch):
            return tiers_here(*hidden, cell=cell, dtype=dtype)

    assert tiers("sm_80", LSTM, BF16, 128, 129, 1728, 1729) == [BLOCK, GRID, GRID, STEP]
    assert tiers("sm_90", LSTM, BF16, 128, 2112, 2113) == [BLOCK, GRID, STEP]
    assert tiers("sm_90", LSTM, FP32, 128, 1200, 1201) == [BLOCK, GRID, STEP]
    assert tiers("sm_80", LSTM, FP32, 96, 97, 944, 945) == [BLOCK, GRID, GRID, STEP]
    assert tiers("sm_120", LSTM, BF16, 128, 1216, 1217) == [BLOCK, GRID, STEP]
    assert tiers("sm_80", GRU, BF16, 1728, 1729) == [GRID, STEP]
    assert tier_of(torch.empty(0), 16, 64, 32, 1, LSTM, False) == STEP
    gpu._library.stand_in_play(8, 0, 107, 163 << 10, 164 << 10)  # 108 slices, a block each
    assert tiers_here(1728) == [STEP]


def test_every_launch_goes_to_the_device_and_stream_of_the_call(gpu: Device) -> None:
    with gpu.placed(1, 7) as stream:
        for tier in (BLOCK, GRID, STEP):
            run(call(dtype=BF16, H=8, T=1, B=1), cuda(tier))
    assert {(x.device, x.stream) for x in gpu.launches} == {(1, stream)}


@pytest.mark.parametrize("name", ["cudaLaunchKernel", "cudaMemsetAsync", "cudaFuncSetAttribute"])
def test_a_failing_call_says_what_it_was(gpu: Device, name: str) -> None:
    made = call(dtype=BF16, H=8, T=1, B=1)
    with gpu.failing(name, 701), pytest.raises(RuntimeError) as raised:
        run(made, cuda(GRID))
    assert "fastattn::recurrence_cuda" in str(raised.value)
    assert "cudaErrorLaunchOutOfResources" in str(raised.value)
    judge(made, cuda(GRID))  # no error stays behind
    assert gpu.idle()


def refusals() -> dict[str, dict[str, Any]]:
    wide = torch.zeros
    return {
        r"w_hh must have shape \(32, 8\).*got \(32, 7\)": {"w_hh": [wide(32, 7)]},
        r"w_hh must have 1 tensors, got 2": {"w_hh": [wide(32, 8), wide(32, 8)]},
        r"gx must have T B = 6 rows without offsets, got 5": {"gx": wide(1, 5, 32)},
        r"gx must have shape \(1, 6, 32\)": {"gx": wide(1, 6, 24)},
        r"h0 must have shape \(D, B, P\)": {"h0": wide(2, 8)},
        r"c0 must have shape \(1, 2, 8\)": {"c0": wide(1, 2, 7)},
        r"c0 is the LSTM's, which needs it": {"c0": None},
        r"b_hn is the GRU's alone": {"b_hn": [wide(8)]},
        r"h_mask must have h0's dtype": {"h_mask": wide(1, 2, 8).half()},
        r"offsets must be int64 of shape \(4,\), got \(3,\)": {
            "offsets": wide(3, dtype=torch.int64)
        },
        r"lengths must be int32 or int64 of shape \(2,\)": {"lengths": wide(2)},
        r"cell must be 0, 1, 2 or 3, got 4": {"cell": 4},
        r"reverse must have a bit a direction, got 2": {"reverse": 2},
        r"w_hr: a projection takes a GEMM a step": {"w_hr": [wide(4, 8)]},
    }


@pytest.mark.parametrize("words", refusals())
def test_a_direct_call_stays_inside_its_tensors(gpu: Device, words: str) -> None:
    given = {**call(H=8, T=3, B=2).arguments(), **refusals()[words]}
    with pytest.raises(RuntimeError, match=rf"fastattn::recurrence_cuda: {words}"):
        OPS.recurrence_cuda_kernel_fwd(*given.values(), True, 0)
    assert not gpu.launches
    assert gpu.idle()


def test_an_lstm_too_wide_for_the_gpu_is_named(gpu: Device) -> None:
    given = call(H=8, T=1, B=1).arguments()
    with pytest.raises(RuntimeError, match="w_hh of H 8 does not stay in this GPU's registers"):
        OPS.recurrence_cuda_kernel_fwd(*given.values(), True, STEP)


# ------------------------------------------------------------------------------------ whole layers


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layers(cell: str, gpu: Device) -> None:
    """backend="cuda" of the public functions: GEMMs, biases, gradients of weights around it."""
    layers.judge(layers.make(cell, D=2, B=3, lengths=[2, 5, 0]), "cuda")
    assert kernels(gpu)


@pytest.mark.parametrize("cell", [LSTM, GRU])
def test_the_first_use_check_passes(cell: int, gpu: Device) -> None:
    given = call(cell, H=9, T=3, **BOTH).arguments()
    names = ("w_hh", "b_hn", "w_hr", "h0", "c0", "h_mask", "offsets", "lengths", "T", "cell")
    arguments = (*(given[n] for n in names), given["reverse"])
    assert recurrent_gpu._check("cuda", arguments) is None
    assert kernels(gpu)
