"""One planted bug for each fault, beside the correct program that must pass."""

from __future__ import annotations

import numpy as np
import pytest

from . import ptx
from .kit import HEADER, kernel, launch


def zeros(n: int = 64, dtype: str = "u4") -> np.ndarray:
    return np.zeros(n, dtype)


def at(thread_bytes: int, base: str = "%d0", to: str = "%d10") -> str:
    return f"mad.wide.u32 {to}, %r0, {thread_bytes}, {base};\n"


# -------------------------------------------------------------------------------------- bounds


def test_out_of_bounds_load_names_region_lane_and_line() -> None:
    body = at(4) + "ld.global.b32 %r1, [%d10+4];\nst.global.b32 [%d10], %r1;"
    launch(kernel(body), [zeros(33)], redundant_stores="fail", block=1)
    with pytest.raises(ptx.OutOfBounds, match=r"PTX line \d+ `ld.global.b32") as error:
        launch(kernel(at(4) + "ld.global.b32 %r1, [%d10+4];"), [zeros(32)])
    assert "lane 31" in str(error.value)
    assert "0 bytes beyond the end of a0" in str(error.value)


def test_out_of_bounds_store_before_the_region() -> None:
    with pytest.raises(ptx.OutOfBounds, match=r"4 bytes before a0|beyond the end"):
        launch(kernel("st.global.b32 [%d0+-4], %r0;"), [zeros()], block=1)


def test_guarded_off_lanes_may_point_anywhere() -> None:
    body = "setp.lt.u32 %p1, %r0, 8;\n" + at(4) + "@%p1 st.global.b32 [%d10], %r0;"
    x = zeros(8)
    launch(kernel(body), [x])
    assert x.tolist() == list(range(8))


