"""bench/model: loops, pipes, occupancy and the arithmetic, on SASS of a few lines each."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench.model import (
    archs,
    kernels,
    occupancy,
    pipes,
    predict,
    published,
    report,
    sass,
    torch_flash,
)
from bench.model.sass import Instruction

A100, H100, B200 = (archs.ARCHS[name] for name in ("sm_80", "sm_90", "sm_100"))


def text(*lines: str, name: str = "kernel") -> str:
    """Lines of code as nvdisasm prints them; one that starts with a dot is a label."""
    body, at = [], 0
    for line in lines:
        if line.startswith("."):
            body.append(line)
        else:
            body.append(f"        /*{at:04x}*/                   {line} ;")
            at += 16
    return "\n".join([f'\t.section\t.text.{name},"ax"', *body, ""])


def function(*lines: str) -> sass.Function:
    return sass.functions(text(*lines))["kernel"]


def hot(x: Instruction) -> bool:
    return x.op.startswith("HMMA")


MMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


# ---- sass --------------------------------------------------------------------------------------


def test_one_loop() -> None:
    f = function("MOV R1, R2", ".L_a:", MMA, "IADD3 R1, R1, 0x1, RZ", "@P0 BRA `(.L_a)", "EXIT")
    (loop,) = f.loops
    ops = [i.op for b in sorted(loop.blocks) for i in f.blocks[b].instructions]
    assert ops == ["HMMA.16816.F32.BF16", "IADD3", "BRA"]


def test_innermost_hot_loop_of_a_nest() -> None:
    """Three deep; the innermost has no product, so the middle one is the hot loop."""
    f = function(
        ".L_outer:", "MOV R1, R2", ".L_middle:", MMA, ".L_inner:", "FADD R1, R1, R2",
        "@P0 BRA `(.L_inner)", "@P1 BRA `(.L_middle)", "@P2 BRA `(.L_outer)", "EXIT",
    )  # fmt: skip
    assert [len(x.blocks) for x in f.loops] == [1, 3, 5]
    (found,) = f.innermost(hot)
    assert found is f.loops[1]


def test_two_loops_one_after_the_other() -> None:
    f = function(
        ".L_a:", MMA, "@P0 BRA `(.L_a)", ".L_b:", MMA, "FADD R1, R1, R2", "@P1 BRA `(.L_b)", "EXIT"
    )
    assert len(f.innermost(hot)) == 2
    assert predict.read(f).trip["fp32"] == 0  # the one with fewer instructions a product


def test_rotated_loop_with_a_block_out_of_line() -> None:
    """As ptxas lays FlashAttention-2's out: the prefetch stands before the head, and jumps in."""
    f = function(
        "@!P0 BRA `(.L_end)", "BRA `(.L_head)", ".L_prefetch:", "LDGSTS.E.BYPASS.128 [R1], [R2.64]",
        "BRA `(.L_rest)", ".L_head:", MMA, "@P0 BRA `(.L_prefetch)", ".L_rest:", "FADD R1, R1, R2",
        "@P1 BRA `(.L_head)", ".L_end:", "EXIT",
    )  # fmt: skip
    assert len(f.loops) == 1  # to jump back to the prefetch is no loop
    code = predict.read(f)
    assert code.trip == {"issue": 6, "mma": 4096, "lsu": 512, "fp32": 32}
    assert code.outside["issue"] == 3  # two branches on the way in, EXIT


def test_plain_trip_goes_around_masks() -> None:
    f = function(
        ".L_head:", MMA, "@P0 BRA `(.L_full)", "FSEL R1, R1, R2, P1", "FSEL R2, R1, R2, P1",
        ".L_full:", "MUFU.EX2 R1, R2", "@P1 BRA `(.L_head)", "EXIT",
    )  # fmt: skip
    trip = predict.read(f).trip
    assert trip["alu"] == 0
    assert trip["xu"] == 32


def test_plain_trip_takes_aligned_rows() -> None:
    """Copies that are asynchronous where rows are aligned, one by one where they are not."""
    f = function(
        ".L_head:", MMA, "@P0 BRA `(.L_odd)", "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "NOP",
        "BRA `(.L_rest)", ".L_odd:", "LDG.E.U16 R1, [R2.64]", "LDG.E.U16 R3, [R2.64]",
        ".L_rest:", "@P1 BRA `(.L_head)", "EXIT",
    )  # fmt: skip
    assert predict.read(f).trip["lsu"] == 512


