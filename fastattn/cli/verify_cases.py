"""The calls that ``fastattn verify`` makes: every op with its features, on small fixed inputs.

Sizes give several tiles of every kernel and a partial one. A case's function is given the op, ours
or the reference's, so that both get the very same arguments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Named tensors, what is differentiable first; then what the op returns, by name.
Tensors = dict[str, Tensor]
Call = Callable[[Callable[..., Any], Tensors, dict[str, Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """op: a name of ``fastattn``. shapes: of the floating point inputs, which all get gradients
    where the op has them. head_dim: what the table of backends asks for."""

    op: str
    what: str
    shapes: dict[str, tuple[int, ...]]
    call: Call
    head_dim: int = 0
    gradients: bool = True

    def inputs(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        gen = torch.Generator().manual_seed(1)

        def values(name: str, shape: tuple[int, ...]) -> Tensor:
            # Products of weights of variance 1 would saturate gates and softmax.
            matrix = name.startswith("w") and len(shape) == 2
            scale = shape[-1] ** -0.5 if matrix else 1.0
            return (torch.randn(shape, generator=gen) * scale).to(device, dtype)

        return {name: values(name, shape) for name, shape in self.shapes.items()}


def _ints(like: Tensor, *values: int) -> Tensor:
    return torch.tensor(values, device=like.device)


def _attention(**features: Any) -> Call:
    """lens: valid keys of each sequence; the rest as attention takes it."""

    def call(op: Callable[..., Any], t: Tensors, backend: dict[str, Any]) -> dict[str, Tensor]:
        given = dict(features)
        q = t["q"]
        if "k_lens" in given:
            given["k_lens"] = _ints(q, *given["k_lens"])
        if "alibi_slopes" in given:
            given["alibi_slopes"] = torch.linspace(0.1, 0.5, q.shape[1], device=q.device).to(q)
        more = {name: t[name] for name in ("bias", "sinks") if name in t}
        o, lse = op(q, t["k"], t["v"], **more, **given, return_lse=True, **backend)
        return {"o": o, "lse": lse}

    return call


def _varlen(op: Callable[..., Any], t: Tensors, backend: dict[str, Any]) -> dict[str, Tensor]:
    cu_q, cu_k = _ints(t["q"], 0, 60, 60, 150), _ints(t["q"], 0, 70, 71, 170)
    return {
        "o": op(t["q"], t["k"], t["v"], cu_q, cu_k, causal="bottom_right", window=(40, 0),
                **backend)
    }  # fmt: skip


def _cached(paged: bool, rows: int) -> Call:
    """Attention of `rows` newest rows, appended to a cache that holds 70 and 3 keys."""

    def call(op: Callable[..., Any], t: Tensors, backend: dict[str, Any]) -> dict[str, Tensor]:
        caches = [t["k_cache"].clone(), t["v_cache"].clone()]  # they are written
        angles = torch.arange(128, device=t["q"].device)[:, None] / 10.0 ** torch.arange(
            8, device=t["q"].device
        )
        table = _ints(t["q"], *range(5, -1, -1)).reshape(2, 3) if paged else None
        o, lse = op(
            t["q"][:, :, :rows], *caches, cache_lens=_ints(t["q"], 70, 3), k=t["k"][:, :, :rows],
            v=t["v"][:, :, :rows], block_table=table, rotary=(angles.cos(), angles.sin()),
            window=(60, 0), return_lse=True, **backend,
        )  # fmt: skip
        return {"o": o, "lse": lse, "k_cache": caches[0], "v_cache": caches[1]}

    return call


def _one(*names: str, **given: Any) -> Call:
    """An op that takes these tensors in order, the others by name, and returns one."""

    def call(op: Callable[..., Any], t: Tensors, backend: dict[str, Any]) -> dict[str, Tensor]:
        rest = {name: x for name, x in t.items() if name not in names}
        return {"y": op(*(t[name] for name in names), **rest, **given, **backend)}

    return call


def _ffn(**given: Any) -> Call:
    def call(op: Callable[..., Any], t: Tensors, backend: dict[str, Any]) -> dict[str, Tensor]:
        args = (t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2"))
        rest = {n: x for n, x in t.items() if n not in ("x", "w1", "b1", "w2", "b2")}
        return {"y": op(*args, **rest, **given, **backend)}

    return call


def _norm(**given: Any) -> Call:
    def call(op: Callable[..., Any], t: Tensors, backend: dict[str, Any]) -> dict[str, Tensor]:
        rest = {name: x for name, x in t.items() if name != "x"}
        return {"y": op(t["x"], t["x"].shape[-1:], **rest, **given, **backend)}

    return call


def _add_norm(op: Callable[..., Any], t: Tensors, backend: dict[str, Any]) -> dict[str, Tensor]:
    y, s = op(t["x"], t["residual"], t["weight"], t["bias"], dropout_p=0.2, seed=7, **backend)
    return {"y": y, "s": s}


def _embedding(op: Callable[..., Any], t: Tensors, backend: dict[str, Any]) -> dict[str, Tensor]:
    ids = (torch.arange(120, device=t["weight"].device) * 17 % 50).reshape(4, 30)
    tables = {name: x for name, x in t.items() if name != "weight"}
    return {"y": op(ids, t["weight"], **tables, norm="layer", dropout_p=0.1, seed=7, **backend)}


def _cross_entropy(
    op: Callable[..., Any], t: Tensors, backend: dict[str, Any]
) -> dict[str, Tensor]:
    target = torch.arange(len(t["x"]), device=t["x"].device) * 31 % t["weight"].shape[0]
    target[::5] = -100
    return {"loss": op(t["x"], t["weight"], target, t["bias"], label_smoothing=0.1, **backend)}


def _recurrent(layers: int, with_state: int, **given: Any) -> Call:
    def call(op: Callable[..., Any], t: Tensors, backend: dict[str, Any]) -> dict[str, Tensor]:
        weights = [
            tuple(t[f"{name}{i}"] for name in ("w_ih", "w_hh", "b_ih", "b_hh"))
            for i in range(layers)
        ]
        lengths = torch.tensor([20, 0, 13, 7, 20], device=t["x"].device)
        state: Any = t["h"] if with_state == 1 else (t["h"], t["c"])
        y, last = op(t["x"], state, weights, lengths=lengths, **given, **backend)
        states = (last,) if isinstance(last, Tensor) else last
        return {"y": y} | dict(zip(("h_n", "c_n"), states, strict=False))

    return call


def _cell(with_state: int) -> Call:
    def call(op: Callable[..., Any], t: Tensors, backend: dict[str, Any]) -> dict[str, Tensor]:
        state: Any = t["h"] if with_state == 1 else (t["h"], t["c"])
        found = op(t["x"], state, *(t[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh")), **backend)
        states = (found,) if isinstance(found, Tensor) else found
        return dict(zip(("h", "c"), states, strict=False))

    return call


def _qkv(D: int, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"q": (2, 4, 150, D), "k": (2, 2, 170, D), "v": (2, 2, 170, D), **more}


def _newest(cache: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    new = (2, 2, 12, 64)
    return {"q": (2, 8, 12, 64), "k": new, "v": new, "k_cache": cache, "v_cache": cache}


def _weights(gates: int, inputs: int, H: int, directions: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(directions):
        shapes |= {
            f"w_ih{i}": (gates * H, inputs),
            f"w_hh{i}": (gates * H, H),
            f"b_ih{i}": (gates * H,),
            f"b_hh{i}": (gates * H,),
        }
    return shapes


def _sequence(gates: int, states: int) -> dict[str, tuple[int, ...]]:
    T, B, inputs, H, directions = 20, 5, 24, 40, 2
    state = dict.fromkeys(("h", "c")[:states], (directions, B, H))
    return {"x": (T, B, inputs), **state, **_weights(gates, inputs, H, directions)}


def _step(gates: int, states: int) -> dict[str, tuple[int, ...]]:
    B, inputs, H = 5, 24, 40
    shapes = {name.rstrip("0"): s for name, s in _weights(gates, inputs, H, 1).items()}
    return {"x": (B, inputs), **dict.fromkeys(("h", "c")[:states], (B, H)), **shapes}


_X: dict[str, tuple[int, ...]] = {"x": (70, 96)}
_BLOCK = {**_X, "w1": (200, 96), "b1": (200,), "w2": (96, 200), "b2": (96,)}

CASES = (
    Case("attention", "plain, D 64", _qkv(64), _attention(), 64),
    Case("attention", "causal, window, D 128", _qkv(128), _attention(causal=True, window=(50, 0)),
         128),
    Case("attention", "bias, sinks, ALiBi, softcap", _qkv(64, bias=(1, 4, 150, 170), sinks=(4,)),
         _attention(alibi_slopes=True, softcap=5.0), 64),
    Case("attention", "lengths, dropout", _qkv(64),
         _attention(k_lens=(170, 33), dropout_p=0.2, seed=7), 64),
    Case("attention_varlen", "packed, causal, window",
         {"q": (150, 4, 64), "k": (170, 2, 64), "v": (170, 2, 64)}, _varlen, 64),
    Case("attention_with_kv_cache", "a token, rotary, window", _newest((2, 2, 96, 64)),
         _cached(False, 1), 64, gradients=False),
    Case("attention_with_kv_cache", "several rows, pages", _newest((6, 2, 32, 64)),
         _cached(True, 12), 64, gradients=False),
    Case("layernorm_ffn", "layer norm, GELU, dropout",
         {**_BLOCK, "norm_weight": (96,), "norm_bias": (96,)},
         _ffn(dropout_p=0.1, hidden_dropout_p=0.1, seed=7), 96),
    Case("layernorm_ffn", "RMS norm, SwiGLU",
         {**_X, "w1": (200, 96), "w2": (96, 200), "w_gate": (200, 96), "norm_weight": (96,)},
         _ffn(norm="rms", activation="silu"), 96),
    Case("layer_norm", "weight, bias", {**_X, "weight": (96,), "bias": (96,)}, _norm()),
    Case("rms_norm", "weight", {**_X, "weight": (96,)}, _norm(eps=1e-6)),
    Case("add_layer_norm", "dropout",
         {**_X, "residual": (70, 96), "weight": (96,), "bias": (96,)}, _add_norm),
    Case("bias_act", "GEGLU", {**_X, "gate": (70, 96), "bias": (96,), "gate_bias": (96,)},
         _one("x")),
    Case("embedding", "words, positions, norm, dropout",
         {"weight": (50, 96), "position_weight": (64, 96), "norm_weight": (96,),
          "norm_bias": (96,)}, _embedding),
    Case("linear_cross_entropy", "bias, ignored rows, smoothing",
         {**_X, "weight": (300, 96), "bias": (300,)}, _cross_entropy),
    Case("lstm", "two directions, lengths", _sequence(4, 2),
         _recurrent(2, 2, bidirectional=True)),
    Case("gru", "two directions, lengths", _sequence(3, 1),
         _recurrent(2, 1, bidirectional=True)),
    Case("rnn", "two directions, lengths", _sequence(1, 1),
         _recurrent(2, 1, bidirectional=True)),
    Case("lstm_cell", "one step", _step(4, 2), _cell(2)),
    Case("gru_cell", "one step", _step(3, 1), _cell(1)),
    Case("rnn_cell", "one step", _step(1, 1), _cell(1)),
)  # fmt: skip
