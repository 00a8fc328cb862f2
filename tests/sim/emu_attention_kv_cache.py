"""Cases of csrc/cuda/attention_kv_cache.h for the source emulator, from the calls of the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from kv_cache_tools import CACHES, Call
from torch import Tensor

from .emu import HERE, ROOT, Case, Program

NAN = float("nan")
_CUDA = ROOT / "csrc" / "cuda"
_FEW = "few<__nv_bfloat16, 64>(DType::kBf16)"
_TYPES = (("few", "float", "kF32"), ("many", "__nv_bfloat16", "kBf16"))


def program(cuda: Path = _CUDA, named: bool = False) -> Program:
    """Few variants, of csrc/cuda; or of a copy that names its own."""
    lines = [_FEW, *(f"{tier}<{t}, 64>(DType::{code})" for tier, t, code in _TYPES)]
    names = ("attention_kv_cache", "attention_kv_append", "attention_kv_merge")
    sources = tuple(cuda / f"{name}.cu" for name in names)
    defines = () if named else (f"FASTATTN_KV_VARIANTS={', '.join(lines)}",)
    return Program((*sources, HERE / "launchers" / "attention_kv_cache.cpp"), defines)


PROGRAM = program()


def case_of(call: Call, splits: int = 1, multiprocessors: int = 8) -> Case:
    """A call of the op; `splits`: what its plan must come to."""
    t, options = call.copies(), call.options
    cos, sin = options.get("rotary", (None, None))
    more = {"cos": cos, "sin": sin, **{n: options.get(n) for n in ("alibi_slopes", "sinks")}}
    mask = options.get("mask")
    if mask is not None:
        more["mask"] = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
    left, right = (-1 if w is None else w for w in options.get("window", (None, None)))
    B, H, Sq, D = t["q"].shape
    numbers = {
        "scale": float(options.get("scale", D**-0.5)),
        "softcap": float(options.get("softcap", 0.0)),
        "causal": int(options.get("causal", True)),
        "window_left": left,
        "window_right": right,
        "interleaved": int(options.get("rotary_interleaved", False)),
        "multiprocessors": multiprocessors,
        "splits": splits,
    }
    outputs = {
        "o": torch.full((B, H, Sq, t["v_cache"].shape[3]), NAN, dtype=call.dtype),
        "lse": torch.full((B, H, Sq), NAN),
        **{n: t.pop(n) for n in CACHES},
    }
    given = {n: x for n, x in (t | more).items() if x is not None}
    return Case("attention_kv_cache", numbers, given, outputs)


def check(call: Call, got: dict[str, Tensor]) -> None:
    """By the oracle's rule, and nothing left unwritten."""
    assert not got["o"].isnan().any()
    assert not got["lse"].isnan().any()
    call.check(got)
