"""Launches of backend="cuda": what fails says what was launched, and every kernel of a call goes to
the device of its tensors and to torch's current stream there."""

import re
import subprocess
from typing import Any

import pytest
import torch
from refused_calls import qkv
from torch import Tensor

import fastattn
from fastattn import reference
from sim import build
from sim.cudart import Device

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("cudaLaunchKernel", 9, r"cudaErrorInvalidConfiguration \(invalid configuration argument"),
        ("cudaLaunchKernel", 209, r"cudaErrorNoKernelImageForDevice \(no kernel image"),
        ("cudaLaunchKernel", 701, r"cudaErrorLaunchOutOfResources \(too many resources"),
        ("cudaFuncSetAttribute", 1, r"cudaErrorInvalidValue \(invalid argument"),
    ],
)
def test_a_failure_says_what_was_launched(gpu: Device, call: str, error: int, words: str) -> None:
    q, k, v = qkv(1, 2, 9, 8)
    fastattn.attention(q, k, v, backend="cuda")
    (made,) = gpu.launches
    with gpu.failing(call, error), pytest.raises(RuntimeError) as raised:
        fastattn.attention(q, k, v, backend="cuda")
    # `match` would not tell a missing number from one that is there by chance.
    text = str(raised.value)
    assert "fastattn::attention_cuda_fwd: " in text
    (kernel,) = [w for w in text.replace(",", " ").split() if w.endswith("_kernel")]
    assert kernel in made.kernel
    if call == "cudaLaunchKernel":
        assert f"grid {made.grid[0]}, block {made.block[0]}, {made.shared} bytes" in text
    assert "B 1 H 2 Sq 9 Sk 9 D 8 Dv 8" in text
    with pytest.raises(RuntimeError, match=words):
        with gpu.failing(call, error):
            fastattn.attention(q, k, v, backend="cuda")
    # No error stays behind for the next launch.
    right = reference.attention(q, k, v)
    torch.testing.assert_close(fastattn.attention(q, k, v, backend="cuda"), right)
    assert gpu.idle()


def test_the_weights_kernel_fails_by_its_own_name(gpu: Device) -> None:
    q, k, v = qkv()
    fastattn.attention(q, k, v, backend="cuda", return_weights=True)
    made = gpu.launches[1]
    with pytest.raises(RuntimeError, match="weights.*_kernel") as raised:
        original = gpu._launch

        def second_fails(launched: Any) -> int:
            error = original(launched)
            return 719 if b"weights" in launched.kernel else error

        gpu._launch = second_fails
        try:
            fastattn.attention(q, k, v, backend="cuda", return_weights=True)
        finally:
            gpu._launch = original
    assert f"grid {made.grid[0]}, block {made.block[0]}" in str(raised.value)


def test_an_architecture_without_code(gpu: Device) -> None:
    with gpu.playing("sm_75"), pytest.raises(RuntimeError, match="NoKernelImage|InvalidValue"):
        fastattn.attention(*qkv(), backend="cuda")


@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_shared_memory_of_the_smaller_architectures(
    gpu: Device, arch: str, dtype: torch.dtype, head_dim: int
) -> None:
    """99 KB a block on GeForce: every variant must fit, or its launch fails there."""
    q, k, v = qkv(1, 1, 5, head_dim, dtype=dtype)
    with gpu.playing(arch):
        fastattn.attention(q, k, v, backend="cuda")
        fastattn.attention(q, k, v, backend="cuda", softcap=2.0, return_weights=True)


# --------------------------------------------------------------------------- failures of a backward


def everything(leaves: list[Tensor], deterministic: bool) -> tuple[Tensor, list[Tensor]]:
    """A call that launches every kernel that there is, and its gradients to come."""
    more = [torch.randn(9, 9, requires_grad=True), torch.randn(2, requires_grad=True)]
    o, w = fastattn.attention(
        *leaves, bias=more[0], sinks=more[1], return_weights=True, deterministic=deterministic,
        backend="cuda",
    )  # fmt: skip
    return o.sum() + w.square().sum(), [*leaves, *more]


KERNELS = ("prepare", "weights", "keys", "rows", "shared", "dsinks")


