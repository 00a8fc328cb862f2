"""``backend="torch"``: torch's own ops compute what ours do, or refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.encoder_layer import Weights, encoder_layer

randn = torch.randn
Args = dict[str, Any]


def _qkv(H: int = 4, Hk: int = 4) -> Args:
    return {"q": randn(2, H, 9, 16), "k": randn(2, Hk, 9, 16), "v": randn(2, Hk, 9, 16)}


def _mask() -> Tensor:
    mask = torch.rand(2, 1, 9, 9) > 0.4
    mask[:, :, 3] = False  # a row without keys
    return mask


def _ffn(**more: Any) -> Args:
    weights = {"w1": randn(48, 32) / 6, "b1": randn(48), "w2": randn(32, 48) / 7, "b2": randn(32)}
    return {"x": randn(3, 5, 32), **weights, "norm_weight": randn(32), **more}


def _recurrent(gates: int, layers: int = 1, D: int = 1, bias: bool = True, P: int = 8) -> Args:
    weights, features = [], 6
    for _ in range(layers):
        for _ in range(D):
            entry = [randn(gates * 8, features) / 3, randn(gates * 8, P) / 3]
            entry += [randn(gates * 8), randn(gates * 8)] if bias else []
            weights.append(tuple(entry + ([randn(P, 8)] if P != 8 else [])))
        features = P * D
    return {"x": randn(7, 3, 6), "state": None, "weights": weights, "bidirectional": D == 2}


def _cell(gates: int) -> Args:
    w = {"w_ih": randn(gates * 8, 6), "w_hh": randn(gates * 8, 8), "b_ih": randn(gates * 8)}
    return {"x": randn(3, 6), "state": None, **w, "b_hh": randn(gates * 8)}


def _layer(wide: bool = False, mask: bool = False, **more: Any) -> Args:
    D = 32
    q = [randn(3 * D, D) / 6, randn(3 * D), None, None, None, None]
    if wide:
        q = [x for _ in range(3) for x in (randn(D, D) / 6, randn(D))]
    rest = [randn(D, D) / 6, randn(D), randn(D), randn(D), randn(64, D) / 6, randn(64)]
    weights = Weights(*q, *rest, randn(D, 64) / 8, randn(D), randn(D), randn(D))
    numbers = {"heads": 4, "scale": 8**-0.5, "activation": "gelu", "eps": (1e-5, 1e-6)}
    return {"x": randn(2, 9, D), "mask": _mask() if mask else None, "weights": weights, **numbers,
            **more}  # fmt: skip


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], Args]]] = {
    "attention": (fastattn.attention, _qkv),
    "attention, causal": (fastattn.attention, lambda: {**_qkv(), "causal": True}),
    "attention, mask": (fastattn.attention, lambda: {**_qkv(), "mask": _mask()}),
    "attention, grouped": (fastattn.attention, lambda: {**_qkv(4, 2), "scale": 0.3}),
    "layer_norm": (
        fastattn.layer_norm,
        lambda: {"x": randn(4, 3, 20), "normalized_shape": (3, 20), "weight": randn(3, 20)},
    ),
    "rms_norm": (
        fastattn.rms_norm,
        lambda: {"x": randn(4, 20), "normalized_shape": 20, "weight": randn(20), "eps": 1e-6},
    ),
    "add_layer_norm": (
        fastattn.add_layer_norm,
        lambda: {"x": randn(4, 20), "residual": randn(4, 20), "weight": randn(20)},
    ),
    "bias_act": (
        fastattn.bias_act,
        lambda: {"x": randn(4, 20), "bias": randn(20), "gate": randn(4, 20), "activation": "silu"},
    ),
    "ffn": (fastattn.layernorm_ffn, _ffn),
    "ffn, behind": (fastattn.layernorm_ffn, lambda: _ffn(pre_norm=False, activation="relu")),
    "ffn, gated": (fastattn.layernorm_ffn, lambda: _ffn(norm="rms", w_gate=randn(48, 32) / 6)),
    "embedding": (
        fastattn.embedding,
        lambda: {
            "ids": torch.randint(9, (2, 5)),
            "weight": randn(9, 8),
            "norm": "layer",
            "position_weight": randn(6, 8),
            "padding_idx": 1,
        },
    ),
    "lstm": (fastattn.lstm, lambda: _recurrent(4)),
    "lstm, 2 x 2": (fastattn.lstm, lambda: _recurrent(4, 2, 2, bias=False)),
    "lstm, one sequence": (fastattn.lstm, lambda: {**_recurrent(4, 1, 2), "x": randn(7, 6)}),
    "lstm, states": (
        fastattn.lstm,
        lambda: {**_recurrent(4), "state": (randn(1, 7, 8), randn(1, 7, 8)), "batch_first": True},
    ),
    "gru": (fastattn.gru, lambda: _recurrent(3, 2)),
    "rnn": (fastattn.rnn, lambda: _recurrent(1)),  # relu: a kink moves with the rounding
    "lstm_cell": (fastattn.lstm_cell, lambda: _cell(4)),
    "gru_cell": (fastattn.gru_cell, lambda: {**_cell(3), "x": randn(6)}),
    "rnn_cell": (
        fastattn.rnn_cell,
        lambda: {**_cell(1), "state": randn(3, 8), "nonlinearity": "relu"},
    ),
}


def _map(x: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {k: _map(v, f) for k, v in x.items()}
    if isinstance(x, Weights):
        return Weights(*(_map(y, f) for y in x))
    return type(x)(_map(y, f) for y in x) if isinstance(x, (tuple, list)) else x


def _flat(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    x = x.values() if isinstance(x, dict) else x
    return (
        [t for y in x for t in _flat(y)] if not isinstance(x, (str, int, float, type(None))) else []
    )


def _outcome(fn: Callable[..., Any], args: Args, dtype: torch.dtype, **more: Any) -> list[Tensor]:
    """Outputs, and the gradients for fixed upstream ones, in fp64."""

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_() if x.is_floating_point() else x

    mine = _map(args, leaf)
    outputs = _flat(fn(**mine, **more))
    leaves = [t for t in _flat(mine) if t.requires_grad]
    torch.manual_seed(1)
    upstream = [randn(o.shape).to(dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    grads = [torch.zeros(()) if g is None else g for g in grads]
    return [t.detach().double() for t in (*outputs, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_torchs_own_ops_compute_the_same(name: str, dtype: torch.dtype) -> None:
    fn, make = CALLS[name]
    args = _map(make(), lambda x: x.to(dtype) if x.is_floating_point() else x)
    right = _outcome(fn, args, torch.float64, backend="reference")
    plain = _outcome(fn, args, dtype, backend="reference")
    found = _outcome(fn, args, dtype, backend="torch")
    for i, (r, p, f) in enumerate(zip(right, plain, found, strict=True)):
        size = r.norm() + 1e-30
        eps = torch.finfo(dtype).eps
        assert f.shape == r.shape, i
        assert (f - r).norm() / size <= 2 * (p - r).norm() / size + eps, (name, i)


LAYERS: dict[str, Args] = {
    "plain": {}, "mask": {"mask": True}, "in front": {"pre_norm": True, "causal": True},
    "apart": {"wide": True},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_stock_encoder_layer_computes_the_same(name: str) -> None:
    args = _layer(**LAYERS[name])
    with torch.no_grad():
        ours, stock = encoder_layer(**args), encoder_layer(**args, backend="torch")
    torch.testing.assert_close(stock, ours, rtol=1e-5, atol=2e-5)


REFUSED: dict[str, tuple[str, Args]] = {
    "attention, dropout": ("attention", {"dropout_p": 0.1}),
    "attention, window": ("attention", {"window": (2, 2)}),
    "attention, lse": ("attention", {"return_lse": True}),
    "attention, bias": ("attention", {"bias": torch.zeros(1, 1, 9, 9)}),
    "attention, lengths": ("attention", {"k_lens": torch.tensor([3, 4])}),
    "attention, corner": ("attention", {"causal": "bottom_right"}),
    "attention, both": ("attention, causal", {"mask": torch.ones(9, 9, dtype=torch.bool)}),
    "layer_norm, mixed": ("layer_norm", {"weight": torch.ones(3, 20, dtype=torch.bfloat16)}),
    "add_layer_norm, dropout": ("add_layer_norm", {"dropout_p": 0.1}),
    "ffn, dropout": ("ffn", {"hidden_dropout_p": 0.1}),
    "lstm, lengths": ("lstm", {"lengths": [7, 3, 2]}),
    "lstm, projected": ("lstm", {"weights": _recurrent(4, P=5)["weights"]}),
    "lstm, dropout": ("lstm", {"recurrent_dropout_p": 0.1}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_torchs_own_ops_refuse_what_means_something_else(name: str) -> None:
    of, more = REFUSED[name]
    fn, make = CALLS[of]
    with pytest.raises(ValueError, match=rf"fastattn::{fn.__name__}: backend='torch' cannot serve"):
        fn(**{**make(), **more}, backend="torch")


def test_recompute_is_ours_alone() -> None:
    args = _ffn(recompute="all")
    fastattn.layernorm_ffn(**args, backend="torch")
    args["x"].requires_grad_()
    with pytest.raises(ValueError, match="backend='torch' cannot serve"):
        fastattn.layernorm_ffn(**args, backend="torch")


def test_double_backward_and_transforms() -> None:
    q, k, v = (randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))

    def by_torch(*qkv: Tensor) -> Tensor:
        return fastattn.attention(*qkv, backend="torch")

    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradgradcheck(by_torch, leaves)
    each = torch.func.vmap(by_torch)(*(x[:, None] for x in leaves))
    torch.testing.assert_close(each[0], by_torch(*leaves))
    gradient = torch.func.grad(lambda q: by_torch(q, k, v).sum())(q)
    torch.testing.assert_close(gradient, torch.autograd.grad(by_torch(*leaves).sum(), q)[0])


def test_a_backward_may_run_twice() -> None:
    q = randn(1, 2, 5, 8, requires_grad=True)
    o = fastattn.attention(q, q, q, backend="torch")
    first, second = (torch.autograd.grad(o.sum(), q, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
