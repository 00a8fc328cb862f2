"""The budget's rows of the kernels of layernorm_ffn and its parts; see budget.py. They have no
product: what counts is registers, spills and shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from ffn_tools import Call, ffn, run
from test_bias_act import act_call
from test_layernorm import norm_call

import fastattn
from fastattn.ops import layernorm_triton

from .calls import tiles_of
from .launches import Launch, recorded

# Columns: a small model's, BERT's, the widest row that a backward holds, a wider one. "everything":
# every branch of the kernels at once, as a block with its norm behind launches them.
WIDTHS = (64, 768, 4096, 8192)
FEATURES = ("rows", "everything")
# The whole block, of the widths that it serves (fp32: the first), for few rows and for many.
BLOCK_WIDTHS = (64, 128, 256)
BLOCK_FEATURES = ("block few", "block many")
BLOCK_KERNELS = ("ffn_block_kernel", "ffn_block_finish_kernel")
KERNELS = (
    "norm_forward_kernel", "norm_backward_kernel", "norm_row_sums_kernel", "act_forward_kernel",
    "act_backward_kernel", "sum_parts_kernel",
)  # fmt: skip


def calls(dtype: torch.dtype, width: int, feature: str) -> list[Call]:
    if feature == "rows":
        return [
            norm_call("add_layer_norm", 40, width, dtype=dtype),
            act_call(40, width, dtype=dtype),
        ]
    if feature in BLOCK_FEATURES:
        rows = 5 if feature == "block few" else 2000
        call = ffn(rows, d=width, f=4 * width, dtype=dtype, gated=True, activation="silu")
        return [Call(call.op, call.tensors, call.kwargs, frozen=tuple(call.tensors))]
    given = {"dropout_p": 0.1, "hidden_dropout_p": 0.1, "seed": 1}
    call = ffn(5, d=width, f=width, dtype=dtype, gated=True, pre_norm=False, **given)
    return [call.with_(activation="silu", recompute="activation")]


def launches(
    arch: str, dtype: torch.dtype, width: int, feature: str, kernels: Sequence[str] = KERNELS
) -> Iterator[Launch]:
    """The first launch of each kernel; nothing runs."""
    torch.manual_seed(0)
    block = feature in BLOCK_FEATURES
    one_kernel = mock.patch.object(layernorm_triton, "whole_block", return_value=block)
    with one_kernel, tiles_of(arch), recorded() as found:
        for call in calls(dtype, width, feature):
            if block:
                call.run(fastattn, call.leaves(), backend="triton")
            else:
                run(call, "triton")
    for name in kernels:
        yield from [x for x in found if x.name == name][:1]
