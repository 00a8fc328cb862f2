"""What others measured of FlashAttention-2, and how far the model is from it.

The model is applied to FlashAttention-2's machine code in torch (torch_flash.py) at the published
shapes. One number is fitted, predict.EXPOSED, on four points of one GPU; every other point is held
out: other lengths, another GPU, forward and backward alone.

Sources, by name:
  FA2    arXiv 2307.08691, figures 4 and 7 = assets/flash2_{a100,h100}_fwd_bwd_benchmark.png of the
         FlashAttention repository (numbers on the bars; two hide behind a legend and are left
         out), and section 4 for the best forward ("up to 230 TFLOPs/s")
  FA3    arXiv 2407.08608, figures 5 and 6: its FlashAttention-2 bars, H100 SXM5 (figure 5 is also
         assets/flash3_fp16_fwd.png there)
  5090   gau-nernst.github.io/fa-5090: F.sdpa's FlashAttention, RTX 5090, torch's own kernel
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from bench.model import torch_flash
from bench.model.archs import ARCHS
from bench.model.predict import Kernel, Prediction, Problem, predict

_TOKENS, _WIDTH = 16384, 2048  # B * S and H * D of the papers' benchmarks
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Point:
    source: str
    arch: str
    what: str  # "forward", "backward", "both"
    problem: Problem
    tflops: float  # useful: 4 D a pair forward, 10 D backward
    fitted: bool = False


def _paper(source: str, arch: str, what: str, D: int, causal: bool, bars: str) -> list[Point]:
    """bars: TFLOP/s at the six lengths, "-" for one that cannot be read."""
    points = []
    for S, bar in zip(_LENGTHS, bars.split(), strict=True):
        if bar == "-":
            continue
        problem = Problem(_TOKENS // S, _WIDTH // D, S, S, D, causal)
        fitted = (source, arch, S) == ("FA2", "sm_80", 16384) and what == "both"
        points.append(Point(source, arch, what, problem, float(bar), fitted))
    return points


POINTS = (
    *_paper("FA2", "sm_80", "both", 64, False, "132 153 162 171 175 176"),
    *_paper("FA2", "sm_80", "both", 64, True, "88 119 140 156 165 171"),
    *_paper("FA2", "sm_80", "both", 128, False, "- - 187 196 201 203"),
    *_paper("FA2", "sm_80", "both", 128, True, "99 133 155 173 182 189"),
    # The paper does not say which shape is the best one.
    *_paper("FA2", "sm_80", "forward", 128, False, "- - - - - 230"),
    *_paper("FA2", "sm_90", "both", 64, False, "215 254 274 288 294 296"),
    *_paper("FA2", "sm_90", "both", 64, True, "141 192 232 257 273 284"),
    *_paper("FA2", "sm_90", "both", 128, False, "248 294 320 326 335 338"),
    *_paper("FA2", "sm_90", "both", 128, True, "163 221 265 294 308 328"),
    *_paper("FA3", "sm_90", "forward", 64, False, "282 306 318 321 322 324"),
    *_paper("FA3", "sm_90", "forward", 64, True, "180 229 262 284 295 299"),
    *_paper("FA3", "sm_90", "forward", 128, False, "309 350 362 368 370 370"),
    *_paper("FA3", "sm_90", "forward", 128, True, "191 260 298 319 333 335"),
    *_paper("FA3", "sm_90", "backward", 64, False, "198 238 264 279 287 291"),
    *_paper("FA3", "sm_90", "backward", 128, False, "214 260 291 310 318 322"),
    Point("5090", "sm_120", "forward", Problem(1, 8, 4096, 8192, 128), 186.73),
)
# Below, what a block does before and after its loop is not hidden by others, and kernels are short.
LONG = 2048


@dataclass(frozen=True)
class Checked:
    point: Point
    predicted: float  # TFLOP/s

    @property
    def error(self) -> float:
        return self.predicted / self.point.tflops - 1


@lru_cache
def _kernel(what: str, arch: str, head_dim: int, causal: bool) -> Kernel:
    return getattr(torch_flash, what)(arch, head_dim, causal)  # type: ignore[no-any-return]


def check(point: Point, exposed: float | None = None) -> Checked:
    """The model at a published point. NoTorchKernelsError where torch has no kernels."""
    seconds = flops = 0.0
    for what in ("forward", "backward") if point.what == "both" else (point.what,):
        found = flash(what, point.arch, point.problem, exposed)
        assert found.seconds is not None
        seconds, flops = seconds + found.seconds, flops + found.flops
        if what == "backward":
            seconds += _streams(point)
    return Checked(point, flops / seconds / 1e12)


def flash(what: str, arch: str, problem: Problem, exposed: float | None = None) -> Prediction:
    """The model on torch's own kernel."""
    kernel = _kernel(what, arch, problem.D, problem.causal)
    return predict(kernel, ARCHS[arch], problem, exposed)


def _streams(point: Point) -> float:
    """Seconds of the two small kernels of a backward: o and do are read and fp32 dq is zeroed; that
    is read and dq written."""
    p = point.problem
    return (2 * 2 + 4 + 4 + 2) * p.B * p.H * p.Sq * p.D / ARCHS[point.arch].dram


def fit(points: Iterable[Point] = POINTS) -> float:
    """EXPOSED for which the fitted points are right in the mean of their logarithms. Bisection: the
    more is exposed, the slower."""
    fitted = [point for point in points if point.fitted]
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        too_fast = sum(math.log1p(check(point, middle).error) for point in fitted) > 0
        low, high = (middle, high) if too_fast else (low, middle)
    return (low + high) / 2
