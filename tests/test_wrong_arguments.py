"""Every public function with what people hand over by mistake: the message names the argument.

What each op refuses in detail is in its own tests; random mistakes are in tests/fuzz.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from robustness_calls import CALLS
from test_layernorm_ffn_ops import calls_of
from torch import Tensor, nn

import fastattn

X, W, IDS = torch.randn(4, 8), torch.randn(10, 8), torch.randint(10, (4,))
Q, K = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
CELL = [torch.randn(s) for s in ((32, 8), (32, 8), (32,), (32,))]
FFN = {"w1": torch.randn(16, 8), "b1": None, "w2": torch.randn(8, 16), "b2": None}
CU = torch.tensor([0, 4])
CACHE = torch.zeros(1, 2, 16, 8)

# Function, right arguments, those of them that are tensors, names of the rest.
RIGHT: dict[str, tuple[dict[str, Any], str, str]] = {
    "attention": ({"q": Q, "k": K, "v": K}, "q k v mask bias sinks alibi_slopes q_lens k_lens", ""),
    "attention_varlen": (
        {"q": Q[0].transpose(0, 1)[:4], "k": Q[0].transpose(0, 1)[:4],
         "v": Q[0].transpose(0, 1)[:4], "cu_seqlens_q": CU, "cu_seqlens_k": CU},
        "q k v cu_seqlens_q cu_seqlens_k mask bias", "max_seqlen_q max_seqlen_k",
    ),
    "attention_with_kv_cache": (
        {"q": Q, "k_cache": CACHE, "v_cache": CACHE.clone(), "cache_lens": torch.tensor([4]),
         "k": Q, "v": Q},
        "q k_cache v_cache cache_lens k v new_lens block_table cache_index mask alibi_slopes sinks",
        "rotary rotary_interleaved causal window softcap scale return_lse",
    ),
    "layer_norm": ({"x": X, "normalized_shape": 8}, "x weight bias", "eps normalized_shape"),
    "rms_norm": ({"x": X, "normalized_shape": 8}, "x weight", "eps normalized_shape"),
    "add_layer_norm": ({"x": X}, "x residual weight bias", "norm eps dropout_p seed"),
    "bias_act": ({"x": X}, "x bias gate", "activation dropout_p seed"),
    "layernorm_ffn": (
        {"x": X, **FFN}, "x w1 w2 b1 b2 w_gate norm_weight norm_bias",
        "norm eps activation pre_norm residual dropout_p hidden_dropout_p seed recompute",
    ),
    "embedding": (
        {"ids": IDS, "weight": W}, "ids weight",
        "position_offset scale norm eps dropout_p seed padding_idx scale_grad_by_freq",
    ),
    "linear_cross_entropy": (
        {"x": X, "weight": W, "target": IDS}, "x weight target bias",
        "ignore_index label_smoothing reduction",
    ),
    "lstm": ({"x": X, "state": None, "weights": CELL}, "x", "state weights dropout_p"),
    "gru": (
        {"x": X, "state": None, "weights": [w[:24] for w in CELL]}, "x", "state weights dropout_p",
    ),
    "rnn": (
        {"x": X, "state": None, "weights": [w[:8] for w in CELL]}, "x",
        "state weights nonlinearity",
    ),
    "lstm_cell": (
        {"x": X, "state": None, "w_ih": CELL[0], "w_hh": CELL[1]}, "x w_ih w_hh b_ih b_hh", "state",
    ),
    "gru_cell": (
        {"x": X, "state": None, "w_ih": CELL[0][:24], "w_hh": CELL[1][:24]},
        "x w_ih w_hh b_ih b_hh", "",
    ),
    "rnn_cell": (
        {"x": X, "state": None, "w_ih": CELL[0][:8], "w_hh": CELL[1][:8]},
        "x w_ih w_hh b_ih b_hh", "nonlinearity",
    ),
}  # fmt: skip
NO_TENSORS = {"list": [[1.0, 2.0]], "array": np.ones((4, 8), np.float32), "str": "x"}


def test_all_are_here() -> None:
    assert set(RIGHT) == set(CALLS)
    for name, (args, _, _) in RIGHT.items():
        getattr(fastattn, name)(**args)


@pytest.mark.parametrize("what", NO_TENSORS)
@pytest.mark.parametrize("name", RIGHT)
def test_no_tensor(name: str, what: str) -> None:
    args, tensors, _ = RIGHT[name]
    for wrong in tensors.split():
        with pytest.raises(TypeError, match=rf"fastattn::{name}: {wrong}\b.*must be a Tensor"):
            getattr(fastattn, name)(**{**args, wrong: NO_TENSORS[what]})


@pytest.mark.parametrize("what", [None, *NO_TENSORS])
@pytest.mark.parametrize(
    "layer",
    [
        fastattn.nn.LayerNorm(8), fastattn.nn.RMSNorm(8), fastattn.nn.Embedding(4, 8),
        fastattn.nn.LSTM(8, 8), fastattn.nn.LayerNormFFN(8, 16),
        fastattn.nn.TransformerEncoderLayer(8, 2, 16),
        fastattn.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_no_tensor_for_a_layer(layer: torch.nn.Module, what: str | None) -> None:
    with pytest.raises(TypeError, match="must be a Tensor, got"):
        layer(None if what is None else NO_TENSORS[what])


def test_no_tensors_for_attention() -> None:
    mha = fastattn.nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 8)
    for i, name in enumerate(("query", "key", "value")):
        given: list[Any] = [x, x, x]
        given[i] = None
        with pytest.raises(TypeError, match=f"{name} must be a Tensor, got NoneType"):
            mha(*given)


@pytest.mark.parametrize("what", [None, 3, torch.ones(2), torch.nn.Linear])
def test_no_module_to_undo(what: Any) -> None:
    with pytest.raises(TypeError, match="fastattn.unswap: model must be an nn.Module"):
        fastattn.unswap(what)


@pytest.mark.parametrize("name", RIGHT)
def test_sparse(name: str) -> None:
    args, tensors, _ = RIGHT[name]
    first = tensors.split()[0]
    sparse = args[first].to_sparse()
    with pytest.raises(TypeError, match=rf"{name}: {first}\b.*must be a strided tensor.*to_dense"):
        getattr(fastattn, name)(**{**args, first: sparse})


@pytest.mark.parametrize("name", RIGHT)
def test_another_type(name: str) -> None:
    args, _, others = RIGHT[name]
    for wrong in others.split():
        with pytest.raises((TypeError, ValueError), match=rf"fastattn::{name}: .*{wrong}\b"):
            getattr(fastattn, name)(**{**args, wrong: object()})
    for backend in (None, 3, ["cpu"], "tpu"):
        with pytest.raises((TypeError, ValueError), match="backend must be one of"):
            getattr(fastattn, name)(**args, backend=backend)
    with pytest.raises(TypeError, match="unexpected keyword"):
        getattr(fastattn, name)(**args, nonsense=1)


MISTAKES: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "shape_float": (TypeError, "normalized_shape must be an int or a sequence of ints, got 8.0",
                    lambda: fastattn.layer_norm(X, 8.0)),
    "shape_floats": (TypeError, "normalized_shape must be an int",
                     lambda: fastattn.rms_norm(X, [8.0])),
    "only": (TypeError, "only takes module-name globs and module classes, got 3",
             lambda: fastattn.swap(nn.Linear(2, 2), only=3)),
    "skip": (TypeError, "skip takes module-name globs",
             lambda: fastattn.swap(nn.Linear(2, 2), skip=3)),
    "no_columns": (ValueError, "weight must have classes and columns", lambda:
                   fastattn.linear_cross_entropy(X[:, :0], W[:, :0], IDS)),
    "no_classes": (ValueError, "weight must have classes and columns", lambda:
                   fastattn.linear_cross_entropy(X, W[:0], IDS)),
    "ignore_index": (TypeError, "ignore_index must be an int, got 1.5", lambda:
                     fastattn.linear_cross_entropy(X, W, IDS, ignore_index=1.5)),
    "target": (ValueError, r"target must be in \[0, 10\) or ignore_index = -100, got -1", lambda:
               fastattn.linear_cross_entropy(X, W, torch.full((4,), -1))),
    "target_of_one": (ValueError, "target must be in .* got 10", lambda:
                      fastattn.linear_cross_entropy(X[0], W, torch.tensor(10))),
    "activation": (ValueError, "LayerNormFFN: activation must be one of", lambda:
                   fastattn.nn.LayerNormFFN(8, 8, activation="swish")),
    "recompute": (ValueError, "LayerNormFFN: recompute must be one of", lambda:
                  fastattn.nn.LayerNormFFN(8, 8, recompute="some")),
    "w_hh_of_a_layer": (TypeError, r"weights\[0\]: w_hh must be a Tensor, got list", lambda:
                        fastattn.lstm(X, None, [(CELL[0], [[1.0]])])),
    "w_hh_of_the_second": (TypeError, r"weights\[1\]: w_hh must be a Tensor, got str", lambda:
                           fastattn.gru(X, None, [[w[:24] for w in CELL], (CELL[0][:24], "x")])),
    "w_hh_no_matrix": (ValueError, r"w_hh must be a matrix, got a Tensor of shape \(8,\)", lambda:
                       fastattn.rnn_cell(X, None, CELL[0][:8], X[0])),
    "dropout": (ValueError, r"LayerNormFFN: dropout must be in \[0, 1\)", lambda:
                fastattn.nn.LayerNormFFN(8, 8, 1.5)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake: str) -> None:
    kind, words, call = MISTAKES[mistake]
    with pytest.raises(kind, match=words):
        call()


def test_numpy_ints_are_sizes() -> None:
    assert fastattn.layer_norm(X, np.int64(8)).shape == X.shape  # type: ignore[arg-type]
    assert fastattn.layer_norm(X, (np.int32(8),)).shape == X.shape  # type: ignore[arg-type]


# ------------------------------------------- direct calls of a backward with another's statistics


def _statistics(x: Tensor) -> dict[str, Tensor]:
    """As many numbers as there are rows, but in less memory than fp32 has."""
    return {"half": x.half(), "expanded": x[:1].expand(x.shape), "short": x[:-1]}


@pytest.mark.parametrize("how", ["half", "expanded", "short"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_statistics_of_another(name: str, how: str) -> None:
    op, args = calls_of(name)["add_layer_norm_bwd"]
    for i, what in ((3, "mean"), (4, "rstd")):
        if not args[i].numel():
            continue
        wrong = [_statistics(x)[how] if j == i else x for j, x in enumerate(args)]
        with pytest.raises(RuntimeError, match=f"{what} must be the forward's"):
            op(*wrong)


@pytest.mark.parametrize("how", ["half", "expanded", "short"])
def test_statistics_of_another_embedding(how: str) -> None:
    from test_attention_ops import op_calls_of

    def run() -> None:
        weight = W.clone().requires_grad_()
        fastattn.embedding(IDS, weight, norm="layer").sum().backward()

    op, args = op_calls_of(run)["embedding_bwd"]
    for i, what in ((10, "mean"), (11, "rstd")):
        wrong = [_statistics(x)[how] if j == i else x for j, x in enumerate(args)]
        with pytest.raises(RuntimeError, match=f"{what} must be the forward's"):
            op(*wrong)


def test_gated_without_the_gate_of_the_forward() -> None:
    op, args = calls_of("ffn_gated")["layernorm_ffn_bwd"]
    g = 15
    assert args[g].numel() == args[g - 1].numel() > 0
    with pytest.raises(RuntimeError, match="g must be the forward's"):
        op(*[x[:0] if i == g else x for i, x in enumerate(args)])


# ------------------------------------------------------------ swap with a backend of few kernels


class Parts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(width), nn.RMSNorm(width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)


@pytest.mark.parametrize("width", [64, 512])
def test_what_cuda_has_no_kernel_of_takes_auto(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known when the model is swapped, and said; not at its first call."""
    model = Parts(width)
    report = fastattn.swap(model, backend="cuda")
    assert [n for n in report.notes if "norm: no kernel in backend='cuda', so 'auto'" in n]
    x = torch.randn(2, 3, width)
    model.rms(model.norm(x))
    assert fastattn.swap(model, backend="cuda").replaced == []  # it is all that already
    asked: dict[str, list[str]] = {}
    # What the layer asks for; nothing can run "cuda" here.
    from fastattn.nn import transformer

    def ffn(*args: Any, backend: str, **kwargs: Any) -> Tensor:
        asked.setdefault("ffn", []).append(backend)
        return x

    monkeypatch.setattr(transformer, "layernorm_ffn", ffn)
    model.layer.self_attn.backend = "auto"
    model.layer(x)
    assert asked["ffn"] == ["cuda" if width <= 256 else "auto"]
    fastattn.swap(model, backend="cpu")
    assert (model.norm.backend, model.layer.norm1.backend) == ("cpu", "cpu")