def test_vector_access_ends_beyond_the_region() -> None:
    body = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0];"
    launch(kernel(body), [np.zeros(4, "u4")], block=1)
    room = np.zeros(8, "u4")
    start = -(room.ctypes.data // 4) % 4
    with pytest.raises(ptx.OutOfBounds):
        launch(kernel(body), [room[start : start + 3]], block=1)


def test_store_to_read_only_memory() -> None:
    x = zeros()
    memory = ptx.Memory()
    memory.add_array(x, writable=False, name="x")
    module = kernel("st.global.b32 [%d0], %r0;")
    with pytest.raises(ptx.OutOfBounds, match="read-only"):
        module.launch("k", (1,), (1,), module.kernels["k"].pack([x]), memory=memory)


def test_shared_out_of_bounds() -> None:
    declare = ".shared .align 16 .b8 s[128];\n"
    body = "mov.u32 %r1, s;\nmad.lo.u32 %r1, %r0, 4, %r1;\nst.shared.b32 [%r1{}], %r0;"
    launch(kernel(body.format(""), 0, declare), [])
    with pytest.raises(ptx.OutOfBounds, match=r"shared\+128, of 128 bytes"):
        launch(kernel(body.format("+4"), 0, declare), [])
    with pytest.raises(ptx.OutOfBounds, match="shared"):
        launch(kernel(body.format("+-4"), 0, declare), [])


def test_dynamic_shared_memory_has_the_size_of_the_launch() -> None:
    head = ".extern .shared .align 16 .b8 s[];\n"
    body = "mov.u32 %r1, s;\nmad.lo.u32 %r1, %r0, 4, %r1;\nst.shared.b32 [%r1], %r0;"
    launch(kernel(body, 0, head=head), [], shared=128)
    with pytest.raises(ptx.OutOfBounds, match="shared"):
        launch(kernel(body, 0, head=head), [], shared=124)


def test_local_memory_is_per_thread_and_bounded() -> None:
    declare = ".local .align 4 .b8 depot[8];\n.reg .b64 %SPL;\n"
    body = (
        "mov.u64 %SPL, depot;\nst.local.b32 [%SPL+4], %r0;\nld.local.b32 %r1, [%SPL+4];\n"
        + at(4)
        + "st.global.b32 [%d10], %r1;"
    )
    x = zeros(32)
    launch(kernel(body, 1, declare), [x])
    assert x.tolist() == list(range(32))
    with pytest.raises(ptx.OutOfBounds, match=r"local\+8"):
        launch(kernel(body.replace("+4]", "+8]"), 1, declare), [x])
    with pytest.raises(ptx.UnwrittenRead, match="local"):
        launch(kernel(body.replace("[%SPL+4], %r0", "[%SPL], %r0"), 1, declare), [x])


# ------------------------------------------------------------------------- alignment, unwritten


@pytest.mark.parametrize(
    ("load", "offset"), [("ld.global.b32 %r1", 2), ("ld.global.v2.b32 {%r1, %r2}", 4),
                         ("ld.global.b64 %d9", 4), ("ld.global.b16 %h1", 1)]
)  # fmt: skip
def test_misaligned_global(load: str, offset: int) -> None:
    room = np.zeros(64, "u1")
    start = -room.ctypes.data % 16
    x = room[start : start + 32]
    launch(kernel(f"{load}, [%d0];"), [x], block=1)
    with pytest.raises(ptx.Misaligned, match=f"{offset}|address"):
        launch(kernel(f"{load}, [%d0+{offset}];"), [x], block=1)


def test_misaligned_shared_vector() -> None:
    declare = ".shared .align 16 .b8 s[128];\n"
    body = "mov.u32 %r1, s;\nst.shared.v4.b32 [%r1{}], {{%r0, %r0, %r0, %r0}};"
    launch(kernel(body.format("+16"), 0, declare), [], block=1)
    with pytest.raises(ptx.Misaligned):
        launch(kernel(body.format("+8"), 0, declare), [], block=1)


def test_unwritten_global_until_somebody_writes() -> None:
    x = zeros(32)
    read = kernel(at(4) + "ld.global.b32 %r1, [%d10];")
    write = kernel(at(4) + "st.global.b32 [%d10], %r0;")
    memory = ptx.Memory()
    memory.add_array(x, written=False, name="x")
    params = read.kernels["k"].pack([x])
    with pytest.raises(ptx.UnwrittenRead, match=r"x\+0: nobody wrote it"):
        read.launch("k", (1,), (32,), params, memory=memory)
    write.launch("k", (1,), (31,), params, memory=memory)
    with pytest.raises(ptx.UnwrittenRead, match=r"x\+124.*"):
        read.launch("k", (1,), (32,), params, memory=memory)
    write.launch("k", (1,), (32,), params, memory=memory)
    read.launch("k", (1,), (32,), params, memory=memory)


def test_unwritten_shared_and_a_block_that_finds_its_predecessors_bytes() -> None:
    """Shared memory of a new block is nobody's, whatever the last block left there."""
    declare = ".shared .align 16 .b8 s[128];\n"
    body = (
        "mov.u32 %r1, s;\nmad.lo.u32 %r1, %r0, 4, %r1;\nmov.u32 %r2, %ctaid.x;\n"
        "setp.eq.u32 %p1, %r2, 0;\n{}st.shared.b32 [%r1], %r0;\nld.shared.b32 %r3, [%r1];"
    )
    launch(kernel(body.format(""), 0, declare), [], grid=2, resident_blocks=1)
    with pytest.raises(ptx.UnwrittenRead, match=r"block \(1, 0, 0\).*shared\+0"):
        launch(kernel(body.format("@%p1 "), 0, declare), [], grid=2, resident_blocks=1)


def test_unwritten_part_of_a_vector() -> None:
    declare = ".shared .align 16 .b8 s[16];\n"
    body = (
        "mov.u32 %r1, s;\nst.shared.v2.b32 [%r1], {%r0, %r0};\n"
        "ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];"
    )
    with pytest.raises(ptx.UnwrittenRead, match=r"shared\+8"):
        launch(kernel(body, 0, declare), [], block=1)


# ----------------------------------------------------------------------------------- divergence

DIVERGED = [
    "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;",
    "vote.sync.ballot.b32 %r1, %p1, -1;",
    "redux.sync.add.u32 %r1, %r0, -1;",
    "match.any.sync.b32 %r1, %r0, -1;",
    "bar.warp.sync -1;",
    "bar.sync 0;",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0,%f1,%f2,%f3}, {%r1,%r2,%r3,%r4}, "
    "{%r5,%r6}, {%f0,%f1,%f2,%f3};",
]


