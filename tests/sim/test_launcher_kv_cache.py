"""Attention over a KV cache by CUDA C++ as it is called: plans, refusals, first use, compilers,
failures, modules. Kernels run in the PTX simulator, on shapes of one tile."""

import re
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from kv_cache_tools import CACHES, Call, assert_same_bits, featured, make, table
from test_attention_kv_cache_ops import arguments
from test_attention_ops import on_fake_cuda
from torch._subclasses import FakeTensorMode

import fastattn
from fastattn import first_use
from fastattn.kernels import attention_kv_cache as triton
from fastattn.ops import attention_kv_cache as public
from fastattn.ops import attention_kv_cache_cuda as implementation
from fastattn.ops import attention_kv_cache_guard as guard
from fastattn.ops.attention_kv_cache_checks import Call as Arguments
from sim import kernels
from sim.cudart import Device

OP = torch.ops.fastattn.attention_kv_cache_cuda


def launched(gpu: Device) -> list[str]:
    """Kernels by name, in order."""
    return [re.findall(r"attention_kv_([a-z]+)_kernel", x.kernel)[-1] for x in gpu.launches]


# ------------------------------------------------------------------------------------------- plans


def plan(
    *, b: int = 1, h: int = 32, hk: int = 8, sq: int = 1, d: int = 128, capacity: int = 4096,
    sn: int = 1, dtype: torch.dtype = torch.bfloat16, causal: int = 2, window: tuple[int, int] =
    (-1, -1), multiprocessors: int = 108,
) -> tuple[int, int, bool]:  # fmt: skip
    """Rows of a block, splits, whether the append is a launch of its own; of shapes alone."""
    m = kernels.module()
    p = m.cuda.AttentionParams()
    p.B, p.H, p.Hk, p.Sq, p.Sk, p.D, p.Dv = b, h, hk, sq, capacity, d, d
    p.dtype, p.causal = kernels.DTYPES[dtype], causal
    p.window_left, p.window_right = window
    found: tuple[int, int, bool] = m.cuda.attention_kv_cache_plan(p, sn, multiprocessors)
    return found


def test_tiers() -> None:
    for h, hk, sq, rows in ((32, 8, 1, 16), (32, 2, 1, 16), (32, 1, 1, 64), (8, 8, 16, 16),
                            (8, 8, 17, 64), (1, 1, 4000, 64)):  # fmt: skip
        assert plan(h=h, hk=hk, sq=sq)[0] == rows, (h, hk, sq)
    assert [plan(sn=n)[2] for n in (0, 1, 16, 17)] == [False, False, False, True]


