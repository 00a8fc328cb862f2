"""Calls of ``attention_with_kv_cache`` for the tests, and their verdict by the rule of rule.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rule import EPS32, Cast, Draws, assert_within, one_thread
from torch import Tensor

import fastattn
from fastattn import reference

CACHES = ("k_cache", "v_cache")


@dataclass
class Call:
    """The arguments of a call; the caches are written, so every use takes copies of them."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["q"].dtype

    @property
    def capacity(self) -> int:
        size = self.tensors["k_cache"].shape[2]
        return (
            size * self.tensors["block_table"].shape[1] if "block_table" in self.tensors else size
        )

    def copies(self) -> dict[str, Tensor]:
        """The tensors with the memory layout of the caches kept."""
        return {
            n: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
            if n in CACHES
            else x
            for n, x in self.tensors.items()
        }

    def run(self, backend: str, **more: Any) -> dict[str, Tensor]:
        """o, lse and the caches afterwards."""
        t = self.copies()
        o, lse = fastattn.attention_with_kv_cache(
            **t, **self.options, return_lse=True, backend=backend, **more
        )
        return {"o": o, "lse": lse, **{n: t[n] for n in CACHES}}

    def by_formula(self, cast: Cast) -> dict[str, Tensor]:
        """o and lse by the formula, of the very values that the call has, each float through cast.

        Rotation rounds to the call's dtype (the cache holds it), so the oracle is given rows that
        were rotated before.
        """
        t, options = self.copies(), dict(self.options)
        rotary = options.pop("rotary", None)
        pairs = options.pop("rotary_interleaved", False)
        if rotary is not None:
            first, _, total = lengths(t)
            Sq = t["q"].shape[2]
            start = first if "new_lens" in t else total - Sq
            t["q"] = rotated(t["q"], start, rotary, pairs)
            if "k" in t:
                t["k"] = rotated(t["k"], first, rotary, pairs)
        t = {n: cast(x) if x.is_floating_point() else x for n, x in t.items()}
        o, lse = reference.attention_with_kv_cache(**t, **options, return_lse=True)
        return {"o": o, "lse": lse}

    def judge(self, backend: str, **more: Any) -> dict[str, Tensor]:
        """:meth:`check` of what a backend gives."""
        got = self.run(backend, **more)
        self.check(got)
        return got

    def check(self, got: dict[str, Tensor]) -> None:
        """o and lse within 2 x the error of plain PyTorch in the same dtype, caches to the bit."""
        with one_thread():
            right, caches = self.by_formula(Tensor.double), self.run("reference")
        plain = Draws(self.by_formula)
        for name in CACHES:
            assert_same_bits(name, got[name], caches[name])
        assert got["o"].dtype == self.dtype
        # exp need not be finer than 1/128 of the rounding that P gets before the product with v.
        fast_exp = torch.finfo(self.dtype).eps / 256 if self.dtype != torch.float32 else 0.0
        assert_within("o", got["o"], right["o"], plain["o"])
        floor = fast_exp + 4 * EPS32 * (1.0 + self.largest_logit())
        assert_within("lse", got["lse"], right["lse"], plain["lse"], floor)

    def contiguous(self) -> "Call":
        """The same keys in a cache without pages."""
        t = self.copies()
        table = t.pop("block_table")
        pages = table.clamp(0, t["k_cache"].shape[0] - 1).long()
        for name in CACHES:  # (B, columns, Hk, page, D)
            t[name] = t[name][pages].transpose(1, 2).flatten(2, 3).contiguous()
        return Call(t, self.options)

    def largest_logit(self) -> float:
        q, k = self.tensors["q"].double(), self.tensors["k_cache"].double()
        norms = [x.nan_to_num(0.0).norm(dim=-1) for x in (q, k, self.tensors.get("k", q).double())]
        q_norm, *k_norms = (float(x.amax()) if x.numel() else 0.0 for x in norms)
        return q_norm * max(k_norms) * abs(self.options.get("scale", q.shape[-1] ** -0.5))