@pytest.mark.parametrize("instruction", DIVERGED, ids=lambda x: x.split(" ")[0])
def test_warp_wide_instruction_in_a_branch(instruction: str) -> None:
    """Lanes 16 to 31 jump over it, to a place from which they never come back."""

    def body(limit: int, after: str) -> str:
        return f"setp.lt.u32 %p1, %r0, {limit};\n@!%p1 bra SKIP;\n{instruction}\nSKIP:\n{after}"

    launch(kernel(body(32, ""), 0), [])
    # Those who jumped wait at a barrier, so they have not exited.
    with pytest.raises(ptx.Diverged, match="do not come"):
        launch(kernel(body(16, "bar.sync 1;"), 0), [])


def test_aligned_instruction_after_an_exit() -> None:
    body = (
        "setp.lt.u32 %p1, %r0, 31;\n@!%p1 exit;\n"
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0,%f1,%f2,%f3}, "
        "{%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f0,%f1,%f2,%f3};"
    )
    with pytest.raises(ptx.Diverged, match=r"exited: \[31\]"):
        launch(kernel(body, 0), [])
    # .sync without .aligned does not wait for who has exited.
    launch(kernel(body.split("mma")[0] + "bar.warp.sync -1;\nbar.sync 0;", 0), [])


def test_lanes_that_part_and_meet_again() -> None:
    """The side path lies behind the join: lanes must wait for each other there."""
    body = (
        "mov.u32 %r1, 0;\nsetp.lt.u32 %p1, %r0, 16;\n@%p1 bra SIDE;\n"
        "JOIN:\nshfl.sync.idx.b32 %r2, %r1, 0, 31, -1;\n" + at(4) + "st.global.b32 [%d10], %r2;\n"
        "exit;\nSIDE:\nmov.u32 %r1, 7;\nbra JOIN;"
    )
    x = zeros(32)
    launch(kernel(body), [x])
    assert set(x.tolist()) == {7}


def test_masks_of_a_part_of_the_warp() -> None:
    body = (
        "setp.lt.u32 %p1, %r0, 16;\n@!%p1 bra HIGH;\n"
        "shfl.sync.down.b32 %r1, %r0, 1, 31, {low};\nbra JOIN;\n"
        "HIGH:\nshfl.sync.down.b32 %r1, %r0, 1, 31, 0xffff0000;\nJOIN:\n"
        + at(4)
        + "st.global.b32 [%d10], %r1;"
    )
    x = zeros(32)
    with pytest.raises(ptx.Diverged, match="reads lane 16"):
        launch(kernel(body.replace("{low}", "0xffff")), [x])
    inside = body.replace("{low}", "0xffff").replace("1, 31, 0xffff;", "1, 0x100f, 0xffff;")
    launch(kernel(inside), [x])
    assert x.tolist() == [*range(1, 16), 15, *range(17, 32), 31]
    with pytest.raises(ptx.Diverged):
        launch(kernel(body.replace("{low}", "0x1ffff")), [x])


def test_masks_that_name_lanes_that_have_exited() -> None:
    """Only who has not exited is waited for."""
    body = "setp.ge.u32 %p1, %r0, 20;\n@%p1 exit;\nvote.sync.ballot.b32 %r1, %p2, 0x3fffffff;"
    launch(kernel(body, 0), [])


def test_shuffle_from_a_lane_that_is_here_but_not_in_the_mask() -> None:
    """Two halves at one instruction, each with a mask of its own."""
    body = (
        "setp.lt.u32 %p1, %r0, 16;\nselp.b32 %r2, 0xffff, 0xffff0000, %p1;\n"
        "shfl.sync.bfly.b32 %r1, %r0, {}, 31, %r2;"
    )
    launch(kernel(body.format(8), 0), [])
    with pytest.raises(ptx.Diverged, match="reads lane 16, which is not in mask 0xffff"):
        launch(kernel(body.format(16), 0), [])