def test_conditions_and_ends_of_blocks() -> None:
    """A branch with a condition among its operands falls through; a bare one does not."""
    f = function("BRA.U UP0, `(.L_b)", "EXIT", ".L_b:", "BRA `(.L_c)", "NOP", ".L_c:", "@P0 EXIT",
                 "RET.REL.NODEC R2 `(.L_b)")  # fmt: skip
    assert [b.after for b in f.blocks] == [[2, 1], [], [4], [4], [5], []]


def test_what_is_no_sass_is_refused() -> None:
    with pytest.raises(sass.SassError, match="no instruction"):
        sass.function("empty", "nothing here")
    with pytest.raises(sass.SassError, match="leads to no label"):
        function("BRA `(.L_gone)", "EXIT")
    with pytest.raises(sass.SassError, match="not an instruction"):
        sass.function("odd", "        /*0000*/      ??? ;")


def test_functions_are_told_apart() -> None:
    both = text("EXIT", name="one") + text(MMA, "EXIT", name="two")
    found = sass.functions(both)
    assert {n: len(list(f.instructions)) for n, f in found.items()} == {"one": 1, "two": 2}


# ---- pipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "kind", "amount"),
    [
        ("HMMA.16816.F32.BF16", "mma", 2 * 16 * 8 * 16),
        ("HMMA.16816.F32", "mma", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", "mma_tf32", 2 * 16 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", "wgmma", 2 * 64 * 128 * 16 / 4),
        ("UTCHMMA", "tcgen05", 1),
        ("FFMA.FTZ", "fp32", 32),
        ("FFMA2", "fp32", 64),
        ("HFMA2.MMA.BF16_V2", "half2", 32),
        ("IMAD.WIDE.U32", "imad", 32),
        ("IADD3.X", "iadd", 32),
        ("FMNMX", "alu", 32),
        ("FSETP.GEU.AND", "alu", 32),
        ("F2FP.BF16.F32.PACK_AB", "alu", 32),
        ("MUFU.EX2", "xu", 32),
        ("F2I.FTZ.U32.TRUNC.NTZ", "xu", 32),
        ("DFMA", "fp64", 32),
        ("LDSM.16.M88.4", "lsu", 512),
        ("LDSM.16.MT88.2", "lsu", 256),
        ("LDS.128", "lsu", 512),
        ("STS.64", "lsu", 256),
        ("LDS.U8", "lsu", 128),
        ("LDGSTS.E.BYPASS.LTC128B.128", "lsu", 512),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "lsu", 128),
        ("SHFL.BFLY", "lsu", 128),
    ],
)
def test_opcodes_go_to_their_pipe(op: str, kind: str, amount: float) -> None:
    assert pipes.work(Instruction(0, "", op, "")) == {"issue": 1, kind: amount}


@pytest.mark.parametrize("op", ["BAR.SYNC.DEFER_BLOCKING", "BRA", "ULEA.HI", "LDC.64", "R2UR"])
def test_some_only_take_an_issue_slot(op: str) -> None:
    assert pipes.work(Instruction(0, "", op, "")) == {"issue": 1}


def test_what_is_guarded_by_not_true_does_nothing() -> None:
    f = function("@!PT LDS RZ, [RZ]", "@P0 LDS R1, [R2]", "EXIT")
    assert pipes.total(f.blocks) == {"issue": 3, "lsu": 128}


@pytest.mark.parametrize(
    "op", ["FROB.X", "IMMA.16832.S8.S8", "HMMA.16816.F16", "HMMA.884.F32.F32", "HGMMA.64x8x16.F16"]
)
def test_an_unknown_opcode_is_named(op: str) -> None:
    with pytest.raises(pipes.PipeError, match=op.replace(".", r"\.")):
        pipes.work(Instruction(0, "", op, ""))


def test_every_kind_of_work_has_a_pipe_and_a_rate() -> None:
    assert set(pipes.PIPE_OF.values()) == set(pipes.PIPES)
    for arch in archs.ARCHS.values():
        assert arch.rates.keys() == pipes.PIPE_OF.keys(), arch.name


# ---- archs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "megahertz"),  # of the data sheets; peak = SMs x cycles x FLOPs a cycle
    [("sm_80", 1410), ("sm_86", 1695), ("sm_89", 2520), ("sm_90", 1830), ("sm_120", 2407)],
)
def test_peaks_agree_with_boost_clocks(name: str, megahertz: float) -> None:
    clock = archs.ARCHS[name].clock
    assert clock is not None
    assert clock / 1e6 == pytest.approx(megahertz, rel=0.005)


