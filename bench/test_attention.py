"""pytest-benchmark over the cases of bench/cases.py. `make bench` runs it and writes RESULTS.md.

The figure that counts is the interleaved ratio, kept as `extra_info["row"]`; pytest-benchmark's own
statistics are of the fused call alone.
"""

import pytest

from bench.cases import CASES, tagged
from bench.harness import run_case

TIMED = [case.name for tag in ("table", "beside", "small") for case in tagged(tag)]


@pytest.mark.parametrize("name", TIMED)
def test_attention(benchmark, request, name):
    case = CASES[name]
    backend = request.config.getoption("--fastattn-backend")
    rounds = request.config.getoption("--fastattn-rounds")
    row = run_case(case, backend=backend, rounds=rounds)
    fused = case.make(backend).fused
    benchmark.group = next(iter(case.tags))
    benchmark.extra_info["row"] = row.to_json()
    benchmark.pedantic(fused, rounds=min(rounds, 5), warmup_rounds=1)