def assert_same_bits(name: str, a: Tensor, b: Tensor) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert (a.shape, a.dtype) == (b.shape, b.dtype), name
    same = a.contiguous().view(bits) == b.contiguous().view(bits)
    assert same.all(), f"{name}: {(~same).sum()} elements differ, at {(~same).nonzero()[:3]}"


def rotated(x: Tensor, first: Tensor, rotary: tuple[Tensor, Tensor], pairs: bool) -> Tensor:
    """Rows from position first[b] on, in complex numbers: not the formula of the reference."""
    cos, sin = rotary
    half = cos.shape[1]
    position = (first[:, None] + torch.arange(x.shape[2])).clamp(0, max(len(cos) - 1, 0))
    # In fp32 as all backends do it: what is rounded next must be the same number.
    turn = [t.float()[position].unsqueeze(1) for t in (cos, sin)]
    a, b = (
        (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2])
        if pairs
        else (x[..., :half], x[..., half : 2 * half])
    )
    a, b = a.float(), b.float()
    real, imag = a * turn[0] - b * turn[1], a * turn[1] + b * turn[0]
    out = x.clone()
    if pairs:
        out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2] = real.to(x.dtype), imag.to(x.dtype)
    else:
        out[..., :half], out[..., half : 2 * half] = real.to(x.dtype), imag.to(x.dtype)
    return out


