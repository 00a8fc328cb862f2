"""What ``fastattn.attention`` and ``attention_varlen`` accept, checked before any kernel runs.

Shapes, dtypes and devices are checked always. Values (lengths, cu_seqlens) are read on the CPU
always and on another device only under ``fastattn.debug_checks(True)``: a read would synchronise.
"""

from __future__ import annotations

import itertools
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn._debug import debug_checks_enabled

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTS = (torch.int32, torch.int64)
_FAR = 2**31  # a window this wide is no window
_FP32 = torch.finfo(torch.float32)


def fail(op: str, message: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"fastattn::{op}: {message}")


def check_strided(op: str, name: str, x: Tensor) -> None:
    if x.layout is not torch.strided:
        fail(
            op,
            f"{name} must be a strided tensor, got layout {x.layout}; x.to_dense() makes one",
            TypeError,
        )


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_qkv(op: str, q: Any, k: Any, v: Any, dims: int, layout: str) -> None:
    if not _plainly_right(q, k, v, dims):
        _explain_qkv(op, q, k, v, dims, layout)


def _plainly_right(q: Any, k: Any, v: Any, dims: int) -> bool:
    """The common call in few steps (a small call takes as long as its checks): one shape for k and
    v, one head count or a multiple. What is unusual goes through every check by name."""
    if not (type(q) is Tensor and type(k) is Tensor and type(v) is Tensor):
        return False
    dtype, device, shape, k_shape = q.dtype, q.device, q.shape, k.shape
    if dtype not in _FLOATS or k.dtype is not dtype or v.dtype is not dtype:
        return False
    if not (q.layout is k.layout is v.layout is torch.strided):
        return False
    if k.device != device or v.device != device or v.shape != k_shape:
        return False
    if len(shape) != dims or len(k_shape) != dims or k_shape[-1] != shape[-1] or not shape[-1]:
        return False
    if dims == 4 and k_shape[0] != shape[0]:
        return False
    return k_shape[1] != 0 and shape[1] % k_shape[1] == 0


def _explain_qkv(op: str, q: Any, k: Any, v: Any, dims: int, layout: str) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            fail(op, f"{name} must be a Tensor, got {type(x).__name__}", TypeError)
        check_strided(op, name, x)
        if x.dim() != dims:
            fail(op, f"{name} must have {dims} dimensions {layout}, got shape {_shape(x)}")
    if q.dtype not in _FLOATS:
        fail(
            op,
            f"q must be float32, bfloat16, float16 or float64, got {q.dtype}",
            TypeError,
        )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            fail(op, f"{name} must have q's dtype {q.dtype}, got {x.dtype}", TypeError)
        if x.device != q.device:
            fail(op, f"{name} must be on q's device {q.device}, got {x.device}")
    if k.shape[-1] != q.shape[-1]:
        fail(op, f"k must have head_dim {q.shape[-1]} to match q, got {k.shape[-1]}")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        fail(op, f"head_dim must be at least 1, got q {_shape(q)} and v {_shape(v)}")
    hq, hk, hv = q.shape[1], k.shape[1], v.shape[1]  # (B, H, S, D) and (T, H, D)
    if hk != hv:
        fail(op, f"v must have k's {hk} heads, got {hv}")
    if hq != hk and (hk == 0 or hq % hk):
        fail(op, f"q's heads must be a multiple of k's, got {hq} and {hk}")
    if dims == 4:
        if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
            fail(
                op,
                f"q, k and v must have one batch size, got {q.shape[0]}, {k.shape[0]}"
                f" and {v.shape[0]}",
            )
        if k.shape[2] != v.shape[2]:
            fail(op, f"v must have k's length {k.shape[2]}, got {v.shape[2]}")
    elif k.shape[0] != v.shape[0]:
        fail(op, f"v must have k's {k.shape[0]} tokens, got {v.shape[0]}")