def test_rates_as_documented() -> None:
    """The rows of NVIDIA's table that kernels of ours lean on: (fp32, half2 lanes, fp64)."""
    found = {
        n: tuple(a.rates[k] for k in ("fp32", "half2", "fp64")) for n, a in archs.ARCHS.items()
    }
    assert found == {
        "sm_80": (64, 128, 32), "sm_86": (128, 128, 2), "sm_89": (128, 64, 2),
        "sm_90": (128, 128, 64), "sm_100": (128, 64, 64), "sm_120": (128, 64, 2),
    }  # fmt: skip
    for arch in archs.ARCHS.values():
        assert [arch.rates[k] for k in ("imad", "alu", "xu", "lsu", "issue")] == [
            64,
            64,
            16,
            128,
            4,
        ]


# ---- occupancy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks", "limit"),
    [
        # CUDA C++ Best Practices Guide, "Calculating Occupancy", for 64 K registers: 32 registers
        # a thread leave every warp its place.
        ("sm_80", 32, 0, 256, 8, "warps"),
        ("sm_86", 32, 0, 256, 6, "warps"),
        ("sm_80", 32, 0, 1024, 2, "warps"),
        ("sm_86", 32, 0, 1024, 1, "warps"),  # 1536 threads hold one block of 1024
        ("sm_80", 33, 0, 1024, 1, "registers"),  # 33 round up to 40
        ("sm_80", 41, 0, 256, 5, "registers"),  # 41 to 48: not 6 blocks
        ("sm_80", 16, 0, 32, 32, "blocks"),
        ("sm_86", 16, 0, 32, 16, "blocks"),
        # Ampere Tuning Guide: 163 KB a block on 8.0, 99 KB on 8.6, 1 KB of each block is reserved.
        ("sm_80", 32, 163 * 1024, 256, 1, "shared memory"),
        ("sm_80", 32, 163 * 1024 + 1, 256, 0, "shared memory"),
        ("sm_86", 32, 99 * 1024, 256, 1, "shared memory"),
        ("sm_86", 32, 100 * 1024, 256, 0, "shared memory"),
        ("sm_80", 32, 40 * 1024, 128, 4, "shared memory"),
        ("sm_80", 32, 41 * 1024, 128, 3, "shared memory"),
        # FlashAttention-2 on A100: 255 registers, 4 warps, 48 and 64 KB.
        ("sm_80", 255, 48 * 1024, 128, 2, "registers"),
        ("sm_80", 255, 64 * 1024, 128, 2, "registers"),
        # Registers come from a quarter of the file: 9 warps fit the whole, 8 the quarters.
        ("sm_80", 224, 0, 288, 0, "registers"),
    ],
)
def test_occupancy(
    arch: str, registers: int, shared: int, threads: int, blocks: int, limit: str
) -> None:
    found = occupancy.occupancy(archs.ARCHS[arch], registers, shared, threads)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps == blocks * threads // 32


# ---- predict -----------------------------------------------------------------------------------


def kernel(f: sass.Function, **changes: object) -> predict.Kernel:
    """A forward kernel of one warp and tiles 16 x 8 x 16: two products are two HMMA."""
    plain = predict.Kernel("k", f, 64, 32, 1024, 16, 8, 16, "rows", 2, 2, 2)
    return replace(plain, **changes)  # type: ignore[arg-type]


LOOP = (".L_a:", MMA, MMA, *["MUFU.EX2 R1, R1"] * 3, "FFMA R1, R1, R1, R1", "FMNMX R1, R1, R2, PT",
        "LDS.128 R4, [R1]", "@P0 BRA `(.L_a)", "EXIT")  # fmt: skip


def test_cycles_by_pipe_of_a_known_loop() -> None:
    found = predict.predict(kernel(function(*LOOP)), A100, predict.Problem(1, 1, 64, 64, 16))
    assert found.trip == {
        "tensor": 2 * 4096 / 2048, "xu": 3 * 32 / 16, "fma": 32 / 64, "alu": 32 / 64, "fp64": 0,
        "lsu": 512 / 128, "issue": 9 / 4,
    }  # fmt: skip
    assert found.binding == "xu"
    assert found.trips == 64 / 8
    assert found.done == 1
    # 4 blocks on 108 SMs: the time of one. EXIT is what is outside.
    busiest, rest = 6.0, 4 + 0.5 + 0.5 + 4
    block = 8 * (busiest + predict.EXPOSED * rest) + 1 / 4
    assert found.block_cycles == pytest.approx(block)
    assert found.seconds is not None
    assert A100.clock is not None
    assert found.seconds == pytest.approx(block / A100.clock)
    assert found.flops == 4 * 64 * 64 * 16
    assert found.share(A100) == pytest.approx(found.flops / found.seconds / 312e12)


