"""Happens-before: each pattern with the thing that orders it, and without."""

from __future__ import annotations

import numpy as np
import pytest

from . import ptx
from .kit import kernel, launch

SHARED = ".shared .align 16 .b8 s[1024];\n"
ORDERS = ["forward", "reverse", "random"]
MINE = "mov.u32 %r1, s;\nmad.lo.u32 %r2, %r0, 4, %r1;\n"  # %r2: this thread's word
# %r3: the word of the same lane in the other warp (of two), %r4: of the neighbour lane
OTHERS = "xor.b32 %r5, %r0, 32;\nmad.lo.u32 %r3, %r5, 4, %r1;\nxor.b32 %r5, %r0, 1;\n" + (
    "mad.lo.u32 %r4, %r5, 4, %r1;\n"
)


def shared_kernel(body: str, params: int = 0) -> ptx.Module:
    return kernel(MINE + OTHERS + body, params, SHARED)


def racy(module: ptx.Module, match: str = "", arrays: tuple = (), **how: object) -> None:
    for order in ORDERS:
        with pytest.raises(ptx.Race, match=match or "nothing orders"):
            launch(module, list(arrays), order=order, seed=3, **how)


def fine(module: ptx.Module, arrays: tuple = (), **how: object) -> None:
    for order in ORDERS:
        for x in arrays:
            x[...] = 0
        launch(module, list(arrays), order=order, seed=3, **how)


# ------------------------------------------------------------------------------- within a block


@pytest.mark.parametrize("other", ["%r3", "%r4"], ids=["other warp", "other lane"])
def test_read_after_write_in_shared(other: str) -> None:
    body = f"st.shared.b32 [%r2], %r0;\n{{}}ld.shared.b32 %r6, [{other}];"
    fine(shared_kernel(body.format("bar.sync 0;\n")), block=64)
    racy(shared_kernel(body.format("")), "reads shared.*written by thread", block=64)


@pytest.mark.parametrize("other", ["%r3", "%r4"], ids=["other warp", "other lane"])
def test_write_after_read_in_shared(other: str) -> None:
    body = f"st.shared.b32 [%r2], 5;\nbar.sync 0;\nld.shared.b32 %r6, [{other}];\n{{}}"
    body += "st.shared.b32 [%r2], %r6;"
    fine(shared_kernel(body.format("bar.sync 0;\n")), block=64)
    racy(shared_kernel(body.format("")), "shared.*(read|written) by thread", block=64)


def test_write_after_write_in_shared() -> None:
    body = "st.shared.b32 [%r2], 1;\n{}st.shared.b32 [%r3], %r0;"
    fine(shared_kernel(body.format("bar.sync 0;\n")), block=64)
    racy(shared_kernel(body.format("")), "writes shared.*written by thread", block=64)


def test_an_older_reader_is_remembered() -> None:
    """Warp 0 reads a word, then warp 1 reads the same word and writes it."""
    body = (
        "setp.ge.u32 %p1, %r0, 32;\nsetp.eq.u32 %p2, %r0, 0;\n@%p2 st.shared.b32 [%r1], 1;\n"
        "bar.sync 0;\n@%p1 bra SECOND;\nld.shared.b32 %r6, [%r1];\n{}bra END;\n"
        "SECOND:\n{}setp.ne.u32 %p3, %r0, 32;\n@%p3 bra END;\nld.shared.b32 %r6, [%r1];\n"
        "st.shared.b32 [%r1], 2;\nEND:\n"
    )
    barrier = "bar.sync 0;\n"
    fine(shared_kernel(body.format(barrier, barrier)), block=64)
    racy(shared_kernel(body.format("", "")), block=64)


