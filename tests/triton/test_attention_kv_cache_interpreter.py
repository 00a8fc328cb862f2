"""The Triton kernels of attention over a KV cache in Triton's interpreter, through the public
function: every feature against the fp64 oracle. Tiles have 16 keys and 16 or 32 packed rows, and
4 pretended processors split the keys of a short batch (``configs.py``).
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import interpreter
import numpy as np
import pytest
import torch
from kv_cache_tools import CACHES, FEATURES, Call, featured, make, table
from tools import DTYPES

import fastattn
from fastattn.kernels import attention_kv_cache as launcher
from fastattn.ops import attention_kv_cache_guard as guard
from fastattn.ops.attention_kv_cache_checks import Call as Arguments

NUMBERS = (0.25, 0.0, True, -1, -1, False)
# Beside these, features in 16 bits and in pages differ by what the CPU's tests judge.
SOME = ("everything", "rows", "rotary_pairs_part")


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str) -> None:
    featured(feature, d=16).judge("triton")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("feature", [*SOME, "plain"])
def test_feature_in_16_bits(feature: str, dtype: torch.dtype) -> None:
    featured(feature, dtype=dtype, d=24, dv=20).judge("triton")


@pytest.mark.parametrize("page_size", [7, 16])
@pytest.mark.parametrize("feature", SOME)
def test_feature_in_pages(feature: str, page_size: int) -> None:
    featured(feature, page_size=page_size, d=16).judge("triton")


@pytest.mark.parametrize("page_size", [1, 12, 256])
def test_page_sizes(page_size: int) -> None:
    call = make((31, 0), sq=2, capacity=36, page_size=page_size, d=16, index_dtype=torch.int64)
    call.judge("triton")


def test_pages_give_the_bits_of_a_contiguous_cache() -> None:
    """A tile of keys is a tile of keys, wherever they lie."""
    paged = make((61, 16), capacity=64, page_size=8, d=16, rotary=table(64, 8))
    first, second = paged.run("triton"), paged.contiguous().run("triton")
    for name in ("o", "lse"):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("h", "hk", "sq"), [(1, 1, 1), (12, 1, 1), (6, 2, 7), (2, 1, 40), (1, 1, 16)]
)
def test_packed_rows(h: int, hk: int, sq: int) -> None:
    """Below, at and above a tile; a group may straddle two."""
    make((40, 1), h=h, hk=hk, sq=sq, sn=min(sq, 8), capacity=48, d=16).judge("triton")


@pytest.mark.parametrize("sn", [16, 17, 33])
def test_prompts(sn: int) -> None:
    """From 17 new rows on the append is a launch of its own."""
    call = make((7, 0), h=2, sq=sn, capacity=40, page_size=9, d=16, rotary=table(40, 3))
    assert ("append_kernel" in launches(lambda: call.judge("triton"))) == (sn > 16)


def test_rows_beyond_new_lens_are_not_read() -> None:
    call = featured("rotary_ragged", d=16, sinks=True)
    for b, n in enumerate(call.tensors["new_lens"].tolist()):
        for name in "qkv":
            call.tensors[name][b, :, n:] = torch.nan
    call.judge("triton")


def test_no_key_at_all() -> None:
    for capacity in (0, 8):
        got = make((0,), sn=0, capacity=capacity, d=16).judge("triton")
        assert not got["o"].any()
        assert got["lse"].eq(float("-inf")).all()
    assert make((), sn=0, d=16).run("triton")["o"].shape == (0, 4, 1, 16)


@pytest.mark.parametrize("sn", [0, 2, 20])
def test_no_heads(sn: int) -> None:
    """Nobody asks, and the new rows are appended."""
    call = make((7, 0), h=0, sq=3, sn=sn, d=16, capacity=28, page_size=5, window=(3, 0))
    got, right = call.run("triton"), call.run("reference")
    assert got["o"].shape == (2, 0, 3, 16)
    for name in CACHES:
        assert torch.equal(got[name].nan_to_num(9.0), right[name].nan_to_num(9.0)), name
    assert launches(lambda: call.run("triton")) == (["append_kernel"] if sn else [])


@pytest.mark.parametrize(("d", "dv"), [(1, 1), (3, 5), (33, 17), (72, 128), (256, 130)])
def test_head_dims(d: int, dv: int) -> None:
    make((17,), capacity=24, d=d, dv=dv, dtype=torch.bfloat16).judge("triton")


# ---- what is launched ----------------------------------------------------------------------------


def launches(run_it: Callable[[], Any]) -> list[str]:
    names = []
    inner = interpreter.launcher.hook

    def hook(kernel: Any, grid: Any, args: Any, meta: Any) -> bool:
        names.append(kernel.fn.__name__)
        return inner(kernel, grid, args, meta)

    with mock.patch.object(interpreter.launcher, "hook", hook):
        run_it()
    return names


def test_splits_follow_from_shapes() -> None:
    """FlashDecoding: enough programs to fill the device, none that has next to nothing to do."""
    splits = launcher.splits_for
    assert splits(programs=8, tiles=1000, slots=216) == 23  # B = 1, 8 kv heads, an A100
    assert splits(programs=300, tiles=1000, slots=216) == 1
    assert splits(programs=1, tiles=3, slots=216) == 1
    assert splits(programs=1, tiles=10, slots=216) == 5  # two tiles each
    assert max(splits(n, 10**6, 264) for n in range(1, 9)) <= launcher.MAX_SPLITS
    attend = "cached_attention_kernel"
    long, short = make((65, 7), capacity=70, d=16), make((17, 0), capacity=24, d=16)
    assert launches(lambda: long.run("triton")) == [attend, "merge_kernel"]
    assert launches(lambda: short.run("triton")) == [attend]


def test_splits_are_merged_some_at_a_time() -> None:
    call = make((141,), h=2, hk=1, capacity=144, d=16)
    with mock.patch.object(launcher, "_MERGED_AT_ONCE", 2):
        names = launches(lambda: call.judge("triton"))
    assert names == ["cached_attention_kernel", "merge_kernel"]


def test_bitwise_repeatable_in_any_order_of_programs() -> None:
    call = featured("everything", page_size=7, d=16)
    first = call.run("triton")
    with interpreter.interpreted(np.random.RandomState(5).permutation):
        second = call.run("triton")
    for name, x in first.items():
        assert torch.equal(x.nan_to_num(7), second[name].nan_to_num(7)), name


@pytest.mark.parametrize("sn", [3, 20])
def test_each_new_row_is_written_once(sn: int) -> None:
    """By one program: equal values would hide that several do."""
    call = make((65, 7), sq=9, sn=sn, capacity=86, page_size=7, d=16)
    k_cache, v_cache = (x.clone() for x in (call.tensors[n] for n in CACHES))
    stored: list[np.ndarray] = []
    store = interpreter.Builder.create_masked_store

    def spy(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        stored.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())
        return store(self, ptrs, value, mask, *rest)

    with mock.patch.object(interpreter.Builder, "create_masked_store", spy):
        fastattn.attention_with_kv_cache(
            **{**call.tensors, "k_cache": k_cache, "v_cache": v_cache}, backend="triton"
        )
    every = np.concatenate(stored).astype(np.int64)
    for cache in (k_cache, v_cache):
        inside = every[(every >= cache.data_ptr()) & (every < cache.data_ptr() + cache.nbytes)]
        assert len(inside) == len(np.unique(inside)) == 2 * 2 * sn * 16


def test_keys_outside_a_window_are_not_read() -> None:
    def dots(**more: Any) -> int:
        call = make((190,), h=1, hk=1, sn=0, capacity=200, d=16, **more)
        count = mock.Mock(side_effect=interpreter._dot)
        with mock.patch.object(interpreter, "_dot", lambda *args: count(*args)):
            call.run("triton")
        return count.call_count

    assert dots() == 2 * 12
    assert dots(window=(20, None)) <= 2 * 3


@pytest.mark.parametrize("sn", [0, 1, 40])
def test_what_lies_left_of_a_window_stays_there(sn: int) -> None:
    """In the tile that the window begins in too, of cached keys and of new ones."""
    call = make((60, 41), sq=1, sn=sn, capacity=110, d=16, window=(20, 0))
    right = call.run("triton")["o"]
    for b, cached in enumerate((60, 41)):
        first = cached + sn - 1 - 20
        for cache, new in (("k_cache", "k"), ("v_cache", "v")):
            call.tensors[cache][b, :, : min(first, cached)] = torch.nan
            if sn:
                call.tensors[new][b, :, : max(first - cached, 0)] = torch.nan
    assert right.isfinite().all()
    assert torch.equal(call.run("triton")["o"], right)


# ---- refusals and the first use ------------------------------------------------------------------


def arguments(call: Call) -> Arguments:
    """The op's tensors."""
    cos, sin = call.options.get("rotary", (None, None))
    named = {**call.copies(), "cos": cos, "sin": sin}
    return Arguments(*map(named.get, Arguments._fields))


