"""The Triton implementation of attention over a KV cache, under the CUDA key, and under the CPU key
for tests (Triton's interpreter, or a hook that takes the launches over).

Triton is imported at the first call: `import fastattn` needs none. A kernel that its first-use
check found wrong gives way to the reference (attention_kv_cache_guard.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends import select
from fastattn.ops import attention_kv_cache_guard as guard
from fastattn.ops.attention_kv_cache_checks import OP


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    from fastattn.kernels.attention_kv_cache import attention_kv_cache
    from fastattn.kernels.attention_kv_cache_checks import check_call

    check_call(*args)
    if not guard.may_run("triton", attention_kv_cache, args):
        return guard.by_reference(*args)
    result: tuple[Tensor, Tensor] = attention_kv_cache(*args)
    return result


def _run_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    select(OP, "triton", "cpu", args[0].dtype)  # raises where nothing would run it
    return _run(*args)


_lib = torch.library.Library("fastattn", "IMPL")
_lib.impl("attention_kv_cache_triton", _run, "CUDA")
_lib.impl("attention_kv_cache_triton", _run_cpu, "CPU")