@pytest.mark.parametrize("writer", [0, 31, 32, 63])
def test_both_warps_read_and_one_of_them_writes(writer: int) -> None:
    body = (
        f"setp.eq.u32 %p1, %r0, {writer};\n@%p1 st.shared.b32 [%r1], 1;\nbar.sync 0;\n"
        "ld.shared.b32 %r6, [%r1];\nbar.warp.sync -1;\n{}@%p1 st.shared.b32 [%r1], 2;"
    )
    fine(shared_kernel(body.replace("{}", "bar.sync 0;\n")), block=64)
    racy(shared_kernel(body.replace("{}", "")), block=64)


def test_lanes_of_a_warp_that_read_in_turn() -> None:
    """Lane 1 reads a word, then lane 0 reads and writes it: the last reader is the writer."""
    body = (
        "setp.eq.u32 %p1, %r0, 1;\nsetp.eq.u32 %p2, %r0, 0;\n@%p2 st.shared.b32 [%r1], 1;\n"
        "bar.sync 0;\n@%p1 ld.shared.b32 %r6, [%r1];\n{}@%p2 ld.shared.b32 %r6, [%r1];\n"
        "@%p2 st.shared.b32 [%r1], 2;"
    )
    fine(shared_kernel(body.format("bar.warp.sync -1;\n")))
    racy(shared_kernel(body.format("")))


def test_lanes_that_read_in_turn_around_a_fence() -> None:
    """A fence moves the clock of one lane on; it orders nothing within the warp."""
    body = (
        "setp.eq.u32 %p1, %r0, 1;\nsetp.eq.u32 %p2, %r0, 0;\n@%p2 st.shared.b32 [%r1], 1;\n"
        "bar.sync 0;\n@%p1 ld.shared.b32 %r6, [%r1];\n@%p2 fence.acq_rel.gpu;\n"
        "{}@%p2 ld.shared.b32 %r6, [%r1];\n@%p2 st.shared.b32 [%r1], 2;"
    )
    fine(shared_kernel(body.format("bar.warp.sync -1;\n")))
    racy(shared_kernel(body.format("")))


def test_all_lanes_read_what_the_last_one_writes() -> None:
    body = (
        "setp.eq.u32 %p1, %r0, 31;\n@%p1 st.shared.b32 [%r1], 1;\nbar.sync 0;\n"
        "ld.shared.b32 %r6, [%r1];\n{}@%p1 st.shared.b32 [%r1], 2;"
    )
    fine(shared_kernel(body.format("bar.warp.sync -1;\n")))
    racy(shared_kernel(body.format("")))


def test_warp_barrier_orders_a_warp_only() -> None:
    body = "st.shared.b32 [%r2], %r0;\nbar.warp.sync {};\nld.shared.b32 %r6, [{}];"
    fine(shared_kernel(body.format("-1", "%r4")), block=64)
    racy(shared_kernel(body.format("-1", "%r3")), block=64)


def test_warp_barrier_of_some_lanes() -> None:
    """Lanes 0 and 1 of each warp meet; 2 and 3 do not."""
    body = (
        "and.b32 %r7, %r0, 31;\nsetp.gt.u32 %p1, %r7, {limit};\n@%p1 exit;\n"
        "st.shared.b32 [%r2], %r0;\nsetp.gt.u32 %p2, %r7, 1;\n@%p2 bra READ;\n"
        "bar.warp.sync 3;\nREAD:\nld.shared.b32 %r6, [%r4];"
    )
    fine(shared_kernel(body.replace("{limit}", "1")), block=64)
    racy(shared_kernel(body.replace("{limit}", "3")), block=64)


def test_shuffle_orders_nothing() -> None:
    body = "st.shared.b32 [%r2], %r0;\nshfl.sync.bfly.b32 %r6, %r0, 1, 31, -1;\n"
    racy(shared_kernel(body + "ld.shared.b32 %r6, [%r4];"))


def test_bytes_of_a_word_by_different_threads() -> None:
    """Neighbours in one word do not conflict."""
    body = (
        "add.u32 %r2, %r1, %r0;\ncvt.u16.u32 %h1, %r0;\nst.shared.b8 [%r2], %h1;\n"
        "ld.shared.b8 %h2, [%r2];"
    )
    fine(shared_kernel(body), block=64)