def lengths(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """cache_lens, appended rows, total, of every sequence."""
    first = t["cache_lens"].long()
    given = t["k"].shape[2] if "k" in t else 0
    n = t["new_lens"].long() if "new_lens" in t else torch.full_like(first, given)
    return first, n, first + n


def table(positions: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return angle.cos(), angle.sin()


def make(
    lens: Sequence[int] = (23, 0, 40),
    h: int = 4,
    hk: int = 2,
    sq: int = 1,
    sn: int | None = None,  # rows of k; None = sq, 0 = no k and v
    d: int = 32,
    dv: int | None = None,
    capacity: int = 52,
    page_size: int = 0,  # 0 = contiguous
    dtype: torch.dtype = torch.float32,
    new_lens: Sequence[int] | None = None,
    cache_index: Sequence[int] | None = None,
    entries: int | None = None,
    layout: str = "bhsd",  # or "bshd": a transposed view
    index_dtype: torch.dtype = torch.int32,
    **options: Any,
) -> Call:
    """A cache whose slots beyond the lengths hold NaN, as do the pages that no sequence reaches."""
    B, dv, sn = len(lens), d if dv is None else dv, sq if sn is None else sn
    if page_size:
        columns = -(-capacity // page_size)
        shape = (B * columns + 3, hk, page_size)
    else:
        shape = (entries or B, hk, capacity)
    t = {"q": torch.randn(B, h, sq, d).to(dtype)}
    for name, width in zip(CACHES, (d, dv), strict=True):
        x = torch.full((*shape, width), torch.nan, dtype=dtype)
        if layout == "bshd":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        t[name] = x
    t["cache_lens"] = torch.tensor(lens, dtype=index_dtype)
    if page_size:
        pages = torch.randperm(shape[0])[: B * columns].view(B, columns)
        t["block_table"] = pages.to(index_dtype)
    if cache_index is not None:
        t["cache_index"] = torch.tensor(cache_index, dtype=index_dtype)
    for b, n in enumerate(lens):
        for name in CACHES:
            for j in range(n):
                if page_size:
                    row = t[name][pages[b, j // page_size], :, j % page_size]
                else:
                    row = t[name][cache_index[b] if cache_index is not None else b, :, j]
                row.copy_(torch.randn(row.shape))
    if page_size:  # what is not reached may hold anything
        for b, n in enumerate(lens):
            more = new_lens[b] if new_lens is not None else sn
            t["block_table"][b, -(-(n + more) // page_size) :] = (-1, 10**6)[b % 2]
    if sn:
        t["k"], t["v"] = torch.randn(B, hk, sn, d).to(dtype), torch.randn(B, hk, sn, dv).to(dtype)
    if new_lens is not None:
        t["new_lens"] = torch.tensor(new_lens, dtype=index_dtype)
    return Call(t, options)


# One call a feature; sizes so that some rows are short, some empty, one sequence has no key before.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_new_rows": {"sn": 0, "sq": 2},
    "more_rows_than_keys": {"lens": (0, 3, 9), "sn": 0, "sq": 5},
    "not_causal": {"sq": 3, "causal": False},
    "not_causal_short": {"lens": (0, 1, 9), "sn": 0, "sq": 4, "causal": False},
    "rows": {"sq": 5},
    "many_rows": {"sq": 21, "lens": (3, 0, 20)},
    "prompt_after_cache": {"sq": 1, "sn": 9},
    "ragged": {"sq": 4, "new_lens": (4, 0, 2)},
    "ragged_window": {"sq": 4, "new_lens": (1, 4, 3), "window": (6, None)},
    "window": {"sq": 3, "window": (7, 0)},
    "window_both": {"sq": 3, "window": (5, 1), "causal": False},
    "softcap": {"sq": 2, "softcap": 1.5},
    "alibi": {"sq": 3, "alibi_slopes": "h"},
    "alibi_batch": {"sq": 3, "alibi_slopes": "bh", "causal": False},
    "sinks": {"sq": 2, "sinks": True},
    "sinks_short": {"lens": (0, 1, 9), "sn": 0, "sq": 3, "sinks": True, "causal": False},
    "mask": {"sq": 2, "mask": "b11s"},
    "mask_full": {"sq": 3, "mask": "bhqs"},
    "scale": {"scale": 0.3},
    "gqa_8": {"h": 16, "hk": 2, "sq": 1},
    "mqa": {"h": 7, "hk": 1, "sq": 2},
    "mha": {"h": 3, "hk": 3},
    "rotary": {"sq": 2, "rotary": 32},
    "rotary_part": {"sq": 2, "rotary": 12},
    "rotary_pairs": {"sq": 3, "rotary": 32, "rotary_interleaved": True},
    "rotary_pairs_part": {"sq": 1, "rotary": 10, "rotary_interleaved": True},
    "rotary_ragged": {"sq": 3, "new_lens": (1, 3, 0), "rotary": 20},
    "rotary_old_keys": {"sq": 2, "sn": 0, "rotary": 32},
    "everything": {
        "sq": 3, "new_lens": (3, 2, 1), "window": (9, None), "softcap": 2.0, "alibi_slopes": "h",
        "sinks": True, "mask": "b11s", "rotary": 16, "scale": 0.4,
    },
    "cache_index": {"cache_index": (4, 0, 2), "entries": 6},
    "full_cache": {"lens": (51, 0, 51)},
    "bshd": {"layout": "bshd", "sq": 2},
}  # fmt: skip


def featured(feature: str, **sizes: Any) -> Call:
    """A call of FEATURES."""
    given = {**FEATURES[feature], **sizes}
    special = {n: given.pop(n, None) for n in ("alibi_slopes", "sinks", "mask", "rotary")}
    if given.get("page_size"):
        given = {n: x for n, x in given.items() if n not in ("cache_index", "entries")}
    call = make(**given)
    B, H, Sq, D = call.tensors["q"].shape
    if special["alibi_slopes"]:
        shape = (H,) if special["alibi_slopes"] == "h" else (B, H)
        call.options["alibi_slopes"] = torch.rand(shape)
    if special["sinks"]:
        call.options["sinks"] = torch.randn(H)
    if special["mask"]:
        shape = (B, 1, 1) if special["mask"] == "b11s" else (B, H, Sq)
        call.options["mask"] = torch.rand(*shape, call.capacity) < 0.6
    if special["rotary"]:
        call.options["rotary"] = table(512, min(special["rotary"], D // 2 * 2) // 2)
    return call
