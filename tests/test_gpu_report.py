"""The report of `make test-gpu` and `make bench-gpu`, as far as it needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest

XML = """<testsuites><testsuite>
<testcase classname="tests.test_attention" name="test_a" time="1.5"/>
<testcase classname="tests.test_attention" name="test_b" time="0.5">
 <failure message="AssertionError: o: too far&#10;second line">text</failure></testcase>
<testcase classname="tests.test_attention" name="test_c" time="0"><skipped message="x"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("what", ["test", "bench"])
def test_without_a_gpu_it_stops_with_a_sentence(what: str) -> None:
    done = subprocess.run(
        [sys.executable, gpu_report.__file__, what], capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.startswith(f"make {what}-gpu needs a GPU")
    assert len(done.stderr.strip().splitlines()) == 1


def test_report_lists_failures_and_what_has_not_run(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text(XML)
    tests = gpu_report.read_junit(tmp_path / "x.xml")
    assert (tests["passed"], tests["skipped"], tests["seconds"]) == (1, 1, 2)
    text = gpu_report.markdown({"environment": {"GPU": "X"}, "tests": {**tests, "exit_status": 1}})
    assert "1 passed, 1 failed, 1 skipped in 2 s" in text
    assert "- `tests.test_attention::test_b`: AssertionError: o: too far" in text
    assert "Not run: `make bench-gpu`" in text


def test_bench_table() -> None:
    row = {
        "what": "fwd", "flops": 1.6e9, "bytes": 1e6, "roof": "gemm", "share": 0.5,
        "over": {"stock": {"median": 1.25}},
        "seconds": {"stock": {"median": 1e-3}, "fused": {"median": 8e-4}},
    }  # fmt: skip
    text = gpu_report.markdown({"environment": {}, "bench": {"exit_status": 0, "rows": [row]}})
    assert "| fwd | 1.000 | 0.800 | 1.25 | 2.0 | 50% of gemm |" in text


def test_files_of_the_list_are_there() -> None:
    assert all((gpu_report.ROOT / "tests" / f"{name}.py").exists() for name in gpu_report.TESTS)
