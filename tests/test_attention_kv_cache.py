"""``attention_with_kv_cache`` against the fp64 oracle, and what the contract says of the cache:
appended rows to the bit, nothing else written, nothing unreached read."""

from typing import Any

import pytest
import torch
from fuzz.kv_cache import calls
from hypothesis import given, settings
from kv_cache_tools import (
    CACHES,
    FEATURES,
    Call,
    assert_same_bits,
    featured,
    lengths,
    make,
    rotated,
    table,
)
from tools import DTYPES

import fastattn
from fastattn import reference
from fastattn.backends import cpu_isas, force_cpu_isa

PAGES = (0, 1, 7, 16, 256)


# ------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, page_size: int, kernel: str) -> None:
    featured(feature, page_size=page_size).judge(kernel)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_in_16_bits(feature: str, dtype: torch.dtype, kernel: str) -> None:
    featured(feature, dtype=dtype).judge(kernel)


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", ["everything", "many_rows", "gqa_8", "rotary_pairs_part"])
def test_instruction_sets(feature: str, dtype: torch.dtype, isa: str) -> None:
    with force_cpu_isa(isa):
        featured(feature, dtype=dtype, page_size=5).judge("cpu")


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_page_sizes(page_size: int, dtype: torch.dtype, kernel: str) -> None:
    make((300, 0, 17), sq=2, capacity=310, page_size=page_size, dtype=dtype, h=2).judge(kernel)


@pytest.mark.parametrize(
    ("d", "dv"), [(1, 1), (3, 5), (16, 16), (17, 64), (33, 31), (64, 80), (100, 100), (128, 128),
                  (257, 300), (300, 9)]
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_head_dims(d: int, dv: int, dtype: torch.dtype, kernel: str) -> None:
    for sq in (1, 3, 12):
        make((40, 5, 0), d=d, dv=dv, sq=sq, page_size=16, dtype=dtype).judge(kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "hk", "sq"), [(32, 8, 1), (12, 12, 1), (16, 1, 1), (8, 2, 6)])