def test_double_buffer_that_forgets_a_barrier() -> None:
    """Two stages, one barrier a round: the write of round i + 2 meets the reads of round i."""
    loop = (
        "mov.u32 %r10, 0;\nLOOP:\nand.b32 %r11, %r10, {mask};\nshl.b32 %r11, %r11, 8;\n"
        "add.u32 %r12, %r2, %r11;\nadd.u32 %r13, %r3, %r11;\nst.shared.b32 [%r12], %r10;\n"
        "bar.sync 0;\nld.shared.b32 %r6, [%r13];\nadd.u32 %r10, %r10, 1;\n"
        "setp.lt.u32 %p1, %r10, 6;\n@%p1 bra LOOP;"
    )
    fine(shared_kernel(loop.replace("{mask}", "1")), block=64)
    racy(shared_kernel(loop.replace("{mask}", "0")), block=64)


def test_named_barrier_of_two_warps_does_not_reach_a_third() -> None:
    body = (
        "shr.u32 %r7, %r0, 5;\nst.shared.b32 [%r2], %r0;\nsetp.eq.u32 %p1, %r7, 2;\n"
        "@%p1 bra THIRD;\nbar.sync 1, 64;\nld.shared.b32 %r6, [%r3];\nbra END;\n"
        "THIRD:\n{}END:\n"
    )
    fine(shared_kernel(body.format("")), block=96)
    racy(shared_kernel(body.format("ld.shared.b32 %r6, [%r1];\n")), block=96)


def test_producer_arrives_consumer_waits() -> None:
    """bar.arrive: what the producer does afterwards is not covered."""
    body = (
        "shr.u32 %r7, %r0, 5;\nsetp.eq.u32 %p1, %r7, 1;\n@%p1 bra CONSUMER;\n"
        "st.shared.b32 [%r2], %r0;\nbar.arrive 2, 64;\n{}bra END;\n"
        "CONSUMER:\nbar.sync 2, 64;\nld.shared.b32 %r6, [%r3];\nEND:\n"
    )
    fine(shared_kernel(body.format("")), block=64)
    racy(shared_kernel(body.format("st.shared.b32 [%r2], 9;\n")), block=64)


@pytest.mark.parametrize("value", ["7", "%r0"])
def test_redundant_stores_of_one_instruction(value: str) -> None:
    """The same value from every lane is what Triton does; different values are a race."""
    module = shared_kernel(f"st.shared.b32 [%r1], {value};")
    if value == "7":
        fine(module, block=64)
        assert launch(module, [], block=64).redundant_stores == 63
        racy(module, block=64, redundant_stores="fail")
    else:
        racy(module, block=64)


def test_redundant_stores_that_round_differently() -> None:
    body = "cvt.rn.f32.u32 %f1, %r0;\nfma.rn.f32 %f2, %f1, {}, 0f3F800000;\n"
    body += "st.shared.f32 [%r1], %f2;"
    near = shared_kernel(body.format("0f33800000"))  # 1 + lane 2^-24
    racy(near)
    assert launch(near, [], redundant_stores="near").near_stores > 0
    racy(shared_kernel(body.format("0f3F800000")), redundant_stores="near")


# ------------------------------------------------------------------------------------ cp.async

COPY = "mad.wide.u32 %d10, %r0, 4, %d0;\ncp.async.ca.shared.global [%r2], [%d10], 4;\n"


def copied(body: str) -> ptx.Module:
    return shared_kernel(COPY + body, 1)