def test_a_direct_call_stays_inside_its_tensors() -> None:
    right = arguments(make((17, 0), sn=2, capacity=24, d=16))
    x, two = torch.randn, torch.zeros(2, dtype=torch.int32)
    wrong: dict[str, dict[str, Any]] = {
        "q must have 4 dimensions": {"q": x(2, 4, 16)},
        "float32, bfloat16": {"q": right.q.double()},
        "k_cache must have q's dtype": {"k_cache": right.k_cache.half()},
        "k_cache must have head_dim 16": {"k_cache": x(2, 2, 24, 8)},
        "v_cache must have k_cache's first": {"v_cache": x(2, 2, 23, 16)},
        "heads must be a multiple": {"q": x(2, 3, 1, 16)},
        "given together": {"v": None},
        "k must have shape": {"k": x(2, 1, 2, 16)},
        "v must have shape": {"v": x(2, 2, 2, 8)},
        "new_lens needs as many rows": {"new_lens": two},
        "cache_lens must have shape": {"cache_lens": two[:1]},
        "cache_lens must be int32": {"cache_lens": two.float()},
        "k_cache must have 2 entries": {"k_cache": x(3, 2, 24, 16), "v_cache": x(3, 2, 24, 16)},
        "block_table must have shape": {"block_table": two},
        "block_table must be int32": {"block_table": x(2, 3)},
        "cos and sin must have one shape": {"cos": x(9, 9), "sin": x(9, 9)},
        "cos and sin must be given together": {"cos": x(9, 4)},
        "mask dimension 1 must be 1 or 24": {"mask": torch.ones(1, 23, dtype=torch.bool)},
        "alibi_slopes must have shape": {"alibi_slopes": x(5)},
        "sinks must have shape": {"sinks": x(1)},
    }
    op = torch.ops.fastattn.attention_kv_cache_triton
    with mock.patch.object(launcher, "launch", side_effect=AssertionError("launched")):
        for words, change in wrong.items():
            with pytest.raises(ValueError, match=words):
                op(*right._replace(**change), *NUMBERS)


