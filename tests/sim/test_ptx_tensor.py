"""mma.sync, ldmatrix and movmatrix: fragments as two independent descriptions give them.

tensor-layouts (PyPI, pure Python) and CuTe's traits (PyPI nvidia-cutlass, compiled for the host)
place every element in a lane's register. The operands are placed by their word, the product is
read back by it, and compared with a matrix product.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from . import ptx
from .build import KEPT, cuda_includes
from .kit import bf16_bits, kernel, launch


@dataclass(frozen=True)
class Mma:
    shape: str
    acc: str
    kind: str

    @property
    def k(self) -> int:
        return int(self.shape.split("k")[1])

    @property
    def suffix(self) -> str:
        return f"{self.shape}.row.col.{self.acc}.{self.kind}.{self.kind}.{self.acc}"


MMAS = {
    f"{shape} {acc} {kind}": Mma(shape, acc, kind)
    for shape, acc, kind in (
        ("m16n8k16", "f32", "f16"),
        ("m16n8k16", "f16", "f16"),
        ("m16n8k16", "f32", "bf16"),
        ("m16n8k8", "f32", "f16"),
        ("m16n8k8", "f16", "f16"),
        ("m16n8k8", "f32", "bf16"),
        ("m16n8k8", "f32", "tf32"),
        ("m16n8k4", "f32", "tf32"),
    )
}
LDMATRIX = ["x1", "x2", "x4", "x1 trans", "x2 trans", "x4 trans"]


# -------------------------------------------------------------------------------------- oracles


def _by_tensor_layouts() -> dict[str, dict[str, np.ndarray]]:
    from tensor_layouts import atoms_nv

    names = {
        "m16n8k16 f32 f16": "SM80_16x8x16_F32F16F16F32_TN",
        "m16n8k16 f16 f16": "SM80_16x8x16_F16F16F16F16_TN",
        "m16n8k16 f32 bf16": "SM80_16x8x16_F32BF16BF16F32_TN",
        "m16n8k8 f32 f16": "SM80_16x8x8_F32F16F16F32_TN",
        "m16n8k8 f16 f16": "SM80_16x8x8_F16F16F16F16_TN",
        "m16n8k8 f32 bf16": "SM80_16x8x8_F32BF16BF16F32_TN",
        "m16n8k8 f32 tf32": "SM80_16x8x8_F32TF32TF32F32_TN",
        "m16n8k4 f32 tf32": "SM80_16x8x4_F32TF32TF32F32_TN",
    }
    found = {}
    for name, atom in names.items():
        traits = getattr(atoms_nv, atom)
        m = MMAS[name]
        counts = {"a": 16 * m.k // 32, "b": 8 * m.k // 32, "c": 4}
        found[name] = {
            x: np.array([[getattr(traits, f"{x}_layout")(lane, v) for v in range(n)]
                         for lane in range(32)]) for x, n in counts.items()
        }  # fmt: skip
    copies = ["U32x1_LDSM_N", "U32x2_LDSM_N", "U32x4_LDSM_N", "U16x2_LDSM_T", "U16x4_LDSM_T",
              "U16x8_LDSM_T"]  # fmt: skip
    for name, atom in zip(LDMATRIX, copies, strict=True):
        traits = getattr(atoms_nv, f"SM75_{atom}")
        n = 2 * int(name[1])
        found[name] = {
            "from": np.array([[traits.src_layout_bits(lane, 16 * v) // 16 for v in range(8)]
                              for lane in range(32)]),
            "to": np.array([[traits.dst_layout_bits(lane, 16 * v) // 16 for v in range(n)]
                            for lane in range(32)]),
        }  # fmt: skip
    return found


@functools.cache
def _by_cute() -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    name = ""
    for line in subprocess.run([_cute_program()], capture_output=True, text=True, check=True
                               ).stdout.splitlines():  # fmt: skip
        word, _, rest = line.partition(" ")
        if word in ("mma", "ldmatrix"):
            name = rest
            found[name] = {}
        else:
            found[name][word] = np.array([int(x) for x in rest.split()]).reshape(32, -1)
    return found


def _cute_program() -> str:
    """Compiled once (5 s) and kept under build/."""
    import cutlass_library

    source = Path(__file__).parent / "cute_layouts.cpp"
    program = KEPT / "cute_layouts"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        KEPT.mkdir(parents=True, exist_ok=True)
        cutlass = Path(next(iter(cutlass_library.__path__))) / "source" / "include"
        made = KEPT / "cute_layouts.new"
        compiler = shutil.which("g++") or shutil.which("clang++") or "c++"
        headers = [f"-isystem{cutlass}", *cuda_includes()]
        command = [compiler, "-std=c++17", "-O0", *headers, str(source), "-o", str(made)]
        subprocess.run(command, check=True, timeout=300)
        made.replace(program)
    return str(program)


ORACLES: dict[str, Callable[[], dict[str, dict[str, np.ndarray]]]] = {
    "tensor-layouts": _by_tensor_layouts,
    "cute": _by_cute,
}


# ------------------------------------------------------------------------------------------ mma


def _packed(m: Mma, values: np.ndarray, kind: str) -> np.ndarray:
    """(32, n) values of a lane to (32, registers) words."""
    if kind == "f16":
        return np.ascontiguousarray(values.astype(np.float16)).view("u4")
    if kind == "bf16":
        return np.ascontiguousarray(bf16_bits(values)).view("u4")
    return np.ascontiguousarray(values.astype(np.float32)).view("u4")


def run_mma(m: Mma, a: np.ndarray, b: np.ndarray, c: np.ndarray, **schedule: str) -> np.ndarray:
    """(32, registers) words each: one warp, one instruction. Returns d's registers."""
    counts = [x.shape[1] for x in (a, b, c)]
    body = ""
    first = [1, 1 + counts[0], 1 + counts[0] + counts[1]]
    for i, (start, n) in enumerate(zip(first, counts, strict=True)):
        body += f"mad.wide.u32 %d10, %r0, {4 * n}, %d{i};\n"
        for k in range(n):
            body += f"ld.global.b32 %r{start + k}, [%d10+{4 * k}];\n"

    def registers(start: int, n: int) -> str:
        return "{" + ", ".join(f"%r{start + k}" for k in range(n)) + "}"

    names = [registers(s, n) for s, n in zip(first, counts, strict=True)]
    d = registers(40, counts[2])
    body += f"mma.sync.aligned.{m.suffix} {d}, {', '.join(names)};\n"
    body += f"mad.wide.u32 %d10, %r0, {4 * counts[2]}, %d3;\n"
    for k in range(counts[2]):
        body += f"st.global.b32 [%d10+{4 * k}], %r{40 + k};\n"
    out = np.zeros((32, counts[2]), "u4")
    launch(kernel(body, 4), [*(np.ascontiguousarray(x) for x in (a, b, c)), out], **schedule)
    return out


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("name", MMAS)
def test_mma_fragments(name: str, oracle: str) -> None:
    """Whole numbers up to 8: every sum is exact, so the product must be equal."""
    m = MMAS[name]
    where = ORACLES[oracle]()[name]
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-8, 9, s).astype(np.float64) for s in ((16, m.k), (m.k, 8), (16, 8)))
    # Offsets are column-major in (M, K), (N, K) and (M, N).
    lanes = {
        "a": a.ravel(order="F")[where["a"]],
        "b": b.T.ravel(order="F")[where["b"]],
        "c": c.ravel(order="F")[where["c"]],
    }
    words = [_packed(m, lanes["a"], m.kind), _packed(m, lanes["b"], m.kind),
             _packed(m, lanes["c"], m.acc)]  # fmt: skip
    out = run_mma(m, *words)
    got = out.view("f2" if m.acc == "f16" else "f4").astype(np.float64)
    assert (got == (a @ b + c).ravel(order="F")[where["c"]]).all()


