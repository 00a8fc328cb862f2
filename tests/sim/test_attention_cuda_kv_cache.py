"""Attention over a KV cache by CUDA C++ on CPU tensors: the shipped binding, launcher and kernels
(their sm_80 PTX, in the simulator) against the fp64 oracle, every feature; what is read and written
of the cache, and what hostile lengths and pages do.
"""

import re
from typing import Any

import pytest
import torch
from kv_cache_tools import CACHES, FEATURES, Call, assert_same_bits, featured, make, table
from tools import DTYPES

import fastattn
from fastattn import reference
from sim import ptx
from sim.cudart import Device

pytestmark = [pytest.mark.usefixtures("gpu"), pytest.mark.sampled(5)]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FEW, MANY, APPEND, MERGE = "few", "many", "append", "merge"


def launched(gpu: Device) -> list[str]:
    """Kernels by name, in order."""
    return [re.findall(r"attention_kv_([a-z]+)_kernel", x.kernel)[-1] for x in gpu.launches]


# ------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, dtype: torch.dtype) -> None:
    featured(feature, dtype=dtype).judge("cuda")


@pytest.mark.parametrize("page_size", [7, 16])
@pytest.mark.parametrize("feature", ["everything", "rows", "many_rows", "rotary_pairs_part"])
def test_feature_in_pages(feature: str, page_size: int) -> None:
    featured(feature, page_size=page_size, dtype=BF16, d=24, dv=20).judge("cuda")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 100, 256])
def test_page_sizes(page_size: int, index_dtype: torch.dtype) -> None:
    call = make((131, 0, 64), sq=2, h=2, hk=1, capacity=140, page_size=page_size, d=16,
                index_dtype=index_dtype, dtype=F16)  # fmt: skip
    call.judge("cuda")


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("sq", [1, 20])
@pytest.mark.parametrize(
    ("d", "dv"), [(1, 1), (3, 5), (33, 17), (64, 64), (72, 128), (128, 65), (256, 130), (250, 256)]
)
def test_head_dims(d: int, dv: int, sq: int, dtype: torch.dtype) -> None:
    rotary = table(165, d // 2) if d > 1 else None
    make((140,), h=2, hk=1, sq=sq, capacity=165, d=d, dv=dv, dtype=dtype, rotary=rotary).judge(
        "cuda"
    )


@pytest.mark.parametrize(
    ("h", "hk", "sq", "tier"),
    [(1, 1, 1, FEW), (16, 1, 1, FEW), (17, 1, 1, MANY), (6, 2, 7, MANY), (2, 1, 8, FEW),
     (5, 1, 13, MANY), (3, 1, 50, MANY)],
)  # fmt: skip
def test_packed_rows(h: int, hk: int, sq: int, tier: str, gpu: Device) -> None:
    """Below, at and above a tile; a group may straddle two."""
    make((90, 1), h=h, hk=hk, sq=sq, sn=min(sq, 8), capacity=100, d=16).judge("cuda")
    assert launched(gpu)[0] == tier


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "hk", "sq"), [(8, 2, 1), (4, 2, 12)])
def test_long_caches_are_split_and_merged(
    h: int, hk: int, sq: int, dtype: torch.dtype, gpu: Device
) -> None:
    """Lengths apart: splits of the shorter sequences have no key."""
    make((570, 60, 0), h=h, hk=hk, sq=sq, d=16, capacity=600, dtype=dtype,
         sinks=torch.randn(h)).judge("cuda")  # fmt: skip
    assert launched(gpu) == [FEW if sq == 1 else MANY, MERGE]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sn", [16, 17, 33])
