"""Run our Triton kernels in Triton's interpreter, in a process that can compile them as well.

``TRITON_INTERPRET=1`` decides when a kernel is decorated, and then nothing compiles any more. Here
a launch is taken over by ``fastattn.kernels.launch.hook``, and every ``@triton.jit`` function that
the kernel calls (ours and those of ``triton.language``) is interpreted while it runs.

The interpreter of triton 3.8 is silently wrong in places, repaired while a kernel runs:
  - tl.dot of bfloat16 multiplies the raw uint16; here operands are widened to float32
  - casts of float32 to bfloat16 truncate; here they round to nearest even
  - input_precision="tf32" is ignored; here operands lose 13 bits, to nearest
  - libdevice calls raise; here tanh, exp and log run in numpy
and what it calls undefined is made loud: a masked load without ``other`` gives NaN, not 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as core
from triton.runtime.jit import JITFunction

from fastattn.kernels import launch as launcher

Handle = core.TensorHandle
Builder = core.InterpreterBuilder
_ORIGINAL = {
    name: getattr(Builder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot")
}


# ---- the repairs -------------------------------------------------------------------------------


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, as uint16; a NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(x))


def f32_to_tf32(x: np.ndarray) -> np.ndarray:
    """To nearest with 10 bits of mantissa, ties away from zero, as ``cvt.rna.tf32`` does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(x), rounded, x).astype(np.float32).reshape(np.shape(x))


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    """Every cast to or from bf16 goes through float32 with the right rounding."""
    a, b = src.dtype.scalar, dst_type.scalar
    if a == b or tl.bfloat16 not in (a, b):
        return _ORIGINAL["cast_impl"](self, src, dst_type)
    if a == tl.bfloat16:
        wide = Handle(bf16_to_f32(src.data), tl.float32)
        return wide if b == tl.float32 else _ORIGINAL["cast_impl"](self, wide, dst_type)
    return Handle(f32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)


def _fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        return _cast(self, src, dst_type)
    return _ORIGINAL["create_fp_to_fp"](self, src, dst_type, rounding_mode)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
    assert a.dtype.scalar == b.dtype.scalar, (a.dtype, b.dtype)

    def operand(x: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            return Handle(bf16_to_f32(x.data), tl.float32)
        if x.dtype.scalar == tl.float16:
            return Handle(x.data.astype(np.float32), tl.float32)
        if x.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            return Handle(f32_to_tf32(x.data), tl.float32)
        return x

    return _ORIGINAL["create_dot"](self, operand(a), operand(b), d, input_precision, imprecise)


def _masked_load(
    self: Any, ptrs: Any, mask: Any, other: Any, cache: Any, eviction: Any, volatile: Any
) -> Any:
    dtype = ptrs.get_element_ty()
    if other is None and dtype.is_floating():
        numpy_dtype = core._get_np_dtype(dtype)
        nan = np.float32("nan")
        value = f32_to_bf16(nan) if dtype == tl.bfloat16 else numpy_dtype.type(nan)
        other = Handle(np.full(ptrs.data.shape, value, numpy_dtype), dtype)
    return _LOAD(self, ptrs, mask, other, cache, eviction, volatile)


_LOAD = Builder.create_masked_load


def _libdevice(name: str, function: Any) -> Any:
    def call(x: Any, _semantic: Any = None) -> Any:
        data = function(x.handle.data).astype(x.handle.data.dtype)
        return tl.core.tensor(Handle(data, x.dtype.scalar), x.type)

    call.__name__ = name
    return call


_CASTS = (
    "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext",
    "create_fp_trunc", "create_int_cast",
)  # fmt: skip


@contextmanager
def repaired() -> Iterator[None]:
    """Triton's interpreter with right bf16, tf32, libdevice and undefined values."""
    from triton.language.extra import libdevice

    changes: dict[str, Any] = {
        "cast_impl": _cast, "create_fp_to_fp": _fp_to_fp, "create_dot": _dot,
        "create_masked_load": _masked_load,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(mock.patch.object(Builder, name, value))
        for name in ("tanh", "exp", "log"):
            stack.enter_context(
                mock.patch.object(libdevice, name, _libdevice(name, getattr(np, name)))
            )
        yield


# ---- interpreting what was decorated to be compiled ----------------------------------------------

_rewritten: dict[Any, Any] = {}
_NUMPY = {
    str(t): core._get_np_dtype(t)
    for t in (
        *(tl.int1, tl.int8, tl.int16, tl.int32, tl.int64, tl.uint8, tl.uint16, tl.uint32),
        *(tl.uint64, tl.float16, tl.bfloat16, tl.float32, tl.float64),
    )
}


def _numpy_dtype(t: Any) -> Any:
    """What the interpreter works out anew at every operation, at a tenth of its time."""
    return _NUMPY["uint64" if t.scalar.is_ptr() else t.scalar.name]


def _python(function: JITFunction) -> Any:
    """The function's source as the interpreter wants it (assignments make tensors)."""
    found = _rewritten.get(function.fn)
    if found is None:
        found = _rewritten[function.fn] = core.FunctionRewriter(function.fn).rewrite_ast()
    return found


def _call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("_semantic", None)
    return _python(self)(*args, **kwargs)


@contextmanager
def _language() -> Iterator[None]:
    """triton.language on numpy, and @triton.jit functions that can be called."""
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    with ExitStack() as stack:
        stack.enter_context(repaired())
        stack.enter_context(mock.patch.object(JITFunction, "__call__", _call))
        # triton.knobs.runtime.interpret reads it, and leaves it behind where it is set by itself.
        stack.enter_context(mock.patch.dict(os.environ, TRITON_INTERPRET="1"))
        scope = core._patch_lang(everything)
        stack.callback(scope.restore)
        yield


def interpret(
    kernel: JITFunction, grid: tuple[int, ...], args: tuple, meta: dict, order: Any = None
) -> bool:
    """A hook for ``fastattn.kernels.launch``: run the launch in the interpreter.

    order: from the number of programs to the order in which they run; None = ascending.
    """
    run = core.GridExecutor(_python(kernel), kernel.arg_names, grid)
    set_index = core.interpreter_builder.set_grid_idx
    with ExitStack() as stack:
        stack.enter_context(_language())
        # Patching the language costs 10 ms, which the executor would pay again.
        nothing = core._LangPatchScope()
        stack.enter_context(mock.patch.object(core, "_patch_lang", return_value=nothing))
        stack.enter_context(mock.patch.object(core, "_get_np_dtype", _numpy_dtype))
        stack.enter_context(np.errstate(all="ignore"))
        if order is not None:
            at = order(grid[0])
            stack.enter_context(
                mock.patch.object(
                    core.interpreter_builder,
                    "set_grid_idx",
                    lambda x, y, z: set_index(int(at[x]), y, z),
                )
            )
        run(*args, **{k: v for k, v in meta.items() if k in kernel.arg_names})
    return True


@contextmanager
def interpreted(order: Any = None) -> Iterator[None]:
    """Launches inside the block run in the interpreter."""

    def hook(kernel: Any, grid: Any, args: Any, meta: Any) -> bool:
        return interpret(kernel, grid, args, meta, order)

    with mock.patch.object(launcher, "hook", hook):
        yield
