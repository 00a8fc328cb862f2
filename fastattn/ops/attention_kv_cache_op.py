"""The torch.library ops beneath ``fastattn.attention_with_kv_cache``: one schema, its fake.

The kernels register under their dispatch keys: the CPU ones in csrc/bindings/attention_kv_cache.cpp
under ``attention_kv_cache``, Triton's under ``attention_kv_cache_triton``, the CUDA C++ ones under
``attention_kv_cache_cuda``. The caches are written in place, nothing else. No autograd: a cache is
for generation, and the public function says so where a gradient is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.contract import empty_as
from fastattn.ops._eager import below_autograd
from fastattn.ops._fakes import register_fake
from fastattn.ops.layernorm_op import lib

# window -1 = unlimited, softcap 0 = off; cos and sin are contiguous fp32, (positions, R / 2).
ARGUMENTS = (
    "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, Tensor? k, Tensor? v, "
    "Tensor? new_lens, Tensor? block_table, Tensor? cache_index, Tensor? cos, Tensor? sin, "
    "Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, float scale, float softcap, bool causal, "
    "int window_left, int window_right, bool interleaved"
)
_RESULTS = "(Tensor o, Tensor lse)"
_SUFFIXES = {"cpu": "", "triton": "_triton", "cuda": "_cuda"}

for _suffix in _SUFFIXES.values():
    lib.define(
        f"attention_kv_cache{_suffix}({ARGUMENTS}) -> {_RESULTS}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
# What attention_kv_cache_cuda calls once the first-use verdict is there: the binding.
lib.define(f"attention_kv_cache_cuda_kernel({ARGUMENTS}) -> {_RESULTS}")


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    o = empty_as(q, (*q.shape[:-1], v_cache.shape[-1]))
    return o, q.new_empty(q.shape[:-1], dtype=torch.float32)


_OPS: dict[str, Any] = {}
for _backend, _suffix in _SUFFIXES.items():
    register_fake(f"fastattn::attention_kv_cache{_suffix}", _fake, lib=lib)
    _OPS[_backend] = getattr(torch.ops.fastattn, f"attention_kv_cache{_suffix}").default


def run(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    """The op of a backend on the schema's arguments: o and lse (fp32)."""
    if torch.compiler.is_compiling():
        return _OPS[backend](*args)  # type: ignore[no-any-return]
    results: tuple[Tensor, Tensor] = below_autograd(_OPS[backend], args)
    # Whoever saved a cache for a backward is told that it has changed.
    if args[4] is not None:
        torch.autograd.graph.increment_version(args[1:3])
    return results
