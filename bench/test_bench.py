"""pytest-benchmark over the cases of a section. `make bench` runs it for every section.

The figures that count are the interleaved ones, kept as `extra_info["row"]`; pytest-benchmark's own
statistics are of the fused call alone.
"""

from bench.harness import Setting, run_case
from bench.show import line


def test_bench(benchmark, request, case):
    option = request.config.getoption
    setting = Setting(option("--fastattn-backend"), peers=not option("--fastattn-no-peers"))
    row = run_case(
        case, setting, rounds=option("--fastattn-rounds"), max_seconds=option("--fastattn-seconds")
    )
    print(line(row), flush=True)
    fused = case.make(Setting(setting.backend, peers=False)).fused
    benchmark.group = case.tag
    benchmark.extra_info["row"] = row.to_json()
    benchmark.pedantic(fused, rounds=3, warmup_rounds=1)