def test_copy_is_seen_after_wait_and_barrier() -> None:
    x = np.arange(64, dtype="u4")
    body = "cp.async.commit_group;\n{}{}ld.shared.b32 %r6, [{}];"
    wait, bar = "cp.async.wait_group 0;\n", "bar.sync 0;\n"
    launch(copied(body.format(wait, bar, "%r3")), [x], block=64)
    launch(copied(body.format(wait, "", "%r2")), [x], block=64)
    racy(copied(body.format(wait, "", "%r3")), arrays=(x,), block=64)
    racy(copied(body.format("", bar, "%r3")), "nobody has waited", arrays=(x,), block=64)
    racy(copied(body.format("", "", "%r2")), "nobody has waited", arrays=(x,), block=64)


def test_wait_before_commit_waits_for_nothing() -> None:
    x = np.arange(64, dtype="u4")
    racy(copied("cp.async.wait_group 0;\nld.shared.b32 %r6, [%r2];"), "nobody has waited",
         arrays=(x,))  # fmt: skip
    launch(copied("cp.async.wait_all;\nld.shared.b32 %r6, [%r2];"), [x])


def test_wait_group_counts_the_youngest() -> None:
    """Two groups in flight: wait_group 1 lands the older."""
    x = np.arange(256, dtype="u4")
    body = (
        "cp.async.commit_group;\nadd.u32 %r7, %r2, 256;\n"
        "cp.async.ca.shared.global [%r7], [%d10], 4;\ncp.async.commit_group;\n"
        "cp.async.wait_group {};\nld.shared.b32 %r6, [{}];"
    )
    launch(copied(body.format(1, "%r2")), [x], block=64)
    launch(copied(body.format(0, "%r7")), [x], block=64)
    racy(copied(body.format(1, "%r7")), "nobody has waited", arrays=(x,), block=64)
    racy(copied(body.format(2, "%r2")), "nobody has waited", arrays=(x,), block=64)


def test_copy_into_a_stage_that_others_still_read() -> None:
    """The classic pipeline: after the last read, a barrier, then the next copy."""
    x = np.arange(64, dtype="u4")
    body = (
        "cp.async.commit_group;\ncp.async.wait_group 0;\nbar.sync 0;\nld.shared.b32 %r6, [%r3];\n"
        "{}cp.async.ca.shared.global [%r2], [%d10], 4;\ncp.async.wait_all;"
    )
    launch(copied(body.format("bar.sync 0;\n")), [x], block=64)
    racy(
        copied(body.format("")),
        "shared.*(read|written) by thread|nobody has waited",
        arrays=(x,),
        block=64,
    )


def test_copy_over_a_copy_in_flight() -> None:
    x = np.arange(64, dtype="u4")
    again = "cp.async.ca.shared.global [%r2], [%d10], 4;\n"
    launch(copied("cp.async.wait_all;\n" + again), [x])
    racy(copied(again), "nobody has waited", arrays=(x,))


# ------------------------------------------------------------------------------ between blocks