def test_long_caches_are_split_and_merged(
    h: int, hk: int, sq: int, dtype: torch.dtype, kernel: str
) -> None:
    make((2900, 700), h=h, hk=hk, sq=sq, d=16, capacity=3000, dtype=dtype).judge(kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_in_parts(dtype: torch.dtype, kernel: str) -> None:
    """Many rows against a long cache: packed chunks of keys, in parts of an item each, or (the
    capacity decides) in one item, where the rows' states wait between chunks."""
    call = make((1500, 0), h=2, hk=1, sq=130, d=24, capacity=1700, dtype=dtype, page_size=48)
    call.judge(kernel)
    table = torch.nn.functional.pad(call.tensors["block_table"], (0, 200), value=-1)
    call.tensors["block_table"] = table
    call.judge(kernel)


def test_a_window_in_a_long_cache(kernel: str) -> None:
    call = make((2900, 60), sq=3, d=16, capacity=3000, window=(50, 0))
    for name in CACHES:  # keys left of the window are not read
        call.tensors[name][0, :, : 2900 - 50] = torch.nan
        call.tensors[name][1, :, : 60 - 50] = torch.nan
    got = call.run(kernel)
    for name in CACHES:
        call.tensors[name][0, :, : 2900 - 50] = 0.0
        call.tensors[name][1, :, : 60 - 50] = 0.0
    assert_same_bits("o", got["o"], call.run(kernel)["o"])
    call.judge(kernel)


@pytest.mark.parametrize("kind", [64, 130])
def test_rows_of_many_tiles(kind: int, kernel: str) -> None:
    """Blocks of rows, with softcap, ALiBi, sinks, a mask, and a window that some of them see."""
    featured(
        "everything", sq=kind, new_lens=(kind, 3, kind - 1), lens=(70, 0, 9), capacity=300
    ).judge(kernel)


@pytest.mark.parametrize("lens", [(), (0,), (0, 0)])
def test_empty(lens: tuple[int, ...], backend: str) -> None:
    call = make(lens, sn=0, sq=2)
    got = call.run(backend)
    assert torch.equal(got["o"], torch.zeros(len(lens), 4, 2, 32))
    assert got["lse"].eq(-torch.inf).all()


@pytest.mark.parametrize("window", [None, (3, 0)])
@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize("sn", [0, 1, 20])
@pytest.mark.parametrize("sq", [1, 20])
def test_no_heads(sq: int, sn: int, page_size: int, window: Any, backend: str) -> None:
    """Nobody asks, and the new rows are appended."""
    call = make(h=0, sq=sq, sn=sn, capacity=70, page_size=page_size, window=window)
    got, right = call.run(backend), call.run("reference")
    assert got["o"].shape == (3, 0, sq, 32)
    assert got["lse"].shape == (3, 0, sq)
    for name in CACHES:
        assert_same_bits(name, got[name], right[name])


@pytest.mark.parametrize("page_size", [0, 4])
def test_a_cache_of_no_slot(page_size: int, backend: str) -> None:
    call = make((0, 0), sn=0, sq=1, capacity=0, page_size=page_size)
    assert call.run(backend)["o"].eq(0).all()


def test_no_pages(backend: str) -> None:
    call = make((0,), sn=0, page_size=4)
    call.tensors |= {n: call.tensors[n][:0] for n in CACHES}
    assert call.run(backend)["o"].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("page_size", [0, 8])
def test_index_dtypes(dtype: torch.dtype, page_size: int, kernel: str) -> None:
    featured("ragged", index_dtype=dtype, page_size=page_size).judge(kernel)
    featured("cache_index", index_dtype=dtype).judge(kernel)


# ----------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_is_attention_over_the_assembled_keys(feature: str, page_size: int) -> None:
    """Sequence by sequence, row by row, with keys copied one at a time."""
    call = featured(feature, page_size=page_size)
    options = dict(call.options)
    slopes = options.pop("alibi_slopes", None)
    got = call.run("reference")
    t, rotary = call.copies(), options.pop("rotary", None)
    pairs, mask = options.pop("rotary_interleaved", False), options.pop("mask", None)
    causal, window = options.pop("causal", True), options.pop("window", None) or (None, None)
    first, n, total = lengths(t)
    B, H, Sq, _ = t["q"].shape
    for b in range(B):
        keys = {}
        for name in ("k", "v"):
            cache, rows = t[f"{name}_cache"], []
            for j in range(int(total[b])):
                if j >= first[b]:
                    x = t[name][b : b + 1]
                    if name == "k" and rotary is not None:
                        x = rotated(x, first[b : b + 1], rotary, pairs)
                    rows.append(x[0, :, j - int(first[b])])
                elif "block_table" in t:
                    size = cache.shape[2]
                    rows.append(cache[t["block_table"][b, j // size], :, j % size])
                else:
                    rows.append(cache[t["cache_index"][b] if "cache_index" in t else b, :, j])
            empty = cache.new_zeros(cache.shape[1], 0, cache.shape[3])
            keys[name] = (torch.stack(rows, 1) if rows else empty)[None]
        for i in range(Sq):
            at = int(first[b]) + i if "new_lens" in t else int(total[b]) - Sq + i
            where = (b, slice(None), i)
            if at < 0 or ("new_lens" in t and i >= n[b]):
                assert got["o"][where].eq(0).all()
                assert got["lse"][where].eq(-torch.inf).all()
                continue
            q = t["q"][b : b + 1, :, i : i + 1]
            if rotary is not None:
                q = rotated(q, torch.tensor([at]), rotary, pairs)
            j = torch.arange(int(total[b]))
            seen = (j <= at) if causal else torch.ones_like(j, dtype=torch.bool)
            seen &= j >= (-1 if window[0] is None else at - window[0])
            seen &= j <= (10**9 if window[1] is None else at + window[1])
            seen = seen.expand(1, H, 1, -1)
            if mask is not None:
                m = mask.expand(B, H, Sq, -1)[b : b + 1, :, i : i + 1, : len(j)]
                seen = seen & m
            bias = None
            if slopes is not None:
                slope = slopes if slopes.dim() == 1 else slopes[b]
                bias = -slope[:, None, None] * (j - at).abs()
            o, lse = reference.attention(
                q, keys["k"], keys["v"], mask=seen, bias=bias, return_lse=True, **options
            )
            torch.testing.assert_close(got["o"][where], o[0, :, 0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got["lse"][where], lse[0, :, 0], rtol=1e-5, atol=1e-6)


def test_alibi_counts_from_the_row() -> None:
    """-slope |position - j| by hand: equal keys, so that the slope alone decides."""
    k, slope = torch.zeros(1, 1, 8, 4), torch.tensor([0.7])
    v = torch.eye(8)[None, None]
    o = reference.attention_with_kv_cache(
        torch.randn(1, 1, 2, 4), k, v, cache_lens=torch.tensor([6]), alibi_slopes=slope
    )
    for i, at in enumerate((4, 5)):
        right = torch.softmax(-0.7 * (at - torch.arange(at + 1.0)), 0)
        torch.testing.assert_close(o[0, 0, i, : at + 1], right)


def test_generation_equals_attention_over_all_rows(backend: str) -> None:
    """A prompt, single tokens and a speculative step, one call each, against one causal call."""
    q, k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    caches = torch.zeros(2, 2, 32, 16), torch.zeros(2, 2, 32, 16)
    at, parts = 0, []
    for n in (9, 1, 1, 5, 1, 13):
        new = [x[:, :, at : at + n] for x in (q, k, v)]
        parts.append(
            fastattn.attention_with_kv_cache(
                new[0], *caches, cache_lens=torch.full((2,), at), k=new[1], v=new[2],
                backend=backend,
            )
        )  # fmt: skip
        at += n
    right = reference.attention(q, k, v, causal=True)
    torch.testing.assert_close(torch.cat(parts, 2), right, rtol=1e-4, atol=1e-5)
    assert torch.equal(caches[0][:, :, :30], k)


# ------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("page_size", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cache_changes_where_rows_are_appended(
    dtype: torch.dtype, page_size: int, layout: str, backend: str
) -> None:
    call = make((9, 0, 30), sq=4, dtype=dtype, page_size=page_size, layout=layout, d=24, dv=10,
                new_lens=(4, 0, 3), rotary=table(50, 5))  # fmt: skip
    got, t = call.run(backend), call.copies()
    turned = rotated(t["k"], t["cache_lens"].long(), call.options["rotary"], False)
    for name, rows in zip(CACHES, (turned, t["v"]), strict=True):
        for b, n in enumerate((4, 0, 3)):
            for i in range(n):
                j = (9, 0, 30)[b] + i
                if page_size:
                    to = t[name][t["block_table"][b, j // page_size], :, j % page_size]
                else:
                    to = t[name][b, :, j]
                to.copy_(rows[b, :, i])
        assert_same_bits(name, got[name], t[name])
        assert got[name].stride() == call.tensors[name].stride()


def test_lengths_and_new_rows_are_not_changed(backend: str) -> None:
    call = featured("rotary_ragged")
    before = {n: x.clone() for n, x in call.tensors.items()}
    call.run(backend)
    for name, x in before.items():
        assert torch.equal(x.nan_to_num(7.0), call.tensors[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("feature", ["plain", "rotary_pairs", "many_rows"])
def test_strides(feature: str, kernel: str) -> None:
    """q, k, v of any strides, a cache that is a part of a larger one, and o as q lies."""
    call = featured(feature)
    right = call.run(kernel)
    t = call.tensors
    t["q"] = t["q"].transpose(2, 3).contiguous().transpose(2, 3)  # no unit stride in d
    t["k"] = t["k"].transpose(1, 2).contiguous().transpose(1, 2)
    t["v"] = torch.stack((t["v"], t["v"]), -1)[..., 0]
    for name in CACHES:
        n, h, s, d = t[name].shape
        wide = torch.full((n, s + 3, 2, h, d + 5), torch.nan)
        view = wide[:, 1 : s + 1, 1, :, 2 : d + 2].transpose(1, 2)
        t[name] = view.copy_(t[name])
    copies = dict(t)
    o, lse = fastattn.attention_with_kv_cache(
        **copies, **call.options, return_lse=True, backend=kernel
    )
    assert_same_bits("o", o, right["o"])
    assert_same_bits("lse", lse, right["lse"])
    assert o.transpose(1, 2).is_contiguous()
    for name in CACHES:
        assert_same_bits(name, t[name], right[name])
        edges = t[name]._base
        assert edges[:, 0].isnan().all()
        assert edges[:, :, 0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_pages(dtype: torch.dtype, backend: str) -> None:
    """Two sequences read one prefix and append to pages of their own."""
    call = make((8, 8), sq=1, page_size=4, dtype=dtype, capacity=12)
    t = call.tensors
    t["block_table"][1, :2] = t["block_table"][0, :2]
    t["q"][1], t["k"][1], t["v"][1] = t["q"][0], t["k"][0], t["v"][0]
    got = call.run(backend)
    assert_same_bits("o", got["o"][0], got["o"][1])
    call.judge("cpu")


def test_pages_that_others_read_may_be_written_behind_them(backend: str) -> None:
    """Both read the page; one alone appends to it."""
    call = make((6, 5), sq=1, page_size=4, capacity=8, new_lens=(1, 0))
    t = call.tensors
    t["block_table"][1] = t["block_table"][0]
    call.judge(backend)


# ------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize(
    "sizes",
    [
        {"lens": (2900, 33), "capacity": 3000, "h": 8, "hk": 2},
        {"lens": (2900,), "capacity": 3000, "h": 4, "hk": 1, "sq": 30, "window": (900, None)},
        {"lens": (70, 200, 1), "capacity": 2048, "h": 12, "hk": 12, "sq": 3},
    ],
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_threads_and_repeats_give_the_same_bits(dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    call = make(d=32, dtype=dtype, rotary=table(3000, 16), **sizes)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(call.run("cpu"))
    for other in results[1:]:
        for name, x in results[0].items():
            assert_same_bits(name, x, other[name])


@pytest.mark.parametrize("sq", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_give_the_bits_of_a_contiguous_cache(dtype: torch.dtype, sq: int) -> None:
    torch.manual_seed(3)
    whole = make((1200, 90), sq=sq, capacity=1300, dtype=dtype)
    right = whole.run("cpu")
    for page_size in (1, 7, 64, 256, 1300):
        call = make((0, 0), sq=sq, capacity=1300, dtype=dtype, page_size=page_size)
        t = call.tensors
        for name in ("q", "k", "v", "cache_lens"):
            t[name] = whole.tensors[name]
        columns = -(-1300 // page_size)
        t["block_table"] = torch.randperm(2 * columns).view(2, columns)
        for name in CACHES:
            rows = torch.nn.functional.pad(
                whole.tensors[name], (0, 0, 0, columns * page_size - 1300)
            )
            pages = rows.unflatten(2, (columns, page_size)).transpose(1, 2)
            t[name][t["block_table"].flatten()] = pages.flatten(0, 1)
        got = call.run("cpu")
        assert_same_bits("o", got["o"], right["o"])
        assert_same_bits("lse", got["lse"], right["lse"])


# -------------------------------------------------------------------------------------------- fuzz


@settings(max_examples=60, deadline=None)
@given(call=calls())
def test_fuzz(call: Call) -> None:
    call.judge("cpu")


def test_a_call_is_made_of_what_it_says() -> None:
    """The tools: unreached slots are NaN, so that reading one shows."""
    call = make((3, 0), page_size=4)
    assert isinstance(call, Call)
    assert call.tensors["k_cache"].isnan().any()
    assert int(call.tensors["block_table"][0, 1]) == -1