def test_oracles_agree_and_cover() -> None:
    one, other = _by_tensor_layouts(), _by_cute()
    assert set(one) == set(other) == set(MMAS) | set(LDMATRIX)
    for name, parts in one.items():
        for part, offsets in parts.items():
            assert (offsets == other[name][part]).all(), (name, part)


def test_tf32_reads_the_upper_19_bits() -> None:
    m = MMAS["m16n8k8 f32 tf32"]
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((32, 4)).astype("f4"), rng.standard_normal((32, 2)).astype("f4")
    c = np.zeros((32, 4), "f4")
    words = [np.ascontiguousarray(x).view("u4") for x in (a, b, c)]
    cut = [words[0] & 0xFFFFE000, words[1] & 0xFFFFE000, words[2]]
    assert (run_mma(m, *words) == run_mma(m, *cut)).all()
    assert (run_mma(m, words[0] | 0x2000, *words[1:]) != run_mma(m, *words)).any()


@pytest.mark.parametrize("sums", ["exact", "ascending", "descending", "truncated"])
def test_sums_in_different_orders(sums: str) -> None:
    """Within the error of fp32 additions of the exact product, and not all alike."""
    m = MMAS["m16n8k16 f32 f16"]
    rng = np.random.default_rng(2)
    halves = [rng.standard_normal((32, n)).astype(np.float16) for n in (8, 4)]
    c = (rng.standard_normal((32, 4)) * 100).astype("f4")
    words = [np.ascontiguousarray(x).view("u4") for x in (*halves, c)]
    got = run_mma(m, *words, sums=sums).view("f4")
    exact = run_mma(m, *words).view("f4")
    assert np.abs(got - exact).max() <= 17 * 2.0**-23 * 512
    assert (sums == "exact") == bool((got == exact).all())


