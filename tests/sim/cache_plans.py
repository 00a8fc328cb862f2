"""Calls over a KV cache as attention_kv_cache_plan() serves them, which bench/model reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.model.archs import ARCHS
from bench.model.decode_list import ARCHITECTURES, CASES, plan

from .kernels import module

_DTYPES = {"fp32": 0, "bf16": 1}


def plans(archs: Iterable[str]) -> list[dict[str, Any]]:
    """A row is appended a call for each row of q, as decoding does."""
    cuda, found = module().cuda, []
    for arch in archs:
        for call in CASES if arch in ARCHITECTURES else ():
            p = cuda.AttentionParams()
            p.B, p.H, p.Hk, p.Sq, p.Sk = call.B, call.H, call.Hk, call.Sq, call.Sk
            p.D = p.Dv = call.D
            p.dtype = _DTYPES[call.dtype]
            rows, splits, apart = cuda.attention_kv_cache_plan(p, call.Sq, ARCHS[arch].sms)
            assert not apart, call
            tier = "few" if rows == 16 else "many"
            attend = f"attention_kv_{tier}_kernel {call.dtype} d{call.D}"
            merge = f"attention_kv_merge_kernel {call.dtype} d256"
            found.append(plan(arch, call, splits, attend, merge))
    return found
