"""Calls of layer_norm, add_layer_norm, bias_act and layernorm_ffn for the rungs: small, several
tiles each way, one feature or trap at a time.

They go through the public functions: on CPU tensors these take the Triton kernels wherever a hook
takes the launches over, and no first-use check stands between, so no fallback hides a mutant.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from ffn_tools import Call, ffn, judge, run
from test_bias_act import act_call
from test_layernorm import norm_call
from torch import Tensor

import fastattn
from fastattn.ops import layernorm_triton

WIDE = 150  # columns that do not fit one of the interpreter's tiles
BF16 = torch.bfloat16


def _huge(n: int) -> Call:
    """Rows whose squares, and one whose sum, overflow fp32, beside an ordinary one."""
    x = torch.randn(5, n).clamp(-1, 1) * 1e30
    x[1], x[2] = torch.randn(n), 1e38
    return norm_call("layer_norm", 5, n, x=x, affine=False)


def _offset(n: int) -> Call:
    return norm_call("layer_norm", 5, n, x=torch.randn(5, n) + 1000, affine=False)


def _strided() -> Call:
    """Rows of a wider tensor, from an odd offset, under an expanded upstream gradient."""
    x = torch.randn(3, 4, 60)[..., 3:43]
    up = tuple(torch.randn(40).expand(3, 4, 40) for _ in range(2))
    call = norm_call("add_layer_norm", 3, 4, 40, x=x)
    return Call(call.op, call.tensors, call.kwargs, upstream=up)


def _mixed() -> Call:
    call = norm_call("add_layer_norm", 9, 40, dtype=BF16, params=torch.float32)
    call.tensors["residual"] = torch.randn(9, 40)
    return call.with_(dropout_p=0.3, seed=2**40 + 7)


def _rounded() -> Call:
    """bf16 has steps of 4 to 8 at 1000."""
    call = norm_call("add_layer_norm", 9, 40, dtype=BF16, affine=False)
    call.tensors["residual"] = (8 * torch.randn(9, 40) + 1000).to(BF16)
    return call


def _ffn(**kwargs: object) -> Callable[[], Call]:
    return lambda: ffn(9, d=24, f=40, **kwargs)


CASES: dict[str, Callable[[], Call]] = {
    "row_norm": lambda: norm_call("layer_norm", 41, 24),
    "row_norm_wide": lambda: norm_call("layer_norm", 7, WIDE),
    "row_rms": lambda: norm_call("rms_norm", 11, 40),
    "row_rms_wide": lambda: norm_call("rms_norm", 7, WIDE, dtype=torch.float16),
    "row_add": lambda: norm_call("add_layer_norm", 11, 40, dropout_p=0.4, seed=-5),
    "row_add_wide": lambda: norm_call("add_layer_norm", 5, WIDE, dropout_p=0.4, seed=3),
    "row_sum_only": lambda: norm_call(
        "add_layer_norm", 11, 40, norm=None, affine=False, dropout_p=0.2, seed=1
    ),
    "row_mixed": _mixed,
    "row_sum_rounded": _rounded,
    "row_offset": lambda: _offset(100),
    "row_offset_wide": lambda: _offset(WIDE),
    "row_huge": lambda: _huge(70),
    "row_huge_wide": lambda: _huge(WIDE),
    "row_strided": _strided,
    "row_one": lambda: norm_call("add_layer_norm", 1, 1, 1),
    "row_act": lambda: act_call(21, 40),
    "row_act_tanh": lambda: act_call(9, 33, activation="gelu_tanh", dtype=torch.float16),
    "row_act_relu": lambda: act_call(9, 33, activation="relu"),
    "row_act_relu2": lambda: act_call(9, 33, activation="relu2", dtype=BF16),
    "row_act_gated": lambda: act_call(21, 40, gated=True, activation="silu", dropout_p=0.3, seed=8),
    "row_ffn": _ffn(),
    "row_ffn_behind": _ffn(pre_norm=False, dropout_p=0.2, hidden_dropout_p=0.2, seed=6),
    "row_ffn_gated": _ffn(gated=True, activation="silu", norm="rms", recompute="activation"),
    "row_block": _ffn(hidden_dropout_p=0.2, seed=2),
    "row_block_slices": lambda: ffn(
        3, d=24, f=100, gated=True, activation="silu", pre_norm=False, dropout_p=0.2, seed=6
    ),
    "row_block_bf16": lambda: ffn(50, d=33, f=70, dtype=BF16, norm="rms", recompute="all"),
    "row_ffn_bf16": _ffn(dtype=BF16, param_dtype=torch.float32, recompute="all"),
}


def case_named(name: str) -> Call:
    torch.manual_seed(0)
    return (CASES | FAR)[name]()


def check(name: str) -> None:
    """AssertionError unless the call is as near to the fp64 oracle as plain PyTorch is (x 2)."""
    block = name.startswith("row_block")  # one kernel; else passes and GEMMs
    with mock.patch.object(layernorm_triton, "whole_block", return_value=block):
        _check(name, case_named(name))


def _check(name: str, call: Call) -> None:
    if name == "row_sum_rounded":  # the oracle does not round what it normalises
        _check_rounded(call)
    elif name.startswith("row_huge"):  # plain PyTorch in fp32 is no measure there
        _check_huge(call)
    else:
        judge(call, "triton")


def _check_rounded(call: Call) -> None:
    """y is the norm of s as it is returned."""
    got = call.run(fastattn, call.leaves(), backend="triton")
    right = torch.nn.functional.layer_norm(got["s"].double(), got["s"].shape[-1:])
    torch.testing.assert_close(got["y"].double(), right, rtol=2**-8, atol=1e-3)


def _check_huge(call: Call) -> None:
    got = run(call, "triton")
    exact = call.run(fastattn.reference, call.leaves(Tensor.double))["y"]
    torch.testing.assert_close(got.outputs["y"].double(), exact, rtol=1e-5, atol=1e-6)
    assert got.grads["x"].isfinite().all()
    assert not got.grads["x"][0].any() or got.grads["x"][0].abs().max() < 1e-28


def _far_rows() -> Call:
    """Rows 2^29 elements apart: the fifth begins beyond 2^31. Of 6 GB of zeros that nobody wrote
    only the pages of the rows exist."""
    import numpy as np

    stride = 1 << 29
    room = torch.from_numpy(np.zeros(6 * stride, np.uint16)).view(BF16)

    def rows(at: int) -> Tensor:
        x = torch.as_strided(room, (6, 16), (stride, 1), at)
        return x.copy_(torch.randn(x.shape))

    call = norm_call("add_layer_norm", 6, 16, dtype=BF16, x=rows(0))
    call.tensors["residual"] = rows(1024)
    return Call(call.op, call.tensors, call.kwargs, upstream=(rows(2048), rows(3072)))


# Of their own: 6 GB of addresses (and a few pages).
FAR = {"row_far": _far_rows}
