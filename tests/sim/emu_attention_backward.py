"""The CUDA attention backward in the source emulator: a `Problem` of tests/tools.py as its case.

The forward kernel runs first, for its lse. The host's part (kernels/attention.py: where a bias
gradient is summed) is repeated in `Bias`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tools import Problem, Result, compare, one_thread, oracle, plain_results
from torch import Tensor

from .emu import HERE, ROOT, Case, Program, run

CSRC = ROOT / "csrc" / "cuda"
SOURCES = ("fwd", "weights", "bwd", "bwd_keys", "bwd_rows", "bwd_bias", "bwd_prepare")
_C_TYPES = {"bf16": "__nv_bfloat16", "f16": "__half", "f32": "float"}
_C_DTYPES = {"bf16": "kBf16", "f16": "kF16", "f32": "kF32"}


@dataclass(frozen=True)
class Variant:
    """A line of the kernels' tables; `atomics` matters to the pass by keys alone."""

    dtype: str
    head_dim: int
    laden: bool = False
    atomics: bool = False

    def line(self, *flags: bool, make: str = "variant") -> str:
        given = [_C_TYPES[self.dtype], str(self.head_dim), *(str(x).lower() for x in flags)]
        return f"{make}<{', '.join(given)}>(DType::{_C_DTYPES[self.dtype]})"


def few(variants: Sequence[Variant]) -> tuple[str, ...]:
    """For -D: these variants alone, of the backward and of the forward that it starts from. g++
    takes minutes for all of them."""

    def lines(made: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(made))

    plain = lines(v.line(v.laden) for v in variants)
    one = [v.line(make="make") for v in variants]
    return (
        "FASTATTN_EMU_BACKWARD",
        f"FASTATTN_FWD_VARIANTS={plain}",
        f"FASTATTN_WEIGHTS_VARIANTS={lines(v.line() for v in variants)}",
        f"FASTATTN_BWD_KEYS_VARIANTS={lines(v.line(v.laden, v.atomics) for v in variants)}",
        f"FASTATTN_BWD_ROWS_VARIANTS={plain}",
        f"FASTATTN_BWD_BIAS_VARIANTS(make)={lines(one)}",
    )


def program(variants: Sequence[Variant], csrc: Path = CSRC) -> Program:
    """csrc: the sources, or a copy with a planted bug."""
    sources = (*(csrc / f"attention_{n}.cu" for n in SOURCES), HERE / "launchers" / "attention.cpp")
    return Program(sources, few(variants))


NAN = float("nan")
_CAUSAL = {False: 0, True: 1, "top_left": 1, "bottom_right": 2}
NONE, STORE, KEYS, ROWS, SHARED = range(5)


@dataclass
class Bias:
    """The buffer that a bias gradient is summed in, and how."""

    mode: int
    buffer: Tensor
    bias: Tensor

    @staticmethod
    def of(bias: Tensor, full: tuple[int, ...], fused: bool) -> Bias:
        nb, nh, ni, nj = (*(1,) * (4 - bias.dim()), *bias.shape)
        if nj == 1 < full[3] or ni == nj == 1:
            return Bias(ROWS, torch.zeros(*full[:3], 1), bias)
        if ni == 1 < full[2]:
            return Bias(KEYS, torch.zeros(*full[:2], 1, full[3]), bias)
        if (nb, nh) == full[:2]:
            return Bias(STORE, torch.zeros(full, dtype=bias.dtype), bias)
        start = 0.0 if fused else NAN
        dtype = torch.float32 if fused else bias.dtype
        return Bias(SHARED, torch.full((nb, nh, ni, nj), start, dtype=dtype), bias)

    def finish(self, buffer: Tensor) -> Tensor:
        shape = (*(1,) * (4 - self.bias.dim()), *self.bias.shape)
        return buffer.sum_to_size(shape).reshape(self.bias.shape).to(self.bias.dtype)


def _dense(x: Tensor) -> Tensor:
    return x.detach().contiguous()


def forward(problem: Problem, program: Program, numbers: dict, given: dict) -> dict[str, Tensor]:
    """o, lse and lse_lo of the forward kernel: its lse goes with the bits of its own logits."""
    q, v = problem.q, problem.v
    shape = (q.shape[1], q.shape[0]) if problem.cu_seqlens else q.shape[:3]
    starts = (0.0, -math.inf, 0.0) if problem.cu_seqlens else (NAN, NAN, NAN)  # no sequence's
    outputs = {
        "o": torch.full((*q.shape[:-1], v.shape[-1]), starts[0], dtype=q.dtype),
        "lse": torch.full(shape, starts[1]),
        "lse_lo": torch.full(shape, starts[2]),
    }
    return run(program, Case("attention_forward", numbers, given, outputs))


