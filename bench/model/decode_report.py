"""The section of REPORT.md on decoding over a KV cache; every figure is *model*."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.model.archs import ARCHS
from bench.model.decode import MAX_SPLITS, Call, Step, best_splits, step
from bench.model.decode_list import Planned
from bench.model.latency import Pair

Table = tuple[list[str], list[list[str]]]
MAIN = ("sm_80", "sm_90")
BACKENDS = ("CUDA", "Triton")

HEAD = """
## Decoding over a KV cache: a step at a time

*Model*, not run on hardware yet; `bench/model/decode.py` says what a step is made of,
`bench/model/latency.py` where its latencies come from and which of them are assumptions.
Microseconds are best to worst, with the launches; share: of DRAM's whole rate, [worst, best], with
the launches, which are most of a short step; bound: what wins inside the attention kernel, at best
and at worst where they differ (dram; chain: the waits of a block; pipes: its machine code; port of
an SM); merge: with its launch. Splits are what the launcher's own plan gives; an SM: blocks that it
holds. x0.5, x2: the step with half or twice the splits, over the plan's; fastest: the splits for
which the mean of best and worst is least, and that mean over the plan's. A load from shared memory
counts the bytes of every lane, also where lanes read one address, as Triton's fp32 products do on
the CUDA cores: there pipes and chain are more than it takes.
"""

_ALIKE = """
### More rows, and pages