def test_splits_follow_from_shapes() -> None:
    """FlashDecoding: as Triton's launcher has them, of the same tiles and two blocks an SM."""
    for b in (1, 2, 5, 40):
        for hk in (1, 3, 8):
            for capacity in (0, 64, 200, 1000, 4096, 10**6):
                for d, tile in ((64, 128), (128, 64)):
                    _, splits, _ = plan(b=b, h=4 * hk, hk=hk, d=d, capacity=capacity)
                    assert splits == triton.splits_for(b * hk, -(-capacity // tile), 216)
    assert plan()[1] == 23  # 8 kv heads on an A100
    assert plan(b=64)[1] == 1
    assert plan(capacity=100)[1] == 1
    assert (
        max(plan(hk=hk, h=hk, capacity=10**6, multiprocessors=132)[1] for hk in range(1, 9)) <= 64
    )


def test_a_window_needs_fewer_splits() -> None:
    assert plan(h=8, hk=1, window=(1000, -1))[1] == triton.splits_for(1, 16, 216) == 7
    assert plan(h=8, hk=1, window=(1000, -1), causal=0)[1] == plan(h=8, hk=1)[1] == 28
    assert plan(h=8, hk=1, window=(60, 60), causal=0)[1] == 1


@pytest.mark.parametrize("sn", [0, 2, 20])
def test_no_heads(sn: int, gpu: Device) -> None:
    """Nobody asks, and the new rows are appended."""
    assert plan(h=0, sn=sn, window=(60, 60)) == (16, 1, True)
    call = make((7, 0), h=0, sq=3, sn=sn, d=16, capacity=28, page_size=5, window=(3, 0))
    got, right = call.run("cuda"), call.run("reference")
    assert got["o"].shape == (2, 0, 3, 16)
    for name in CACHES:
        assert_same_bits(name, got[name], right[name])
    assert launched(gpu) == (["append"] if sn else [])


# ------------------------------------------------------------------------------------ before launch


def tensors_of(call: Call) -> dict[str, Any]:
    return dict(zip(Arguments._fields, arguments(call)[:14], strict=True))


NUMBERS = (0.25, 0.0, True, -1, -1, False)


def test_a_direct_call_stays_inside_its_tensors(gpu: Device) -> None:
    """Whatever the op is called with: an error before any launch."""
    right = tensors_of(make((17, 0), sn=2, capacity=24, d=16))
    x, two = torch.randn, torch.zeros(2, dtype=torch.int32)
    wide = {"q": x(2, 4, 1, 300), "k_cache": x(2, 2, 24, 300), "k": x(2, 2, 2, 300)}
    wrong: dict[str, dict[str, Any]] = {
        "must have 4 dimensions, got 3": {"q": x(2, 4, 16)},
        "float32, bfloat16": {n: right[n].double() for n in ("q", *CACHES)},
        "one dtype": {"k_cache": x(2, 2, 24, 16).half()},
        "k_cache must have q's head_dim 16": {"k_cache": x(2, 2, 24, 8)},
        "head_dim up to 256, got 300": wide,
        "v_cache must have k_cache's first": {"v_cache": x(2, 2, 23, 16)},
        "v_cache must not be k_cache": {"v_cache": right["k_cache"]},
        "stride 1 in d": {"v_cache": x(2, 2, 16, 24).mT},
        "share memory": {"k_cache": x(1, 2, 24, 16).expand(2, -1, -1, -1)},
        "heads must be a multiple": {"q": x(2, 3, 1, 16)},
        "at least one row": {"q": x(2, 4, 0, 16)},
        "given together": {"v": None},
        r"k and v must be \(B, Hk, Sn": {"k": x(2, 1, 2, 16)},
        "the caches' head_dims": {"v": x(2, 2, 2, 8)},
        "new_lens needs k and v of as many": {"new_lens": two},
        "cache_lens must have 1 dimensions": {"cache_lens": two[:1]},
        "cache_lens must be int32": {"cache_lens": two.float()},
        "has 3 entries for 2": {"k_cache": x(3, 2, 24, 16), "v_cache": x(3, 2, 24, 16)},
        "block_table must have 2 dimensions": {"block_table": two},
        "block_table must be int32": {"block_table": x(2, 3)},
        "does not go with block_table": {"block_table": two.view(2, 1), "cache_index": two},
        "cache_index must have 1 dim": {"cache_index": two.view(2, 1)},
        r"must be less than 2\^30": {"block_table": two.view(2, 1).expand(2, 2**26)},
        "of one shape": {"cos": x(9, 4), "sin": x(9, 5)},
        "R <= head_dim 16": {"cos": x(9, 9), "sin": x(9, 9)},
        "cos and sin must be given together": {"cos": x(9, 4)},
        "mask must be bool": {"mask": x(24)},
        "mask dimension 0 must be 1 or 24": {"mask": torch.ones(23, dtype=torch.bool)},
        "alibi_slopes must be floats of shape": {"alibi_slopes": x(5)},
        "sinks must be floats of shape": {"sinks": x(1)},
    }
    for words, change in wrong.items():
        with pytest.raises((RuntimeError, ValueError), match=rf"fastattn::attention.*{words}"):
            OP(*(right | change).values(), *NUMBERS)
    assert not gpu.launches


def test_without_the_stand_in_the_cpu_is_refused() -> None:
    call = make((3,), d=16)
    with pytest.raises(ValueError, match="backend='cuda' cannot serve.*CUDA tensors"):
        call.run("cuda")
    with pytest.raises(ValueError, match="CUDA tensors"):
        OP(*arguments(call))


def test_auto_leaves_cpu_tensors_to_the_cpu(gpu: Device) -> None:
    make((3,), d=16).run("auto")
    assert not gpu.launches


def test_bad_values_are_named_before_anything_is_written(gpu: Device) -> None:
    """On the CPU always; on a GPU under debug_checks(True)."""
    call = make((17, 0), sn=8, capacity=24, d=16)
    with pytest.raises(ValueError, match="the cache is full: sequence 0 has"):
        call.run("cuda")
    assert not gpu.launches


def test_nothing_warns(gpu: Device) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make((3,), d=16).run("cuda")


# ---------------------------------------------------------------------------------- failed launches


@pytest.mark.parametrize("short", ["append", "many", "merge"])
def test_a_failing_kernel_is_named(short: str, gpu: Device) -> None:
    """And nothing is launched behind it."""
    call = make((160,), h=2, hk=1, sq=17, sn=17, d=16, capacity=300)
    original, made, after = gpu._launch, [], []

    def fails(found: Any) -> int:
        if made:
            after.append(found.kernel)
        if b"attention_kv_%b_kernel" % short.encode() in found.kernel:
            made.append((tuple(found.grid), tuple(found.block), found.shared))
            return 719
        return original(found)

    with mock.patch.object(gpu, "_launch", fails):
        with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure") as raised:
            call.run("cuda")
    ((grid, block, shared),) = made
    text = str(raised.value)
    assert f"attention_kv_{short}_kernel" in text
    assert f"grid {grid[0]}, block {block[0]}, {shared} bytes" in text
    assert "fastattn::attention_kv_cache_cuda: " in text
    assert "B 1 H 2 Sq 17 capacity 300 D 16 Dv 16 splits 5" in text
    assert after == []
    assert gpu.idle()


@pytest.mark.parametrize(("device", "stream"), [(0, 0xBEE), (1, 0xBEE)])
def test_every_launch_goes_to_the_device_and_stream_of_the_call(
    gpu: Device, device: int, stream: int
) -> None:
    with gpu.placed(device, stream) as handle:
        make((160,), h=2, hk=1, sq=17, sn=17, d=16, capacity=300).run("cuda")
    assert launched(gpu) == ["append", "many", "merge"]
    assert {(x.device, x.stream) for x in gpu.launches} == {(device, handle)}
    assert gpu.guarded() == -1


# --------------------------------------------------------------------------------------- first use


@pytest.fixture
def unknown_gpu(gpu: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Device:
    """CPU tensors stand for those of an sm_80 that nothing is known about."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_use, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(first_use, "_verdicts", None)
    monkeypatch.setattr(first_use, "generation", object())
    return gpu


def decode() -> Call:
    return make((17, 0), capacity=24, d=16, page_size=8, rotary=table(24, 8))


def test_a_right_kernel_is_checked_once(unknown_gpu: Device) -> None:
    """Two calls, of which one is split, and ours."""
    decode().judge("cuda")
    assert launched(unknown_gpu) == ["few", "merge", "few", "few"]
    (verdict,) = first_use.verdicts()
    assert (verdict.op, verdict.ok, verdict.detail) == ("attention_with_kv_cache", True, "")
    assert verdict.variant == "cuda float32 D16 few rows paged by 8 append rotary16 gqa causal"
    decode().run("cuda")
    assert len(unknown_gpu.launches) == 5


@pytest.mark.parametrize(("at", "what"), [(0, "o"), (1, "lse"), (2, "k_cache")])
def test_a_wrong_kernel_gives_way(
    at: int, what: str, unknown_gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = implementation.kernel

    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = right(*args)
        x = (o, lse, args[1])[at]
        x[x.isfinite()] += 0.05
        return o, lse

    monkeypatch.setattr(implementation, "kernel", wrong)
    monkeypatch.setattr(guard, "_CAPACITIES", (30,))
    # What `auto` takes on a GPU (on CPU tensors it would take the CPU's kernels).
    monkeypatch.setattr(public, "select", lambda *args: "cuda")
    with pytest.warns(first_use.KernelMismatchWarning, match=rf"WRONG on sm_80.*{what} is"):
        decode().judge("auto")
    with pytest.raises(ValueError, match="backend='cuda' is disabled for cuda float32 D16 few"):
        decode().run("cuda")


# ------------------------------------------------------------------------------------ the compilers


@pytest.mark.parametrize("page_size", [0, 5])
def test_opcheck(page_size: int, gpu: Device) -> None:
    call = featured("everything", page_size=page_size, d=16)
    for name in CACHES:  # opcheck compares by value
        call.tensors[name].nan_to_num_(1.0)
    results = torch.library.opcheck(OP, arguments(call))
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_without_a_graph_break(gpu: Device) -> None:
    call = featured("rotary", d=16)
    right, t = call.run("cuda"), call.copies()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(t: dict[str, torch.Tensor]) -> torch.Tensor:
        o: torch.Tensor = fastattn.attention_with_kv_cache(**t, **call.options, backend="cuda")
        return o * 2

    assert_same_bits("o", step(t), right["o"] * 2)
    for name in CACHES:
        assert_same_bits(name, t[name], right[name])


def test_fake_cuda() -> None:
    """The fake gives what the CPU's kernel gives, on the device."""
    args = arguments(featured("everything", layout="bshd"))
    real = torch.ops.fastattn.attention_kv_cache(*args)
    with FakeTensorMode():
        faked = OP(*(on_fake_cuda(a) for a in args))
        for r, f in zip(real, faked, strict=True):
            assert (f.shape, f.dtype, f.device.type) == (r.shape, r.dtype, "cuda")
            assert f.stride() == r.stride()


# ------------------------------------------------------------------------------------------ modules


def test_module(gpu: Device) -> None:
    """A prompt and a token, with the cache of MultiheadAttention, equal one causal call."""
    mha = fastattn.nn.MultiheadAttention(16, 2, batch_first=True, backend="cuda").eval()
    x = torch.randn(2, 5, 16)
    cache = fastattn.nn.KVCache(layers=1, batch=2, heads=2, head_dim=8, capacity=8)
    parts = []
    with torch.no_grad():
        for part in (x[:, :4], x[:, 4:]):
            layer = cache.extend(part.shape[1])[0]
            parts.append(mha(part, part, part, need_weights=False, kv_cache=layer)[0])
        causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
        right, _ = mha(x, x, x, need_weights=False, attn_mask=causal, is_causal=True)
    torch.testing.assert_close(torch.cat(parts, 1), right, rtol=1e-4, atol=1e-5)
    names = [x.kernel for x in gpu.launches]
    assert sum("attention_kv_few" in n for n in names) == 2