@pytest.mark.parametrize("short", [*KERNELS, "dq"])
def test_a_failing_kernel_of_the_backward_is_named(gpu: Device, short: str) -> None:
    """And nothing is launched behind it."""
    loss, leaves = everything(qkv(requires_grad=True), deterministic=short != "dq")
    original, made, after = gpu._launch, [], []

    def fails(launched: Any) -> int:
        if made:
            after.append(launched.kernel)
        if b"attention_bwd_%b_kernel" % short.encode() in launched.kernel:
            made.append((tuple(launched.grid), tuple(launched.block), launched.shared))
            return 719
        return original(launched)

    gpu._launch = fails
    try:
        with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure") as raised:
            torch.autograd.grad(loss, leaves)
    finally:
        gpu._launch = original
    ((grid, block, shared),) = made
    text = str(raised.value)
    assert f"attention_bwd_{short}_kernel" in text
    assert f"grid {grid[0]}, block {block[0]}, {shared} bytes" in text
    assert "fastattn::attention_cuda_bwd: " in text
    assert "B 1 H 2 Sq 9 Sk 9 D 8 Dv 8" in text
    assert after == []
    assert gpu.idle()


# ------------------------------------------------------------------------------ devices and streams


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("device", "stream"), [(0, 0), (0, 0xBEE), (1, 0), (1, 0xBEE)])
def test_every_launch_goes_to_the_device_and_stream_of_the_call(
    gpu: Device, device: int, stream: int, deterministic: bool
) -> None:
    """The stand-in fails a launch whose stream is not the current device's, as CUDA does."""
    with gpu.placed(device, stream) as handle:
        loss, leaves = everything(qkv(requires_grad=True), deterministic)
        torch.autograd.grad(loss, leaves)
    assert len(gpu.launches) >= 7
    assert {(x.device, x.stream) for x in gpu.launches} == {(device, handle)}
    assert gpu.guarded() == -1


def test_the_next_call_goes_back(gpu: Device) -> None:
    """This library's current device is its own: nobody inherits it."""
    for device in (1, 0):
        with gpu.placed(device):
            fastattn.attention(*qkv(), backend="cuda")
    assert [x.device for x in gpu.launches] == [1, 0]


def test_a_device_that_is_not_there(gpu: Device) -> None:
    with (
        gpu.placed(7),
        pytest.raises(RuntimeError, match=r"cudaSetDevice\(7\): cudaErrorInvalidDev"),
    ):
        fastattn.attention(*qkv(), backend="cuda")
    assert gpu.guarded() == -1  # though it failed
    fastattn.attention(*qkv(), backend="cuda")
    assert [x.device for x in gpu.launches] == [0]


def test_the_guard_is_left_where_a_launch_fails(gpu: Device) -> None:
    with gpu.placed(1, 5), gpu.failing("cudaLaunchKernel", 9):
        with pytest.raises(RuntimeError, match="cudaErrorInvalidConfiguration"):
            fastattn.attention(*qkv(), backend="cuda")
        assert gpu.guarded() == -1


# What CUDA lets a thread call while a stream of it captures a graph, and what our objects and
# nvcc's host code in them may therefore want of the runtime. No allocation, copy, event or
# synchronisation: memory is torch's, from its capture-aware allocator.
CAPTURABLE = {
    "__cudaRegisterFatBinary", "__cudaRegisterFatBinaryEnd", "__cudaUnregisterFatBinary",
    "__cudaRegisterFunction", "__cudaRegisterVar", "__cudaPushCallConfiguration",
    "__cudaPopCallConfiguration", "__cudaGetKernel", "__cudaLaunchKernel", "cudaLaunchKernel",
    "cudaLaunchCooperativeKernel", "cudaFuncSetAttribute", "cudaGetLastError", "cudaGetErrorName",
    "cudaGetErrorString", "cudaSetDevice", "cudaGetDevice", "cudaDeviceGetAttribute",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor", "cudaMemsetAsync",  # a node of the graph
}  # fmt: skip


def test_a_stream_that_captures_a_graph_is_not_disturbed() -> None:
    """Nothing that the launchers or the binding call is forbidden there."""
    objects = [*build.cuda_objects(), *build.bindings()]
    found: set[str] = set()
    for path in objects:
        names = subprocess.run(
            ["nm", "-u", path], capture_output=True, text=True, check=True
        ).stdout
        found |= set(re.findall(r"U (_*cu[a-zA-Z]\w+)", names))
    assert "__cudaLaunchKernel" in found or "cudaLaunchKernel" in found
    assert found <= CAPTURABLE
