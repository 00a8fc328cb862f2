"""`_kernels`, the torch-free launchers as a module, on torch CPU tensors or NumPy arrays.

    m = module()
    p = cuda_call(q, k, v, o, lse, lse_lo)      # m.cuda.AttentionParams; set more fields as needed
    made = m.cuda.attention_forward(p)

The caller keeps the tensors alive. CUDA launches run in the PTX simulator of `device()`, which is
to be told what they may touch.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sim import build
from sim.cudart import FILLED_RESULT, READ, RESULT, Device

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}


@functools.cache
def module() -> ModuleType:
    """Compiled where it is not (sim.build)."""
    path = str(build.kernels())
    loader = importlib.machinery.ExtensionFileLoader("_kernels", path)
    spec = importlib.util.spec_from_file_location("_kernels", path, loader=loader)
    assert spec is not None
    found = importlib.util.module_from_spec(spec)
    loader.exec_module(found)
    return found


@functools.cache
def device() -> Device:
    """What the module's CUDA kernels run on (a library of its own, with a stand-in of its own)."""
    module()
    return Device(build.kernels())


def operand(x: Tensor) -> Any:
    """A (B, H, S, X) or packed (T, H, X) tensor."""
    out = module().Operand()
    out.ptr = x.data_ptr()
    if x.dim() == 3:
        out.s, out.h, out.d = x.stride()
    else:
        out.b, out.h, out.s, out.d = x.stride()
    return out


def cpu_call(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lse_lo: Tensor) -> Any:
    """cpu.AttentionParams of a padded call with nothing but a scale."""
    p = _call(module().cpu.AttentionParams(), q, k, v, o, lse, lse_lo)
    p.lse_b, p.lse_h, p.lse_s = lse.stride()
    return p


def cuda_call(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lse_lo: Tensor) -> Any:
    """cuda.AttentionParams of the same; the simulator is told of the tensors."""
    gpu = device()
    named = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "lse_lo": lse_lo}
    for name, x in named.items():
        give(gpu, x, READ if name in "qkv" else RESULT, name)
    return _call(module().cuda.AttentionParams(), q, k, v, o, lse, lse_lo)


def give(gpu: Device, x: Tensor, access: int = FILLED_RESULT, name: str = "") -> int:
    """A tensor to the simulator; its address."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    gpu.add(x.data_ptr(), span * x.element_size() if x.numel() else 0, access, name)
    return x.data_ptr()


def _call(p: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lse_lo: Tensor) -> Any:
    p.B, p.H, p.Sq, p.D = q.shape
    p.Hk, p.Sk, p.Dv = k.shape[1], k.shape[2], v.shape[3]
    p.dtype, p.scale = DTYPES[q.dtype], q.shape[-1] ** -0.5
    p.q, p.k, p.v, p.o = operand(q), operand(k), operand(v), operand(o)
    p.lse, p.lse_lo = lse.data_ptr(), lse_lo.data_ptr()
    return p
