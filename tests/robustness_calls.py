"""A small call of every public op: from a seed to outputs and gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn

Made = tuple[Callable[..., Any], list[Tensor], dict[str, Any]]


def _generator(seed: int) -> torch.Generator:
    """Of its own: threads share torch's."""
    return torch.Generator().manual_seed(seed)


def _attention(g: torch.Generator, *, packed: bool = False) -> Made:
    shape = (30, 2, 16) if packed else (2, 2, 30, 16)
    qkv = [torch.randn(shape, generator=g) for _ in range(3)]
    if not packed:
        return fastattn.attention, qkv, {"causal": True}
    cu = torch.tensor([0, 11, 30])
    return fastattn.attention_varlen, qkv, {"cu_seqlens_q": cu, "cu_seqlens_k": cu}


def _cached(g: torch.Generator) -> Made:
    """The caches are this call's own: it writes them."""
    tensors = [torch.randn(2, 2, n, 16, generator=g) for n in (3, 40, 40, 3, 3)]
    lens = torch.tensor([5, 30])
    return (
        lambda q, kc, vc, k, v: fastattn.attention_with_kv_cache(
            q, kc, vc, cache_lens=lens, k=k, v=v, return_lse=True
        ), tensors, {},
    )  # fmt: skip


def _norm(g: torch.Generator, name: str) -> Made:
    x, w, b = (torch.randn(s, generator=g) for s in ((9, 48), (48,), (48,)))
    if name == "add_layer_norm":
        return fastattn.add_layer_norm, [x, x.flip(0), w, b], {}
    if name == "layer_norm":
        return lambda x, w, b: fastattn.layer_norm(x, 48, w, b), [x, w, b], {}
    return lambda x, w: fastattn.rms_norm(x, 48, w), [x, w], {}


def _bias_act(g: torch.Generator) -> Made:
    return fastattn.bias_act, [torch.randn(s, generator=g) for s in ((9, 48), (48,))], {}


def _ffn(g: torch.Generator) -> Made:
    shapes = ((20, 48), (96, 48), (96,), (48, 96), (48,))
    return fastattn.layernorm_ffn, [torch.randn(s, generator=g) for s in shapes], {}


def _embedding(g: torch.Generator) -> Made:
    ids = torch.randint(30, (2, 9), generator=g)
    tables = [torch.randn(s, generator=g) for s in ((30, 24), (40, 24))]
    return (
        lambda w, p: fastattn.embedding(ids, w, position_weight=p, norm="layer"), tables, {},
    )  # fmt: skip


def _cross_entropy(g: torch.Generator) -> Made:
    target = torch.randint(50, (12,), generator=g)
    given = [torch.randn(s, generator=g) for s in ((12, 24), (50, 24))]
    return lambda x, w: fastattn.linear_cross_entropy(x, w, target), given, {}


def _recurrent(g: torch.Generator, name: str) -> Made:
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[name.removesuffix("_cell")]
    shapes = [(gates * 16, 8), (gates * 16, 16), (gates * 16,), (gates * 16,)]
    weights = [torch.randn(s, generator=g) / 4 for s in shapes]
    op = getattr(fastattn, name)
    if name.endswith("_cell"):
        x = torch.randn(3, 8, generator=g)
        return lambda x, *w: op(x, None, *w), [x, *weights], {}
    x = torch.randn(6, 3, 8, generator=g)
    return lambda x, *w: op(x, None, list(w)), [x, *weights], {}


_MADE: dict[str, Callable[[torch.Generator], Made]] = {
    "attention": _attention,
    "attention_varlen": lambda g: _attention(g, packed=True),
    "attention_with_kv_cache": _cached,
    **{n: lambda g, n=n: _norm(g, n) for n in ("layer_norm", "rms_norm", "add_layer_norm")},
    "bias_act": _bias_act,
    "layernorm_ffn": _ffn,
    "embedding": _embedding,
    "linear_cross_entropy": _cross_entropy,
    **{
        n: lambda g, n=n: _recurrent(g, n)
        for n in ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")
    },
}


def _flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [x for part in out for x in _flat(part)]


def _with_gradients(name: str, seed: int) -> list[Tensor]:
    fn, tensors, kwargs = _MADE[name](_generator(seed))
    leaves = [x.requires_grad_() for x in tensors]
    outputs = _flat(fn(*leaves, **kwargs))
    wanted = [o for o in outputs if o.requires_grad]
    grads = torch.autograd.grad(wanted, leaves, [torch.ones_like(o) for o in wanted])
    return [o.detach() for o in outputs] + list(grads)


def forward_only(name: str) -> Callable[[int], list[Tensor]]:
    def call(seed: int) -> list[Tensor]:
        fn, tensors, kwargs = _MADE[name](_generator(seed))
        with torch.no_grad():
            return _flat(fn(*tensors, **kwargs))

    return call


CALLS: dict[str, Callable[[int], list[Tensor]]] = {
    name: lambda seed, name=name: _with_gradients(name, seed) for name in _MADE
}
CALLS["attention_with_kv_cache"] = forward_only("attention_with_kv_cache")  # it has no backward
