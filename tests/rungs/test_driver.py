"""The stand-in driver: specialisation, packing and limits of Triton's JIT, without a device."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from fastattn.kernels.launch import launch
from rungs import toys
from rungs.driver import LaunchError, standing_in


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, stride, wrong: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if wrong:  # a stride of 1 is a Python integer here, which has no .to
        stride = stride.to(tl.int64)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs * stride, offs < n), offs < n)


def run_copy(x: torch.Tensor, wrong: bool = False, grid: tuple[int, ...] = (1,)) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    launch(copy_kernel, grid, x, out, x.shape[0], x.stride(0), wrong=wrong, BLOCK=64)
    return out


@pytest.mark.parametrize("cc", [80, 90])
def test_each_specialisation_runs_and_compiles_once(cc: int) -> None:
    base = torch.randn(400)
    with standing_in(cc, values=True) as gpu:
        for x in (
            base[:48],  # aligned, n % 16 == 0, stride == 1
            base[:64],  # the same key
            base[:47],  # n % 16 != 0
            base[1:48],  # misaligned pointer
            base[:96:2],  # stride 2
            base[:1],  # n == 1
        ):
            assert torch.equal(run_copy(x), x)
    assert len(gpu.launches) == 6
    assert gpu.compiled == {"copy_kernel": 5}
    assert gpu.launches[0].constants == {"stride": 1, "wrong": False, "BLOCK": 64}
    assert gpu.launches[5].constants["n"] == 1


def test_a_kernel_that_fails_for_one_specialisation_is_caught() -> None:
    x = torch.randn(64)
    with standing_in() as gpu:
        run_copy(x[::2], wrong=True)
        with pytest.raises(triton.CompilationError, match="stride.to"):
            run_copy(x, wrong=True)
    assert len(gpu.launches) == 1


def test_64_bit_arguments_are_typed_so() -> None:
    x = torch.randn(1).expand(64)
    with standing_in() as gpu:
        out = torch.empty(64)
        launch(copy_kernel, (1,), x, out, 64, 2**31, wrong=False, BLOCK=64)
        launch(copy_kernel, (1,), x, out, 64, 2**31 - 1, wrong=False, BLOCK=64)
    kinds = [x.compiled.signature["stride"] for x in gpu.launches]
    assert kinds == ["i64", "i32"]


def test_grid_limits() -> None:
    with standing_in():
        run_copy(torch.randn(64), grid=(70000,))
        with pytest.raises(LaunchError, match="axis 1 is limited to 65535"):
            run_copy(torch.randn(64), grid=(1, 70000))


def test_shared_memory_over_the_limit_is_refused() -> None:
    a = torch.randn(256, 256, dtype=torch.float16)
    with standing_in(90):
        toys.matmul(a, a, 128, 128, 64, num_stages=5)
    with standing_in(86), pytest.raises(OutOfResources, match="shared memory"):
        toys.matmul(a, a, 128, 128, 64, num_stages=5)


def test_a_launch_past_the_one_place_is_refused() -> None:
    x = torch.randn(64)
    with standing_in(), pytest.raises(LaunchError, match=r"kernels/launch\.py"):
        copy_kernel[(1,)](x, torch.empty(64), 64, 1, wrong=False, BLOCK=64)


@triton.jit
def strided_kernel(x_ptr, out_ptr, strides, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * strides[0] + offs * strides[1], offs < n, other=0.0)
    tl.store(out_ptr + row * n + offs, x, offs < n)


def test_tuples_are_specialised_member_by_member() -> None:
    x = torch.randn(4, 32)
    with standing_in(80, values=True) as gpu:
        for view in (x, x.T, x[:, ::2]):
            out = torch.empty(view.shape)
            launch(
                strided_kernel, (view.shape[0],), view, out, view.stride(), view.shape[1], BLOCK=32
            )
            assert torch.equal(out, view)
    assert [x.constants.get("strides.1") for x in gpu.launches] == [1, None, None]
    assert gpu.launches[1].constants["strides.0"] == 1
