"""Warp-wide instructions against loops over the lanes, after the PTX manual's pseudo-code."""

from __future__ import annotations

import numpy as np
import pytest

from .kit import evaluate, integers, kernel, launch

FULL = 0xFFFFFFFF


def across(
    text: str, inputs: list[tuple[str, np.ndarray]], out: str = "u32", mode: str = ""
) -> list[int]:
    return evaluate(text, inputs, out, mode).tolist()


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8])
def test_shfl(mode: str, width: int) -> None:
    n = 128
    x, b = integers("u32", n, 0), np.random.default_rng(1).integers(0, 40, n).astype(np.uint32)
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    text = f"shfl.sync.{mode}.b32 %r1|%p2, {{0}}, {{1}}, {c}, -1; selp.u32 %r2, 1, 0, %p2; "
    value = across(text + "mov.u32 {d}, %r1", [("u32", x), ("u32", b)])
    inside = across(text + "mov.u32 {d}, %r2", [("u32", x), ("u32", b)])
    for i in range(n):
        lane, by = i % 32, int(b[i]) & 31
        clamp, segment = c & 31, c >> 8 & 31
        highest = (lane & segment) | (clamp & ~segment & 31)
        lowest = lane & segment
        j, ok = {
            "up": (lane - by, lane - by >= highest),
            "down": (lane + by, lane + by <= highest),
            "bfly": (lane ^ by, lane ^ by <= highest),
            "idx": (lowest | (by & ~segment & 31), (lowest | (by & ~segment & 31)) <= highest),
        }[mode]
        assert inside[i] == int(ok)
        assert value[i] == x[i - lane + (j if ok else lane)]


def test_shfl_under_a_guard_keeps_the_others() -> None:
    x = integers("u32", 64, 0)
    text = (
        "mov.u32 %r1, 77; mov.u32 %r3, %laneid; setp.lt.u32 %p3, %r3, 16; "
        "@%p3 shfl.sync.bfly.b32 %r1, {0}, 3, 31, 0xffff; mov.u32 {d}, %r1"
    )
    got = across(text, [("u32", x)])
    assert got == [int(x[i ^ 3]) if i % 32 < 16 else 77 for i in range(64)]


@pytest.mark.parametrize("mode", ["all", "any", "uni", "ballot"])
def test_vote(mode: str) -> None:
    n = 256
    x = integers("u32", n, 0)
    x[:32], x[32:64], x[64:96] = 1, 0, 1
    x[70] = 0
    text = f"setp.ne.u32 %p2, {{0}}, 0; vote.sync.{mode}."
    if mode == "ballot":
        got = across(text + "b32 {d}, %p2, -1", [("u32", x)])
    else:
        got = across(text + "pred {d}, %p2, -1", [("u32", x)], mode="pred")
    for w in range(0, n, 32):
        yes = [bool(v) for v in x[w : w + 32]]
        want = {
            "all": int(all(yes)), "any": int(any(yes)), "uni": int(all(yes) or not any(yes)),
            "ballot": sum(1 << k for k in range(32) if yes[k]),
        }[mode]  # fmt: skip
        assert got[w : w + 32] == [want] * 32


@pytest.mark.parametrize("kind", ["u32", "s32"])
@pytest.mark.parametrize("op", ["add", "min", "max"])
def test_redux_arithmetic(op: str, kind: str) -> None:
    x = integers(kind, 128, 1)
    got = across(f"redux.sync.{op}.{kind} {{d}}, {{0}}, -1", [(kind, x)])
    for w in range(0, 128, 32):
        values = x[w : w + 32].tolist()
        want = {"add": sum, "min": min, "max": max}[op](values) & FULL
        assert got[w : w + 32] == [want] * 32


