"""The stopwatch and the memory meter that the demo and the benches share (standard library only).

Two rules make figures from a shared, throttling machine worth printing. Competing functions run
*interleaved* in one process, in alternating order, so that whatever slows the machine slows both;
what is reported is the median of the *pairwise* ratios with their quartiles. Memory is the peak of
the resident set while one call runs, over what was resident before it: it counts what torch's
allocator does not see (scratch of C++ kernels, of oneDNN), and pages, not promises.
"""

import contextlib
import ctypes
import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Thunk = Callable[[], object]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a list of figures."""

    median: float
    q1: float
    q3: float
    count: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.median:{spec}} [{self.q1:{spec}}, {self.q3:{spec}}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of one value, that value three times."""
    if not values:
        raise ValueError("spread: no values")
    ordered = sorted(values)
    if len(ordered) < 2:
        return Spread(ordered[0], ordered[0], ordered[0], 1)
    q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(median, q1, q3, len(ordered))


def ratios(base: Sequence[float], new: Sequence[float]) -> Spread:
    """How many times faster `new` is than `base`, from the pairs taken next to each other."""
    return spread([b / n for b, n in zip(base, new, strict=True)])


def _warm(fn: Thunk, warmup: int, min_seconds: float) -> int:
    """Warm up, and from the last call: calls per sample so that a sample lasts `min_seconds`."""
    once = min_seconds
    for _ in range(max(1, warmup)):
        start = time.perf_counter()
        fn()
        once = time.perf_counter() - start
    return max(1, min(10_000, round(min_seconds / max(once, 1e-7))))


def interleave(
    fns: Mapping[str, Thunk],
    *,
    rounds: int = 15,
    warmup: int = 2,
    min_seconds: float = 2e-3,
    max_seconds: float | None = None,
    min_rounds: int = 3,
) -> dict[str, list[float]]:
    """Seconds per call of each function, one sample per round, order reversed every other round.

    `warmup` calls of each (at least one) come first. Stops early after `min_rounds` once
    `max_seconds` have passed. The garbage collector is held off meanwhile. The C heap is as that of
    a process that has run for a while: what it was before depends on who ran first.
    """
    _age_heap()
    repeats = {name: _warm(fn, warmup, min_seconds) for name, fn in fns.items()}
    samples: dict[str, list[float]] = {name: [] for name in fns}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    try:
        for round_ in range(rounds):
            spent = time.perf_counter() - begin
            if max_seconds is not None and round_ >= min_rounds and spent > max_seconds:
                break
            for name in list(fns)[:: 1 if round_ % 2 == 0 else -1]:
                fn, n = fns[name], repeats[name]
                start = time.perf_counter()
                for _ in range(n):
                    fn()
                samples[name].append((time.perf_counter() - start) / n)
    finally:
        if enabled:
            gc.enable()
    return samples


def load_average() -> float:
    """Runnable processes over the last minute; -1 where nobody says."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return -1.0


def not_idle(loads: Sequence[float], threads: int) -> str:
    """What to say, after a sentence, of rows measured under such loads; nothing of a quiet
    machine."""
    busy = sum(load > threads + 1 for load in loads)
    if not busy:
        return ""
    return (
        f" The machine was not idle: {busy} of {len(loads)} rows at a load above {threads + 1}; "
        "turns keep ratios fair, absolute times are too long."
    )


def _status_kib(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")


def _age_heap() -> None:
    """Free one block of almost 32 MiB, which takes glibc's heap to where it stays.

    Up to there a block that is mapped from the system, page fault by page fault, raises the
    threshold for mapping to its own size when it is freed, and that for giving free memory back to
    twice that. Until then whoever allocates the larger blocks looks slower than he will be.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        libc.free(libc.malloc((32 << 20) - (64 << 10)))


def _release_free_heap() -> None:
    """Give freed heap back to the system, so that reuse of it shows up as growth (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def settle_heap() -> None:
    """Make the C heap hand large blocks straight back to the system (glibc; else nothing happens).

    Without it a freed block may be kept and reused, and the next peak looks smaller than it is. It
    slows allocation, so call it after the last timing of the process, before the first peak.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 64 << 10)
        libc.mallopt(m_trim_threshold, 0)


def peak_method() -> str:
    """How `peak_extra_bytes` measures on this machine, in words for a report."""
    if sys.platform == "linux" and _CLEAR_REFS.exists():
        return "growth of the resident set's high-water mark during one call (/proc/self, VmHWM)"
    return "growth of the resident set during one call, sampled every millisecond"


def _sampled_peak(fn: Thunk) -> int:
    """Peak growth without VmHWM: sampled, from psutil; raises ImportError without it."""
    import psutil

    process = psutil.Process()
    before = peak = int(process.memory_info().rss)
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, int(process.memory_info().rss))

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        result = fn()
        peak = max(peak, int(process.memory_info().rss))
        del result
    finally:
        done.set()
        watcher.join()
    return peak - before


def peak_extra_bytes(fn: Thunk, *, warmup: int = 1) -> int | None:
    """Peak resident bytes during `fn()` over those before it, its result included.

    `warmup` calls come first: thread pools, code pages and packed weights are not the call's.
    None where the platform offers no way to measure (neither /proc nor psutil).
    """
    for _ in range(warmup):
        fn()
    _release_free_heap()
    if sys.platform == "linux" and _CLEAR_REFS.exists():
        try:
            _CLEAR_REFS.write_text("5")  # resets VmHWM of this process to VmRSS
            before = _status_kib("VmRSS")
            result = fn()
            peak = _status_kib("VmHWM")
            del result
            return max(0, peak - before) * 1024
        except OSError:
            pass
    try:
        return max(0, _sampled_peak(fn))
    except ImportError:
        return None