def test_mma_overflow_and_nan() -> None:
    m = MMAS["m16n8k16 f32 bf16"]
    big = np.full((32, 4), 0x7F7F7F7F, "u4")
    out = run_mma(m, big, np.full((32, 2), 0x7F7F7F7F, "u4"), np.zeros((32, 4), "u4")).view("f4")
    assert np.isposinf(out).all()
    out = run_mma(m, np.full((32, 4), 0x7FC07FC0, "u4"), big[:, :2], np.zeros((32, 4), "u4"))
    assert np.isnan(out.view("f4")).all()


# ------------------------------------------------------------------------------------- ldmatrix


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("name", LDMATRIX)
def test_ldmatrix(name: str, oracle: str) -> None:
    """Rows lie anywhere in shared memory: each lane's row at an address of its own."""
    number, trans = int(name[1]), ".trans" if "trans" in name else ""
    where = ORACLES[oracle]()[name]
    rows = np.arange(32 * 8, dtype="u2").reshape(32, 8)  # lane's row, its element
    registers = "{" + ", ".join(f"%r{20 + k}" for k in range(number)) + "}"
    body = (
        "mov.u32 %r1, s;\nmul.lo.u32 %r2, %r0, 7;\nand.b32 %r2, %r2, 31;\n"
        "mad.lo.u32 %r2, %r2, 16, %r1;\nmad.wide.u32 %d10, %r0, 16, %d0;\n"
        "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d10];\n"
        "st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};\nbar.warp.sync -1;\n"
        f"ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {registers}, [%r2];\n"
        f"mad.wide.u32 %d11, %r0, {4 * number}, %d1;\n"
    )
    for k in range(number):
        body += f"st.global.b32 [%d11+{4 * k}], %r{20 + k};\n"
    out = np.zeros((32, number), "u4")
    declare = ".shared .align 128 .b8 s[512];\n"
    launch(kernel(body, 2, declare), [np.ascontiguousarray(rows).view("u4"), out])
    used = 8 * number
    flat = np.zeros(8 * used, "u2")
    flat[where["from"][:used]] = rows[:used]
    assert (out.view("u2").reshape(32, -1) == flat[where["to"]]).all()


