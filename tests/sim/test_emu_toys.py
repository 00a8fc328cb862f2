"""The source emulator on toys: what is right stays silent, each planted fault is named."""

import pytest
import torch

from sim import emu_toys
from sim.emu import (
    HERE,
    SANITIZERS,
    SCHEDULES,
    BuildError,
    Case,
    EmulatorFault,
    LaunchError,
    Program,
    agreeing,
    run,
)

TOYS = {"gemm": emu_toys.gemm, "reduce": emu_toys.reduce, "grid": emu_toys.grid}
# fp32 sums of some hundred numbers of size 1, against fp64.
TOLERANCE = 1e-5


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", TOYS)
def test_correct_kernels_are_silent_under_every_schedule(name: str, sanitizer: str) -> None:
    toy = TOYS[name]()
    got = agreeing(toy.program, toy.case, sanitizer)
    assert toy.error(got) < TOLERANCE


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 8), (64, 64, 32), (65, 129, 40), (130, 3, 200)])
def test_gemm_of_any_shape(M: int, N: int, K: int) -> None:
    toy = emu_toys.gemm(M=M, N=N, K=K)
    assert toy.error(agreeing(toy.program, toy.case, "asan")) < TOLERANCE


def test_fences_order_as_release_and_acquire_do() -> None:
    toy = emu_toys.grid(bug=1)  # none: kFences
    assert toy.error(agreeing(toy.program, toy.case, "tsan", schedules=SCHEDULES[:2])) < TOLERANCE


# (toy, kBug, its number, sanitizer, kind): the rung that answers for the fault. Copies land
# eagerly, which hides most of these from values.
FAULTS = [
    ("gemm", "kNoWait", 1, "tsan", "race"),
    ("gemm", "kWrongWait", 2, "tsan", "race"),
    ("gemm", "kNoBarrierBefore", 3, "tsan", "race"),
    ("gemm", "kNoBarrierAfter", 4, "tsan", "race"),
    ("gemm", "kRowTooFar", 5, "asan", "out of bounds"),
    ("gemm", "kMisaligned", 6, "plain", "misaligned"),
    ("gemm", "kDivergedMma", 7, "plain", "diverged"),
    ("gemm", "kLdmatrixTooFar", 8, "plain", "out of bounds"),
    ("gemm", "kStoreTooFar", 10, "asan", "out of bounds"),
    ("gemm", "kOverlappingStages", 11, "tsan", "race"),
    ("reduce", "kNoBarrier", 1, "tsan", "race"),
    ("reduce", "kNoSyncWarp", 2, "tsan", "race"),
    ("reduce", "kShuffleFromGone", 3, "plain", "diverged"),
    ("reduce", "kTwoBarriers", 4, "plain", "barrier"),
    ("reduce", "kSpin", 5, "plain", "deadlock"),
    ("reduce", "kPlainSum", 7, "tsan", "race"),
    ("reduce", "kNotInMask", 8, "plain", "diverged"),
    ("reduce", "kBarrierBranch", 9, "plain", "barrier"),
    ("grid", "kNoGridBarrier", 2, "tsan", "race"),
    ("grid", "kRelaxed", 3, "tsan", "race"),
    ("grid", "kNoBarrierBefore", 4, "tsan", "race"),
    ("grid", "kNoBarrierAfter", 5, "tsan", "race"),
    ("grid", "kFenceTooEarly", 6, "tsan", "race"),
    ("grid", "kFenceOfBlock", 7, "tsan", "race"),
    ("grid", "kOneTooMany", 8, "plain", "deadlock"),
    ("grid", "kReadOnlyLoad", 9, "tsan", "race"),
    ("grid", "kOneBuffer", 10, "tsan", "race"),
    ("grid", "kPlainFlag", 11, "tsan", "race"),
]


