"""``attention_with_kv_cache`` and the rest of PyTorch: opcheck, torch.compile, grad mode, and every
bad value refused before anything is written, in words that say what to do."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE
from kv_cache_tools import CACHES, Call, assert_same_bits, featured, make, table
from torch import Tensor

import fastattn
from fastattn.ops.attention_kv_cache_op import ARGUMENTS

OP = torch.ops.fastattn.attention_kv_cache.default


def arguments(call: Call) -> tuple[Any, ...]:
    """The op's, in the order of its schema."""
    t, options = call.copies(), call.options
    cos, sin = options.get("rotary", (None, None))
    window = [-1 if w is None else w for w in options.get("window", (None, None))]
    given = {
        **t, "cos": cos, "sin": sin, "mask": options.get("mask"), "softcap":
        options.get("softcap", 0.0), "alibi_slopes": options.get("alibi_slopes"),
        "sinks": options.get("sinks"), "scale": options.get("scale", t["q"].shape[-1] ** -0.5),
        "causal": options.get("causal", True), "window_left": window[0], "window_right": window[1],
        "interleaved": options.get("rotary_interleaved", False),
    }  # fmt: skip
    names = [part.split()[-1] for part in ARGUMENTS.split(", ")]
    return tuple(given.get(n) for n in names)


@pytest.mark.parametrize("feature", ["plain", "everything", "no_new_rows", "bshd"])
@pytest.mark.parametrize("page_size", [0, 5])
def test_opcheck(feature: str, page_size: int) -> None:
    call = featured(feature, page_size=page_size)
    for name in CACHES:  # opcheck compares by value
        call.tensors[name].nan_to_num_(1.0)
    torch.library.opcheck(OP, arguments(call))


@pytest.mark.parametrize("feature", ["plain", "everything"])
@pytest.mark.parametrize("page_size", [0, 5])
def test_compile(feature: str, page_size: int) -> None:
    call = featured(feature, page_size=page_size)
    right, t = call.run("cpu"), call.copies()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return fastattn.attention_with_kv_cache(**t, **call.options, return_lse=True)

    o, lse = step(t)
    assert_same_bits("o", o, right["o"])
    assert_same_bits("lse", lse, right["lse"])
    for name in CACHES:
        assert_same_bits(name, t[name], right[name])


@pytest.mark.slow
def test_compile_with_inductor_does_not_compile_again_for_lengths() -> None:
    """Generation: the lengths are values, so one graph serves every step."""
    caches = torch.zeros(1, 2, 32, 16), torch.zeros(1, 2, 32, 16)
    eager = tuple(x.clone() for x in caches)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def step(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> Tensor:
        o = fastattn.attention_with_kv_cache(q * 2.0, *caches, cache_lens=lens, k=k, v=v)
        return o + 1.0

    for at in range(4):
        q, k, v = (torch.randn(1, h, 1, 16) for h in (4, 2, 2))
        lens = torch.tensor([at])
        right = fastattn.attention_with_kv_cache(q * 2.0, *eager, cache_lens=lens, k=k, v=v) + 1.0
        torch.testing.assert_close(step(q, k, v, lens), right)
    assert counter.frame_count == 1
    assert_same_bits("k_cache", caches[0], eager[0])


def test_a_cache_that_autograd_has_saved_is_known_to_have_changed() -> None:
    call = make((3,))
    t = call.copies()
    w = torch.ones_like(t["k_cache"], requires_grad=True)
    product = (w * t["k_cache"]).sum()
    fastattn.attention_with_kv_cache(**t)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("name", ["q", "k", "v_cache", "sinks", "alibi_slopes"])
def test_a_gradient_is_refused(name: str, backend: str) -> None:
    call = featured("sinks")
    t = {**call.copies(), **call.options}
    t[name] = t.get(name, torch.ones(4)).clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"{name} has requires_grad=True.*torch\.no_grad"):
        fastattn.attention_with_kv_cache(**t, backend=backend)
    with torch.no_grad():
        fastattn.attention_with_kv_cache(**t, backend=backend)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_grad_modes(mode: Callable[[], Any]) -> None:
    call = featured("rotary")
    right = call.run("cpu")
    with mode():
        assert_same_bits("o", call.run("cpu")["o"], right["o"])
        fresh = Call({n: x.clone() for n, x in call.tensors.items()}, call.options)
        assert_same_bits("o", fresh.run("cpu")["o"], right["o"])