def case_of(
    problem: Problem, right: Result, program: Program, deterministic: bool, lead: int = 0
) -> tuple[Case, Bias | None]:
    given, q, k, v = dict(problem.kwargs), problem.q, problem.k, problem.v
    cu_q, cu_k = problem.cu_seqlens or (None, None)
    packed = cu_q is not None
    longest = [int(cu.diff().max()) if packed else 0 for cu in (cu_q, cu_k) if cu is not None]
    left, right_ = given.get("window") or (None, None)
    p = given.get("dropout_p", 0.0)
    numbers = {
        "scale": float(given.get("scale", q.shape[-1] ** -0.5)),
        "softcap": float(given.get("softcap", 0.0)),
        "causal": _CAUSAL[given.get("causal", False)],
        "window_left": -1 if left is None else left,
        "window_right": -1 if right_ is None else right_,
        "dropout_p": float(p),
    }
    tensors = {"q": q, "k": k, "v": v}
    if packed:
        numbers |= {"Sq": longest[0], "Sk": longest[1]}
        tensors |= {"cu_q": cu_q, "cu_k": cu_k}
    for name in ("mask", "bias", "q_lens", "k_lens", "sinks"):
        if given.get(name) is not None:
            tensors[name] = given[name]
    for name in ("mask", "bias"):
        if name in tensors:
            tensors[name] = tensors[name][(None,) * (4 - tensors[name].dim())]
    if given.get("alibi_slopes") is not None:
        tensors["alibi"] = given["alibi_slopes"].float().contiguous()
    if "sinks" in tensors:
        tensors["sinks"] = _dense(tensors["sinks"].float())
    if p:
        tensors["seed"] = torch.tensor([given["seed"]])
    tensors |= forward(problem, program, dict(numbers), dict(tensors))
    ups = problem.upstream_for(right.outputs)
    names = {"o": "d_o", "lse": "dlse", "weights": "dweights"}
    tensors |= {names[n]: x for n, x in ups.items()}
    if "dlse" in tensors:
        tensors["dlse"] = tensors["dlse"].float()

    lse = right.outputs["lse"]
    H = q.shape[1]
    B = len(cu_q) - 1 if packed else q.shape[0]
    sq, sk = longest if packed else (q.shape[2], k.shape[2])
    start = 0.0 if packed else NAN
    outputs = {f"d{n}": torch.full_like(getattr(problem, n), start) for n in "qkv"}
    outputs = {n: x for n, x in outputs.items() if n[1:] not in problem.frozen}
    outputs["delta"] = torch.full(lse.shape, NAN)
    outputs["lse_units"] = torch.full(lse.shape, math.inf if packed else NAN)
    fused = not deterministic and "dq" in outputs and ("dk" in outputs or "dv" in outputs)
    if fused:
        outputs["dq_sums"] = torch.zeros(*lse.shape, q.shape[-1])
    bias = None
    if "bias" in tensors and "bias" not in problem.frozen:
        bias = Bias.of(given["bias"], (B, H, sq, sk), fused)
        outputs["dbias"] = bias.buffer
        numbers["dbias_mode"] = bias.mode
    if "sinks" in tensors and "sinks" not in problem.frozen:
        outputs["dsinks"] = torch.full((H,), NAN)
    leads = dict.fromkeys((n for n in ("q", "k", "v", "o", "d_o") if n in tensors), lead)
    return Case("attention_backward", numbers, tensors, outputs, leads), bias


def gradients(problem: Problem, got: dict[str, Tensor], bias: Bias | None) -> dict[str, Tensor]:
    grads = {n: got[f"d{n}"] for n in "qkv" if f"d{n}" in got}
    if bias is not None:
        grads["bias"] = bias.finish(got["dbias"])
    if "dsinks" in got:
        grads["sinks"] = got["dsinks"].to(problem.kwargs["sinks"].dtype)
    return grads


def check(
    problem: Problem,
    program: Program,
    sanitizer: str = "plain",
    *,
    deterministic: bool = True,
    lead: int = 0,
    **how: object,
) -> dict[str, Tensor]:
    """AssertionError unless the gradients are as near to the oracle as plain PyTorch's (x 2)."""
    torch.manual_seed(1)
    with one_thread():
        right, floors = oracle(problem)
        plain = plain_results(problem)
    case, bias = case_of(problem, right, program, deterministic, lead)
    got = run(program, case, sanitizer, **how)  # type: ignore[arg-type]
    grads = gradients(problem, got, bias)
    right = Result({}, {n: g for n, g in right.grads.items() if n not in problem.frozen})
    compare(problem, Result({}, grads), right, floors, plain)
    return got
