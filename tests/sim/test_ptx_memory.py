"""Loads, stores, atomics, asynchronous copies and module variables: what they read and write."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from . import ptx
from .kit import HEADER, WIDTH_OF, integers, kernel, launch


@pytest.mark.parametrize("space", ["global", "shared", "local", "generic"])
@pytest.mark.parametrize("kind", ["b8", "b16", "b32", "b64"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_vectors_through_every_space(space: str, kind: str, count: int) -> None:
    size = WIDTH_OF[kind]
    if size * count > 16:  # no such instruction on sm_80
        return
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[size]
    regs = [f"%{letter}{20 + k}" for k in range(count)]
    regs = regs[0] if count == 1 else "{" + ", ".join(regs) + "}"
    v = "" if count == 1 else f".v{count}"
    wide = size * count
    declare = ".shared .align 16 .b8 s[1024];\n.local .align 16 .b8 l[16];\n"
    where = {
        "shared": "mov.u32 %r1, s;\nmad.lo.u32 %r2, %r0, {0}, %r1;\n",
        "local": "mov.u64 %d12, l;\n",
        "generic": "mov.u64 %d12, s;\ncvta.shared.u64 %d12, %d12;\n"
        "mad.wide.u32 %d12, %r0, {0}, %d12;\n",
        "global": "mad.wide.u32 %d12, %r0, {0}, %d1;\n",
    }[space].format(wide)
    at = "%r2" if space == "shared" else "%d12"
    name = "" if space == "generic" else f".{space}"
    body = (
        f"{where}mad.wide.u32 %d10, %r0, {wide}, %d0;\nmad.wide.u32 %d11, %r0, {wide}, %d2;\n"
        f"ld.global{v}.{kind} {regs}, [%d10];\nst{name}{v}.{kind} [{at}], {regs};\n"
        f"mov.b64 %d20, 0;\nld{name}{v}.{kind} {regs}, [{at}];\nst.global{v}.{kind} [%d11], {regs};"
    )
    x = integers(kind, 32 * count, 0)
    there, back = np.zeros_like(x), np.zeros_like(x)
    # The loads of both ends are checked for bounds, the middle for being written.
    launch(kernel(body, 3, declare), [x, there, back])
    assert (back == x).all()
    if space == "global":
        assert (there == x).all()


@pytest.mark.parametrize(("kind", "target"), [("s8", "r"), ("u8", "r"), ("s16", "r"), ("u16", "d"),
                                              ("s32", "d"), ("s8", "h"), ("u8", "d")])  # fmt: skip
def test_loads_extend_to_wider_registers(kind: str, target: str) -> None:
    size, wide = WIDTH_OF[kind], {"h": 2, "r": 4, "d": 8}[target]
    body = (
        f"mad.wide.u32 %d10, %r0, {size}, %d0;\nmad.wide.u32 %d11, %r0, {wide}, %d1;\n"
        f"ld.global.{kind} %{target}20, [%d10];\nst.global.b{8 * wide} [%d11], %{target}20;"
    )
    x = integers(kind, 32, 0)
    out = np.zeros(32, f"u{wide}")
    launch(kernel(body, 2), [x, out])
    assert out.tolist() == [v & (1 << 8 * wide) - 1 for v in x.tolist()]


@pytest.mark.parametrize(
    "modifier", ["", ".relaxed.gpu", ".acquire.sys", ".volatile", ".L1::evict_last", ".cg", ".nc",
                 ".L1::no_allocate.L2::128B", ".weak"]
)  # fmt: skip
def test_load_modifiers(modifier: str) -> None:
    middle = f"ld{modifier}.global" if not modifier.startswith((".L1", ".cg", ".nc")) else (
        f"ld.global{modifier}"
    )  # fmt: skip
    body = (
        "mad.wide.u32 %d10, %r0, 4, %d0;\nmad.wide.u32 %d11, %r0, 4, %d1;\n"
        f"{middle}.b32 %r1, [%d10];\nst.global.b32 [%d11], %r1;"
    )
    x, out = integers("b32", 32, 0), np.zeros(32, "u4")
    launch(kernel(body, 2), [x, out])
    assert (x == out).all()


def test_cache_policies_are_hints() -> None:
    body = (
        "createpolicy.fractional.L2::evict_last.b64 %d20, 0f3F800000;\n"
        "mad.wide.u32 %d10, %r0, 4, %d0;\nmad.wide.u32 %d11, %r0, 4, %d1;\n"
        "prefetch.global.L2 [%d10];\n"
        "ld.global.L2::cache_hint.b32 %r1, [%d10], %d20;\n"
        "st.global.L2::cache_hint.b32 [%d11], %r1, %d20;\nnanosleep.u32 20;"
    )
    x, out = integers("b32", 32, 0), np.zeros(32, "u4")
    launch(kernel(body, 2), [x, out])
    assert (x == out).all()


# -------------------------------------------------------------------------------------- atomics


def sequential(op: str, kind: str, memory: int, value: int, second: int, width: int) -> int:
    def number(x: int) -> int:
        return x - (1 << width) if kind[0] == "s" and x >> width - 1 else x

    return {
        "add": lambda: memory + value, "and": lambda: memory & value, "or": lambda: memory | value,
        "xor": lambda: memory ^ value, "exch": lambda: value,
        "min": lambda: min(number(memory), number(value)),
        "max": lambda: max(number(memory), number(value)),
        "inc": lambda: 0 if memory >= value else memory + 1,
        "dec": lambda: value if memory == 0 or memory > value else memory - 1,
        "cas": lambda: second if memory == value else memory,
    }[op]() & (1 << width) - 1  # fmt: skip


ATOMS = [
    *itertools.product(("add", "min", "max"), ("u32", "s32", "u64", "s64")),
    *itertools.product(("and", "or", "xor", "exch", "cas"), ("b32", "b64")),
    ("inc", "u32"), ("dec", "u32"), ("cas", "b16"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "kind"), ATOMS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics_in_the_order_of_lanes(op: str, kind: str, space: str) -> None:
    """32 lanes on 3 places: what each found, and what is left, as one after the other. 64-bit
    add and min of signed numbers exist as u64 and s64."""
    if (op, kind) == ("add", "s64"):
        return  # not in the ISA; the next line would be refused by ptxas
    size = WIDTH_OF[kind]
    letter = {2: "h", 4: "r", 8: "d"}[size]
    raw = f"b{8 * size}"
    lane = np.arange(32)
    places = lane % 3
    values = integers(raw, 32, 3) % 7
    second = integers(raw, 32, 4)
    start = (integers(raw, 3, 5) % 5).astype(values.dtype)
    arguments = f"%{letter}20" + (f", %{letter}21" if op == "cas" else "")
    declare = ".shared .align 16 .b8 s[64];\n"
    body = (
        f"rem.u32 %r1, %r0, 3;\nmul.lo.u32 %r1, %r1, {size};\ncvt.u64.u32 %d20, %r1;\n"
        "add.u64 %d21, %d0, %d20;\nmov.u32 %r2, s;\nadd.u32 %r2, %r2, %r1;\n"
        f"setp.lt.u32 %p1, %r0, 3;\n@%p1 ld.global.{raw} %{letter}22, [%d21];\n"
        f"@%p1 st.shared.{raw} [%r2], %{letter}22;\nbar.sync 0;\n"
        f"mad.wide.u32 %d10, %r0, {size}, %d1;\nmad.wide.u32 %d11, %r0, {size}, %d2;\n"
        f"mad.wide.u32 %d12, %r0, {size}, %d3;\nmov.b64 %d30, %d21;\n"
        f"ld.global.{raw} %{letter}20, [%d10];\nld.global.{raw} %{letter}21, [%d11];\n"
        f"atom.{space}.{op}.{kind} %{letter}23, [{'%d30' if space == 'global' else '%r2'}], "
        f"{arguments};\nst.global.{raw} [%d12], %{letter}23;\nbar.sync 0;\n"
    )
    if space == "shared":
        body += (
            f"@%p1 ld.shared.{raw} %{letter}22, [%r2];\n@%p1 st.global.{raw} [%d30], %{letter}22;"
        )
    memory, found = start.copy(), np.zeros(32, values.dtype)
    launch(kernel(_apart(body), 4, declare), [memory, values, second, found])
    left = start.tolist()
    for i in range(32):
        assert found[i] == left[places[i]]
        left[places[i]] = sequential(
            op, kind, left[places[i]], int(values[i]), int(second[i]), 8 * size
        )
    assert memory.tolist() == left


def _apart(body: str) -> str:
    """Addresses out of the way of the 64-bit values in %d20 to %d23."""
    return (
        body.replace("cvt.u64.u32 %d20", "cvt.u64.u32 %d40")
        .replace("add.u64 %d21, %d0, %d20", "add.u64 %d41, %d0, %d40")
        .replace("[%d21]", "[%d41]")
        .replace("%d30, %d21", "%d42, %d41")
        .replace("%d30", "%d42")
    )


@pytest.mark.parametrize("kind", ["f32", "f64", "f16x2", "bf16x2"])
def test_float_atomics(kind: str) -> None:
    size = WIDTH_OF[kind]
    letter = "d" if size == 8 else "r"
    body = (
        f"mad.wide.u32 %d10, %r0, {size}, %d1;\nld.global.b{8 * size} %{letter}20, [%d10];\n"
        f"red.global.add{'.noftz' if 'x2' in kind else ''}.{kind} [%d0], %{letter}20;"
    )
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 8, 64).astype(np.float32)  # sums are exact in every format
    if kind in ("f32", "f64"):
        values, total = x[:32].astype(f"f{size}"), np.zeros(1, f"f{size}")
        launch(kernel(body, 2), [total, values])
        assert total[0] == x[:32].sum()
        return
    from .kit import bf16_bits, bf16_values

    if kind == "f16x2":
        bits = x.astype(np.float16).view("u2")
    else:
        bits = bf16_bits(x)
    total = np.zeros(2, "u2")
    launch(kernel(body, 2), [total.view("u4"), bits.view("u4")])
    got = total.view(np.float16) if kind == "f16x2" else bf16_values(total)
    assert got.tolist() == [x[0::2].sum(), x[1::2].sum()]


def test_float_atomics_follow_the_schedule() -> None:
    """Sums that depend on the order differ between schedules: they are really permuted."""
    body = (
        "mov.u32 %r1, %ctaid.x;\nmad.wide.u32 %d10, %r1, 4, %d1;\nld.global.b32 %r2, [%d10];\n"
        "red.global.add.f32 [%d0], %r2;"
    )
    x = np.array([1e8, 1.0, -1e8, 1.0], np.float32)
    seen = set()
    for order in ("forward", "reverse", "random"):
        for seed in range(6):
            total = np.zeros(1, np.float32)
            launch(kernel(body, 2), [total, x], grid=4, block=1, order=order, seed=seed,
                   resident_blocks=1)  # fmt: skip
            seen.add(float(total[0]))
    assert len(seen) > 1


# ------------------------------------------------------------------------------------- cp.async


@pytest.mark.parametrize(("cache", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
@pytest.mark.parametrize("source_size", [None, 0, 3, 16])
def test_copies_and_zero_fill(cache: str, size: int, source_size: int | None) -> None:
    if source_size is not None and source_size > size:
        source_size = size
    declare = ".shared .align 16 .b8 s[1024];\n"
    more = "" if source_size is None else ", %r4"
    body = (
        f"mov.u32 %r1, s;\nmad.lo.u32 %r2, %r0, {size}, %r1;\n"
        f"mad.wide.u32 %d10, %r0, {size}, %d0;\n"
        f"mov.u32 %r4, {source_size or 0};\n"
        f"cp.async.{cache}.shared.global [%r2], [%d10], {size}{more};\ncp.async.commit_group;\n"
        f"cp.async.wait_group 0;\nmad.wide.u32 %d11, %r0, {size}, %d1;\n"
    )
    for k in range(0, size, 4):
        body += f"ld.shared.b32 %r5, [%r2+{k}];\nst.global.b32 [%d11+{k}], %r5;\n"
    x = integers("b8", 32 * size, 0)
    room = np.zeros(32 * size + 16, "u1")
    start = -room.ctypes.data % 16
    x = room[start : start + 32 * size]
    x[:] = np.arange(1, 32 * size + 1) % 255 + 1
    out = np.zeros(32 * size, "u1")
    launch(kernel(body, 2, declare), [x, out])
    want = x.reshape(32, size).copy()
    if source_size is not None:
        want[:, source_size:] = 0
    assert (out.reshape(32, size) == want).all()


def test_zero_sized_copies_touch_no_source() -> None:
    """The usual tail: rows beyond the end have src-size 0 and a wild address."""
    declare = ".shared .align 16 .b8 s[512];\n"
    body = (
        "mov.u32 %r1, s;\nmad.lo.u32 %r2, %r0, 16, %r1;\nmad.wide.u32 %d10, %r0, 16, %d0;\n"
        "setp.lt.u32 %p1, %r0, 20;\nselp.u32 %r3, 16, {}, %p1;\n"
        "cp.async.cg.shared.global [%r2], [%d10], 16, %r3;\ncp.async.wait_all;\n"
        "ld.shared.b32 %r4, [%r2];\nmad.wide.u32 %d11, %r0, 4, %d1;\nst.global.b32 [%d11], %r4;"
    )
    room = np.ones(84, "u4")
    start = (-room.ctypes.data % 16) // 4
    x, out = room[start : start + 80], np.zeros(32, "u4")
    launch(kernel(body.format(0), 2, declare), [x, out])
    assert out.tolist() == [1] * 20 + [0] * 12
    with pytest.raises(ptx.OutOfBounds, match="beyond the end of a0"):
        launch(kernel(body.format(4), 2, declare), [x, out])


def test_poison_before_the_wait_is_not_the_data() -> None:
    """What a lucky race would have read: never the right bytes."""
    declare = ".shared .align 16 .b8 s[16];\n"
    module = kernel(
        "mov.u32 %r1, s;\ncp.async.ca.shared.global [%r1], [%d0], 4;\nld.shared.b32 %r2, [%r1];", 1,
        declare,
    )  # fmt: skip
    with pytest.raises(ptx.Race, match="nobody has waited"):
        launch(module, [np.ones(1, "u4")], block=1)


# ------------------------------------------------------------------------------------- variables


def test_module_variables_and_constants() -> None:
    text = (
        f"{HEADER}.const .align 4 .b32 table[4] = {{10, 20, 30, -1}};\n"
        ".global .align 8 .u64 counter = 5;\n.global .align 4 .f32 half = 0f3F000000;\n"
        ".visible .entry k(.param .u64 q)\n{\n.reg .b32 %r<8>;\n.reg .b64 %d<8>;\n"
        "ld.param.u64 %d1, [q];\nmov.u32 %r0, %tid.x;\nmov.u64 %d2, table;\n"
        "mad.wide.u32 %d3, %r0, 4, %d2;\nld.const.b32 %r1, [%d3];\n"
        "mad.wide.u32 %d4, %r0, 4, %d1;\nst.global.b32 [%d4], %r1;\nld.const.b32 %r2, [table+8];\n"
        "st.global.b32 [%d4+16], %r2;\nmov.u64 %d5, counter;\natom.global.add.u64 %d6, [%d5], 1;\n"
        "ld.global.b32 %r3, [half];\nst.global.b32 [%d4+32], %r3;\nret;\n}\n"
    )
    module = ptx.load(text)
    out = np.zeros(12, "u4")
    memory = ptx.Memory()
    memory.add_array(out, name="out")
    for _ in range(2):  # globals live on between launches
        module.launch("k", (1,), (4,), module.kernels["k"].pack([out]), memory=memory)
    assert out[:4].tolist() == [10, 20, 30, 0xFFFFFFFF]
    assert out[4:8].tolist() == [30] * 4
    assert out[8:].tolist() == [0x3F000000] * 4
    assert module.globals["counter"].view("u8")[0] == 13


def test_parameters_by_value_and_by_offset() -> None:
    text = (
        f"{HEADER}.visible .entry k(.param .u8 a, .param .align 8 .b8 b[24], .param .u16 c,\n"
        ".param .u64 .ptr .global .align 16 out, .param .f64 e)\n{\n.reg .b32 %r<8>;\n"
        ".reg .b64 %d<8>;\n.reg .b16 %h<8>;\n"
        "ld.param.u64 %d1, [out];\nld.param.s8 %r1, [a];\nst.global.b32 [%d1], %r1;\n"
        "ld.param.v2.u32 {%r2, %r3}, [b+8];\nst.global.v2.b32 [%d1+8], {%r2, %r3};\n"
        "ld.param.u16 %h1, [c];\nst.global.b16 [%d1+16], %h1;\nld.param.b64 %d2, [e];\n"
        "st.global.b64 [%d1+24], %d2;\nmov.b64 %d3, b;\nadd.u64 %d3, %d3, 16;\n"
        "ld.param.b64 %d4, [%d3];\nst.global.b64 [%d1+32], %d4;\nret;\n}\n"
    )
    module = ptx.load(text)
    k = module.kernels["k"]
    assert [(p.offset, p.size, p.align) for p in k.params] == [
        (0, 1, 1), (8, 24, 8), (32, 2, 2), (40, 8, 8), (48, 8, 8)
    ]  # fmt: skip
    out = np.zeros(5, "u8")
    memory = ptx.Memory()
    memory.add_array(out, name="out")
    b = np.array([1, 2, 3, 4, 5, 6], "u4").tobytes()
    module.launch("k", (1,), (1,), k.pack([-2, b, 7, out, 1.5]), memory=memory)
    assert out[0] == 0xFFFFFFFE
    assert out.view("u4")[2:4].tolist() == [3, 4]
    assert out[2] == 7
    assert out.view("f8")[3] == 1.5
    assert out[4] == 6 << 32 | 5


def test_device_functions_are_called() -> None:
    text = (
        f"{HEADER}.func (.param .b32 result) f(.param .b32 x, .param .b64 p)\n{{\n"
        ".reg .b32 %r<4>;\n.reg .b64 %d<4>;\n.reg .pred %p;\nld.param.b32 %r1, [x];\n"
        "ld.param.b64 %d1, [p];\nsetp.gt.u32 %p, %r1, 5;\n@%p bra BIG;\nld.global.b32 %r2, [%d1];\n"
        "add.u32 %r1, %r1, %r2;\nst.param.b32 [result], %r1;\nret;\nBIG:\n"
        "st.param.b32 [result], 1000;\nret;\n}\n"
        ".visible .entry k(.param .u64 q)\n{\n.reg .b32 %r<8>;\n.reg .b64 %d<8>;\n"
        "ld.param.u64 %d1, [q];\nmov.u32 %r0, %tid.x;\nmov.u32 %r5, 1;\n{\n.param .b32 a0;\n"
        "st.param.b32 [a0], %r0;\n.param .b64 a1;\nst.param.b64 [a1], %d1;\n.param .b32 r0;\n"
        "call.uni (r0), f, (a0, a1);\nld.param.b32 %r1, [r0];\n}\n{\n.param .b32 b0;\n"
        "st.param.b32 [b0], %r1;\n.param .b64 b1;\nst.param.b64 [b1], %d1;\n.param .b32 r1;\n"
        "call (r1), f, (b0, b1);\nld.param.b32 %r2, [r1];\n}\n"
        "bar.sync 0;\nmad.wide.u32 %d2, %r0, 4, %d1;\nst.global.b32 [%d2+4], %r2;\nret;\n}\n"
    )
    module = ptx.load(text)
    out = np.zeros(33, "u4")
    out[0] = 2
    memory = ptx.Memory()
    memory.add_array(out, name="out")
    module.launch("k", (1,), (32,), module.kernels["k"].pack([out]), memory=memory)

    def f(x: int) -> int:
        return 1000 if x > 5 else x + 2

    assert out[1:].tolist() == [f(f(i)) for i in range(32)]
    with pytest.raises(ptx.Unsupported, match="recursion"):
        ptx.load(text.replace("add.u32 %r1, %r1, %r2;", "call f, (x, p);").replace(
            ".func (.param .b32 result) f(", ".func f(").replace("st.param.b32 [result], %r1;", "")
            .replace("st.param.b32 [result], 1000;", "").replace("(r0), f,", "f,")
            .replace("(r1), f,", "f,"))  # fmt: skip


def test_isspacep_and_generic_addresses() -> None:
    declare = ".shared .align 16 .b8 s[128];\n.local .align 8 .b8 l[8];\n"
    body = (
        "mov.u64 %d10, s;\ncvta.shared.u64 %d10, %d10;\nmov.u64 %d11, l;\n"
        "cvta.local.u64 %d11, %d11;\n"
        "isspacep.shared %p1, %d10;\nisspacep.local %p2, %d11;\nisspacep.global %p3, %d0;\n"
        "isspacep.shared %p4, %d0;\nselp.u32 %r1, 1, 0, %p1;\nselp.u32 %r2, 2, 0, %p2;\n"
        "selp.u32 %r3, 4, 0, %p3;\nselp.u32 %r4, 8, 0, %p4;\nadd.u32 %r1, %r1, %r2;\n"
        "add.u32 %r3, %r3, %r4;\nadd.u32 %r1, %r1, %r3;\n"
        # Lanes of one instruction in different spaces.
        "mad.wide.u32 %d10, %r0, 4, %d10;\nsetp.lt.u32 %p5, %r0, 16;\n"
        "selp.b64 %d12, %d10, %d11, %p5;\n"
        "st.b32 [%d12], %r1;\nld.b32 %r5, [%d12];\ncvta.to.shared.u64 %d13, %d10;\n"
        "cvt.u32.u64 %r6, %d13;\n"
        "@%p5 ld.shared.b32 %r5, [%r6];\nmad.wide.u32 %d14, %r0, 4, %d0;\nst.b32 [%d14], %r5;"
    )
    x = np.zeros(32, "u4")
    launch(kernel(body, 1, declare), [x])
    assert set(x.tolist()) == {7}


def test_overlapping_regions_and_arrays() -> None:
    x = np.arange(64, dtype="u4").reshape(8, 8)
    memory = ptx.Memory()
    memory.add_array(x[:4], writable=False, name="top")
    memory.add_array(x[3:, ::-1], written=False, name="bottom")
    assert len(memory.regions) == 1
    region = memory.regions[0]
    assert (region.start, region.end - region.start) == (x.ctypes.data, 256)
    assert region.writable
    assert region.written is not None
    done = region.written.raw[region.start - region.origin :][:256]
    assert done[:128].all()
    assert not done[128:].any()
