"""Calls of attention_with_kv_cache: contiguous and paged caches, with every feature."""

from typing import Any

import torch
from hypothesis import strategies as st
from kv_cache_tools import Call, make, table
from tools import DTYPES

import fastattn
from fuzz import spoil
from fuzz.attention import BAD_LENS, WINDOW
from fuzz.case import Valid
from fuzz.rows import lay

_LENGTH = st.one_of(st.integers(0, 8), st.integers(9, 70), st.sampled_from([128, 300]))
_ROWS = st.one_of(st.integers(1, 5), st.integers(6, 40), st.sampled_from([64, 130]))
_SIDE = st.one_of(st.none(), st.integers(0, 60))


@st.composite
def calls(draw: Any) -> Call:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    lens = draw(st.lists(_LENGTH, max_size=4))
    hk, sq, ragged = draw(st.integers(1, 3)), draw(_ROWS), draw(st.booleans())
    sn = sq if ragged else draw(st.sampled_from([0, 1, 9, sq]))
    d = draw(st.sampled_from([1, 2, 5, 16, 18, 32, 40, 64, 72, 128]))
    page_size = draw(st.sampled_from([0, 0, 1, 7, 16, 64]))
    where: dict[str, Any] = {}
    if not page_size and draw(st.booleans()):
        entries = len(lens) + draw(st.integers(0, 2))
        where = {"entries": entries, "cache_index": torch.randperm(entries)[: len(lens)].tolist()}
    call = make(
        lens, h=hk * draw(st.sampled_from([0, 1, 1, 2, 5, 8])), hk=hk, sq=sq, sn=sn, d=d,
        dv=draw(st.integers(1, 70)), capacity=max(lens, default=0) + sn + draw(st.integers(0, 9)),
        page_size=page_size, dtype=draw(st.sampled_from(DTYPES)),
        new_lens=[draw(st.integers(0, sn)) for _ in lens] if ragged else None,
        layout=draw(st.sampled_from(["bhsd", "bshd"])),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])), **where,
    )  # fmt: skip
    t = call.tensors
    size = draw(st.sampled_from([1.0, 1.0, 1e-4, 8.0]))  # of the logits
    t["q"] = (t["q"] * size).to(t["q"].dtype)
    t |= {n: lay(draw, t[n]) for n in ("q", "k", "v") if n in t}
    call.options |= draw(_options(call, max(lens, default=0) + sn))
    return call


@st.composite
def _options(draw: Any, call: Call, positions: int) -> dict[str, Any]:
    b, h, m, d = call.tensors["q"].shape
    given: dict[str, Any] = {"causal": draw(st.booleans())}

    def broadcast() -> list[int]:
        shape = [draw(st.sampled_from([size, 1])) for size in (b, h, m, call.capacity)]
        return shape[draw(st.integers(0, 4)) :]

    for name, make_it in (
        ("window", lambda: (draw(_SIDE), draw(_SIDE))),
        ("mask", lambda: torch.rand(broadcast()) < draw(st.sampled_from([0.3, 0.9, 1.0]))),
        ("alibi_slopes", lambda: torch.rand(draw(st.sampled_from([(h,), (b, h)]))) * 0.5),
        ("softcap", lambda: draw(st.sampled_from([0.7, 5.0, 30.0]))),
        ("sinks", lambda: torch.randn(h)),
        ("scale", lambda: draw(st.sampled_from([0.05, 0.5, -0.2]))),
    ):
        if draw(st.integers(0, 3)) == 0:
            given[name] = make_it()
    if d > 1 and draw(st.booleans()):
        turns = table(positions + draw(st.integers(1, 9)), draw(st.integers(1, d // 2)))
        dtype = draw(st.sampled_from([torch.float32, call.dtype]))
        given["rotary"] = tuple(x.to(dtype) for x in turns)
        given["rotary_interleaved"] = draw(st.booleans())
    return given


_ROLES: dict[str, spoil.Ways] = {
    "q": {**spoil.FLOAT, **spoil.DEEPER},
    "k_cache": {**spoil.VECTOR, **spoil.DEEPER},
    "v_cache": {**spoil.PARAM, **spoil.DEEPER},
    "k": {**spoil.VECTOR, **spoil.DEEPER},
    "v": {**spoil.VECTOR, **spoil.DEEPER},
    "cache_lens": {**spoil.INDEX, **spoil.LONGER, **spoil.DEEPER, **BAD_LENS},
    "new_lens": {**spoil.INDEX, **spoil.LONGER, **BAD_LENS},
    "block_table": {**spoil.INDEX, **spoil.DEEPER},
    "cache_index": {**spoil.INDEX, **spoil.LONGER, **BAD_LENS},
    "rotary": {
        **spoil.constants("nonsense", 3, (1, 2), torch.zeros(3)),
        "one of them": lambda r: (r and r[:1]) or [torch.zeros(3, 1)],
    },
    "rotary_interleaved": spoil.FLAG,
    "causal": spoil.FLAG,
    "window": WINDOW,
    "mask": spoil.MASK,
    "alibi_slopes": spoil.VECTOR,  # one dimension more is a sequence's own
    "softcap": {**spoil.POSITIVE, **spoil.constants(0.0)},
    "sinks": {**spoil.VECTOR, **spoil.DEEPER},
    "scale": spoil.NUMBER,
    "return_lse": spoil.FLAG,
    "backend": spoil.BACKEND,
}


def _roles(call: Call) -> dict[str, spoil.Ways]:
    """With what is wrong because a key or a position is reached."""
    roles, t = dict(_ROLES), call.tensors
    if not len(t["cache_lens"]):  # of no sequence no value is wrong
        for name in ("cache_lens", "new_lens", "cache_index"):
            roles[name] = {n: way for n, way in roles[name].items() if n not in BAD_LENS}
    if bool((t["cache_lens"] > 0).any()):
        if "block_table" in t:
            roles["block_table"] = {**roles["block_table"], **BAD_LENS}
        if "rotary" in call.options:
            cut: spoil.Ways = {"no position": lambda r: tuple(x[:0] for x in r)}
            roles["rotary"] = {**roles["rotary"], **cut}
    if "rotary" in call.options:
        other: spoil.Ways = {
            "of ints": lambda r: tuple(x.int() for x in r),
            "of two shapes": lambda r: (r[0], r[1][:-1]),
            "too wide": lambda r: tuple(spoil.longer(x) for x in r),
            "elsewhere": lambda r: tuple(torch.empty_like(x, device="meta") for x in r),
        }
        roles["rotary"] = {**roles["rotary"], **other}
    return roles


@st.composite
def attention_with_kv_cache(draw: Any) -> Valid:
    call = draw(calls())
    return Valid(
        fastattn.attention_with_kv_cache,
        {**call.copies(), **call.options},
        lambda: call.judge("cpu"),
        _roles(call),
        lambda: call.run("cpu"),
    )
