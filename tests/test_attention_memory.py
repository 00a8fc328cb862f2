"""Memory: nothing of Sq x Sk unless weights are asked for.

The peak of the resident set is read in processes of their own, where nothing else allocates. At
S = 8192 one (S, S) matrix in fp32 is 256 MiB. The limit of issue 2, 2 x (q + k + v + o) at
B1 H12 D64, is 192 MiB; the features are held to a quarter of one (S, S) matrix at two heads.
"""

import subprocess
import sys

import pytest
import torch

_PEAK = """
import re, sys, torch, fastattn
from pathlib import Path
def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
dtype = getattr(torch, sys.argv[2])
S, H, D = int(sys.argv[3]), int(sys.argv[4]), 64
def make(s):
    return [torch.randn(1, H, s, D).to(dtype) for _ in range(3)]
def call(case, s):
    q, k, v = (x.detach().requires_grad_("forward" not in case) for x in inputs[s])
    given, fn, cu = {}, fastattn.attention, ()
    if "causal" in case: given["causal"] = True
    if "window" in case: given["window"] = (128, 128)
    if "lens" in case: given["k_lens"] = torch.tensor([s - 5])
    if "bias" in case: given["bias"] = torch.zeros(H, 1, s, requires_grad="forward" not in case)
    if "mask" in case: given["mask"] = torch.arange(s) % 7 > 0
    if "dropout" in case: given |= {"dropout_p": 0.1, "seed": 1}
    if "packed" in case:
        fn = fastattn.attention_varlen
        cu = (torch.tensor([0, s // 4, s]),) * 2
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    if "square" in case:
        return torch.softmax(q @ k.transpose(2, 3), -1) @ v
    o = fn(q, k, v, *cu, **given, backend="cpu")
    if "backward" in case:
        o.sum().backward()
    return o
inputs = {300: make(300), S: make(S)}
for case in sys.argv[1].split(","):
    call(case, 300)  # libraries, thread pools and arenas are not the call's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
    before = status("VmRSS")
    o = call(case, S)
    allowed = 2 * (sum(x.nbytes for x in inputs[S]) + o.nbytes)
    print(status("VmHWM") - before, allowed)
    del o
"""

FEATURES = (
    *("forward_causal", "forward_window", "forward_lens", "forward_mask", "forward_dropout"),
    *("forward_packed", "backward_causal", "backward_bias", "backward_window", "backward_packed"),
)


def peaks(cases: str, dtype: str, s: int, heads: int) -> list[tuple[int, int]]:
    """For each case, bytes over what was resident before the call, and 2 x (q + k + v + o)."""
    command = [sys.executable, "-c", _PEAK, cases, dtype, str(s), str(heads)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    pairs = [line.split() for line in out.stdout.splitlines()]
    assert len(pairs) == len(cases.split(","))
    return [(int(extra), int(allowed)) for extra, allowed in pairs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["forward", "backward"])
def test_peak_at_8192(case: str, dtype: str) -> None:
    ((extra, allowed),) = peaks(case, dtype, 8192, 12)
    assert extra <= allowed, f"{extra / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f} MiB"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_feature_makes_a_square(dtype: str) -> None:
    square = 8192 * 8192 * getattr(torch, dtype).itemsize
    found = peaks(",".join(FEATURES), dtype, 8192, 2)
    for feature, (extra, _) in zip(FEATURES, found, strict=True):
        assert extra <= square / 4, f"{feature}: {extra / 2**20:.1f} MiB of {square / 2**20:.1f}"


def test_meter_sees_a_square_each_time() -> None:
    found = peaks("forward_square,forward,forward_square", "float32", 4096, 2)
    square = 2 * 4096 * 4096 * 4
    assert found[0][0] >= square
    assert found[1][0] <= square / 4
    assert found[2][0] >= square


def test_allocations_through_torch_hold_no_square() -> None:
    """What torch's allocator hands out while forward and backward run, in one number each."""
    import fastattn

    q, k, v = (torch.randn(1, 2, 2048, 32, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        o = fastattn.attention(q, k, v, backend="cpu")
        o.backward(torch.ones_like(o))
    largest = max(event.self_cpu_memory_usage for event in prof.key_averages())
    assert 0 < largest <= 6 * q.nbytes < 2048 * 2048 * 4