The step with four rows (speculative decoding), on pages of 16 keys, and both, over the one of one
row without pages; 32 heads over 8, D = 128. All *model*.
"""


@dataclass(frozen=True)
class Case:
    backend: str
    planned: Planned
    now: Step
    best: Step

    @property
    def call(self) -> Call:
        return self.planned.call

    def with_splits(self, splits: int) -> Step:
        p = self.planned
        return step(p.call, ARCHS[p.arch], p.attend, p.merge, splits)


def cases(listed: dict[str, Iterable[Planned]]) -> list[Case]:
    """By backend: every call as planned, and with the splits that are fastest."""
    found = []
    for backend, planned in listed.items():
        for p in planned:
            arch = ARCHS[p.arch]
            now = step(p.call, arch, p.attend, p.merge, p.splits)
            found.append(Case(backend, p, now, best_splits(p.call, arch, p.attend, p.merge)))
    return found


def mean(one: Step) -> float:
    return sum(one.seconds) / 2


def rows(found: Iterable[Case]) -> list[dict[str, Any]]:
    """For --json."""
    return [
        {
            "label": "model", "backend": case.backend, "arch": case.planned.arch,
            "call": asdict(case.call), "kernel": case.planned.attend.name,
            "splits": case.now.splits, "blocks": case.now.blocks, "resident": case.now.resident,
            "limit": case.now.limit, "waves": case.now.waves, "trips": case.now.trips,
            "dram_bytes": case.call.dram_bytes, "bounds": case.now.bounds,
            "around": case.now.around, "merge": case.now.merge, "seconds": case.now.seconds,
            "binding": case.now.binding, "share": case.now.share,
            "best_splits": case.best.splits, "best_seconds": case.best.seconds,
        }
        for case in found
    ]  # fmt: skip


def section(found: Sequence[Case], markdown: Callable[[Table], str]) -> str:
    """For report.write; empty without plans."""
    if not found:
        return ""
    parts = [HEAD, _of_splits(found)]
    archs = dict.fromkeys(case.planned.arch for case in found)
    for arch in archs:
        mine = [case for case in found if case.planned.arch == arch and _usual(case.call)]
        if arch not in MAIN:
            mine = [case for case in mine if (case.call.H, case.call.D) == (32, 128)]
        title = f"\n### A step on {arch}: {ARCHS[arch].product}\n\n"
        parts += [title, markdown(_table(mine))]
    for arch in archs:
        if arch in MAIN:
            mine = [case for case in found if case.planned.arch == arch]
            parts += [_ALIKE if arch == MAIN[0] else "\n", "\n", markdown(_alike(mine, arch))]
    return "".join(parts)


def _usual(call: Call) -> bool:
    return call.Sq == 1 and not call.page


def _name(call: Call) -> str:
    return f"{call.dtype} B={call.B} {call.H}/{call.Hk} D={call.D} Sk={call.Sk}"


def _table(found: list[Case]) -> Table:
    of_each = ["splits", "blocks, an SM", "us", "share", "bound", "merge us", "x0.5", "x2",
               "fastest"]  # fmt: skip
    head = ["call", "DRAM", "roof us"]
    head += [f"{backend} {column}" for backend in BACKENDS for column in of_each]
    by_call: dict[Call, dict[str, Case]] = {}
    for case in found:
        by_call.setdefault(case.call, {})[case.backend] = case
    body = []
    for call, pair in by_call.items():
        any_case = next(iter(pair.values()))
        cells = [_name(call), f"{call.dram_bytes / 2**20:.1f} MB", f"{any_case.now.roof * 1e6:.1f}"]
        for backend in BACKENDS:
            cells += _cells(pair[backend]) if backend in pair else [""] * len(of_each)
        body.append(cells)
    return head, body


def _cells(case: Case) -> list[str]:
    now = case.now
    best, worst = (f"{share:.0%}" for share in now.share)
    first, last = now.binding
    return [
        str(now.splits),
        f"{now.blocks}, {now.resident}",
        _us(now.seconds),
        f"[{worst}, {best}]",
        first if first == last else f"{first}, {last}",
        "-" if now.splits == 1 else _us(now.merge),
        _over(case, now.splits // 2),
        _over(case, now.splits * 2),
        f"{case.best.splits} ({mean(case.best) / mean(now):.2f})",
    ]


def _us(pair: Pair) -> str:
    return f"{pair[0] * 1e6:.1f} to {pair[1] * 1e6:.1f}"


def _over(case: Case, splits: int) -> str:
    if not 1 <= splits <= MAX_SPLITS:
        return "-"
    return f"{mean(case.with_splits(splits)) / mean(case.now):.2f}"


def _alike(found: list[Case], arch: str) -> Table:
    ways = ((4, 0), (1, 16), (4, 16))
    head = [f"call, {ARCHS[arch].product}"]
    head += [f"{b} {name}" for b in BACKENDS for name in ("Sq = 4", "pages", "both")]
    by = {(case.backend, case.call): mean(case.now) for case in found}
    body = []
    calls = {c.call for c in found if _usual(c.call) and (c.call.H, c.call.D) == (32, 128)}
    for call in sorted(calls, key=lambda c: (c.dtype, c.B, c.Sk)):
        cells = [_name(call)]
        for backend in BACKENDS:
            for Sq, page in ways:
                other = by.get((backend, replace(call, Sq=Sq, page=page)))
                cells.append("" if other is None else f"{other / by[backend, call]:.2f}")
        body.append(cells)
    return head, body


def _of_splits(found: Sequence[Case]) -> str:
    """What the model says of the plan."""
    lines = ["\nThe splits that the plan takes, over the fastest ones (mean of best and worst):\n"]
    for backend in BACKENDS:
        mine = [case for case in found if case.backend == backend]
        if not mine:
            continue
        ratios = sorted(((mean(c.now) / mean(c.best), c) for c in mine), key=lambda x: x[0])
        over = [sum(ratio > 1 + limit for ratio, _ in ratios) for limit in (0.05, 0.1, 0.2)]
        ratio, worst = ratios[-1]
        call = f"{_name(worst.call)} Sq={worst.call.Sq} on {worst.planned.arch}"
        lines.append(
            f"- {backend}: of {len(mine)} calls {over[0]} are more than 5 % slower, {over[1]} more "
            f"than 10 %, {over[2]} more than 20 %; the worst is {ratio:.2f}, {call}: "
            f"{worst.now.splits} splits, {worst.best.splits} would be fastest."
        )
    return "\n".join([*lines, ""])