def test_prompts(sn: int, dtype: torch.dtype, gpu: Device) -> None:
    """From 17 new rows on the append is a launch of its own."""
    call = make(
        (7, 0), h=2, sq=sn, capacity=40, page_size=9, d=16, dtype=dtype, rotary=table(40, 3)
    )
    call.judge("cuda")
    assert launched(gpu) == ([APPEND, MANY] if sn > 16 else [FEW])


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_tables_and_prompts_of_generation(kind: str) -> None:
    """A prompt, single tokens and a speculative step, one call each, against one causal call."""
    q, k, v = (torch.randn(2, h, 24, 16) for h in (4, 2, 2))
    page = 5 if kind == "paged" else 0
    caches = (torch.full((2 * 5, 2, 5, 16) if page else (2, 2, 25, 16), torch.nan),) * 2
    caches = caches[0].clone(), caches[1].clone()
    where = {"block_table": torch.randperm(10).view(2, 5)} if page else {}
    at, parts = 0, []
    for n in (9, 1, 1, 5, 8):
        new = [x[:, :, at : at + n] for x in (q, k, v)]
        parts.append(
            fastattn.attention_with_kv_cache(
                new[0], *caches, cache_lens=torch.full((2,), at), k=new[1], v=new[2], **where,
                backend="cuda",
            )
        )  # fmt: skip
        at += n
    right = reference.attention(q, k, v, causal=True)
    torch.testing.assert_close(torch.cat(parts, 2), right, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- what lies where


@pytest.mark.parametrize("feature", ["plain", "rotary_pairs", "rotary_part", "many_rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(feature: str, dtype: torch.dtype) -> None:
    """q, k, v of any strides, a cache that is a part of a larger one in a place that no vector may
    be read from, and o as q lies."""
    call = featured(feature, dtype=dtype)
    right = call.run("cuda")
    t = call.tensors
    t["q"] = t["q"].transpose(2, 3).contiguous().transpose(2, 3)  # no unit stride in d
    t["k"] = t["k"].transpose(1, 2).contiguous().transpose(1, 2)
    t["v"] = torch.stack((t["v"], t["v"]), -1)[..., 0]
    for name in CACHES:
        n, h, s, d = t[name].shape
        wide = torch.full((n, s + 3, 2, h, d + 5), torch.nan, dtype=dtype)
        t[name] = wide[:, 1 : s + 1, 1, :, 2 : d + 2].transpose(1, 2).copy_(t[name])
    o, lse = fastattn.attention_with_kv_cache(**t, **call.options, return_lse=True, backend="cuda")
    assert_same_bits("o", o, right["o"])
    assert_same_bits("lse", lse, right["lse"])
    assert o.transpose(1, 2).is_contiguous()
    for name in CACHES:
        assert_same_bits(name, t[name], right[name])
        edges = t[name]._base
        assert edges[:, 0].isnan().all()
        assert edges[:, :, 0].isnan().all()
        assert edges[..., :2].isnan().all()
        assert edges[..., -3:].isnan().all()


@pytest.mark.parametrize("page_size", [8, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_give_the_bits_of_a_contiguous_cache(dtype: torch.dtype, page_size: int) -> None:
    """A tile of keys is a tile of keys, wherever they lie."""
    paged = make((191, 16), capacity=192, page_size=page_size, d=16, dtype=dtype,
                 rotary=table(200, 8))  # fmt: skip
    first, second = paged.run("cuda"), paged.contiguous().run("cuda")
    for name in ("o", "lse"):
        assert_same_bits(name, first[name], second[name])


def test_the_vectors_path_gives_the_bits_of_the_other() -> None:
    """Rows of 40 of 41 columns cannot be read 16 bytes at a time."""
    call = make((140, 3), capacity=150, d=40, dtype=BF16, rotary=table(150, 16))
    apart = {n: torch.nn.functional.pad(x, (0, 1))[..., :-1] if n in (*CACHES, "q", "k", "v") else x
             for n, x in call.tensors.items()}  # fmt: skip
    first, second = call.run("cuda"), Call(apart, call.options).run("cuda")
    for name, x in first.items():
        assert_same_bits(name, x, second[name])


def test_rows_beyond_new_lens_are_not_read() -> None:
    call = featured("rotary_ragged", sinks=True)
    for b, n in enumerate(call.tensors["new_lens"].tolist()):
        for name in "qkv":
            call.tensors[name][b, :, n:] = torch.nan
    call.judge("cuda")


@pytest.mark.parametrize("sq", [1, 3])
def test_keys_outside_a_window_are_not_read(sq: int) -> None:
    call = make((290, 60), sq=sq, d=16, capacity=300, causal=False, window=(50, 5))
    inside = call.run("cuda")
    for name in CACHES:  # beside what the first and the last row see
        for b, n in enumerate((290, 60)):
            call.tensors[name][b, :, : n - 50] = torch.nan
    outside = call.run("cuda")
    for name in ("o", "lse"):
        assert_same_bits(name, outside[name], inside[name])
        assert inside[name].isfinite().all()


def test_a_window_ahead_of_the_rows() -> None:
    """Rows at the start of what a sequence has, and keys beyond their window's end."""
    call = make((0, 100), sn=0, sq=90, d=16, capacity=120, causal=False, window=(3, 2))
    inside = call.run("cuda")
    call.tensors["v_cache"][1, :, 100:] = torch.nan
    assert_same_bits("o", call.run("cuda")["o"], inside["o"])
    call.judge("cuda")


def test_no_key_at_all() -> None:
    for capacity in (0, 8):
        got = make((0,), sn=0, capacity=capacity, d=16).judge("cuda")
        assert not got["o"].any()
        assert got["lse"].eq(float("-inf")).all()
    assert make((), sn=0, d=16).run("cuda")["o"].shape == (0, 4, 1, 16)
    none = make((0,), sn=0, page_size=4)
    none.tensors |= {n: none.tensors[n][:0] for n in CACHES}
    assert none.run("cuda")["o"].eq(0).all()


def test_shared_pages() -> None:
    """Two sequences read one prefix and append to pages of their own."""
    call = make((8, 8), sq=1, page_size=4, capacity=12)
    t = call.tensors
    t["block_table"][1, :2] = t["block_table"][0, :2]
    t["q"][1], t["k"][1], t["v"][1] = t["q"][0], t["k"][0], t["v"][0]
    got = call.run("cuda")
    assert_same_bits("o", got["o"][0], got["o"][1])


def test_masked_values_that_are_nan_do_not_show_in_rows_without_keys() -> None:
    call = make((40, 3), sn=0, d=16)
    call.options["mask"] = torch.zeros(2, 1, 1, 52, dtype=torch.bool)
    for name in CACHES:
        call.tensors[name].fill_(torch.nan)
    got = call.run("cuda")
    assert got["o"].eq(0).all()
    assert got["lse"].eq(float("-inf")).all()


# ------------------------------------------------------------- what nobody has read on the host


def op_arguments(call: Call) -> tuple[Any, ...]:
    """Of the op itself: the public function checks values, which on a device it cannot."""
    t, cs = call.copies(), call.options.get("rotary", (None, None))
    names = ("q", *CACHES, "cache_lens", "k", "v", "new_lens", "block_table", "cache_index")
    tensors = [t.get(n) for n in names] + [*cs, None, None, None]
    return (*tensors, t["q"].shape[-1] ** -0.5, 0.0, True, -1, -1, False)


HOSTILE: dict[str, tuple[dict[str, Any], str, list[Any]]] = {
    "lengths": ({}, "cache_lens", [10**6, -5, 51]),
    "wide_lengths": ({"index_dtype": torch.int64}, "cache_lens", [2**62, -(2**62), 50]),
    "full": ({"sq": 4}, "cache_lens", [50, 52, 49]),
    "prompt": ({"sq": 20}, "cache_lens", [50, 30, -1]),
    "new_lens": ({"sq": 4, "new_lens": (1, 2, 3)}, "new_lens", [-3, 99, 4]),
    "entries": ({"cache_index": (0, 1, 2), "sn": 0, "sq": 2}, "cache_index", [10**6, -1, 1]),
    "pages": ({"page_size": 13, "sn": 0, "sq": 2}, "block_table",
              [[10**6, -1, 2, 99], [-(2**31), 1, 2, 3], [3, 2, 1, 2**31 - 1]]),
    "positions": ({"rotary": table(20, 8), "sq": 2}, "cache_lens", [23, 0, 40]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_out_of_range_is_clamped(name: str) -> None:
    """As the reference clamps it; the simulator fails a launch that leaves its tensors."""
    sizes, what, values = HOSTILE[name]
    call = make(**sizes)
    for cache in CACHES:  # any slot may be reached
        call.tensors[cache].nan_to_num_(0.5)
    call.tensors[what] = torch.tensor(values, dtype=call.tensors[what].dtype)
    args = op_arguments(call)
    o, lse = torch.ops.fastattn.attention_kv_cache_cuda(*args)
    t = call.copies()
    right = reference.attention_with_kv_cache(**t, **call.options, return_lse=True)
    torch.testing.assert_close((o, lse), right, rtol=1e-4, atol=1e-5)
    for got, cache in zip(args[1:3], CACHES, strict=True):
        assert_same_bits(cache, got, t[cache])


# ----------------------------------------------------------------- order, and how memory is touched


@pytest.mark.parametrize("page_size", [0, 7])
def test_bitwise_the_same_in_any_order(gpu: Device, page_size: int) -> None:
    call = featured("everything", lens=(200, 3, 130), capacity=210, page_size=page_size, d=16,
                    window=None)  # fmt: skip
    first = call.run("cuda")
    assert launched(gpu) == [FEW, MERGE]
    try:
        for order in ("reverse", "random"):
            gpu.schedule = ptx.Schedule(seed=3, order=order)
            for name, x in call.run("cuda").items():
                assert_same_bits(name, x, first[name])
    finally:
        gpu.schedule = None


def traffic(gpu: Device, call: Call) -> list[Any]:
    gpu.schedule = ptx.Schedule(traffic=True)
    call.run("cuda")
    gpu.schedule = None
    return [t for launch in gpu.launches for t in launch.report.traffic]


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("sq", [1, 20])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_no_bank_conflicts(dtype: torch.dtype, sq: int, d: int, gpu: Device) -> None:
    """ldmatrix of q, k and v, and the word reads of an fp32 v; what warps have made, which 16 bit
    reads by 32 bytes, is read once."""
    found = traffic(gpu, make((140,), h=4, hk=1, sq=sq, d=d, capacity=160, dtype=dtype))
    reads = [t for t in found if t.space == "shared" and "ld.shared.v4" not in t.site and
             ("ldmatrix" in t.site or "ld.shared" in t.site)]  # fmt: skip
    assert reads
    assert [(t.site, t.ratio) for t in reads if t.ratio > 1] == []


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_global_accesses_are_vectors(dtype: torch.dtype, page_size: int, gpu: Device) -> None:
    """Nine tenths of the sectors of global memory move 16 bytes a lane (sums, lengths, angles and
    pages do not), and what the attention kernel moves is little more than every key once."""
    call = make((505,), h=8, hk=1, sn=9, d=64, capacity=520, dtype=dtype, page_size=page_size)
    found = [t for t in traffic(gpu, call) if t.space == "global" and "ld.param" not in t.site]
    wide = [t for t in found if "cp.async.cg" in t.site or ".v4" in t.site]
    assert sum(t.moved for t in wide) >= 0.9 * sum(t.moved for t in found)
    copied = sum(t.moved for t in found if "cp.async" in t.site)
    assert copied <= 1.05 * 2 * 505 * 64 * dtype.itemsize
