"""Memory: nothing of Sq x Sk unless weights are asked for.

Each case runs in a process of its own, since the peak of the resident set only ever rises. At
S = 8192 one (S, S) matrix in fp32 is 256 MiB; the limit of issue 2, 2 x (q + k + v + o), is 32 MiB
at two heads of 64.
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
case, dtype = sys.argv[1], getattr(torch, sys.argv[2])
S, H, D = 8192, 2, 64
def make(s):
    grad = "forward" not in case
    return [torch.randn(1, H, s, D).to(dtype).requires_grad_(grad) for _ in range(3)]
def call(s):
    q, k, v = inputs[s]
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
    o = fn(q, k, v, *cu, **given, backend="cpu")
    if "backward" in case:
        o.sum().backward()
    return o
inputs = {300: make(300), S: make(S)}
call(300)  # libraries, thread pools and arenas are not the call's
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
before = status("VmRSS")
o = call(S)
q, k, v = inputs[S]
allowed = 2 * (q.nbytes + k.nbytes + v.nbytes + o.nbytes)
print(status("VmHWM") - before, allowed)
"""

CASES = (
    *("forward", "forward_causal", "forward_window", "forward_lens", "forward_mask"),
    *("forward_dropout", "forward_packed", "backward", "backward_causal", "backward_bias"),
    *("backward_dropout", "backward_window", "backward_packed"),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_peak_at_8192(case: str, dtype: str) -> None:
    command = [sys.executable, "-c", _PEAK, case, dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    extra, allowed = (int(x) for x in out.stdout.split())
    assert extra >= allowed / 8, "the output alone is more: the meter is broken"
    assert extra <= allowed, f"{extra / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f} MiB"


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
    assert 0 < largest <= 4 * q.nbytes < 2048 * 2048 * 4
