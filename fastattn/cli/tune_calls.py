"""The calls that ``fastattn tune FILE.json`` understands, on random tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a call may say, with its default; None = it must.
_SIZES: dict[str, dict[str, Any]] = {
    "attention": {"B": 1, "H": None, "Hk": 0, "S": None, "Sk": 0, "D": None, "causal": False},
    "layer_norm": {"rows": None, "D": None},
    "rms_norm": {"rows": None, "D": None},
    "add_layer_norm": {"rows": None, "D": None},
    "layernorm_ffn": {"rows": None, "D": None, "F": 0, "activation": "gelu", "pre_norm": True},
    "lstm": {"T": None, "B": 1, "I": None, "H": None, "layers": 1, "bidirectional": False},
    "gru": {"T": None, "B": 1, "I": None, "H": None, "layers": 1, "bidirectional": False},
}


def make(call: Any, training: bool) -> Callable[[], object]:
    """A thunk of the call.

    Args:
        call: {"op": ..., "dtype": "fp32" | "bf16" | "fp16", sizes by name}; 0 = as the other one
            (Hk as H, Sk as S, F as 4 D).

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(call, dict) or call.get("op") not in [*_SIZES]:  # a list has no hash
        raise ValueError(f"op must be one of {[*_SIZES]}, got {call!r}")
    op, known = call["op"], _SIZES[call["op"]]
    given = {k: v for k, v in call.items() if k not in ("op", "dtype", "device")}
    unknown = [k for k in given if k not in known]
    missing = [k for k, default in known.items() if default is None and k not in given]
    if unknown or missing:
        raise ValueError(f"{op} takes {[*known]}; unknown: {unknown}, missing: {missing}")
    for name, value in given.items():
        _check_value(op, name, value, known[name])
    if call.get("dtype", "fp32") not in [*_DTYPES]:
        raise ValueError(f"dtype must be one of {[*_DTYPES]}, got {call['dtype']!r}")
    device = call.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str):
        raise ValueError(f"device must be a string such as 'cuda:1', got {device!r}")

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(shape, dtype=_DTYPES[call.get("dtype", "fp32")], device=device)
        return (x / shape[-1] ** 0.5 if len(shape) == 2 else x).requires_grad_(training)

    return _thunk(op, {**known, **given}, leaf)


def _check_value(op: str, name: str, value: Any, default: Any) -> None:
    if isinstance(default, bool):
        good, what = isinstance(value, bool), "true or false"
    elif isinstance(default, str):
        good, what = isinstance(value, str), "a string"
    else:
        least = 0 if default == 0 else 1
        good = type(value) is int and value >= least
        what = f"an int of at least {least}"
    if not good:
        raise ValueError(f"{op}: {name} must be {what}, got {value!r}")


def _thunk(op: str, n: dict[str, Any], leaf: Callable[..., Tensor]) -> Callable[[], object]:
    if op == "attention":
        q = leaf(n["B"], n["H"], n["S"], n["D"])
        k, v = (leaf(n["B"], n["Hk"] or n["H"], n["Sk"] or n["S"], n["D"]) for _ in range(2))
        return lambda: fastattn.attention(q, k, v, causal=n["causal"])
    if op in ("lstm", "gru"):
        return _recurrent(op, n, leaf)
    D = n["D"]
    x, g, b = leaf(n["rows"], D), leaf(D), leaf(D)
    if op == "layer_norm":
        return lambda: fastattn.layer_norm(x, D, g, b)
    if op == "rms_norm":
        return lambda: fastattn.rms_norm(x, D, g)
    if op == "add_layer_norm":
        residual = leaf(n["rows"], D)
        return lambda: fastattn.add_layer_norm(x, residual, g, b)
    F = n["F"] or 4 * D
    w1, b1, w2, b2 = leaf(F, D), leaf(F), leaf(D, F), leaf(D)
    return lambda: fastattn.layernorm_ffn(
        x, w1, b1, w2, b2, norm_weight=g, norm_bias=b, activation=n["activation"],
        pre_norm=n["pre_norm"],
    )  # fmt: skip


def _recurrent(op: str, n: dict[str, Any], leaf: Callable[..., Tensor]) -> Callable[[], object]:
    gates, directions = {"lstm": 4, "gru": 3}[op], 2 if n["bidirectional"] else 1
    H, features = n["H"], n["I"]
    weights = []
    for _ in range(n["layers"]):
        for _ in range(directions):
            w = (leaf(gates * H, features), leaf(gates * H, H), leaf(gates * H), leaf(gates * H))
            weights.append(w)
        features = H * directions
    x = leaf(n["T"], n["B"], n["I"])
    function: Any = fastattn.lstm if op == "lstm" else fastattn.gru
    return lambda: function(x, None, weights, bidirectional=n["bidirectional"])
