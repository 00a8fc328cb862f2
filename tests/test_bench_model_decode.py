"""bench/model/decode*.py: a step by hand, what is read of a kernel and of a merge, lists."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.model import decode, decode_list, decode_report, kernels, latency, predict, report, sass
from bench.model.archs import ARCHS
from bench.model.decode import Attend, Call, Merge

A100, H100 = ARCHS["sm_80"], ARCHS["sm_90"]
MMA, COPY = "HMMA.16816.F32.BF16 R4, R8, R12, R4", "LDGSTS.E.BYPASS.128 [R1], [R2.64]"
TF32 = "HMMA.1688.F32.TF32 R4, R8, R12, R4"
SUM, PART = "LDG.E R1, [R2.64]", "LDG.E.128 R{0}, [R2.64+{0}]"
TILE = (".L_a:", MMA, MMA, COPY, "@P0 BRA `(.L_a)", "EXIT")


def function(*lines: str) -> sass.Function:
    text = ['\t.section\t.text.kernel,"ax"']
    for at, line in enumerate(lines):
        text.append(line if line.startswith(".") else f"        /*{16 * at:04x}*/     {line} ;")
    return sass.functions("\n".join([*text, ""]))["kernel"]


def attend(*lines: str, **changes: object) -> Attend:
    """One warp, tiles of 16 rows and 8 keys of 16 columns: two products are two HMMA."""
    plain = Attend("few", function(*(lines or TILE)), 64, 32, 1024, 16, 8, None)
    return replace(plain, **changes)  # type: ignore[arg-type]


def merge(*lines: str, at_once: int | None = None) -> Merge:
    return Merge(function(".L_a:", *lines, "@P0 BRA `(.L_a)", "EXIT"), at_once)


def a_split(first: int = 4) -> tuple[str, ...]:
    """Loads of one split, and what uses them."""
    return PART.format(first), PART.format(first + 4)


# A sum, a decision on it, then the parts, which are used before the next split's loads.
SERIAL = merge(SUM, "FSETP.NEU.AND P1, PT, R1, RZ, PT", *a_split(), "FFMA R20, R4, R5, R20")
CALL = Call("bf16", 2, 4, 2, 1, 64, 16)


def test_a_step_by_hand() -> None:
    found = decode.step(CALL, A100, attend(), SERIAL, 4)
    # 8 tiles of keys in 4 parts, of 2 x 2 kv heads.
    assert (found.trips, found.blocks, found.waves) == (2, 16, 1)
    assert CALL.packed == 2
    assert CALL.dram_bytes == 2 * (2 * 2 * 64 * 16) * 2 + 2 * (2 * 4 * 16) * 2
    clock = A100.clock
    assert clock is not None
    # Of a trip: 8192 FLOPs at 2048 a cycle, 512 bytes at 128; k, then v.
    each = 4.0, 8.0
    best, worst = (565.0, 571 * 1.9)
    want = {
        "dram": (CALL.dram_bytes / 2.039e12 / 0.95, CALL.dram_bytes / 2.039e12 / 0.86),
        "chain": (2 * 2 * best / clock, 2 * (2 * worst + each[1]) / clock),
        "pipes": (2 * each[0] / clock, 2 * each[1] / clock),
        "port": (2 * (2 * 8 * 16 * 2) / 64 / clock, 2 * (2 * 8 * 16 * 2) / 35 / clock),
    }
    assert found.bounds == {name: pytest.approx(pair) for name, pair in want.items()}
    assert found.binding == ("chain", "chain")
    # EXIT is all there is outside; three barriers. The merge: sums from L1, then parts, 4 times.
    around = [latency.KERNEL_S[i] + (0.25 + 3 * latency.SHARED[i]) / clock for i in (0, 1)]
    assert found.around == pytest.approx(around)
    merging = (1.3e-6 + (203 + 4 * (203 + 36)) / clock, 2.6e-6 + (423 + 4 * (423 + 423)) / clock)
    assert found.merge == pytest.approx(merging)
    total = around[0] + want["chain"][0] + merging[0]
    assert found.seconds[0] == pytest.approx(total)
    assert found.share[0] == pytest.approx(CALL.dram_bytes / 2.039e12 / total)


def test_splits_beyond_the_tiles_have_no_keys() -> None:
    """Shares are whole tiles: of 8, five parts are four of two."""
    four, five, one = (decode.step(CALL, A100, attend(), SERIAL, n) for n in (4, 5, 1))
    assert (five.blocks, five.trips, five.bounds) == (four.blocks, four.trips, four.bounds)
    assert five.merge > four.merge
    assert (one.blocks, one.trips, one.merge) == (4, 8, (0.0, 0.0))


def test_blocks_beyond_what_is_resident_come_in_waves() -> None:
    wide = attend(registers=255, threads=256, rows=128)
    wide = replace(wide, function=function(".L_a:", MMA, MMA, COPY, "@P0 BRA `(.L_a)", "EXIT"))
    call = replace(CALL, B=108 // 2)
    once = decode.step(call, A100, wide, SERIAL, 1)
    twice = decode.step(replace(call, B=call.B + 1), A100, wide, SERIAL, 1)
    assert (once.resident, once.waves, twice.waves) == (1, 1, 2)
    assert twice.bounds["chain"] == pytest.approx([2 * x for x in once.bounds["chain"]])


def test_what_a_block_waits_for() -> None:
    def chain(stages: int | None) -> latency.Pair:
        return decode.step(CALL, A100, attend(stages=stages), SERIAL, 8).bounds["chain"]

    clock = A100.clock or 0
    loaded = 571 * 1.9
    assert chain(None) == pytest.approx((2 * 565 / clock, (2 * loaded + 8) / clock))
    assert chain(2) == pytest.approx((565 / clock, (loaded + 8) / clock))
    assert chain(3) == pytest.approx((565 / 2 / clock, (loaded / 2 + 8) / clock))
    # Nothing is under way while it works: k and v together, or in turn.
    assert chain(1) == pytest.approx(((565 + 4) / clock, (2 * loaded + 8) / clock))


def test_work_hides_loads_only_as_long_as_it_is_shorter() -> None:
    busy = (*TILE[:-2], *["MUFU.EX2 R1, R1"] * 2000, *TILE[-2:])
    found = decode.step(CALL, A100, attend(*busy), SERIAL, 8)
    assert found.bounds["chain"][0] == pytest.approx(2000 * 2 / (A100.clock or 0))
    assert found.binding == ("chain", "chain")  # of one block; two an SM share its pipes
    more = decode.step(replace(CALL, B=216), A100, attend(*busy), SERIAL, 8)
    assert more.binding == ("pipes", "pipes")


def test_pages_cost_a_look_at_the_table() -> None:
    plain, paged = (decode.step(replace(CALL, page=p), A100, attend(), SERIAL, 4) for p in (0, 16))
    longer = [(b - a) * (A100.clock or 0) for a, b in zip(plain.around, paged.around, strict=True)]
    assert longer == pytest.approx([203, 571])
    assert paged.bounds == plain.bounds


def test_bounds_are_in_order_and_grow() -> None:
    for arch in (A100, H100):
        steps = [
            decode.step(replace(CALL, Sk=n), arch, attend(), SERIAL, 4) for n in (64, 640, 6400)
        ]
        for found in steps:
            assert all(best <= worst for best, worst in (*found.bounds.values(), found.seconds))
            assert found.share[1] < found.share[0] < 0.95
        assert steps[0].seconds < steps[1].seconds < steps[2].seconds
        merges = [decode.step(CALL, arch, attend(), SERIAL, n).merge for n in (2, 3, 64)]
        assert merges == sorted(merges)
        assert merges[0] < merges[2]


def test_the_fastest_splits_are_found() -> None:
    best = decode.best_splits(CALL, A100, attend(), SERIAL)
    every = [sum(decode.step(CALL, A100, attend(), SERIAL, n).seconds) for n in range(1, 65)]
    assert sum(best.seconds) == min(every)
    # Without latencies of a merge's loop it pays to have a tile a part; with very long ones not.
    assert decode.best_splits(replace(CALL, Sk=512), A100, attend(), SERIAL).splits > 1
    slow = merge(*(SUM, "FADD R3, R1, R1") * 90, *a_split(), "FFMA R20, R4, R5, R20")
    assert decode.best_splits(CALL, A100, attend(), slow).splits == 1


# ---- machine code ------------------------------------------------------------------------------


def test_waits_of_a_merge() -> None:
    assert decode.waits(SERIAL) == (1, 1, 1)
    four = [line for k in range(4) for line in a_split(4 + 8 * k)]
    uses = [f"FFMA R50, R{4 + 8 * k}, R40, R50" for k in range(4)]
    # All loads first: the first use stands for the lot.
    assert decode.waits(merge(*four, *uses)) == (1, 0, 4)
    # One after the other.
    turns = [line for k in range(4) for line in (*a_split(4 + 8 * k), uses[k])]
    assert decode.waits(merge(*turns)) == (4, 0, 4)
    # Triton's has 16 at once, whatever its loads are.
    assert decode.waits(merge(SUM, "FADD R3, R1, R1", *four, *uses, at_once=16)) == (1, 1, 16)
    # Copies to shared memory are waited for once, and only where there are some.
    copies, there = [COPY.replace("R1", f"R{k}") for k in range(16)], "DEPBAR.LE SB0, 0x0"
    assert decode.waits(merge(*copies, there, there, "LDS.128 R4, [R1]")) == (1, 0, 8)
    # The last register of a load counts, the one behind it does not; stores read all of theirs.
    assert decode.waits(merge(*a_split(), "FADD R3, R11, R2")) == (1, 0, 1)
    assert decode.waits(merge(*a_split(), "FADD R3, R12, R2")) == (0, 0, 1)
    assert decode.waits(merge(*a_split(), "STG.E [R30.64], R4")) == (1, 0, 1)
    with pytest.raises(predict.ModelError, match="16 bytes a lane"):
        decode.waits(merge(SUM))


def test_a_merge_of_many_at_once_rounds_up() -> None:
    many = merge(*a_split(), "FADD R3, R4, R2", at_once=16)
    times = [decode.step(CALL, A100, attend(), many, n).merge for n in (2, 16, 17)]
    assert times[0] == times[1] < times[2]


def test_a_loop_inside_a_trip_runs_as_often_as_its_products_want() -> None:
    """fp32: three of tf32 each, 2048 FLOPs. A tile wants 12: 6 unrolled ones, 2 in the loop."""
    inner = (".L_a:", COPY, ".L_b:", TF32, TF32, "@P1 BRA `(.L_b)")
    lines = (*inner, *[TF32] * 6, "@P0 BRA `(.L_a)", "EXIT")
    code = decode.read(attend(*lines), 16)
    assert code.trip["mma_tf32"] == 12 * 2048
    assert code.trip["issue"] == 1 + 3 * (2 + 1) + 6 + 1
    with pytest.raises(predict.ModelError, match="tiles' products, not one"):
        decode.read(attend(*inner, *[TF32] * 5, *lines[-2:]), 16)
    with pytest.raises(predict.ModelError, match="2 loops"):
        decode.read(attend(*inner, ".L_c:", TF32, "@P2 BRA `(.L_c)", *lines[-2:]), 16)


def test_the_loop_over_the_cache_is_the_one_with_most_products() -> None:
    new_rows = (".L_n:", MMA, "@P1 BRA `(.L_n)")
    code = decode.read(attend(*new_rows, *TILE), 16)
    assert code.trip["mma"] == 2 * 4096
    assert code.outside["mma"] == 0  # neither loop
    with pytest.raises(predict.ModelError, match="no loop with products"):
        decode.read(attend(MMA, MMA, "EXIT"), 16)
    with pytest.raises(predict.ModelError, match=r"0\.500 tiles' products"):
        decode.read(attend(".L_a:", MMA, COPY, "@P0 BRA `(.L_a)", "EXIT"), 16)


def test_fmas_are_products_where_there_are_no_others() -> None:
    wants = 2 * 16 * 8 * 16 // 32
    lines = (".L_a:", *["FFMA R1, R2, R3, R1"] * wants, "@P0 BRA `(.L_a)", "EXIT")
    assert decode.read(attend(*lines), 16).trip["fp32"] == 32 * wants
    with pytest.raises(predict.ModelError, match=r"2\.000 tiles' FMAs"):
        decode.read(attend(*lines, keys=4), 16)


def test_rows_of_a_prompt_are_not_a_step_of_the_trip() -> None:
    """Loads into registers are on a CUDA kernel's other way: of a trip they are no part."""
    slow = (".L_a:", MMA, MMA, "@P3 BRA `(.L_new)", COPY, "@!P3 BRA `(.L_end)", ".L_new:",
            "LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64]", ".L_end:",
            "@P0 BRA `(.L_a)", "EXIT")  # fmt: skip
    assert decode.read(attend(*slow), 16).trip["lsu"] == 512


