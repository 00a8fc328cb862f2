"""The section of REPORT.md on the recurrent kernels; every figure is *model*."""

from __future__ import annotations

from collections.abc import Callable

from bench.model.archs import ARCHS
from bench.model.recurrent import GATES, PUBLISHED, Call, Code, Step, predictions

Table = tuple[list[str], list[list[str]]]
GEMM_SHARE = 0.6  # of the peak, for the GEMMs around a recurrence of that size

HEAD = """
## Recurrent kernels: a step at a time

*Model*, not run on hardware yet; `bench/model/recurrent.py` says what a step is made of,
`bench/model/latency.py` where its latencies come from and which of them are assumptions. Cycles of
each link as best to worst of those; a step is that of all directions, without the GEMMs before and
after, which are torch's. L2: bytes that all blocks load in a step. torch asks cuDNN for its
persistent kernel in fp16 alone, unpacked (torch's documentation, "cuDNN persistent RNN"): it serves
every call of these tables step by step. Packed sequences and lengths take these kernels at the same
cost a step, stacked layers their sum, a projection the step tier.
"""

_READ = """
What the model says of these kernels: in 16 bits a step is bound by its way round (load, barrier),
the backward by the G times wider rows that its blocks load, not by tensor cores. In fp32 the
product is most of it, and of that the splitting of numbers into tf32 parts (alu), of the weights
too, anew in every step.
"""

_COMPARED = """
### Against published figures: LSTM, B = 16, T = 1024, H = 768, H100

Milliseconds of a layer, forward, and forward with backward. Others': measured, arXiv 2412.07752.
Ours: *model*, the recurrence as above and its GEMMs at {share:.0%} of the peak.
"""


def section(codes: dict[tuple[str, str], Code], markdown: Callable[[Table], str]) -> str:
    """For report.write; empty without compiled recurrent kernels."""
    if not codes:
        return ""
    steps = predictions(codes)
    parts = [HEAD]
    for name in dict.fromkeys(arch for arch, _, _ in steps):
        rows = [(what, step) for arch, what, step in steps if arch == name]
        parts.append(f"\n### Steps on {name}: {ARCHS[name].product}\n\n{markdown(_table(rows))}")
    parts += [_READ, _COMPARED.format(share=GEMM_SHARE), "\n", markdown(compared(steps))]
    return "".join(parts)


def _table(rows: list[tuple[str, Step]]) -> Table:
    head = ["call", "tier", "L2", "load", "product", "cell", "barrier", "us a step", "ms, T steps"]
    return head, [_cells(what, step) for what, step in rows]


def _cells(what: str, step: Step) -> list[str]:
    c, p = step.call, step.plan
    name = f"{c.cell.upper()} {c.dtype} T={c.T} B={c.B} H={c.H}" + (" x 2" if c.D > 1 else "")
    tier = p.tier
    if p.tier == "grid":
        tier += f", {p.slices} x {p.groups} x {p.directions} blocks"
    elif p.tier == "block":
        tier += f", {p.groups * c.D}"
    links = (step.load, step.product, step.cell, step.barrier)
    return [
        f"{what}: {name} {'backward' if c.backward else 'forward'}",
        tier,
        f"{step.bytes / 1024:.0f} KB",
        *("-" if not any(link) else _range(link, 0) for link in links),
        _range(_scaled(step.seconds, 1e6), 2),
        _range(_scaled(step.of_call, 1e3), 2),
    ]


def _scaled(pair: tuple[float, float], by: float) -> tuple[float, float]:
    return pair[0] * by, pair[1] * by


def _range(pair: tuple[float, float], digits: int) -> str:
    low, high = (f"{x:.{digits}f}" for x in pair)
    return low if low == high else f"{low} to {high}"


def compared(steps: list[tuple[str, str, Step]]) -> Table:
    """Theirs, then ours in bf16 and fp32."""
    body = [[name, f"{fwd:g}", f"{both:g}"] for name, fwd, both in PUBLISHED]
    for dtype in ("bf16", "fp32"):
        ways = [
            step
            for arch, _, step in steps
            if (arch, step.call.dtype, step.call.H, step.call.T) == ("sm_90", dtype, 768, 1024)
        ]
        fwd, bwd = sorted(ways, key=lambda step: step.call.backward)
        first = _scaled(fwd.of_call, 1e3)
        gemm = gemms_ms(fwd.call)
        second = _scaled(bwd.of_call, 1e3)
        body.append([
            f"fastattn, {dtype}, *model*",
            _range((first[0] + gemm, first[1] + gemm), 1),
            _range((first[0] + second[0] + 4 * gemm, first[1] + second[1] + 4 * gemm), 1),
        ])  # fmt: skip
    return ["", "forward", "forward and backward"], body


def gemms_ms(call: Call, arch: str = "sm_90") -> float:
    """One GEMM over all steps, I = H: the forward has one, the backward three (dx, dW_ih, dW_hh).
    fp32 on the CUDA cores, at the same share of their peak."""
    found = ARCHS[arch]
    assert found.peak is not None
    assert found.clock is not None
    fp32 = found.rates["fp32"]
    assert fp32 is not None
    peak = found.peak if call.dtype != "fp32" else 2 * fp32 * found.sms * found.clock
    flops = 2.0 * call.T * call.B * call.H * GATES[call.cell] * call.H * call.D
    return flops / (GEMM_SHARE * peak) * 1e3