def test_bounds() -> None:
    cycles = {"tensor": 10.0, "fma": 4.0, "lsu": 2.0, "issue": 3.0}
    assert predict.bound(cycles, 0.0) == 10
    assert predict.bound(cycles, 1.0) == 16
    assert predict.bound(cycles, 0.5) == 13
    assert predict.bound(cycles | {"issue": 20.0}, 0.0) == 20


def test_causal_tiles_and_bytes() -> None:
    k = kernel(function(*LOOP))
    square = predict.Problem(2, 3, 64, 64, 16, causal=True)
    assert predict.predict(k, A100, square).trips == (2 + 4 + 6 + 8) / 4
    assert predict.predict(k, A100, square).flops == 4 * 6 * 64 * 64 / 2 * 16
    walks_rows = replace(k, over="keys", rows=8, keys=16)
    assert predict.predict(walks_rows, A100, square).trips == (8 + 6 + 4 + 2) / 4
    found = predict.predict(k, A100, predict.Problem(2, 3, 64, 32, 16))
    assert found.dram_bytes == 2 * 6 * 16 * (2 * 64 + 2 * 32)
    # 24 blocks: q and o of 16 rows, k and v of 4 tiles of 8 keys.
    assert found.tile_bytes == 2 * 24 * 16 * (2 * 16 + 4 * 2 * 8)
    assert found.intensity == found.flops / found.dram_bytes
    with pytest.raises(predict.ModelError, match="square"):
        predict.Problem(1, 1, 64, 32, 16, causal=True)


def test_peeled_tiles_are_not_trips() -> None:
    f = function(MMA, MMA, *LOOP)
    found = predict.predict(kernel(f), A100, predict.Problem(1, 1, 64, 64, 16))
    assert found.trips == 64 / 8 - 1


def test_blocks_queue_for_sms() -> None:
    k, arch = kernel(function(*LOOP)), replace(A100, dram=1e15)

    def seconds(B: int) -> float:
        found = predict.predict(k, arch, predict.Problem(B, 1, 16, 4096, 16)).seconds
        assert found is not None
        return found

    assert seconds(108) == seconds(1)
    assert seconds(109) == 2 * seconds(1)


def test_repeated_products_are_shown_and_others_refused() -> None:
    more = function(".L_a:", *[MMA] * 3, "@P0 BRA `(.L_a)", "EXIT")
    problem = predict.Problem(1, 1, 64, 64, 16)
    assert predict.predict(kernel(more), A100, problem).done == 1.5
    for count in (1, 4):
        f = function(".L_a:", *[MMA] * count, "@P0 BRA `(.L_a)", "EXIT")
        with pytest.raises(predict.ModelError, match=f"{count / 2:.3f} times"):
            predict.predict(kernel(f), A100, problem)
    with pytest.raises(predict.ModelError, match=r"0\.500 tiles outside"):
        predict.predict(kernel(function(MMA, *LOOP)), A100, problem)
    with pytest.raises(predict.ModelError, match="head_dim 16"):
        predict.predict(kernel(more), A100, replace(problem, D=32))


def test_memory_bounds_what_has_little_to_do() -> None:
    f = function(MMA, "EXIT")
    k = kernel(f, over="tile", products=1, over_q=1, over_k=1, weights=True)
    found = predict.predict(k, A100, predict.Problem(1, 32, 2048, 2048, 16), exposed=0.0)
    assert found.dram_bytes == 2 * 32 * (2 * 2048 * 16 + 2048 * 2048)
    assert found.seconds == found.dram_bytes / A100.dram
    assert found.binding == "dram"
    fast = replace(A100, dram=1e15)
    found = predict.predict(k, fast, predict.Problem(1, 32, 2048, 2048, 16), exposed=0.0)
    assert found.binding == "tensor"
    assert (found.trips, found.block_cycles) == (1, 4096 / 2048)


