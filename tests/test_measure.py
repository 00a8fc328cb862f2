"""The stopwatch and the memory meter: a figure is worth no more than they are."""

import platform
import subprocess
import sys
import time

import pytest
import torch

from fastattn import measure


def test_spread_and_its_format() -> None:
    s = measure.spread([3.0, 1.0, 2.0, 4.0, 5.0])
    assert (s.q1, s.median, s.q3, s.count) == (2.0, 3.0, 4.0, 5)
    assert f"{s:.1f}" == "3.0 [2.0, 4.0]"
    assert measure.spread([7.0]).q3 == 7.0
    with pytest.raises(ValueError, match="no values"):
        measure.spread([])


def test_ratios_are_of_neighbours() -> None:
    """A machine that slows down by 10 x half way changes no ratio."""
    assert measure.ratios([2.0, 20.0], [1.0, 10.0]).median == 2.0
    with pytest.raises(ValueError, match="zip"):
        measure.ratios([1.0], [1.0, 2.0])


def test_interleave_takes_turns_in_alternating_order() -> None:
    calls: list[str] = []
    fns = {name: (lambda name=name: (calls.append(name), time.sleep(2e-3))) for name in "ab"}
    samples = measure.interleave(fns, rounds=3, warmup=1, min_seconds=1e-3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3}
    assert all(2e-3 <= t < 1 for s in samples.values() for t in s)


def test_interleave_stops_in_time() -> None:
    samples = measure.interleave(
        {"a": lambda: time.sleep(0.02)}, rounds=1000, warmup=1, max_seconds=0.1, min_rounds=2
    )
    assert 2 <= len(samples["a"]) <= 10


def test_short_calls_are_repeated_within_a_sample() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    measure.interleave({"a": call}, rounds=2, warmup=1, min_seconds=5e-3)
    assert count > 20


HEAP = """
import ctypes

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

def mapped():  # a bit of the word before a block; none is freed, which would change the state
    return bool(ctypes.c_size_t.from_address(libc.malloc(16 << 20) - 8).value & 2)

before = mapped()  # and torch, once imported, may have freed a large one
from fastattn import measure
measure.interleave({"a": bool}, rounds=1)
print(before, mapped())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's heap")
def test_what_is_measured_has_a_warm_heap() -> None:
    """Else glibc maps large blocks anew for every call, and gets them page by page."""
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_peak_counts_what_is_freed_before_the_end() -> None:
    def call() -> torch.Tensor:
        torch.ones(40 << 20, dtype=torch.uint8)  # freed at once
        return torch.ones(8 << 20, dtype=torch.uint8)

    peak = measure.peak_extra_bytes(call)
    if peak is None:
        pytest.fail("neither /proc nor psutil here")
    assert 38 << 20 < peak < 56 << 20


def test_peak_sees_memory_that_torch_does_not_allocate() -> None:
    peak = measure.peak_extra_bytes(lambda: bytearray(b"x") * (32 << 20))
    if peak is None:
        pytest.fail("neither /proc nor psutil here")
    assert 30 << 20 < peak < 40 << 20