def check_broadcast(
    op: str,
    name: str,
    x: Tensor,
    q: Tensor,
    target: tuple[Any, ...],
    wants_bool: bool,
    keys: str = "Sk",
    or_else: str = "an additive float mask goes to bias=",
) -> None:
    """mask and bias: dtype, device, and every dimension 1 or that of (B, H, Sq, keys).

    or_else: what becomes of a float mask.
    """
    if not isinstance(x, Tensor):
        fail(op, f"{name} must be a Tensor, got {type(x).__name__}", TypeError)
    if wants_bool and x.dtype != torch.bool:
        hint = f"; {or_else}" if x.is_floating_point() else ""
        fail(op, f"mask must be bool (True = takes part), got {x.dtype}{hint}", TypeError)
    if not wants_bool and x.dtype not in _FLOATS:
        hint = "; a bool mask goes to mask=" if x.dtype == torch.bool else ""
        fail(
            op,
            f"bias must be float32, bfloat16, float16 or float64, got {x.dtype}{hint}",
            TypeError,
        )
    if x.device != q.device:
        fail(op, f"{name} must be on q's device {q.device}, got {x.device}")
    ok = x.dim() <= 4 and all(
        n == 1 or t is None or n == t
        for n, t in zip(reversed(x.shape), reversed(target), strict=False)
    )
    if not ok:
        want = ", ".join("*" if t is None else str(t) for t in target)
        fail(op, f"{name} must broadcast to (B, H, Sq, {keys}) = ({want}), got shape {_shape(x)}")


def check_vector(
    op: str, name: str, x: Any, q: Tensor, shapes: tuple[tuple[int, ...], ...], dtypes: Any
) -> None:
    if not isinstance(x, Tensor):
        fail(op, f"{name} must be a Tensor, got {type(x).__name__}", TypeError)
    if x.dtype not in dtypes:
        fail(op, f"{name} must be one of {[str(d) for d in dtypes]}, got {x.dtype}", TypeError)
    if x.device != q.device:
        fail(op, f"{name} must be on q's device {q.device}, got {x.device}")
    if not any(_shape(x) == s for s in shapes):
        want = " or ".join(str(tuple(s)) for s in shapes)
        fail(op, f"{name} must have shape {want}, got {_shape(x)}")


def check_sinks(op: str, sinks: Any, q: Tensor, heads: int) -> None:
    check_vector(op, "sinks", sinks, q, ((heads,),), _FLOATS)


def check_alibi(op: str, slopes: Any, q: Tensor, batch: int, heads: int) -> None:
    check_vector(op, "alibi_slopes", slopes, q, ((heads,), (batch, heads)), _FLOATS)
    if slopes.requires_grad and torch.is_grad_enabled():
        fail(
            op,
            "alibi_slopes has requires_grad=True, but no gradient is computed for it; detach it, "
            "or pass the slopes' bias as bias=, which is differentiable",
        )


