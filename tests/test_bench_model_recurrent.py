"""bench/model/recurrent.py: the limits of the plan, what is read of a kernel, a step by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from bench.model import latency, predict, recurrent, recurrent_report, report, sass
from bench.model.archs import ARCHS
from bench.model.recurrent import Call, Code, Plan

A100, H100 = ARCHS["sm_80"], ARCHS["sm_90"]
# A warp's tile of a bf16 kernel: three chunks of four gates for two eights, and a cell.
CODE = Code(
    Counter({"mma": 3 * 4 * 2 * 2 * 4096.0, "issue": 64.0}),
    Counter({"issue": 300.0, "alu": 3200.0}),
)


def _most(arch: str, cell: str, dtype: str, tier: str, backward: bool = False) -> int:
    """The largest H of a tier."""
    served = [
        H
        for H in range(16, 2400, 16)
        if recurrent.plan(Call(cell, dtype, 1, 8, H, 1, backward), ARCHS[arch]).tier == tier
    ]
    return max(served)


@pytest.mark.parametrize(
    ("arch", "dtype", "tier", "H"),
    [
        ("sm_80", "bf16", "block", 128),
        ("sm_80", "fp32", "block", 96),
        ("sm_90", "fp32", "block", 128),
        ("sm_80", "bf16", "grid", 1728),
        ("sm_90", "bf16", "grid", 2112),
        ("sm_80", "fp32", "grid", 944),
        ("sm_90", "fp32", "grid", 1200),
        ("sm_120", "bf16", "grid", 1216),
    ],
)
def test_limits_of_the_tiers_are_those_that_the_launcher_states(
    arch: str, dtype: str, tier: str, H: int
) -> None:
    """csrc/cuda/recurrent.cu, above recurrent_plan()."""
    assert _most(arch, "lstm", dtype, tier) == H


def test_sequences_are_cut_into_groups_where_multiprocessors_are_left() -> None:
    assert recurrent.plan(Call("lstm", "bf16", 9, 32, 512), A100) == Plan("grid", 32, 1, 16, 2)
    assert recurrent.plan(Call("lstm", "bf16", 9, 32, 512), H100) == Plan("grid", 32, 1, 8, 4)
    assert recurrent.plan(Call("lstm", "bf16", 9, 32, 512, 2), A100).directions == 2
    assert recurrent.plan(Call("lstm", "bf16", 9, 8, 1024, 2), A100).directions == 1


def test_products_and_cell_are_told_apart() -> None:
    """Time, tiles of sequences, chunks: the loop in the middle, with the way through the cell."""
    lines = (
        ".L_time:", ".L_tile:", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P3 BRA `(.L_sums)",
        ".L_rest:", "LDS.128 R1, [R2]", "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P0 BRA `(.L_rest)", ".L_sums:", "@P4 BRA `(.L_none)", "MUFU.EX2 R1, R2",
        "STG.E [R2.64], R1", ".L_none:", "@P1 BRA `(.L_tile)", "@P2 BRA `(.L_time)", "EXIT",
    )  # fmt: skip
    text = ['\t.section\t.text.kernel,"ax"']
    for at, line in enumerate(lines):
        text.append(line if line.startswith(".") else f"        /*{16 * at:04x}*/     {line} ;")
    code = recurrent.read(sass.functions("\n".join([*text, ""]))["kernel"])
    assert code.product["mma"] == 2 * 4096
    assert (code.rest["xu"], code.rest["mma"]) == (32, 0)
    with pytest.raises(predict.ModelError, match="no loop over tiles"):
        recurrent.read(sass.functions("\n".join([text[0], text[3], ""]))["kernel"])


def test_a_step_of_the_grid_by_hand() -> None:
    """LSTM bf16, B 16, H 768 on an A100: 48 slices, two groups of 8 sequences; a warp has 3 of 24
    chunks, of 4 gates."""
    step = recurrent.step(Call("lstm", "bf16", 100, 16, 768), A100, CODE)
    pitch = (768 * 2 // 64 | 1) * 64
    moved = 96 * 8 * pitch
    assert step.bytes == moved
    near, far = 203, 423  # L2 of an A100 (latency.py); an SM's port has 64 to 35 bytes a cycle
    assert step.load == (near + max(moved / 5120, 8 * pitch / 64), far + 8 * pitch / 35)
    assert 8 * pitch / 35 > moved / 3840
    # 3 chunks x 2 k steps of 4 gates by 8 warps, 4096 FLOPs each, at 2048 a cycle; the chain: 6.
    mma = 3 * 2 * 4 * 8 * 4096 / 2048
    assert step.product == (max(mma, 6 * 25), max(mma, 6 * 35))
    # Issue slots of the four warps with sequences, or the chain behind the product.
    assert step.cell == (max(4 * 300 / 4, 60 + 280), max(4 * 300 / 4, 90 + 480))
    assert step.barrier == (2 * near + 40, 3 * far + 60)
    best = step.load[0] + step.product[0] + step.cell[0] + step.barrier[0]
    assert A100.clock is not None
    assert math.isclose(step.seconds[0], best / A100.clock)
    assert math.isclose(step.of_call[1], 100 * step.seconds[1])


def test_a_block_alone_neither_loads_nor_waits() -> None:
    step = recurrent.step(Call("lstm", "bf16", 10, 8, 128), A100, CODE)
    assert (step.load, step.barrier, step.bytes) == ((0, 0), (0, 0), 0)
    wide = recurrent.step(Call("lstm", "bf16", 10, 8, 128, 2), A100, CODE)
    assert wide.seconds == step.seconds  # directions side by side


def test_directions_in_turn_take_twice_the_time() -> None:
    one = recurrent.step(Call("lstm", "bf16", 10, 8, 1024), A100, CODE)
    two = recurrent.step(Call("lstm", "bf16", 10, 8, 1024, 2), A100, CODE)
    assert math.isclose(two.seconds[0], 2 * one.seconds[0])


def test_the_step_tier_reads_its_weights_every_step() -> None:
    small = recurrent.step(Call("lstm", "fp32", 10, 8, 1216), A100, None)
    large = recurrent.step(Call("lstm", "bf16", 10, 8, 4096), A100, None)
    assert small.plan.tier == large.plan.tier == "step"
    assert small.seconds[0] >= 2 * latency.KERNEL_S[0]
    assert large.seconds[0] > 4 * 4096 * 4096 * 2 / A100.dram
    with pytest.raises(predict.ModelError, match="machine code is needed"):
        recurrent.step(Call("lstm", "bf16", 10, 8, 512), A100, None)


def test_the_section_says_model() -> None:
    """With one kernel's code for all: every case of both architectures, and the comparison."""
    wide = Code(Counter({"mma_tf32": 4096.0, "mma": 4096.0, "issue": 9.0}), CODE.rest)

    class Any(dict[tuple[str, str], Code]):
        def __missing__(self, _: tuple[str, str]) -> Code:
            return wide

    text = recurrent_report.section(Any({("", ""): wide}), report.markdown)
    assert "*Model*, not run on hardware yet" in text
    assert text.count(" H=") == 2 * 2 * len(recurrent.CASES)
    assert "| cuDNN (torch's nn.LSTM), fp16, persistent | 2.01 | 5.19 |" in text
    assert recurrent_report.section({}, report.markdown) == ""
