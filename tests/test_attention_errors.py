"""Bad input: the error names the op, the argument, what it got and what is right."""

import re
from typing import Any

import pytest
import torch
from torch import ones, tensor

import fastattn


def q_(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*(shape or (2, 4, 5, 8)), dtype=dtype)


def kv_(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*(shape or (2, 2, 7, 8)), dtype=dtype)


VE, TE = ValueError, TypeError
META = torch.device("meta")

# id: (error, words that its message has, arguments that replace those of a good call)
BAD: dict[str, tuple[type[Exception], tuple[str, ...], dict[str, Any]]] = {
    "q_not_tensor": (TE, ("q", "Tensor", "list"), {"q": [1.0]}),
    "k_none": (TE, ("k", "Tensor", "NoneType"), {"k": None}),
    "q_dims": (VE, ("q", "4", "(5, 8)"), {"q": q_(5, 8)}),
    "v_dims": (VE, ("v", "4", "(2, 7, 8)"), {"v": kv_(2, 7, 8)}),
    "q_dtype_int": (TE, ("q", "float32", "int64"), {"q": q_(dtype=torch.int64)}),
    "q_dtype_complex": (TE, ("q", "complex64"), {"q": q_(dtype=torch.complex64)}),
    "k_dtype": (TE, ("k", "float32", "bfloat16"), {"k": kv_(dtype=torch.bfloat16)}),
    "v_dtype": (TE, ("v", "float32", "float64"), {"v": kv_(dtype=torch.float64)}),
    "k_device": (VE, ("k", "cpu", "meta"), {"k": kv_().to(META)}),
    "v_device": (VE, ("v", "cpu", "meta"), {"v": kv_().to(META)}),
    "head_dim": (VE, ("k", "head_dim 8", "9"), {"k": kv_(2, 2, 7, 9)}),
    "head_dim_zero": (VE, ("head_dim", "1"), {"v": kv_(2, 2, 7, 0)}),
    "batch": (VE, ("batch", "2", "3"), {"k": kv_(3, 2, 7, 8)}),
    "batch_v": (VE, ("batch", "2", "3"), {"v": kv_(3, 2, 7, 8)}),
    "heads": (VE, ("heads", "multiple", "4", "3"), {"k": kv_(2, 3, 7, 8), "v": kv_(2, 3, 7, 8)}),
    "heads_kv": (VE, ("v", "2 heads", "1"), {"v": kv_(2, 1, 7, 8)}),
    "heads_fewer_than_kv": (VE, ("heads", "4", "8"),
                            {"k": kv_(2, 8, 7, 8), "v": kv_(2, 8, 7, 8)}),
    "length_v": (VE, ("v", "length 7", "6"), {"v": kv_(2, 2, 6, 8)}),
    "mask_float": (TE, ("mask", "bool", "float32", "bias"), {"mask": torch.zeros(5, 7)}),
    "mask_int": (TE, ("mask", "bool", "int64"), {"mask": torch.zeros(5, 7).long()}),
    "mask_not_tensor": (TE, ("mask", "Tensor", "bool"), {"mask": True}),
    "mask_shape": (VE, ("mask", "(2, 4, 5, 7)", "(7, 5)"), {"mask": ones(7, 5) > 0}),
    "mask_of_keys": (VE, ("mask", "(2, 4, 5, 7)", "(2, 7)"), {"mask": ones(2, 7) > 0}),
    "mask_rank": (VE, ("mask", "(1, 2, 4, 5, 7)"), {"mask": ones(1, 2, 4, 5, 7) > 0}),
    "mask_device": (VE, ("mask", "cpu", "meta"), {"mask": (ones(5, 7) > 0).to(META)}),
    "bias_bool": (TE, ("bias", "float", "bool", "mask"), {"bias": ones(5, 7) > 0}),
    "bias_int": (TE, ("bias", "float", "int32"), {"bias": ones(5, 7).int()}),
    "bias_shape": (VE, ("bias", "(2, 4, 5, 7)", "(3, 1, 1, 7)"), {"bias": ones(3, 1, 1, 7)}),
    "bias_heads": (VE, ("bias", "(2, 4, 5, 7)", "(2, 5, 7)"), {"bias": ones(2, 5, 7)}),
    "bias_device": (VE, ("bias", "cpu", "meta"), {"bias": ones(5, 7).to(META)}),
    "causal_word": (VE, ("causal", "bottom_right", "top_left"), {"causal": "top_left"}),
    "causal_int": (VE, ("causal", "bottom_right", "2"), {"causal": 2}),
    "window_int": (TE, ("window", "(left, right)", "3"), {"window": 3}),
    "window_three": (TE, ("window", "(left, right)", "(1, 2, 3)"), {"window": (1, 2, 3)}),
    "window_negative_left": (VE, ("window", "left", "-1"), {"window": (-1, 2)}),
    "window_negative_right": (VE, ("window", "right", "-2"), {"window": (None, -2)}),
    "window_float": (TE, ("window", "left", "int", "1.5"), {"window": (1.5, 2)}),
    "q_lens_list": (TE, ("q_lens", "Tensor", "list"), {"q_lens": [1, 2]}),
    "q_lens_dtype": (TE, ("q_lens", "int32", "float32"), {"q_lens": ones(2)}),
    "q_lens_shape": (VE, ("q_lens", "(2,)", "(3,)"), {"q_lens": ones(3).int()}),
    "q_lens_large": (VE, ("q_lens[1]", "[0, 5]", "6"), {"q_lens": tensor([5, 6])}),
    "k_lens_dtype": (TE, ("k_lens", "int32", "int16"), {"k_lens": ones(2).short()}),
    "k_lens_shape": (VE, ("k_lens", "(2,)", "(2, 1)"), {"k_lens": ones(2, 1).int()}),
    "k_lens_negative": (VE, ("k_lens[0]", "[0, 7]", "-1"), {"k_lens": tensor([-1, 3])}),
    "k_lens_large": (VE, ("k_lens[1]", "[0, 7]", "8"), {"k_lens": tensor([7, 8])}),
    "k_lens_device": (VE, ("k_lens", "cpu", "meta"), {"k_lens": ones(2).int().to(META)}),
    "alibi_shape": (VE, ("alibi_slopes", "(4,)", "(2, 4)", "(3,)"), {"alibi_slopes": ones(3)}),
    "alibi_dtype": (TE, ("alibi_slopes", "int64"), {"alibi_slopes": ones(4).long()}),
    "alibi_grad": (VE, ("alibi_slopes", "requires_grad"),
                   {"alibi_slopes": ones(4, requires_grad=True)}),
    "softcap_zero": (VE, ("softcap", "> 0", "0.0"), {"softcap": 0.0}),
    "softcap_negative": (VE, ("softcap", "> 0", "-3"), {"softcap": -3.0}),
    "softcap_nan": (VE, ("softcap", "nan"), {"softcap": float("nan")}),
    "softcap_word": (TE, ("softcap", "float", "'big'"), {"softcap": "big"}),
    "sinks_shape": (VE, ("sinks", "(4,)", "(2,)"), {"sinks": ones(2)}),
    "sinks_dtype": (TE, ("sinks", "bool"), {"sinks": ones(4) > 0}),
    "sinks_list": (TE, ("sinks", "Tensor", "list"), {"sinks": [0.0] * 4}),
    "scale_tensor": (TE, ("scale", "float"), {"scale": ones(2)}),
    "scale_nan": (VE, ("scale", "finite", "nan"), {"scale": float("nan")}),
    "scale_inf": (VE, ("scale", "finite", "inf"), {"scale": float("inf")}),
    "dropout_one": (VE, ("dropout_p", "[0, 1)", "1.0"), {"dropout_p": 1.0}),
    "dropout_negative": (VE, ("dropout_p", "[0, 1)", "-0.1"), {"dropout_p": -0.1}),
    "dropout_nan": (VE, ("dropout_p", "[0, 1)", "nan"), {"dropout_p": float("nan")}),
    "dropout_word": (TE, ("dropout_p", "float", "'half'"), {"dropout_p": "half"}),
    "seed_float": (TE, ("seed", "int", "1.5"), {"seed": 1.5, "dropout_p": 0.5}),
    "seed_dtype": (TE, ("seed", "int64", "int32"), {"seed": ones(1).int(), "dropout_p": 0.5}),
    "seed_two": (TE, ("seed", "1-element", "(2,)"), {"seed": ones(2).long(), "dropout_p": 0.5}),
    "seed_large": (VE, ("seed", "64 bits", str(2**64)), {"seed": 2**64, "dropout_p": 0.5}),
    "deterministic_int": (TE, ("deterministic", "bool", "1"), {"deterministic": 1}),
    "weights_word": (VE, ("return_weights", "mean", "'sum'"), {"return_weights": "sum"}),
    "backend_word": (VE, ("backend", "cpu", "'gpu'"), {"backend": "gpu"}),
    "backend_no_device": (VE, ("backend", "cuda"), {"backend": "cuda"}),
    "backend_no_kernel": (VE, ("backend", "triton"), {"backend": "triton"}),
}  # fmt: skip