def test_lane_outside_of_its_own_mask() -> None:
    with pytest.raises(ptx.Diverged, match="not in its own mask"):
        launch(kernel("vote.sync.any.pred %p1, %p2, 0x7fffffff;", 0), [])


# ------------------------------------------------------------------------------------ dead-lock


def test_barrier_that_one_warp_never_reaches() -> None:
    """It waits at another barrier instead."""
    body = (
        "shr.u32 %r1, %r0, 5;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 bra OTHER;\nbar.sync 0;\nbra END;\n"
        "OTHER:\nbar.sync {};\nEND:\n"
    )
    launch(kernel(body.format(0), 0), [], block=64)
    with pytest.raises(ptx.Deadlock, match="barrier 0 with 32 of 64 threads"):
        launch(kernel(body.format(1), 0), [], block=64)


def test_exited_warps_are_not_waited_for() -> None:
    body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 exit;\nbar.sync 0;"
    launch(kernel(body, 0), [], block=96)


def test_warps_that_exit_while_others_wait() -> None:
    body = (
        "setp.ge.u32 %p1, %r0, 32;\n@%p1 bra LATE;\nbar.sync 0;\nbra END;\n"
        "LATE:\nbar.warp.sync -1;\nexit;\nEND:\n"
    )
    for order in ("forward", "reverse", "random"):
        launch(kernel(body, 0), [], block=96, order=order)


GRID_BARRIER = (
    "setp.ne.u32 %p1, %r0, 0;\nbar.sync 0;\n@%p1 bra WAITED;\n"
    "fence.acq_rel.gpu;\natom.global.add.u32 %r1, [%d0], 1;\nmov.u32 %r2, %nctaid.x;\n"
    "SPIN:\nld.acquire.gpu.global.b32 %r3, [%d0];\nsetp.lt.u32 %p2, %r3, %r2;\n@%p2 bra SPIN;\n"
    "WAITED:\nbar.sync 0;\n"
)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_grid_barrier_needs_all_blocks_resident(order: str) -> None:
    module = kernel(GRID_BARRIER)
    launch(module, [zeros(1)], grid=6, block=64, cooperative=True, order=order, seed=1)
    with pytest.raises(ptx.Deadlock, match="blocks have not started"):
        launch(module, [zeros(1)], grid=6, block=64, resident_blocks=3, order=order, patience=2000)
    with pytest.raises(ptx.BadLaunch, match="cooperative launch of 6 blocks where 3 fit"):
        launch(module, [zeros(1)], grid=6, block=64, resident_blocks=3, cooperative=True)


def test_flag_that_nobody_sets() -> None:
    body = "SPIN:\nld.volatile.global.b32 %r1, [%d0];\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 bra SPIN;"
    launch(kernel(body), [np.ones(1, "u4")])
    with pytest.raises(ptx.Deadlock, match="no memory changed"):
        launch(kernel(body), [zeros(1)])


def test_spin_within_a_warp_makes_progress() -> None:
    """Lane 0 waits for lane 1 (independent thread scheduling: both must run)."""
    body = (
        "setp.ne.u32 %p1, %r0, 0;\n@%p1 bra SET;\n"
        "SPIN:\nld.acquire.gpu.global.b32 %r1, [%d0];\nsetp.eq.u32 %p2, %r1, 0;\n@%p2 bra SPIN;\n"
        "exit;\nSET:\nsetp.eq.u32 %p3, %r0, 1;\n@%p3 st.release.gpu.global.b32 [%d0], 1;"
    )
    launch(kernel(body), [zeros(1)])


def test_named_barriers_with_different_counts() -> None:
    body = (
        "shr.u32 %r1, %r0, 5;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 bra OTHER;\nbar.sync 1, 64;\n"
        "bra END;\nOTHER:\nbar.sync 1, {};\nEND:\n"
    )
    launch(kernel(body.format(64), 0), [], block=64)
    with pytest.raises(ptx.Deadlock, match="where others wait for"):
        launch(kernel(body.format(96), 0), [], block=64)


