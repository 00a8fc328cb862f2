"""Calls of embedding and linear_cross_entropy."""

from typing import Any

import torch
from hypothesis import strategies as st
from test_embedding import T, V, embedding_call
from test_embedding import judge as judge_embedding
from test_linear_cross_entropy import call as cross_entropy_call
from test_linear_cross_entropy import judge as judge_cross_entropy

import fastattn
from fuzz import spoil
from fuzz.case import Valid
from fuzz.rows import LEAD, SIZES, dropout, lay, restrided, start

_OUTSIDE: spoil.Ways = {
    "negative": lambda x: torch.full_like(x, -1),
    "beyond": lambda x: torch.full_like(x, 10**6),
}
_BEYOND: spoil.Ways = {
    **_OUTSIDE,
    "int32, beyond": lambda x: torch.full(x.shape, 2**31 - 1, dtype=torch.int32),
}
_EMBEDDING: dict[str, spoil.Ways] = {
    "ids": {**spoil.INDEX, **_BEYOND},
    "weight": {**spoil.FLOAT, **spoil.DEEPER},
    "positions": {**spoil.INDEX, **spoil.LONGER, **_BEYOND},
    "segments": {**spoil.INDEX, **spoil.LONGER, **_BEYOND},
    "position_weight": {**spoil.VECTOR, **spoil.DEEPER},
    "segment_weight": {**spoil.VECTOR, **spoil.DEEPER},
    "norm_weight": spoil.VECTOR,
    "norm_bias": spoil.VECTOR,
    "position_offset": spoil.INT,
    "scale": spoil.NUMBER,
    "norm": spoil.CHOICE,
    "eps": spoil.POSITIVE,
    "dropout_p": spoil.PROBABILITY,
    "seed": spoil.SEED,
    "padding_idx": {**spoil.INT, **spoil.constants(10**6, -(10**6))},
    "scale_grad_by_freq": spoil.FLAG,
    "backend": spoil.BACKEND,
}
_CROSS_ENTROPY: dict[str, spoil.Ways] = {
    "x": {**spoil.FLOAT, **spoil.LONGER},
    "weight": {**spoil.VECTOR, **spoil.DEEPER},
    # Negative: not one of those that a call may ignore.
    "target": {
        **spoil.INDEX,
        **spoil.LONGER,
        **_OUTSIDE,
        "negative": lambda x: torch.full_like(x, -7),
    },
    "bias": spoil.VECTOR,
    "ignore_index": spoil.INT,
    "label_smoothing": spoil.PROBABILITY,
    "reduction": spoil.CHOICE,
    "backend": spoil.BACKEND,
}


def _some(roles: dict[str, spoil.Ways], args: dict[str, Any], index: str) -> dict[str, spoil.Ways]:
    """Without what no token makes wrong."""
    if args[index].numel():
        return roles
    return {n: {k: f for k, f in w.items() if k not in _BEYOND} for n, w in roles.items()}


@st.composite
def embedding(draw: Any) -> Valid:
    dtype = start(draw)
    tables = draw(st.sampled_from(["w", "wp", "ws", "wps"]))
    more: dict[str, Any] = draw(dropout("dropout_p"))
    if draw(st.booleans()):
        more["padding_idx"] = draw(st.integers(-V, V - 1))
    more["scale"] = draw(st.sampled_from([1.0, 2.5]))
    more["scale_grad_by_freq"] = draw(st.booleans())
    norm = draw(st.sampled_from(["layer", "rms", None]))
    call = embedding_call(
        draw(st.integers(1, 4)), draw(st.integers(0, 9)), n=draw(SIZES), dtype=dtype,
        tables=tables, norm=norm, explicit=True,
        eps=1e-3, **more,
    )  # fmt: skip
    if "segments" in call.kwargs and draw(st.booleans()):
        call.kwargs["segments"] = torch.randint(T, call.kwargs["ids"].shape[-1:])
        call.kwargs.pop("scale_grad_by_freq")
    if draw(st.booleans()):
        call.kwargs["ids"] = call.kwargs["ids"].int()
    call = restrided(draw, call)
    args = {**call.tensors, **call.kwargs}
    return Valid(
        fastattn.embedding, args, lambda: judge_embedding(call),
        _some(_EMBEDDING, args, "ids"),
    )  # fmt: skip


@st.composite
def linear_cross_entropy(draw: Any) -> Valid:
    dtype = start(draw)
    more: dict[str, Any] = {}
    if draw(st.booleans()):
        more["ignore_index"] = draw(st.integers(-3, 3))
    tensors, kwargs = cross_entropy_call(
        *draw(LEAD), d=draw(SIZES), v=draw(st.sampled_from([1, 2, 3, 7, 50, 333])), dtype=dtype,
        bias=draw(st.booleans()), ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])), **more,
    )  # fmt: skip
    if bool((kwargs["target"] == kwargs.get("ignore_index", -100)).all()):
        kwargs["reduction"] = "sum"  # the mean over no rows is NaN, which equals nothing
    tensors = {n: lay(draw, x) for n, x in tensors.items()}
    args = {**tensors, **kwargs}
    return Valid(
        fastattn.linear_cross_entropy, args, lambda: judge_cross_entropy(tensors, kwargs),
        _some(_CROSS_ENTROPY, args, "target"),
    )  # fmt: skip