@pytest.mark.parametrize("op", ["and", "or", "xor"])
def test_redux_bits_over_two_masks(op: str) -> None:
    """Even and odd lanes reduce apart, in one instruction."""
    x = integers("u32", 64, 2) | np.uint32(0x80000001)
    text = (
        "mov.u32 %r1, %laneid; and.b32 %r1, %r1, 1; setp.eq.u32 %p2, %r1, 0; "
        f"selp.b32 %r2, 0x55555555, 0xaaaaaaaa, %p2; redux.sync.{op}.b32 {{d}}, {{0}}, %r2"
    )
    got = across(text, [("u32", x)])
    import functools
    import operator

    f = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[op]
    for i in range(64):
        w = i - i % 32
        assert got[i] == functools.reduce(f, [int(x[w + k]) for k in range(i % 2, 32, 2)])


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_match_any(kind: str) -> None:
    x = (integers(kind, 96, 0) % 5).astype(integers(kind, 96, 0).dtype)
    got = across(f"match.any.sync.{kind} {{d}}, {{0}}, -1", [(kind, x)])
    for i in range(96):
        w = i - i % 32
        assert got[i] == sum(1 << k for k in range(32) if x[w + k] == x[i])


def test_activemask_in_a_branch() -> None:
    body = (
        "mov.u32 %r1, 0;\nand.b32 %r2, %r0, 3;\nsetp.ne.u32 %p1, %r2, 1;\n@%p1 bra END;\n"
        "activemask.b32 %r1;\nEND:\nmad.wide.u32 %d10, %r0, 4, %d0;\nst.global.b32 [%d10], %r1;"
    )
    x = np.zeros(64, "u4")
    launch(kernel(body), [x], block=64)
    assert x.tolist() == [0x22222222 if i % 4 == 1 else 0 for i in range(64)]


def test_barrier_reductions() -> None:
    body = (
        "and.b32 %r1, %r0, 7;\nsetp.eq.u32 %p1, %r1, 0;\nbar.red.popc.u32 %r2, 0, %p1;\n"
        "bar.red.or.pred %p2, 0, %p1;\nbar.red.and.pred %p3, 0, %p1;\nselp.u32 %r3, 100, 0, %p2;\n"
        "selp.u32 %r4, 1000, 0, %p3;\nadd.u32 %r2, %r2, %r3;\nadd.u32 %r2, %r2, %r4;\n"
        "mad.wide.u32 %d10, %r0, 4, %d0;\nst.global.b32 [%d10], %r2;"
    )
    for order in ("forward", "random"):
        x = np.zeros(96, "u4")
        launch(kernel(body), [x], block=96, order=order)
        assert set(x.tolist()) == {112}


def test_special_registers() -> None:
    """A grid and a block of three dimensions; every thread writes what it finds."""
    names = [
        "%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%ntid.y", "%nctaid.z",
        "%laneid", "%warpid", "%lanemask_lt", "%lanemask_ge", "%lanemask_eq", "%dynamic_smem_size",
    ]  # fmt: skip
    grid, block = (2, 3, 2), (4, 5, 3)
    body = (
        "mov.u32 %r1, %tid.y;\nmov.u32 %r2, %tid.z;\nmad.lo.u32 %r1, %r2, 5, %r1;\n"
        "mad.lo.u32 %r0, %r1, 4, %r0;\nmov.u32 %r3, %ctaid.x;\nmov.u32 %r4, %ctaid.y;\n"
        "mov.u32 %r5, %ctaid.z;\nmad.lo.u32 %r4, %r5, 3, %r4;\nmad.lo.u32 %r3, %r4, 2, %r3;\n"
        f"mad.lo.u32 %r0, %r3, 60, %r0;\nmad.wide.u32 %d10, %r0, {4 * len(names)}, %d0;\n"
    )
    for k, name in enumerate(names):
        body += f"mov.u32 %r6, {name};\nst.global.b32 [%d10+{4 * k}], %r6;\n"
    for order in ("forward", "reverse"):
        from . import ptx

        x = np.zeros((12, 60, len(names)), "u4")
        module = kernel(body)
        memory = ptx.Memory()
        memory.add_array(x, name="x")
        module.launch("k", grid, block, module.kernels["k"].pack([x]), 64, memory,
                      ptx.Schedule(order=order))  # fmt: skip
        for b in range(12):
            for t in range(60):
                lane = t % 32
                assert x[b, t].tolist() == [
                    t % 4, t // 4 % 5, t // 20, b % 2, b // 2 % 3, b // 6, 5, 2, lane, t // 32,
                    (1 << lane) - 1, FULL & ~((1 << lane) - 1), 1 << lane, 64,
                ]  # fmt: skip