# Block 0 writes data (%d0), then says so in a flag (%d1); block 1 waits, then reads.
HANDSHAKE = (
    "mov.u32 %r10, %ctaid.x;\nsetp.ne.u32 %p1, %r10, 0;\nsetp.ne.u32 %p2, %r0, 0;\n"
    "mad.wide.u32 %d10, %r0, 4, %d0;\n@%p1 bra CONSUMER;\n"
    "st.global.b32 [%d10], 1;\n{produced}@%p2 bra END;\n{release}bra END;\n"
    "CONSUMER:\n@%p2 bra READY;\nSPIN:\n{acquire}setp.eq.u32 %p3, %r11, 0;\n@%p3 bra SPIN;\n"
    "{fence}READY:\n{consumed}ld.global.b32 %r12, [%d10];\nEND:\n"
)
GOOD = {
    "produced": "bar.sync 0;\n",
    "release": "st.release.gpu.global.b32 [%d1], 1;\n",
    "acquire": "ld.acquire.gpu.global.b32 %r11, [%d1];\n",
    "fence": "",
    "consumed": "bar.sync 0;\n",
}
PATTERNS = {
    "release and acquire": {},
    "fence and relaxed store, relaxed load and fence": {
        "release": "fence.acq_rel.gpu;\nst.relaxed.gpu.global.b32 [%d1], 1;\n",
        "acquire": "ld.relaxed.gpu.global.b32 %r11, [%d1];\n",
        "fence": "fence.acq_rel.gpu;\n",
    },
    "threadfence and volatile": {
        "release": "membar.gl;\nst.volatile.global.b32 [%d1], 1;\n",
        "acquire": "ld.volatile.global.b32 %r11, [%d1];\n",
        "fence": "membar.gl;\n",
    },
    "atomics of both orders": {
        "release": "red.release.gpu.global.add.u32 [%d1], 1;\n",
        "acquire": "atom.acquire.gpu.global.or.b32 %r11, [%d1], 0;\n",
    },
    "fences around relaxed atomics": {
        "release": "fence.sc.gpu;\natom.global.add.u32 %r13, [%d1], 1;\n",
        "acquire": "atom.global.add.u32 %r11, [%d1], 0;\n",
        "fence": "fence.sc.gpu;\n",
    },
    "exchange": {"release": "atom.release.gpu.global.exch.b32 %r13, [%d1], 1;\n"},
    "strong store after a release of the same thread": {
        "release": "st.release.gpu.global.b32 [%d1], 0;\nst.relaxed.gpu.global.b32 [%d1], 1;\n"
    },
    "release, then an atomic of somebody else": {
        "produced": "bar.sync 0;\nsetp.eq.u32 %p4, %r0, 32;\n"
        "@%p4 st.release.gpu.global.b32 [%d1], 0;\nbar.sync 0;\n",
        "release": "red.relaxed.gpu.global.add.u32 [%d1], 1;\n",
    },
    "wider scope than needed": {
        "release": "st.release.sys.global.b32 [%d1], 1;\n",
        "acquire": "ld.acquire.sys.global.b32 %r11, [%d1];\n",
    },
}
BROKEN = {
    "no release": {"release": "st.relaxed.gpu.global.b32 [%d1], 1;\n"},
    "no acquire": {"acquire": "ld.relaxed.gpu.global.b32 %r11, [%d1];\n"},
    "volatile alone": {
        "release": "st.volatile.global.b32 [%d1], 1;\n",
        "acquire": "ld.volatile.global.b32 %r11, [%d1];\n",
    },
    "release in the block's scope": {"release": "st.release.cta.global.b32 [%d1], 1;\n"},
    "acquire in the block's scope": {"acquire": "ld.acquire.cta.global.b32 %r11, [%d1];\n"},
    "fence in the block's scope": {
        "release": "fence.acq_rel.cta;\nst.relaxed.gpu.global.b32 [%d1], 1;\n"
    },
    "consumer's fence in the block's scope": {
        "acquire": "ld.relaxed.gpu.global.b32 %r11, [%d1];\n", "fence": "fence.acq_rel.cta;\n",
    },
    "release, then a strong store of somebody else": {
        "produced": "bar.sync 0;\nsetp.eq.u32 %p4, %r0, 32;\n"
        "@%p4 st.release.gpu.global.b32 [%d1], 0;\nbar.sync 0;\n",
        "release": "st.relaxed.gpu.global.b32 [%d1], 1;\n",
    },
    "fence after the flag": {
        "release": "st.relaxed.gpu.global.b32 [%d1], 1;\nfence.acq_rel.gpu;\n"
    },
    "fence before the flag is read": {
        "acquire": "fence.acq_rel.gpu;\nld.relaxed.gpu.global.b32 %r11, [%d1];\n"
    },
    "producer's threads do not meet": {"produced": ""},
    "producer's warps alone meet": {"produced": "bar.warp.sync -1;\n"},
    "consumer's threads do not meet": {"consumed": ""},
    "weak flag": {
        "release": "membar.gl;\nst.global.b32 [%d1], 1;\n",
        "acquire": "ld.volatile.global.b32 %r11, [%d1];\n", "fence": "membar.gl;\n",
    },
    "relaxed atomics without fences": {
        "release": "atom.global.add.u32 %r13, [%d1], 1;\n",
        "acquire": "atom.global.add.u32 %r11, [%d1], 0;\n",
    },
    "fences of all threads, but none by who writes the flag after the barrier": {
        "produced": "membar.gl;\nbar.sync 0;\n",
        "release": "st.volatile.global.b32 [%d1], 1;\n",
        "acquire": "ld.volatile.global.b32 %r11, [%d1];\n", "fence": "membar.gl;\n",
    },
    "written again after the release": {
        "release": "st.release.gpu.global.b32 [%d1], 1;\nst.global.b32 [%d10], 2;\n"
    },
}  # fmt: skip


