"""What rung (c) asks of the launchers of layernorm_ffn and its parts behind the stand-in driver."""

from __future__ import annotations

import torch
from ffn_tools import Call, ffn, run
from test_bias_act import act_call
from test_layernorm import norm_call

from . import row_cases
from .calls import tiles_of
from .driver import StandIn, standing_in
from .jit import misaligned, odd_rows


def layouts() -> dict[str, Call]:
    """Calls that fall into different specialisations of the same kernels."""
    torch.manual_seed(0)
    call = norm_call("add_layer_norm", 9, 48, dtype=torch.bfloat16)
    x, residual = call.tensors["x"], call.tensors["residual"]

    def with_rows(fn: object) -> Call:
        return Call(call.op, {**call.tensors, "x": fn(x), "residual": fn(residual)}, call.kwargs)  # type: ignore[operator]

    return {
        "aligned": call,
        "misaligned": with_rows(misaligned),
        "odd_rows": with_rows(odd_rows),
        "expanded": with_rows(lambda t: t[:1].expand(t.shape)),
        "one": row_cases.case_named("row_one"),
        "act": act_call(9, 48, gated=True, dtype=torch.float16),
        "ffn": ffn(9, d=24, f=40, dtype=torch.bfloat16, dropout_p=0.2, seed=1, pre_norm=False),
    }


def runs_everywhere(name: str, cc: int) -> StandIn:
    """Compiles for the device, and gives the right values in just that specialisation."""
    call = layouts()[name]
    with standing_in(cc, values=True) as gpu:
        row_cases.judge(call, "triton")
    return gpu


def compiles_while_growing(cc: int) -> dict[str, int]:
    """How many binaries a kernel needs while rows, eps and the dropout's p change."""
    with standing_in(cc) as gpu:
        for rows in (1, 2, 16, 33, 700):
            p = rows / 2000 + 0.01
            run(norm_call("add_layer_norm", rows, 48, eps=1 / rows, dropout_p=p, seed=rows),
                "triton")  # fmt: skip
            run(act_call(rows, 48, dropout_p=p, seed=rows), "triton")
    return dict(gpu.compiled)


def fits(arch: str, n: int, dtype: torch.dtype) -> StandIn:
    """The shipped tiles of an architecture: shared memory and threads within its limits."""
    with tiles_of(arch), standing_in(int(arch[3:])) as gpu:
        run(norm_call("add_layer_norm", 5, n, dtype=dtype), "triton")
        run(act_call(5, n, dtype=dtype, gated=True), "triton")
    return gpu