# ----------------------------------------------------------------------------- launch and load


def test_launches_the_driver_would_refuse() -> None:
    module = kernel("", 0)
    for grid, block, shared in (((0,), (32,), 0), ((1,), (1025,), 0), ((1, 65536), (1,), 0),
                                ((1,), (32,), 164 << 10)):  # fmt: skip
        with pytest.raises(ptx.BadLaunch):
            module.launch("k", grid, block, b"", shared)
    with pytest.raises(ptx.BadLaunch, match="of parameters"):
        module.launch("k", (1,), (1,), b"1234")
    with pytest.raises(ptx.BadLaunch, match="no kernel"):
        module.launch("other", (1,), (1,), b"")
    limited = ptx.load(f"{HEADER}.visible .entry k()\n.maxntid 64, 1, 1\n{{\nret;\n}}\n")
    assert limited.kernels["k"].maxntid == (64, 1, 1)
    limited.launch("k", (1,), (64,), b"")
    with pytest.raises(ptx.BadLaunch, match="compiled for at most"):
        limited.launch("k", (1,), (65,), b"")


@pytest.mark.parametrize(
    "line",
    [
        "wgmma.fence.sync.aligned;", "add.cc.u32 %r1, %r1, %r2;", "tex.1d.v4.s32.s32 %r1, %r2;",
        "ld.global.weird.b32 %r1, [%d0];", "cvt.rn.e4m3x2.f32 %h1, %f1, %f2;", "mov.u32 %r1, %sm;",
        "fma.f32 %f1, %f1, %f1, %f1;", "div.f32 %f1, %f1, %f1;", "shfl.up.b32 %r1, %r0, 1, 0;",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r1}, {%r1}, {%r1};",
        "add.u32 %h1, %h1, %h2;", "call f, ();", "bra NOWHERE;", "mov.u32 %r1, unknown;",
        ".branchtargets x;", "ld.global.v4.b64 {%d1, %d2, %d3, %d4}, [%d0];",
        "setp.lt.u32 %p1, %r1;", "atom.global.add.s16 %h1, [%d0], %h2;",
    ],
)  # fmt: skip
def test_unknown_ptx_is_refused_when_loaded(line: str) -> None:
    with pytest.raises(ptx.Unsupported, match=r"PTX line \d+"):
        kernel(line)


@pytest.mark.parametrize("stop", ["trap;", "brkpt;", "call __assertfail, (a, b);"])
def test_trap_and_assertions(stop: str) -> None:
    body = "setp.eq.u32 %p1, %r0, {};\n@%p1 {}"
    launch(kernel(body.format(40, stop), 0), [])
    with pytest.raises(ptx.Trap, match="lane 7"):
        launch(kernel(body.format(7, stop), 0), [])


def test_only_the_kernels_asked_for_are_read() -> None:
    body = ".visible .entry {}()\n{{\n{}\nret;\n}}\n"
    text = HEADER + body.format("a", "nonsense.b32;") + body.format("b", "{ bar.sync 0; }")
    with pytest.raises(ptx.Unsupported, match="nonsense"):
        ptx.load(text)
    module = ptx.load(text, only=["b"])
    assert list(module.kernels) == ["b"]
    module.launch("b", (1,), (32,), b"")
    with pytest.raises(ptx.Unsupported, match=r"no kernel \['c'\]"):
        ptx.load(text, only=["c"])


def test_fault_names_source_lines() -> None:
    module = ptx.load(
        f'{HEADER}.file 1 "kernel.cu"\n.file 2 "helper.cuh"\n.visible .entry k(.param .u64 q)\n'
        "{\n.reg .b64 %d;\n.reg .b32 %r;\n.loc 2 17 3, function_name $L, inlined_at 1 42 5\n"
        "ld.param.u64 %d, [q];\nld.global.b32 %r, [%d];\nret;\n}\n"
    )
    with pytest.raises(ptx.OutOfBounds, match=r"helper\.cuh:17, called at kernel\.cu:42"):
        module.launch("k", (1,), (1,), module.kernels["k"].pack([64]))
