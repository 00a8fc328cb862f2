"""The Triton attention kernels as Triton compiles them for sm_80, in the PTX simulator: values
against the fp64 oracle, bounds, races, reads of what nobody wrote.

Tiles are the small ones that configs.py has for the CPU (one warp), and for a few calls an sm_80's
own. The sanitizer (tests/rungs) looks at the same kernels before the compiler's last stages.
"""

import re
from typing import Any

import pytest
import torch
from rungs.calls import attend, check, tiles_of
from tools import featured, packed, padded

from fastattn.kernels import attention as kernels
from sim import ptx, triton_launches

pytestmark = pytest.mark.sampled(2)

SMALL = {"b": 1, "h": 2, "hk": 1, "sq": 21, "sk": 35, "d": 12, "dv": 10}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Together every feature, each dtype with each kind of code; more would be more of Triton's time.
CASES = {
    "plain": ("plain", BF16), "causal": ("bottom_right", F16), "window": ("window_causal", BF16),
    "bias": ("bias", F16), "softcap": ("softcap", BF16), "all": ("all", BF16), "fp32": ("all", F32),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_feature(case: str) -> None:
    feature, dtype = CASES[case]
    with triton_launches.running() as gpu:
        check(featured(feature, **SMALL, dtype=dtype))
    names = {x.name for x in gpu.launches}
    assert names >= {"forward_kernel", "prepare_kernel", "by_keys_kernel", "by_rows_kernel"}


def test_packed() -> None:
    problem = packed([9, 0, 20], [5, 3, 33], h=2, hk=1, d=12, slack=2, dtype=BF16, causal=True)
    with triton_launches.running():
        check(problem)


def test_with_atomics() -> None:
    problem = padded(**SMALL, dtype=BF16, bias=torch.randn(21, 35))
    with triton_launches.running() as gpu:
        check(problem, deterministic=False)
    assert "by_rows_kernel" not in {x.name for x in gpu.launches}


def test_the_tiles_of_an_sm_80() -> None:
    """Several warps, pipelined copies (cp.async), shared memory beyond 48 KB."""
    problem = padded(b=1, h=1, sq=70, sk=150, d=64, dtype=BF16, causal="bottom_right")
    with tiles_of("sm_80"), triton_launches.running() as gpu:
        check(problem, backward=False)
    (launch,) = gpu.launches
    assert launch.block >= 128


def test_any_order_of_blocks() -> None:
    problem = featured("causal", **SMALL, dtype=BF16)
    results = []
    for order in ("forward", "random"):
        with triton_launches.running(seed=5, order=order):
            results.append(attend(problem).all())
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


# --------------------------------------------------------------------- what such a run would see


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [(r"\tbar\.sync \t0;", ""), (r"cp\.async\.wait_group\s+\w+;", "cp.async.wait_group 7;")],
    ids=["no barriers", "no waits"],
)
def test_planted_races(pattern: str, replacement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = ptx.load

    def changed(text: str) -> ptx.Module:
        text, n = re.subn(pattern, replacement, text)
        assert n, pattern
        return load(text)

    monkeypatch.setattr(ptx, "load", changed)
    triton_launches.forget()
    problem = padded(b=1, h=2, sq=70, sk=140, d=32, dtype=BF16, causal=True)
    try:
        with pytest.raises(
            ptx.Race, match=r"forward_kernel at PTX line \d+ .*attention\w*\.py:\d+"
        ):
            with tiles_of("sm_80"), triton_launches.running():
                attend(problem, backward=False)
    finally:
        triton_launches.forget()


def test_an_access_beyond_a_tensor_is_a_fault() -> None:
    problem = padded(**SMALL, dtype=BF16)
    storage = problem.k.untyped_storage()
    storage.resize_(storage.nbytes() - 16)  # the tensor still says that it has all its rows
    with pytest.raises(ptx.OutOfBounds, match="k"):
        with triton_launches.running():
            attend(problem, backward=False)


def test_results_start_out_unwritten() -> None:
    """What torch.empty gave may not be read before a kernel or torch has written it."""
    problem = padded(**SMALL, dtype=BF16)
    with triton_launches.running() as gpu:
        attend(problem, backward=False)
        # The backward of an lse that nobody made.
        shared = (*(None,) * 9, 0.3, 0, -1, -1, 0.0, 0.0, 0, 21, 35)
        lse, lo = torch.empty(1, 2, 21), torch.zeros(1, 2, 21)
        o = torch.zeros(1, 2, 21, 10, dtype=BF16)
        arguments: tuple[Any, ...] = (o, None, None, problem.q, problem.k, problem.v, o)
        with pytest.raises(ptx.UnwrittenRead):
            kernels.attention_backward(*arguments, lse, lo, *shared, need=7, deterministic=True)
        lse.zero_()
        kernels.attention_backward(*arguments, lse, lo, *shared, need=7, deterministic=True)
    assert [x.name for x in gpu.launches].count("prepare_kernel") == 1