def test_ldmatrix_checks_rows_that_are_used() -> None:
    """x1 reads the rows of lanes 0 to 7: the other addresses may be anything."""
    body = (
        "mov.u32 %r1, s;\nsetp.lt.u32 %p1, %r0, 8;\nmad.lo.u32 %r2, %r0, 16, %r1;\n"
        "@%p1 st.shared.v4.b32 [%r2], {{%r0, %r0, %r0, %r0}};\nbar.warp.sync -1;\n"
        "selp.u32 %r2, %r2, 3, %p1;\nldmatrix.sync.aligned.m8n8.{}.shared.b16 {}, [%r2{}];"
    )
    declare = ".shared .align 128 .b8 s[128];\n"
    launch(kernel(body.format("x1", "{%r3}", ""), 0, declare), [])
    with pytest.raises(ptx.Misaligned):
        launch(kernel(body.format("x2", "{%r3, %r4}", ""), 0, declare), [])
    with pytest.raises(ptx.OutOfBounds):
        launch(kernel(body.format("x1", "{%r3}", "+16"), 0, declare), [])
    with pytest.raises(ptx.Misaligned):
        launch(kernel(body.format("x1", "{%r3}", "+8"), 0, declare), [])


def test_ldmatrix_needs_a_barrier_after_the_rows_were_written() -> None:
    body = (
        "mov.u32 %r1, s;\nmad.lo.u32 %r2, %r0, 16, %r1;\nxor.b32 %r3, %r0, 1;\n"
        "mad.lo.u32 %r3, %r3, 16, %r1;\nst.shared.v4.b32 [%r2], {{%r0, %r0, %r0, %r0}};\n{}"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r3];"
    )
    declare = ".shared .align 128 .b8 s[512];\n"
    launch(kernel(body.format("bar.warp.sync -1;\n"), 0, declare), [])
    with pytest.raises(ptx.Race):
        launch(kernel(body.format(""), 0, declare), [])


def test_movmatrix_transposes() -> None:
    x = np.arange(64, dtype="u2").reshape(8, 8)
    body = (
        "mad.wide.u32 %d10, %r0, 4, %d0;\nld.global.b32 %r1, [%d10];\n"
        "movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;\n"
        "mad.wide.u32 %d11, %r0, 4, %d1;\nst.global.b32 [%d11], %r2;"
    )
    out = np.zeros((8, 8), "u2")
    launch(kernel(body, 2), [x.reshape(-1).view("u4"), out.reshape(-1).view("u4")])
    assert (out == x.T).all()


# ------------------------------------------------------------------------------- bank conflicts


@pytest.mark.parametrize(("pitch", "ways"), [(128, 8), (144, 1), (64, 4), (32, 2), (16, 1)])
def test_bank_conflicts_of_ldmatrix(pitch: int, ways: int) -> None:
    """Rows of 64 bf16 lie in the same banks; 16 bytes of padding spread them."""
    body = (
        f"mov.u32 %r1, s;\nmad.lo.u32 %r2, %r0, {pitch}, %r1;\n"
        "st.shared.v4.b32 [%r2], {%r0, %r0, %r0, %r0};\nbar.warp.sync -1;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r2];"
    )
    report = launch(kernel(body, 0, ".shared .align 128 .b8 s[8192];\n"), [], traffic=True)
    assert [t.ratio for t in report.traffic] == [ways, ways]
    assert [t.ideal for t in report.traffic] == [4, 4]


@pytest.mark.parametrize(("stride", "ways"), [(4, 1), (8, 2), (128, 32), (132, 1), (0, 1)])
def test_bank_conflicts_of_words(stride: int, ways: int) -> None:
    body = (
        f"mov.u32 %r1, s;\nmad.lo.u32 %r2, %r0, {stride}, %r1;\nst.shared.b32 [%r1], 0;\n"
        "bar.warp.sync -1;\nst.shared.b32 [%r2], 0;"
    )
    report = launch(kernel(body, 0, ".shared .align 128 .b8 s[8192];\n"), [], traffic=True)
    assert report.traffic[1].moved == ways


@pytest.mark.parametrize(("stride", "count"), [(4, 4), (8, 8), (32, 32), (64, 32)])
def test_sectors(stride: int, count: int) -> None:
    x = np.zeros(1024, "u4")
    start = (-x.ctypes.data % 64) // 4
    body = f"mad.wide.u32 %d10, %r0, {stride}, %d0;\nld.global.b32 %r1, [%d10];"
    report = launch(kernel(body), [x[start:]], traffic=True)
    assert (report.traffic[0].moved, report.traffic[0].ideal) == (count, 4)