def test_float64_takes_the_reference(backend: str) -> None:
    call = make((5, 0), dtype=torch.float64)
    assert call.run("auto")["lse"].dtype == torch.float64
    if backend != "reference":
        with pytest.raises(ValueError, match="cannot serve this call.*float32, bfloat16"):
            call.run(backend)


# ------------------------------------------------------------------------------------------ errors


def with_(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Sets arguments; a callable is asked with the former value."""

    def change(t: dict[str, Any]) -> None:
        for name, x in changes.items():
            t[name] = x(t.get(name)) if callable(x) else x

    return change


def put_same(name: str, index: Any, other: Any) -> Callable[[dict[str, Any]], None]:
    def change(t: dict[str, Any]) -> None:
        t[name] = t[name].clone()
        t[name][index] = t[name][other]

    return change


def put(name: str, index: Any, value: int) -> Callable[[dict[str, Any]], None]:
    def change(t: dict[str, Any]) -> None:
        t[name] = t[name].clone()
        t[name][index] = value

    return change


# name -> sizes of the call, what is wrong with it, the error, its words.
BAD: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], None], type[Exception], str]] = {
    # ---- values
    "negative_length": ({}, put("cache_lens", 1, -1), ValueError,
                        r"cache_lens\[1\] must not be negative, got -1"),
    "full": ({}, put("cache_lens", 2, 52), ValueError,
             r"cache is full: sequence 2 has cache_lens\[2\] = 52 and 1 new rows.*longer cache"),
    "longer_than_the_cache": ({"sn": 0}, put("cache_lens", 0, 53), ValueError,
                              r"cache is full: sequence 0 has cache_lens\[0\] = 53, more than"),
    "pages_full": ({"page_size": 13}, put("cache_lens", 0, 52), ValueError,
                   "block_table more columns"),
    "huge_length": ({"index_dtype": torch.int64}, put("cache_lens", 0, 2**62), ValueError,
                    "cache is full"),
    "page_too_large": ({"page_size": 8}, put("block_table", (0, 2), 99), IndexError,
                       r"block_table\[0, 2\] must be a page in \[0, 24\).*got 99"),
    "page_negative": ({"page_size": 8}, put("block_table", (2, 0), -1), IndexError,
                      r"block_table\[2, 0\].*got -1"),
    "page_written_by_two": ({"page_size": 8, "lens": (8, 3, 16)},
                            put_same("block_table", (2, 2), (0, 1)), ValueError,
                            r"block_table\[2, 2\] is page \d+, to which sequence 0 appends too"),
    "page_written_twice": ({"page_size": 8, "sq": 9, "lens": (8, 3, 16)},
                           put_same("block_table", (0, 2), (0, 1)), ValueError,
                           r"block_table\[0, 2\] is page \d+, to which sequence 0 appends too"),
    "page_of_the_new_row": ({"page_size": 8, "lens": (8, 0, 16)}, put("block_table", (0, 1), 77),
                            IndexError, r"block_table\[0, 1\]"),
    "new_lens_negative": ({"sq": 4, "new_lens": (1, 2, 3)}, put("new_lens", 0, -1), ValueError,
                          r"new_lens\[0\] must be in \[0, 4\]"),
    "new_lens_too_large": ({"sq": 4, "new_lens": (1, 2, 3)}, put("new_lens", 1, 5), ValueError,
                           r"new_lens\[1\] must be in \[0, 4\], the rows of k, got 5"),
    "entry_too_large": ({"cache_index": (0, 1, 2)}, put("cache_index", 1, 3), IndexError,
                        r"cache_index\[1\] must be an entry of the cache in \[0, 3\), got 3"),
    "entry_negative": ({"cache_index": (0, 1, 2)}, put("cache_index", 0, -1), IndexError, "got -1"),
    "entry_twice": ({"cache_index": (0, 1, 2)}, put("cache_index", 2, 0), ValueError,
                    r"cache_index\[2\] is 0, which sequence 0 has too"),
    "beyond_the_rotary_table": ({}, with_(rotary=table(40, 4)), IndexError,
                                "sequence 2 reaches position 40, beyond rotary's 40 positions"),
    # ---- shapes and dtypes
    "q_of_3_dims": ({}, with_(q=lambda q: q[0]), ValueError, r"q must have 4 dimensions"),
    "q_no_rows": ({}, with_(q=lambda q: q[:, :, :0]), ValueError, "at least one row"),
    "q_no_tensor": ({}, with_(q=3), TypeError, "q must be a Tensor, got int"),
    "q_int": ({}, with_(q=lambda q: q.int()), TypeError, "q must be float32"),
    "cache_dtype": ({}, with_(k_cache=lambda x: x.half()), TypeError, "k_cache must have q's"),
    "cache_no_tensor": ({}, with_(v_cache=None), TypeError, "v_cache must be a Tensor"),
    "cache_head_dim": ({}, with_(k_cache=lambda x: x[..., :31]), ValueError, "head_dim 32"),
    "caches_differ": ({}, with_(v_cache=lambda x: x[:, :, :-1]), ValueError, "first dimensions"),
    "heads": ({"h": 4, "hk": 2}, with_(q=lambda q: q[:, :3]), ValueError, "multiple"),
    "cache_batch": ({}, with_(k_cache=lambda x: x[:2], v_cache=lambda x: x[:2]), ValueError,
                    "2 entries for 3 sequences: say with cache_index"),
    "cache_stride": ({}, with_(k_cache=lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
                     ValueError, "stride 1"),
    "cache_overlaps": ({}, with_(v_cache=lambda x: x[:1].expand(3, -1, -1, -1)), ValueError,
                       "share memory"),
    "one_cache": ({}, lambda t: t.update(v_cache=t["k_cache"]), ValueError,
                  "v_cache must not share k_cache's memory"),
    "k_alone": ({}, with_(v=None), ValueError, "k and v must be given together"),
    "k_shape": ({}, with_(k=lambda k: k[:, :1]), ValueError, r"k must have shape \(B, Hk, Sn, D\)"),
    "v_rows": ({"sq": 3}, with_(v=lambda v: v[:, :, :2]), ValueError, "v must have shape"),
    "k_dtype": ({}, with_(k=lambda k: k.double()), TypeError, "k must have q's dtype"),
    "lens_float": ({}, with_(cache_lens=lambda x: x.float()), TypeError, "cache_lens must be one"),
    "lens_shape": ({}, with_(cache_lens=lambda x: x[:2]), ValueError, r"cache_lens .*shape \(3,\)"),
    "lens_no_tensor": ({}, with_(cache_lens=[1, 2, 3]), TypeError, "cache_lens must be a Tensor"),
    "new_lens_without_k": ({"sn": 0}, with_(new_lens=torch.tensor([0, 0, 0])), ValueError,
                           "needs k and v"),
    "new_lens_other_rows": ({"sq": 1, "sn": 4}, with_(new_lens=torch.tensor([1, 1, 1])), ValueError,
                            "as many rows of q as of k"),
    "table_float": ({"page_size": 8}, with_(block_table=lambda x: x.float()), TypeError,
                    "block_table must be int32 or int64"),
    "table_shape": ({"page_size": 8}, with_(block_table=lambda x: x[:2]), ValueError,
                    r"\(B, pages\) = \(3, \*\)"),
    "table_and_index": ({"page_size": 8}, with_(cache_index=torch.tensor([0, 1, 2])), ValueError,
                        "cache_index is for a contiguous cache"),
    "rotary_no_pair": ({}, with_(rotary=torch.zeros(3)), TypeError, r"rotary must be \(cos, sin\)"),
    "rotary_shapes": ({}, with_(rotary=(torch.zeros(60, 4), torch.zeros(60, 5))), ValueError,
                      "one shape"),
    "rotary_wide": ({}, with_(rotary=table(60, 17)), ValueError, "R at most q's head_dim"),
    "rotary_int": ({}, with_(rotary=(torch.zeros(60, 4).int(),) * 2), TypeError, "float dtype"),
    "mask_float": ({}, with_(mask=torch.zeros(52)), TypeError, "mask must be bool.*none is added"),
    "mask_shape": ({}, with_(mask=torch.ones(51, dtype=torch.bool)), ValueError,
                   r"broadcast to \(B, H, Sq, capacity\) = \(3, 4, 1, 52\)"),
    "mask_long": ({}, with_(mask=torch.ones(53, dtype=torch.bool)), ValueError, "broadcast"),
    "sinks_shape": ({}, with_(sinks=torch.zeros(3)), ValueError, "sinks must have shape"),
    "sinks_int": ({}, with_(sinks=torch.zeros(4).int()), TypeError, "sinks must be one of"),
    "alibi_int": ({}, with_(alibi_slopes=torch.zeros(4).int()), TypeError, "alibi_slopes must be"),
    "alibi_turned": ({}, with_(alibi_slopes=torch.zeros(4, 3)), ValueError, "alibi_slopes must"),
    "cache_elsewhere": ({}, with_(k_cache=lambda x: torch.empty_like(x, device="meta")), ValueError,
                        "k_cache must be on q's device"),
    "lens_elsewhere": ({}, with_(cache_lens=lambda x: torch.empty_like(x, device="meta")),
                       ValueError, "cache_lens must be on q's device"),
    "alibi_shape": ({}, with_(alibi_slopes=torch.zeros(3)), ValueError, "alibi_slopes must have"),
    "window_negative": ({}, with_(window=(-1, 0)), ValueError, "window's left side"),
    "softcap_negative": ({}, with_(softcap=-1.0), ValueError, "softcap must be > 0"),
    "scale_text": ({}, with_(scale="1"), TypeError, "scale must be a float"),
    "causal_text": ({}, with_(causal="bottom_right"), TypeError, "causal must be a bool"),
    "interleaved_int": ({}, with_(rotary_interleaved=1), TypeError, "rotary_interleaved must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, backend: str) -> None:
    sizes, spoil, error, words = BAD[name]
    call = make(**sizes)
    t = {**call.copies(), **call.options}
    before = {n: t[n].clone() for n in CACHES}
    tensors = {n: t[n] for n in CACHES}
    spoil(t)
    with pytest.raises(error, match=words) as caught:
        fastattn.attention_with_kv_cache(**t, backend=backend)
    assert str(caught.value).startswith("fastattn::attention_with_kv_cache: ")
    for n in CACHES:
        assert_same_bits(n, tensors[n], before[n])


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels on a GPU clamp")
@pytest.mark.parametrize("name", [n for n, bad in BAD.items() if bad[1].__qualname__[:3] == "put"])
def test_the_binding_refuses_bad_values_itself(name: str) -> None:
    """What a compiled graph calls."""
    sizes, spoil, _, _ = BAD[name]
    call = make(**sizes)
    spoil(call.tensors)
    args = arguments(call)
    before = [x.clone() for x in args[1:3]]
    with pytest.raises(RuntimeError, match="attention_with_kv_cache"):
        OP(*args)
    for x, y in zip(args[1:3], before, strict=True):
        assert_same_bits("cache", x, y)


def test_what_is_not_reached_may_be_out_of_range(backend: str) -> None:
    """Columns of a page table beyond a sequence's end hold -1, as every server leaves them."""
    call = make((5, 0), sn=0, page_size=4)
    assert call.tensors["block_table"].min() == -1
    call.run(backend)


def test_reference_clamps_what_nobody_may_read() -> None:
    """As the kernels on a GPU do: nothing leaves its tensors, rows beyond the capacity are
    dropped."""
    call = make((50, 0, 7), sq=4, page_size=13)
    t = call.copies()
    t["block_table"][2, 0] = 10**6
    o = fastattn.reference.attention_with_kv_cache(**t)
    assert o[0].isfinite().all()
    kept = t["k_cache"][t["block_table"][0, 3], :, 50 - 39 :]
    assert torch.equal(kept, t["k"][0, :, :2])