@pytest.mark.parametrize(("name", "fault", "bug", "sanitizer", "kind"), FAULTS)
def test_faults_are_named(name: str, fault: str, bug: int, sanitizer: str, kind: str) -> None:
    enumerators = (HERE / "toys" / f"{name}.cu").read_text().split("kBugs")[0].split("kNone")[1]
    assert [e.split(",")[0].strip() for e in enumerators.splitlines()[1:-1]][bug - 1] == fault
    toy = TOYS[name](bug)
    # One schedule each way round: a rung that needs the lucky one is none.
    for schedule in ("forward", "reverse") if sanitizer == "tsan" else SCHEDULES:
        with pytest.raises(EmulatorFault) as caught:
            run(toy.program, toy.case, sanitizer, schedule=schedule)
        assert caught.value.kind == kind, caught.value.report
        assert f"{name}.cu" in caught.value.report  # the kernel's line is in the report


def test_reads_of_unwritten_shared_memory_change_with_the_poison() -> None:
    for toy in (emu_toys.reduce(bug=6), emu_toys.gemm(bug=9, K=40)):  # kUnwritten, kTailNotZeroed
        with pytest.raises(EmulatorFault, match="other bits") as caught:
            agreeing(toy.program, toy.case)
        assert caught.value.kind == "unstable"


def test_a_copy_used_before_it_landed_is_stale_where_copies_are_lazy() -> None:
    toy = emu_toys.gemm(bug=1)
    assert toy.error(run(toy.program, toy.case, cp_async="eager")) < TOLERANCE
    assert not toy.error(run(toy.program, toy.case, cp_async="lazy")) < TOLERANCE


def test_blocks_that_wait_for_blocks_not_resident_are_a_dead_lock() -> None:
    toy = emu_toys.grid(bug=12)  # kNotCooperative: three blocks
    assert toy.error(run(toy.program, toy.case, resident=3)) < TOLERANCE
    with pytest.raises(EmulatorFault, match=r"block \(1,0,0\).*an atomic at grid\.cu") as caught:
        run(toy.program, toy.case, resident=2)
    assert caught.value.kind == "deadlock"


def test_reports_say_whose_memory_and_which_thread() -> None:
    toy = emu_toys.gemm(bug=10)
    with pytest.raises(EmulatorFault) as caught:
        run(toy.program, toy.case, "asan")
    assert "is byte 18480 of the 18480 of tensor c" in caught.value.report
    assert "by block (1,1,0) thread (21,0,0)" in caught.value.report
    toy = emu_toys.grid(bug=2)
    with pytest.raises(EmulatorFault, match="of tensor h"):
        run(toy.program, toy.case, "tsan")


def test_a_tensor_of_any_lead_is_misaligned_by_name() -> None:
    toy = emu_toys.gemm()
    toy.case.lead["b"] = 8
    with pytest.raises(EmulatorFault, match="cp.async reads 16 bytes") as caught:
        run(toy.program, toy.case)
    assert caught.value.kind == "misaligned"


def test_launches_that_the_driver_would_refuse() -> None:
    toy = emu_toys.gemm()
    toy.case.tensors["b"] = torch.zeros(0, 72, dtype=torch.bfloat16)  # a grid without blocks
    toy.case.outputs["c"] = torch.zeros(70, 0)
    with pytest.raises(LaunchError) as caught:
        run(toy.program, toy.case)
    assert caught.value.code == 1  # cudaErrorInvalidValue


def test_names_that_the_launcher_does_not_know_are_refused() -> None:
    toy = emu_toys.gemm()
    toy.case.numbers["bgu"] = 1
    with pytest.raises(EmulatorFault, match="does not know 'bgu'"):
        run(toy.program, toy.case)
    with pytest.raises(EmulatorFault, match="no launcher 'gem'"):
        run(toy.program, Case("gem"))


def test_a_program_that_takes_too_long_says_where_it_is() -> None:
    toy = emu_toys.grid(steps=2_000_000)
    with pytest.raises(EmulatorFault, match="warp 0 lanes") as caught:
        run(toy.program, toy.case, seconds=1)
    assert caught.value.kind == "timeout"


def test_static_shared_memory_cannot_be_had_unseen(tmp_path) -> None:
    source = tmp_path / "shared.cu"
    source.write_text(
        '#include "platform.cuh"\nvoid kernel() { __shared__ float s[4]; s[0] = 1; }\n'
    )
    with pytest.raises(BuildError, match="FASTATTN_STATIC_SHARED"):
        Program((source,)).executable("plain")