def _readable(x: Tensor) -> bool:
    """Whether the values may be read: a plain tensor, on the CPU or under debug_checks."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return x.device.type == "cpu" or debug_checks_enabled()


def check_lengths(op: str, name: str, lens: Any, q: Tensor, batch: int, limit: int) -> None:
    check_vector(op, name, lens, q, ((batch,),), _INTS)
    if _readable(lens):
        for b, n in enumerate(lens.tolist()):
            if not 0 <= n <= limit:
                fail(op, f"{name}[{b}] must be in [0, {limit}], got {n}")


def check_cu_seqlens(op: str, name: str, cu: Any, q: Tensor, tokens: int) -> int | None:
    """Returns the longest sequence where the values may be read, else None."""
    if not isinstance(cu, Tensor):
        fail(op, f"{name} must be a Tensor, got {type(cu).__name__}", TypeError)
    if cu.dtype not in _INTS:
        fail(op, f"{name} must be int32 or int64, got {cu.dtype}", TypeError)
    if cu.dim() != 1 or cu.shape[0] < 1:
        fail(op, f"{name} must have shape (B + 1,), got {_shape(cu)}")
    if cu.device != q.device:
        fail(op, f"{name} must be on q's device {q.device}, got {cu.device}")
    if not _readable(cu):
        return None
    values = cu.tolist()
    if values[0] != 0:
        fail(op, f"{name} must start with 0, got {values[0]}")
    longest = 0
    for b, (lo, hi) in enumerate(itertools.pairwise(values)):
        if hi < lo:
            fail(op, f"{name} must not decrease, got {lo} then {hi} at index {b + 1}")
        longest = max(longest, hi - lo)
    if values[-1] > tokens:
        fail(op, f"{name} must end within the {tokens} tokens given, got {values[-1]}")
    return longest


def check_max_seqlen(op: str, name: str, given: Any, longest: int | None) -> None:
    if given is None:
        return
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        fail(op, f"{name} must be an int or None, got {given!r}", TypeError)
    if longest is not None and given < longest:
        fail(op, f"{name} must be at least the longest sequence {longest}, got {given}")


def window_limits(op: str, window: Any) -> tuple[int, int]:
    """(left, right) as the ops take it: -1 = unlimited."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        fail(op, f"window must be (left, right) or None, got {window!r}", TypeError)
    for side, n in zip(("left", "right"), window, strict=True):
        if n is not None and (isinstance(n, bool) or not isinstance(n, (int, torch.SymInt))):
            fail(op, f"window's {side} side must be an int or None, got {n!r}", TypeError)
        if n is not None and n < 0:
            fail(op, f"window's {side} side must be >= 0 or None (unlimited), got {n}")
    limits: list[Any] = [-1 if n is None else min(n, _FAR) for n in window]
    return limits[0], limits[1]


def causal_code(op: str, causal: Any) -> int:
    if causal is False or causal is None:
        return 0
    if causal is True:
        return 1
    if causal == "bottom_right":
        return 2
    fail(op, f"causal must be False, True or 'bottom_right', got {causal!r}")


def check_numbers(op: str, scale: Any, softcap: Any, dropout_p: Any) -> None:
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat)):
        fail(op, f"scale must be a float or None, got {scale!r}", TypeError)
    if type(scale) is float and not torch.compiler.is_compiling() and not abs(scale) <= _FP32.max:
        fail(op, f"scale must be finite in float32, got {scale}")
    if softcap is not None:
        if not isinstance(softcap, (int, float)):
            fail(op, f"softcap must be a float or None, got {softcap!r}", TypeError)
        if not _FP32.tiny <= softcap <= _FP32.max:
            fail(op, f"softcap must be > 0 and finite in float32, or None, got {softcap}")
    if not isinstance(dropout_p, (int, float)):
        fail(op, f"dropout_p must be a float, got {dropout_p!r}", TypeError)
    if not 0.0 <= dropout_p < 1.0:
        fail(op, f"dropout_p must be in [0, 1), got {dropout_p}")


def check_bool(op: str, name: str, given: Any) -> None:
    if not isinstance(given, bool):
        fail(op, f"{name} must be a bool, got {given!r}", TypeError)


def weights_code(op: str, return_weights: Any) -> int:
    if return_weights is False:
        return 0
    if return_weights is True:
        return 1
    if return_weights == "mean":
        return 2
    fail(op, f"return_weights must be False, True or 'mean', got {return_weights!r}")


def seed_tensor(op: str, seed: Any, dropout_p: float, q: Tensor) -> Tensor | None:
    """The 64-bit seed as a 1-element int64 tensor on q's device; None where nothing drops."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            fail(
                op,
                "seed must be an int or a 1-element int64 Tensor, got "
                f"{seed.dtype} of shape {_shape(seed)}",
                TypeError,
            )
        if seed.device != q.device:
            fail(op, f"seed must be on q's device {q.device}, got {seed.device}")
        return seed if dropout_p else None
    if seed is None:
        if not dropout_p:
            return None
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        fail(op, f"seed must be an int or a 1-element int64 Tensor, got {seed!r}", TypeError)
    if not -(2**63) <= seed < 2**64:
        fail(op, f"seed must fit 64 bits, got {seed}")
    if not dropout_p:
        return None
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((1,), signed, dtype=torch.int64, device=q.device)
