"""Bad input to layernorm_ffn and its parts: the error names op, argument, what it got and what is
right; wrong shapes are named both."""

from typing import Any

import pytest
import torch
from torch import ones, zeros

import fastattn

VE, TE = ValueError, TypeError
X = zeros(2, 5, 8)
GOOD: dict[str, dict[str, Any]] = {
    "layer_norm": {"x": X, "normalized_shape": (8,), "weight": ones(8)},
    "rms_norm": {"x": X, "normalized_shape": (8,), "weight": ones(8)},
    "add_layer_norm": {"x": X, "residual": X, "weight": ones(8)},
    "bias_act": {"x": X, "bias": ones(8)},
    "layernorm_ffn": {
        "x": X, "w1": ones(12, 8), "b1": ones(12), "w2": ones(8, 12), "b2": ones(8),
        "norm_weight": ones(8),
    },
}  # fmt: skip

# (op, error, words of the message, arguments that replace those of a good call)
BAD: list[tuple[str, type[Exception], tuple[str, ...], dict[str, Any]]] = [
    ("layer_norm", TE, ("x", "Tensor", "list"), {"x": [1.0]}),
    ("layer_norm", TE, ("x", "float32", "int64"), {"x": X.long()}),
    ("layer_norm", VE, ("x", "()"), {"x": zeros(())}),
    ("layer_norm", VE, ("normalized_shape", "(7,)", "(2, 5, 8)"), {"normalized_shape": 7}),
    ("layer_norm", VE, ("normalized_shape", "()"), {"normalized_shape": ()}),
    ("layer_norm", VE, ("weight", "(8,)", "(9,)"), {"weight": ones(9)}),
    ("layer_norm", TE, ("weight", "Tensor", "float"), {"weight": 1.0}),
    ("layer_norm", TE, ("weight", "float64"), {"weight": ones(8).double()}),
    ("layer_norm", VE, ("bias", "device", "meta"), {"bias": ones(8, device="meta")}),
    ("layer_norm", VE, ("eps", "-1"), {"eps": -1.0}),
    ("layer_norm", TE, ("eps", "'a'"), {"eps": "a"}),
    ("layer_norm", VE, ("backend", "'gpu'"), {"backend": "gpu"}),
    ("layer_norm", VE, ("triton", "takes CUDA tensors"), {"backend": "triton"}),
    ("layer_norm", VE, ("cpu", "float64"), {"x": X.double(), "weight": None, "backend": "cpu"}),
    ("rms_norm", VE, ("weight", "(8,)", "(1, 8)"), {"weight": ones(1, 8)}),
    ("add_layer_norm", VE, ("residual", "(2, 5, 8)", "(2, 5, 9)"), {"residual": zeros(2, 5, 9)}),
    ("add_layer_norm", TE, ("residual", "bfloat16"), {"residual": X.bfloat16()}),
    ("add_layer_norm", VE, ("norm", "'batch'", "layer"), {"norm": "batch"}),
    ("add_layer_norm", VE, ("weight", "norm=None"), {"norm": None}),
    ("add_layer_norm", VE, ("dropout_p", "1.0"), {"dropout_p": 1.0}),
    ("add_layer_norm", TE, ("seed", "'a'"), {"dropout_p": 0.5, "seed": "a"}),
    ("bias_act", VE, ("activation", "'swish'", "silu"), {"activation": "swish"}),
    ("bias_act", VE, ("gate", "(2, 5, 8)", "(5, 8)"), {"gate": zeros(5, 8)}),
    ("bias_act", TE, ("gate", "float16"), {"gate": X.half()}),
    ("bias_act", VE, ("gate_bias", "gate"), {"gate_bias": ones(8)}),
    ("layernorm_ffn", VE, ("x", "(2, 5, 8)", "(12, 9)"), {"w1": ones(12, 9)}),
    ("layernorm_ffn", VE, ("w2", "(8, 11)", "(12, 8)"), {"w2": ones(8, 11)}),
    ("layernorm_ffn", VE, ("w2", "(9, 12)", "(2, 5, 8)", "residual"), {"w2": ones(9, 12)}),
    ("layernorm_ffn", VE, ("w1", "(out, in)", "(8,)"), {"w1": ones(8)}),
    ("layernorm_ffn", TE, ("w2", "float32", "bfloat16"), {"w2": ones(8, 12).bfloat16()}),
    ("layernorm_ffn", TE, ("w1", "bfloat16", "float16"), {
        "x": X.bfloat16(), "w1": ones(12, 8).half(), "w2": ones(8, 12).half()}),
    ("layernorm_ffn", VE, ("w_gate", "(12, 8)", "(8, 12)"), {"w_gate": ones(8, 12)}),
    ("layernorm_ffn", VE, ("b_gate", "w_gate"), {"b_gate": ones(12)}),
    ("layernorm_ffn", VE, ("b1", "(12,)", "(8,)"), {"b1": ones(8)}),
    ("layernorm_ffn", VE, ("b2", "(8,)", "(12,)"), {"b2": ones(12)}),
    ("layernorm_ffn", VE, ("norm_weight", "(8,)", "(12,)"), {"norm_weight": ones(12)}),
    ("layernorm_ffn", VE, ("norm_weight", "norm=None"), {"norm": None}),
    ("layernorm_ffn", VE, ("activation", "'identity'"), {"activation": "identity"}),
    ("layernorm_ffn", VE, ("recompute", "'some'", "activation"), {"recompute": "some"}),
    ("layernorm_ffn", VE, ("hidden_dropout_p", "-0.1"), {"hidden_dropout_p": -0.1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "error", "words", "change"), BAD, ids=[f"{b[0]}-{'-'.join(b[3])}" for b in BAD]
)
def test_error(op: str, error: Any, words: tuple[str, ...], change: dict[str, Any]) -> None:
    with pytest.raises(error) as raised:
        getattr(fastattn, op)(**{**GOOD[op], **change})
    message = str(raised.value)
    assert message.startswith(f"fastattn::{op}: "), message
    for word in words:
        assert word in message, (word, message)


@pytest.mark.parametrize("op", GOOD)
def test_the_good_calls_are_good(op: str) -> None:
    getattr(fastattn, op)(**GOOD[op])


def test_direct_calls_of_the_ops_stay_inside_their_tensors() -> None:
    """Below the public functions the bindings check once more."""
    ops = torch.ops.fastattn
    norm = (None, None, None, 1, 1e-5, 0.0)
    with pytest.raises(RuntimeError, match=r"8.*\(2, 5\)"):
        ops.add_layer_norm_fwd(zeros(2, 5), None, *norm, 8, 3)
    with pytest.raises(RuntimeError, match=r"residual.*\(2, 8\).*\(3, 8\)"):
        ops.add_layer_norm_fwd(zeros(2, 8), zeros(3, 8), *norm, 8, 3)
    with pytest.raises(RuntimeError, match=r"weight.*8.*\(7,\)"):
        ops.add_layer_norm_fwd(zeros(2, 8), None, ones(7), *norm[1:], 8, 3)
    with pytest.raises(RuntimeError, match=r"gate.*\(2, 8\).*\(8, 2\)"):
        ops.bias_act_fwd(zeros(2, 8), None, zeros(8, 2), None, None, 0, 0.0)
    numbers = (None, 1, 1e-5, 0, True, True, 0.0, 0.0, 0)
    none = (None,) * 4
    with pytest.raises(RuntimeError, match=r"w2.*\(12, 8\).*\(8, 11\)"):
        ops.layernorm_ffn_fwd(X, ones(12, 8), None, ones(8, 11), None, *none, *numbers)
    with pytest.raises(RuntimeError, match=r"x.*\(12, 9\).*\(2, 5, 8\)"):
        ops.layernorm_ffn_fwd(X, ones(12, 9), None, ones(8, 12), None, *none, *numbers)
    with pytest.raises(RuntimeError, match="seed"):
        ops.bias_act_fwd(zeros(2, 8), None, None, None, None, 0, 0.5)


def test_a_backward_wants_what_its_forward_saved() -> None:
    ops = torch.ops.fastattn
    x, stats = torch.randn(5, 8), torch.ones(5)
    with pytest.raises(RuntimeError, match="bias must have 8 elements"):
        ops.add_layer_norm_bwd(
            x, None, x, stats, stats, torch.ones(8), torch.ones(1), None, 1, 0.0, 8, 0, 15
        )
    w1, w2 = torch.randn(12, 8), torch.randn(8, 12)
    inputs = (x, w1, None, w2, None, None, None, None, None, None)
    for pre_norm, drop, words in ((True, 1, "mean and rstd"), (True, 2, "mean and rstd"),
                                  (False, 0, "s must be the forward's")):  # fmt: skip
        numbers = (1, 1e-5, 0, pre_norm, True, 0.0, 0.0)
        saved = list(ops.layernorm_ffn_fwd(*inputs, *numbers, 3)[1:])
        ops.layernorm_ffn_bwd(x, *inputs, *saved, *numbers, 11)
        saved[drop] = torch.empty(0)
        with pytest.raises(RuntimeError, match=words):
            ops.layernorm_ffn_bwd(x, *inputs, *saved, *numbers, 11)