def test_undocumented_rates_give_no_figure() -> None:
    k, problem = kernel(function(*LOOP)), predict.Problem(1, 1, 64, 64, 16)
    found = predict.predict(k, B200, problem)
    assert (found.missing, found.trip, found.seconds, found.binding) == (["mma"], None, None, None)
    assert found.share(B200) is None
    assert found.occupancy.blocks == 32
    tf32 = function(".L_a:", *["HMMA.1688.F32.TF32 R4, R8, R10, R4"] * 4, "@P0 BRA `(.L_a)", "EXIT")
    assert predict.predict(kernel(tf32), B200, problem).missing == ["mma_tf32"]
    row = report.prediction(replace(k, head_dim=64), "sm_100", causal=False)
    assert "n/a: mma" in report.kernel_table([row])[1][0]
    row = report.prediction(replace(k, head_dim=64, shared=2**18), "sm_80", causal=False)
    assert "n/a: no block fits, shared memory" in report.kernel_table([row])[1][0]


# ---- kernels, published, report ----------------------------------------------------------------


ENTRY = {
    "name": "forward_kernel bf16 d16", "arch": "sm_80", "cubin": "a.cubin", "function": "kernel",
    "threads": 32, "shared": 1024, "rows": 16, "keys": 8, "head_dim": 16, "causal": None,
}  # fmt: skip


def test_a_list_of_kernels() -> None:
    code = {"kernel": function(*LOOP)}
    found = kernels.listed(ENTRY, code, {"kernel": 64})
    assert found.kernel == replace(kernel(code["kernel"]), name=ENTRY["name"])
    with pytest.raises(kernels.KernelError, match="frob_kernel"):
        kernels.listed(ENTRY | {"name": "frob_kernel bf16"}, code, {"kernel": 64})
    with pytest.raises(kernels.KernelError, match=r"a\.cubin has no function gone"):
        kernels.listed(ENTRY | {"function": "gone"}, code, {"kernel": 64})


def test_a_folder_without_a_list(tmp_path: Path) -> None:
    with pytest.raises(kernels.KernelError, match="kernels.json"):
        kernels.load(tmp_path)


def test_four_points_are_fitted_and_the_others_held_out() -> None:
    fitted = [p for p in published.POINTS if p.fitted]
    assert len(fitted) == 4
    assert {(p.arch, p.problem.Sq, p.what) for p in fitted} == {("sm_80", 16384, "both")}
    assert len(published.POINTS) > 70
    for p in published.POINTS[:-1]:  # the papers' shapes
        assert (p.problem.B * p.problem.Sq, p.problem.H * p.problem.D) == (16384, 2048)


def test_the_fit_finds_what_made_the_points(monkeypatch: pytest.MonkeyPatch) -> None:
    k = replace(kernel(function(*LOOP)), products=2)
    monkeypatch.setattr(published, "_kernel", lambda *_: k)
    problem = predict.Problem(1, 1, 4096, 4096, 16)
    points = []
    for arch, tilt in (("sm_80", 1.1), ("sm_90", 1 / 1.1)):
        found = predict.predict(k, archs.ARCHS[arch], problem, exposed=0.6)
        assert found.seconds is not None
        speed = found.flops / found.seconds / 1e12
        points.append(published.Point("made", arch, "forward", problem, speed * tilt, fitted=True))
    assert published.fit(points) == pytest.approx(0.6, abs=0.01)


def test_a_report_without_torchs_kernels(tmp_path: Path) -> None:
    row = report.prediction(
        replace(kernel(function(*LOOP)), rows=16, keys=8), "sm_80", causal=False
    )
    assert json.loads(json.dumps(row))["label"] == "model"
    path = tmp_path / "REPORT.md"
    report.write(path, [row], "torch is a CPU build.")
    written = path.read_text()
    assert "Validation: not run" in written
    assert "torch is a CPU build." in written


def test_a_cpu_torch_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        origin = str(tmp_path / "torch" / "__init__.py")

    monkeypatch.setattr(torch_flash.importlib.util, "find_spec", lambda _: Spec)
    with pytest.raises(torch_flash.NoTorchKernelsError, match="a CPU build"):
        torch_flash.forward("sm_80", 64, causal=False)


def test_the_checked_in_report_is_of_this_model() -> None:
    """Its head names the fitted number; `make model` writes it anew."""
    head = (Path(report.__file__).with_name("REPORT.md")).read_text()
    assert f"others by {predict.EXPOSED:g}: the one fitted" in head


def test_counters_of_work_add_up() -> None:
    f = function(*LOOP)
    whole = pipes.total(f.blocks)
    code = predict.read(f)
    assert whole == code.trip + code.outside
    assert isinstance(whole, Counter)
    assert not math.isnan(sum(whole.values()))