def check_message(message: str, op: str, words: tuple[str, ...]) -> None:
    assert message.startswith(f"fastattn::{op}: "), message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize("case", BAD)
def test_attention_names_what_is_wrong(case: str) -> None:
    error, words, wrong = BAD[case]
    given = {"q": q_(), "k": kv_(), "v": kv_(), **wrong}
    with pytest.raises(error) as caught:
        fastattn.attention(**given)
    check_message(str(caught.value), "attention", words)


def cu(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


BAD_VARLEN: dict[str, tuple[type[Exception], tuple[str, ...], dict[str, Any]]] = {
    "q_dims": (VE, ("q", "3", "(2, 4, 5, 8)"), {"q": q_()}),
    "heads": (VE, ("heads", "multiple", "4", "3"), {"k": q_(7, 3, 8), "v": q_(7, 3, 8)}),
    "tokens_v": (VE, ("v", "7 tokens", "6"), {"v": q_(6, 2, 8)}),
    "head_dim": (VE, ("k", "head_dim 8", "9"), {"k": q_(7, 2, 9)}),
    "k_dtype": (TE, ("k", "float32", "float16"), {"k": q_(7, 2, 8, dtype=torch.float16)}),
    "cu_list": (TE, ("cu_seqlens_q", "Tensor", "list"), {"cu_seqlens_q": [0, 2, 5]}),
    "cu_dtype": (TE, ("cu_seqlens_k", "int32", "float32"), {"cu_seqlens_k": cu(0, 3, 7).float()}),
    "cu_dims": (VE, ("cu_seqlens_q", "(B + 1,)", "(1, 3)"), {"cu_seqlens_q": cu(0, 2, 5)[None]}),
    "cu_empty": (VE, ("cu_seqlens_q", "(B + 1,)", "(0,)"), {"cu_seqlens_q": cu()}),
    "cu_start": (VE, ("cu_seqlens_q", "start with 0", "1"), {"cu_seqlens_q": cu(1, 2, 5)}),
    "cu_decreasing": (VE, ("cu_seqlens_k", "decrease", "5 then 3"), {"cu_seqlens_k": cu(0, 5, 3)}),
    "cu_negative": (VE, ("cu_seqlens_k", "decrease", "-1"), {"cu_seqlens_k": cu(0, -1, 3)}),
    "cu_beyond": (VE, ("cu_seqlens_k", "7 tokens", "8"), {"cu_seqlens_k": cu(0, 3, 8)}),
    "cu_lengths": (VE, ("cu_seqlens_q", "cu_seqlens_k", "(3,)", "(4,)"),
                   {"cu_seqlens_k": cu(0, 1, 2, 7)}),
    "cu_device": (VE, ("cu_seqlens_q", "cpu", "meta"), {"cu_seqlens_q": cu(0, 2, 5).to(META)}),
    "max_seqlen_q": (VE, ("max_seqlen_q", "3", "2"), {"max_seqlen_q": 2}),
    "max_seqlen_k": (VE, ("max_seqlen_k", "4", "3"), {"max_seqlen_k": 3}),
    "max_seqlen_float": (TE, ("max_seqlen_k", "int", "7.5"), {"max_seqlen_k": 7.5}),
    "mask_shape": (VE, ("mask", "(2, 4, 3, 4)", "(5, 7)"), {"mask": ones(5, 7) > 0}),
    "bias_shape": (VE, ("bias", "(2, 4, 3, 4)", "(2, 4, 5, 7)"), {"bias": ones(2, 4, 5, 7)}),
    "alibi_shape": (VE, ("alibi_slopes", "(4,)", "(3, 4)"), {"alibi_slopes": ones(3, 4)}),
    "window_negative": (VE, ("window", "right", "-1"), {"window": (0, -1)}),
    "dropout_one": (VE, ("dropout_p", "[0, 1)", "1"), {"dropout_p": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_VARLEN)
def test_attention_varlen_names_what_is_wrong(case: str) -> None:
    error, words, wrong = BAD_VARLEN[case]
    good = {
        "q": q_(5, 4, 8),
        "k": q_(7, 2, 8),
        "v": q_(7, 2, 8),
        "cu_seqlens_q": cu(0, 2, 5),
        "cu_seqlens_k": cu(0, 3, 7),
    }
    fastattn.attention_varlen(**good)
    with pytest.raises(error) as caught:
        fastattn.attention_varlen(**{**good, **wrong})
    check_message(str(caught.value), "attention_varlen", words)


def test_float64_is_refused_by_a_kernel_backend_and_only_there(kernel: str) -> None:
    q = q_(1, 1, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"fastattn::attention: backend='{kernel}'.*float64"):
        fastattn.attention(q, q, q, backend=kernel)
    assert fastattn.attention(q, q, q).dtype == torch.float64


def test_limits_are_allowed() -> None:
    """What stands right beside each refusal is served."""
    q = torch.randn(2, 4, 5, 8)
    k = torch.randn(2, 2, 7, 8)
    for given in (
        {"window": (0, 0)},
        {"window": (None, None)},
        {"window": [1, 2]},
        {"q_lens": torch.tensor([0, 5])},
        {"k_lens": torch.tensor([0, 7])},
        {"dropout_p": 0.999999, "seed": 2**64 - 1},
        {"dropout_p": 0, "seed": -(2**63)},
        {"dropout_p": 0.5, "seed": torch.tensor(3)},
        {"softcap": 1e-30},
        {"scale": 0},
        {"scale": 1},
        {"mask": torch.tensor(True)},
        {"bias": torch.ones(1, 1, 1, 1)},
    ):
        o = fastattn.attention(q, k, k, **given)
        assert o.shape == q.shape, given
        assert o.isfinite().all(), given


def test_positional_arguments_end_with_v() -> None:
    with pytest.raises(TypeError, match=re.escape("positional")):
        fastattn.attention(q_(), kv_(), kv_(), torch.ones(5, 7) > 0)
