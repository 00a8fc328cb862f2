"""The CUDA C++ implementation of attention over a KV cache, under the CUDA key, and under the CPU
key for tests (tests/sim: the same binding and kernels, linked with a stand-in for the CUDA
runtime).

``attention_kv_cache_cuda_kernel`` is the binding (csrc/bindings/attention_kv_cache_cuda.cpp). A
kernel that its first-use check found wrong gives way to the reference
(attention_kv_cache_guard.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends import select
from fastattn.ops import attention_kv_cache_guard as guard
from fastattn.ops.attention_kv_cache_checks import OP


def kernel(*args: Any) -> tuple[Tensor, Tensor]:
    """The arguments of ``attention_kv_cache_cuda``."""
    op = torch.ops.fastattn.attention_kv_cache_cuda_kernel.default
    results: tuple[Tensor, Tensor] = op(*args)
    return results


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    # The binding words what is wrong with a direct call; the guard takes its shapes for granted.
    shaped = all(x.dim() == 4 for x in args[:3]) and (args[9] is None or args[9].dim() == 2)
    if shaped and not guard.may_run("cuda", kernel, args):
        return guard.by_reference(*args)
    return kernel(*args)


def _run_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    select(OP, "cuda", "cpu", args[0].dtype)  # raises where nothing would run it
    return _run(*args)


_lib = torch.library.Library("fastattn", "IMPL")
_lib.impl("attention_kv_cache_cuda", _run, "CUDA")
_lib.impl("attention_kv_cache_cuda", _run_cpu, "CPU")