def handshake(change: dict[str, str]) -> ptx.Module:
    return kernel(HANDSHAKE.format(**{**GOOD, **change}), 2)


def flags() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(64, "u4"), np.zeros(1, "u4")


@pytest.mark.parametrize("name", PATTERNS)
def test_message_passing(name: str) -> None:
    fine(handshake(PATTERNS[name]), flags(), grid=2, block=64, cooperative=True)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("order", ORDERS)
def test_broken_message_passing(name: str, order: str) -> None:
    with pytest.raises(ptx.Race):
        launch(handshake(BROKEN[name]), list(flags()), grid=2, block=64, cooperative=True,
               order=order, seed=5)  # fmt: skip


def test_release_by_one_lane_after_a_warp_barrier() -> None:
    """One warp a block: __syncwarp is enough, and needed."""
    with_barrier = {"produced": "bar.warp.sync -1;\n", "consumed": "bar.warp.sync -1;\n"}
    fine(handshake(with_barrier), flags(), grid=2, block=32, cooperative=True)
    for missing in ("produced", "consumed"):
        with pytest.raises(ptx.Race):
            launch(handshake({**with_barrier, missing: ""}), list(flags()), grid=2, block=32,
                   cooperative=True)  # fmt: skip


def test_chain_of_three_blocks() -> None:
    """Causality is transitive: 0 tells 1, 1 tells 2, 2 reads what 0 wrote."""
    body = (
        "mov.u32 %r10, %ctaid.x;\nsetp.eq.u32 %p1, %r10, 0;\nmul.wide.u32 %d11, %r10, 4;\n"
        "add.u64 %d12, %d1, %d11;\n@%p1 st.global.b32 [%d0], 7;\n@%p1 bra TELL;\n"
        "SPIN:\n{acquire}setp.eq.u32 %p2, %r11, 0;\n@%p2 bra SPIN;\n"
        "TELL:\nst.release.gpu.global.b32 [%d12], 1;\nsetp.ne.u32 %p3, %r10, 2;\n@%p3 bra END;\n"
        "ld.global.b32 %r12, [%d0];\nst.global.b32 [%d0+4], %r12;\nEND:\n"
    )
    good = "ld.acquire.gpu.global.b32 %r11, [%d12+-4];\n"
    arrays = (np.zeros(2, "u4"), np.zeros(3, "u4"))
    fine(kernel(body.format(acquire=good), 2), arrays, grid=3, block=1, cooperative=True)
    assert arrays[0][1] == 7
    broken = kernel(body.format(acquire=good.replace("acquire", "relaxed")), 2)
    with pytest.raises(ptx.Race):
        launch(broken, [np.zeros(2, "u4"), np.zeros(3, "u4")], grid=3, block=1, cooperative=True)


