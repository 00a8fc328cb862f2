"""Calls of layer_norm, rms_norm, add_layer_norm, bias_act and layernorm_ffn."""

from dataclasses import replace
from typing import Any

import torch
from ffn_tools import Call, ffn, judge
from hypothesis import strategies as st
from test_bias_act import ACTIVATIONS, act_call
from test_layernorm import norm_call
from tools import DTYPES
from torch import Tensor

import fastattn
from fuzz import spoil
from fuzz.case import Valid

SIZES = st.one_of(st.integers(1, 8), st.integers(9, 80), st.sampled_from([128, 200, 384]))
LEAD = st.lists(st.one_of(st.integers(1, 9), st.sampled_from([0, 1, 33])), max_size=3)


def lay(draw: Any, x: Tensor) -> Tensor:
    """The same values in other memory."""
    how = draw(
        st.sampled_from(["as it is", "as it is", "apart", "rows apart", "turned", "shifted"])
    )
    if how == "apart":
        return x.repeat_interleave(2, -1)[..., ::2]
    if how == "rows apart":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if how == "turned":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "shifted":  # aligned to an element alone
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    return x


def restrided(draw: Any, call: Call) -> Call:
    return replace(call, tensors={n: lay(draw, x) for n, x in call.tensors.items()})


@st.composite
def dropout(draw: Any, *names: str) -> dict[str, Any]:
    given = {n: draw(st.sampled_from([0.1, 0.5])) for n in names if draw(st.integers(0, 3)) == 0}
    return {**given, "seed": draw(st.integers(0, 9))} if given else {}


def start(draw: Any) -> torch.dtype:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    return draw(st.sampled_from(DTYPES))


_EPS = {"eps": spoil.POSITIVE, "backend": spoil.BACKEND}
_DROP = {"dropout_p": spoil.PROBABILITY, "seed": spoil.SEED}
_NORM = {**_EPS, "weight": spoil.VECTOR, "bias": spoil.VECTOR, "x": spoil.FLOAT}
_SHAPE = {"normalized_shape": spoil.constants("nonsense", 8.0, [8.0], (), 7919, [0], -1)}
_ROLES: dict[str, dict[str, spoil.Ways]] = {
    "layer_norm": {**_NORM, **_SHAPE},
    "rms_norm": {n: w for n, w in {**_NORM, **_SHAPE}.items() if n != "bias"},
    "add_layer_norm": {**_NORM, **_DROP, "residual": spoil.VECTOR, "norm": spoil.CHOICE},
    "bias_act": {
        **_DROP,
        "x": spoil.FLOAT,
        "backend": spoil.BACKEND,
        **dict.fromkeys(("bias", "gate", "gate_bias"), spoil.VECTOR),
        "activation": spoil.CHOICE,
    },
    "layernorm_ffn": {
        **_DROP,
        **_EPS,
        "x": {**spoil.FLOAT, **spoil.LONGER},
        **{n: {**spoil.VECTOR, **spoil.DEEPER} for n in ("w1", "w2", "w_gate")},
        **dict.fromkeys(("b1", "b2", "b_gate", "norm_weight", "norm_bias"), spoil.VECTOR),
        "hidden_dropout_p": spoil.PROBABILITY,
        "norm": spoil.CHOICE,
        "activation": spoil.CHOICE,
        "recompute": spoil.CHOICE,
        "pre_norm": spoil.FLAG,
        "residual": spoil.FLAG,
    },
}


def as_valid(call: Call) -> Valid:
    return Valid(
        getattr(fastattn, call.op),
        {**call.tensors, **call.kwargs},
        lambda: judge(call, "cpu"),
        _ROLES[call.op],
    )


@st.composite
def norms(draw: Any) -> Valid:
    dtype = start(draw)
    op = draw(st.sampled_from(["layer_norm", "rms_norm", "add_layer_norm"]))
    more: dict[str, Any] = {"eps": draw(st.sampled_from([1e-5, 1e-3]))}
    affine = draw(st.booleans())
    if op == "add_layer_norm":
        more |= draw(dropout("dropout_p"))
        more["residual"] = draw(st.booleans())
        more["norm"] = draw(st.sampled_from(["layer", "rms"] if affine else ["layer", "rms", None]))
    params = draw(st.sampled_from([None, torch.float32]))
    call = norm_call(
        op, *draw(LEAD), draw(SIZES), dtype=dtype, params=params, affine=affine, **more
    )
    return as_valid(restrided(draw, call))


@st.composite
def bias_act(draw: Any) -> Valid:
    dtype = start(draw)
    call = act_call(
        *draw(LEAD), draw(SIZES), dtype=dtype, gated=draw(st.booleans()), bias=draw(st.booleans()),
        params=draw(st.sampled_from([None, torch.float32])),
        activation=draw(st.sampled_from(ACTIVATIONS)), **draw(dropout("dropout_p")),
    )  # fmt: skip
    return as_valid(restrided(draw, call))


@st.composite
def layernorm_ffn(draw: Any) -> Valid:
    dtype = start(draw)
    norm = draw(st.sampled_from(["layer", "rms", None]))
    call = ffn(
        *draw(LEAD), d=draw(SIZES), f=draw(SIZES), dtype=dtype, gated=draw(st.booleans()),
        biases=draw(st.booleans()), affine=draw(st.booleans()), norm=norm,
        param_dtype=draw(st.sampled_from([None, torch.float32])),
        activation=draw(st.sampled_from(ACTIVATIONS)), pre_norm=draw(st.booleans()),
        recompute=draw(st.sampled_from(["none", "activation", "all"])),
        **draw(dropout("dropout_p", "hidden_dropout_p")),
    )  # fmt: skip
    return as_valid(restrided(draw, call))