def test_what_cannot_be_modelled_is_refused() -> None:
    with pytest.raises(predict.ModelError, match="1 to 64, got 0"):
        decode.step(CALL, A100, attend(), SERIAL, 0)
    with pytest.raises(predict.ModelError, match="1 to 64, got 65"):
        decode.step(CALL, A100, attend(), SERIAL, 65)
    with pytest.raises(predict.ModelError, match="sm_100: no clock"):
        decode.step(CALL, ARCHS["sm_100"], attend(), SERIAL, 1)
    with pytest.raises(predict.ModelError, match="no block fits sm_80, shared memory"):
        decode.step(CALL, A100, attend(shared=200_000), SERIAL, 1)
    with pytest.raises(predict.ModelError, match="no multiple"):
        Call("bf16", 1, 12, 8, 1, 64, 64)


# ---- lists and the section ---------------------------------------------------------------------


def test_every_architecture_has_its_round_trips() -> None:
    assert set(decode_list.ARCHITECTURES) <= latency.ROUND_TRIPS.keys()
    for there in latency.ROUND_TRIPS.values():
        assert there.l1 < there.l2[0] < there.l2[1] < there.dram[0] <= there.dram[1]
    assert len(set(decode_list.CASES)) == len(decode_list.CASES) == 192


def test_a_list_of_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_kernel = {"arch": "sm_80", "cubin": "a.cubin", "function": "kernel", "threads": 32,
                "shared": 1024, "rows": 16, "keys": 8, "stages": None, "at_once": None}  # fmt: skip
    listed = {
        "cache_kernels": [{"id": "few", **a_kernel}, {"id": "merge", **a_kernel, "at_once": 16}],
        "cache_plans": [decode_list.plan("sm_80", CALL, 4, "few", "merge")],
    }
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(listed))
    monkeypatch.setattr(decode_list.tools, "disassemble", lambda _: "text")
    monkeypatch.setattr(decode_list.tools, "registers", lambda _: {"kernel": 64})
    code = function(*TILE)
    monkeypatch.setattr(decode_list, "functions", lambda _: {"kernel": code})
    (found,) = decode_list.load(tmp_path)
    assert (found.arch, found.call, found.splits) == ("sm_80", CALL, 4)
    assert found.attend == replace(attend(), function=code)
    assert found.merge == Merge(code, 16)
    path.write_text(json.dumps(listed | {"cache_kernels": listed["cache_kernels"][:1]}))
    with pytest.raises(kernels.KernelError, match="merge of sm_80, which is not listed"):
        decode_list.load(tmp_path)
    monkeypatch.setattr(decode_list, "functions", lambda _: {"other": code})
    with pytest.raises(kernels.KernelError, match="has no function kernel"):
        decode_list.load(tmp_path)
    path.write_text(json.dumps({"kernels": []}))
    assert decode_list.load(tmp_path) == []