def test_grid_barrier_orders_all_blocks() -> None:
    """Each block reads what its neighbour wrote before the barrier, then both change roles."""
    from .test_ptx_faults import GRID_BARRIER

    barrier = GRID_BARRIER.replace("%d0", "%d1")
    again = (
        barrier.replace("SPIN", "SPIN2")
        .replace("WAITED", "WAITED2")
        .replace("mov.u32 %r2, %nctaid.x;", "mov.u32 %r2, %nctaid.x;\nshl.b32 %r2, %r2, 1;")
    )
    body = (
        "mov.u32 %r20, %ctaid.x;\nmov.u32 %r21, %nctaid.x;\nmov.u32 %r22, %ntid.x;\n"
        "mad.lo.u32 %r23, %r20, %r22, %r0;\nmad.wide.u32 %d10, %r23, 4, %d0;\n"
        "add.u32 %r24, %r20, 1;\nrem.u32 %r24, %r24, %r21;\nmad.lo.u32 %r24, %r24, %r22, %r0;\n"
        "mad.wide.u32 %d11, %r24, 4, %d0;\nst.global.b32 [%d10], %r23;\n{first}"
        "ld.global.b32 %r25, [%d11];\n{second}st.global.b32 [%d10], %r25;"
    )
    x, flag = np.zeros(4 * 64, "u4"), np.zeros(1, "u4")
    good = kernel(body.format(first=barrier, second=again), 2)
    fine(good, (x, flag), grid=4, block=64, cooperative=True)
    assert x.tolist() == [(i + 64) % 256 for i in range(256)]
    for first, second in (("", barrier), (barrier, "")):
        for order in ORDERS:
            with pytest.raises(ptx.Race):
                launch(kernel(body.format(first=first, second=second), 2),
                       [np.zeros(4 * 64, "u4"), np.zeros(1, "u4")], grid=4, block=64,
                       cooperative=True, order=order)  # fmt: skip


def test_atomics_do_not_race_with_each_other() -> None:
    total = np.zeros(1, "u4")
    fine(kernel("red.global.add.u32 [%d0], 1;"), (total,), grid=3, block=64)
    assert total[0] == 192
    mixed = kernel("red.global.add.u32 [%d0], 1;\nld.global.b32 %r1, [%d0];")
    racy(mixed, arrays=(total,), grid=3, block=64)
    narrow = kernel("red.global.cta.add.u32 [%d0], 1;")
    fine(narrow, (total,), grid=1, block=64)
    racy(narrow, arrays=(total,), grid=2, block=64)
    racy(narrow, arrays=(total,), grid=2, block=64, resident_blocks=1)


def test_blocks_write_the_same_place() -> None:
    body = "mov.u32 %r10, %ctaid.x;\nmul.lo.u32 %r10, %r10, {};\nadd.u32 %r10, %r10, %r0;\n"
    body += "mad.wide.u32 %d10, %r10, 4, %d0;\nst.global.b32 [%d10], 3;"
    x = np.zeros(128, "u4")
    fine(kernel(body.format(64)), (x,), grid=2, block=64)
    racy(kernel(body.format(63)), "block 0|block 1", arrays=(x,), grid=2, block=64)
    # One after the other in time is no order either.
    racy(kernel(body.format(63)), arrays=(x,), grid=2, block=64, resident_blocks=1)


def test_read_only_path_sees_no_stores_of_its_own_kernel() -> None:
    body = "mad.wide.u32 %d10, %r0, 4, %d0;\nst.global.b32 [%d10], 1;\nld.global{}.b32 %r1, [%d10];"
    x = np.zeros(32, "u4")
    fine(kernel(body.format("")), (x,))
    racy(kernel(body.format(".nc")), "which this launch wrote", arrays=(x,))


def test_launches_are_ordered() -> None:
    x = np.zeros(64, "u4")
    module = kernel("mad.wide.u32 %d10, %r0, 4, %d0;\nst.global.b32 [%d10], %r0;")
    other = kernel(
        "xor.b32 %r1, %r0, 33;\nmad.wide.u32 %d10, %r1, 4, %d0;\nld.global.b32 %r2, [%d10];"
    )
    memory = ptx.Memory()
    memory.add_array(x, name="x")
    for m in (module, other):
        m.launch("k", (1,), (64,), m.kernels["k"].pack([x]), memory=memory)
