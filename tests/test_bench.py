"""The frame of the benches: what needs no timing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import plots, registry, regress, report
from bench.harness import Case, Contest, Setting, run_case
from fastattn.measure import Spread


def _spread(x: float) -> dict[str, float]:
    return {"median": x, "q1": 0.9 * x, "q3": 1.1 * x, "count": 5}


def _row(name: str, tag: str = "table", verdict: str = "PASS", **more: Any) -> dict[str, Any]:
    return {
        "name": name, "what": f"what {name}", "dtype": "fp32", "tag": tag,
        "stock_backend": "default", "seconds": {"stock": _spread(2e-3), "fused": _spread(1e-3)},
        "over": {"stock": _spread(2.0), "torch.compile": _spread(0.8)}, "products": None,
        "roof": "gemm", "roof_rate": 1e11, "flops": 5e7, "bytes": 1e6, "share": 0.5,
        "stock_share": 0.25, "target": 1.5, "target_share": None, "max_overhead": None,
        "verdict": verdict, "load": 0.5, **more,
    }  # fmt: skip


def _result() -> dict[str, Any]:
    environment = {"cpu": "X", "isa": "avx2", "threads": 2, "torch": "2", "date": "2026-01-01"}
    memory = {
        "name": "m", "what": "peak", "dtype": "fp32", "tag": "memory", "operand_bytes": 2**20,
        "fused_bytes": 2**19, "stock_bytes": 2**21, "fused_times": 0.5, "stock_times": 2.0,
        "target": 2.0, "verdict": "PASS", "load": 9.0,
    }  # fmt: skip
    point = {"x": 64, "stock_s": 2e-3, "fused_s": 1e-3, "flops": 1e9, "load": 0.0}
    ceilings = {"gemm fp32": 2e11, "gemm bf16": 4e11, "gemm fp16": 2e11, "copy": 1e10}
    rows = {
        "attention": [_row("a"), _row("b", verdict="SHORT"), _row("c", "small"), _row("d", "beside",
                      "-")],
        "models": [_row("e", roof_rate=0.0, flops=0.0, products=_spread(0.9))],
        "memory": [memory],
        "sweep": {"large": [_row("s")], "small": []},
        "curves": {
            "ceilings": ceilings | {"read": 1e10},
            "sizes": {"attention, B1, over S: fp32 fwd": [point, point | {"x": 128}]},
            "threads": {"attention, S=1": [point | {"x": 1}, point | {"x": 2}]},
            "memory": {"attention, over S: fp32 fwd": [memory | {"x": 512}]},
        },
    }  # fmt: skip
    return {name: {"environment": environment, "took": 1.0, "rows": r} for name, r in rows.items()}


def test_every_row_is_in_the_report_losses_too(tmp_path: Path) -> None:
    result = _result()
    pictures = plots.draw(result, tmp_path / "plots")
    assert {p.stem for p in pictures} == {"speed", "memory", "threads", "roofline"}
    assert all(p.stat().st_size < 200_000 for p in pictures)
    report.write(result, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    for name in "abcdes":
        assert f"what {name} |" in text
    assert "**SHORT**" in text
    assert "0.80 torch.compile" in text  # a peer that is faster is not hidden
    assert "3 of 5 rows" not in text
    assert "4 of 5 rows reach their target; in the sweep 1 of 1" in text
    assert "Not measured yet: layernorm_ffn, embedding, recurrent" in text
    assert "not idle: 1 of 1 rows" in text
    assert all(f"plots/{p.name}" in text for p in pictures)
    assert "what a |" in report.headline(result)


def test_names_are_unique_and_found() -> None:
    for section in registry.SECTIONS:
        cases = registry.cases(section)
        assert cases
        assert all(name == case.name for name, case in cases.items())
        for name, case in cases.items():
            assert registry.find(f"{section}/{name}") is case
    assert registry.find("absent") is None


THEN = [2.0, 1.9, 2.1]


@pytest.mark.parametrize(
    ("now", "lost"),
    [
        ((2.0, 1.9, 2.1), False),
        ((1.85, 1.80, 1.88), False),  # outside the noise, within 10 %
        ((1.7, 1.5, 1.95), False),  # beyond 10 %, within the noise
        ((1.7, 1.6, 1.8), True),
        ((3.0, 2.9, 3.1), False),
    ],
)
def test_what_counts_as_a_regression(now: tuple[float, float, float], lost: bool) -> None:
    assert regress.regressed(THEN, Spread(*now, 9)) is lost


def test_regressions_are_measured_twice_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recorded.json"
    report.record(_result(), path)
    record = json.loads(path.read_text())
    assert set(record["rows"]) == {"attention/a", "attention/b", "attention/c", "attention/d",
                                   "models/e"}  # fmt: skip
    assert regress.chosen(record["rows"], None, False) == [
        "attention/a", "attention/b", "models/e"
    ]  # fmt: skip
    assert regress.chosen(record["rows"], ["models"], False) == ["models/e"]
    assert len(regress.chosen(record["rows"], None, True)) == 5
    found = {
        "attention/a": [1.0, 1.0],  # slower, and again
        "attention/b": [1.0, 2.0],  # slower once
        "models/e": [None],  # gone
    }
    calls: list[str] = []

    def ratio(name: str, rounds: int, seconds: float) -> Spread | None:
        calls.append(name)
        value = found[name].pop(0)
        return None if value is None else Spread(value, 0.99 * value, 1.01 * value, rounds)

    monkeypatch.setattr(regress, "_ratio", ratio)
    assert regress.check([*found], record["rows"], 1.0) == ["attention/a", "models/e"]
    assert calls == ["attention/a"] * 2 + ["attention/b"] * 2 + ["models/e"]
    assert "REGRESSED" in capsys.readouterr().out
    here = {"cpu": "Y", "isa": "avx2", "threads": 2}
    assert regress.other_machine(record["environment"], here) == ["cpu X there, Y here"]


def test_a_case_is_judged_by_its_target() -> None:
    def busy(n: int) -> Any:
        return lambda: sum(range(n))

    contest = Contest(busy(40_000), busy(4_000), {"peer": busy(400)}, busy(2_000))
    case = Case("x", "x", "fp32", lambda _: contest, ratio=2.0)
    row = run_case(case, Setting(), rounds=5, max_seconds=1.0)
    assert row.verdict == "PASS"
    assert row.best_peer == "peer"
    assert row.over["peer"].median < 1 < row.over["stock"].median
    assert row.roof_rate == 0.0
    assert json.loads(json.dumps(row.to_json()))["name"] == "x"
    for wrong in ({"ratio": 1e6}, {"ratio": None, "share": 0.99}, {"ratio": 1e6, "share": 0.99}):
        case = Case("x", "x", "fp32", lambda _: contest, **wrong)  # type: ignore[arg-type]
        assert run_case(case, Setting(), rounds=5, max_seconds=1.0).verdict == "SHORT"
    case = Case("x", "x", "fp32", lambda _: contest, ratio=1e6, least=10.0)
    assert run_case(case, Setting(), rounds=5, max_seconds=1.0).verdict == "-"