def test_the_section_says_model_and_what_it_found() -> None:
    calls = [Call("bf16", 1, 32, 8, Sq, 1024, 128, page) for Sq in (1, 4) for page in (0, 16)]
    tile = [MMA] * 2 * 8 * 8, 64  # 64 keys of 128 columns
    k = attend(".L_a:", *tile[0], COPY, "@P0 BRA `(.L_a)", "EXIT", keys=tile[1])
    planned = [
        decode_list.Planned(arch, call, 7, k, SERIAL)
        for arch in ("sm_80", "sm_89")
        for call in calls
    ]
    found = decode_report.cases({"CUDA": planned, "Triton": planned[:1]})
    text = decode_report.section(found, report.markdown)
    assert "*Model*, not run on hardware yet" in text
    assert "CUDA: of 8 calls" in text
    assert "Triton: of 1 calls" in text
    row = next(x for x in text.splitlines() if x.startswith("| bf16 B=1 32/8 D=128 Sk=1024"))
    first = found[0]
    assert f"{first.now.share[0]:.0%}]" in row
    assert f"{decode_report.mean(first.with_splits(3)) / decode_report.mean(first.now):.2f}" in row
    assert text.count("| bf16 B=1 32/8 D=128 Sk=1024 |") == 3  # two steps, and rows and pages
    rows = json.loads(json.dumps(decode_report.rows(found)))
    assert {r["label"] for r in rows} == {"model"}
    assert rows[0]["seconds"] == list(first.now.seconds)
    assert decode_report.section([], report.markdown) == ""