def test_bad_values_are_named_before_anything_is_written() -> None:
    """On the CPU always; on a GPU under debug_checks(True)."""
    call = make((17, 0), sn=8, capacity=24, d=16)
    with pytest.raises(ValueError, match="the cache is full: sequence 0 has"):
        fastattn.attention_with_kv_cache(**call.tensors, backend="triton")
    assert call.tensors["k_cache"][0, :, 17:].isnan().all()


LIKE: dict[str, dict[str, Any]] = {
    "plain": {"sn": 0},
    "paged": {"page_size": 16, "rotary": table(20, 8)},
    "ragged": {"sq": 2, "new_lens": (1, 2), "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", LIKE)
def test_the_first_use_check(name: str) -> None:
    """Right kernels pass it."""
    like = arguments(make((17, 0), capacity=20, d=16, **LIKE[name]))
    with mock.patch.object(guard, "_CAPACITIES", (70, 30)):
        assert guard.check(launcher.attention_kv_cache, like, NUMBERS) is None


@pytest.mark.parametrize(("at", "what"), [(0, "o is off"), (1, "lse is off"), (2, "k_cache is")])
def test_the_first_use_check_sees(at: int, what: str) -> None:
    """A wrong value in any result or cache is named."""

    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = guard.by_reference(*args)
        x = (o, lse, args[1])[at]
        x[x.isfinite()] += 0.05
        return o, lse

    like = arguments(make((17, 0), capacity=20, d=16))
    with mock.patch.object(guard, "_CAPACITIES", (20,)):
        said = guard.check(wrong, like, NUMBERS)
    assert said is not None
    assert what in said
