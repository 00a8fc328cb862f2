"""The repairs of Triton's interpreter, each on a kernel of a few lines; the right value comes from
torch, which knows nothing of the interpreter. `test_without_the_repair`: each is needed."""

from contextlib import nullcontext
from unittest import mock

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.runtime.errors import InterpreterError

from fastattn.kernels.launch import launch


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(c_ptr + at, c)


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def tanh_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, libdevice.tanh(tl.load(x_ptr + i)))


@triton.jit
def undefined_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < N // 2)
    tl.store(y_ptr + i, x)


def dot(dtype: torch.dtype, precision: str = "ieee") -> tuple[Tensor, Tensor, Tensor]:
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    c = torch.empty(16, 16)
    launch(dot_kernel, (1,), a, b, c, 16, precision)
    return a, b, c


def check_bf16_dot() -> None:
    a, b, c = dot(torch.bfloat16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def check_fp16_dot() -> None:
    """Products of fp16 are exact in fp32 and are summed there."""
    a, b, c = dot(torch.float16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def tf32(x: Tensor) -> Tensor:
    """By arithmetic, not by bits: to 11 significant binary digits."""
    unit = torch.exp2(torch.floor(torch.log2(x.double().abs())) - 10)
    return torch.where(x == 0, 0.0, torch.round(x.double() / unit) * unit)


def check_tf32_dot() -> None:
    a, b, c = dot(torch.float32, "tf32")
    torch.testing.assert_close(c.double(), tf32(a) @ tf32(b), rtol=1e-5, atol=1e-5)
    assert (c - a @ b).abs().max() > 1e-4, "the values show no rounding"


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    launch(cast_kernel, (1,), x, y, x.numel())
    return y


HARD = torch.tensor([1.00390625, 1.01171875, -1.00390625, 1.003, 3.4e38, 1e-40, float("inf"), -0.0])


def check_cast_to_bf16() -> None:
    """Ties to even, subnormals, infinities, and what overflows by rounding."""
    x = torch.cat([HARD, torch.randn(56)])
    assert torch.equal(cast(x, torch.bfloat16), x.to(torch.bfloat16))
    assert cast(torch.full((16,), float("nan")), torch.bfloat16).isnan().all()
    halves = torch.randn(16).half()
    assert torch.equal(cast(halves, torch.bfloat16), halves.to(torch.bfloat16))


def check_cast_from_bf16() -> None:
    x = torch.cat([HARD, torch.randn(56)]).bfloat16()
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert torch.equal(cast(x, dtype), x.to(dtype))


def check_tanh() -> None:
    x = torch.linspace(-6, 6, 32)
    y = torch.empty_like(x)
    launch(tanh_kernel, (1,), x, y, 32)
    torch.testing.assert_close(y, torch.tanh(x.double()).float(), rtol=1e-6, atol=1e-7)


def check_undefined() -> None:
    """What a masked load has no value for is NaN, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = torch.ones(16, dtype=dtype), torch.ones(16, dtype=dtype)
        launch(undefined_kernel, (1,), x, y, 16)
        assert y[8:].isnan().all()
        assert torch.equal(y[:8], x[:8])


CHECKS = {f.__name__: f for f in (
    check_bf16_dot, check_fp16_dot, check_tf32_dot, check_cast_to_bf16, check_cast_from_bf16,
    check_tanh, check_undefined,
)}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_repaired(check: str) -> None:
    CHECKS[check]()


@pytest.mark.parametrize("check", sorted(set(CHECKS) - {"check_fp16_dot"}))
def test_without_the_repair(check: str) -> None:
    """The interpreter as it comes fails the same check: once it does not, drop the repair."""
    with mock.patch.object(interpreter, "repaired", nullcontext):
        with pytest.raises((AssertionError, InterpreterError)):
            CHECKS[check]()


def test_nothing_stays_changed() -> None:
    """After a launch, @triton.jit functions compile again and the language is its own."""
    before = {name: getattr(tl, name) for name in ("dot", "load", "reduce", "range")}
    dot(torch.float32)
    assert before == {name: getattr(tl, name) for name in before}
    with pytest.raises(RuntimeError, match="outside of the scope"):
        dot_kernel()
    assert not triton.knobs.runtime.interpret


def test_order_of_programs_can_be_chosen() -> None:
    seen = []
    original = interpreter.core.interpreter_builder.set_grid_idx

    def note(x: int, y: int, z: int) -> None:
        seen.append(x)
        original(x, y, z)

    x, y = torch.ones(16), torch.empty(16)
    with mock.patch.object(interpreter.core.interpreter_builder, "set_grid_idx", note):
        interpreter.interpret(cast_kernel, (4,), (x, y, 16), {}, lambda n: np.arange(n)[::-1])
    assert seen == [3, 2, 1, 0]
