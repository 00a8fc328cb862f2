"""Attention problems for the rungs: small, several tiles each way, one feature or trap at a time.

Tiles are those of family "cpu" in kernels/configs.py (32 x 16 forward, 16 x 32 backward), so 37
rows and 45 keys are several programs with tails on every side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tools import FEATURES, Problem, featured, packed, padded
from torch import Tensor

SHAPE = {"b": 2, "h": 4, "hk": 2, "sq": 37, "sk": 45, "d": 24}


@dataclass(frozen=True)
class Case:
    make: Callable[[], Problem]
    backward: bool = True
    deterministic: bool = True
    may_hold_nan: bool = False  # the inputs hold NaN where nobody may look

    def problem(self) -> Problem:
        torch.manual_seed(0)
        return self.make()


def _feature(name: str, **shape: object) -> Case:
    return Case(lambda: featured(name, **{**SHAPE, **shape}))


def _strided() -> Problem:
    """(B, S, H, D) memory, an expanded upstream gradient, a transposed bias."""
    p = padded(**SHAPE)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.q, p.k, p.v))
    bias = torch.randn(45, 37).t()
    return Problem(q, k, v, {"bias": bias}, upstream={"o": torch.ones(1).expand(p.q.shape)})


def _nan_beyond_lengths() -> Problem:
    q_lens, k_lens = torch.tensor([37, 7]), torch.tensor([19, 45])
    p = padded(**SHAPE, q_lens=q_lens, k_lens=k_lens, causal="bottom_right")
    do = torch.randn(p.q.shape)
    for b in range(2):
        for x, n in ((p.q, q_lens[b]), (p.k, k_lens[b]), (p.v, k_lens[b]), (do, q_lens[b])):
            x[b, :, n:] = torch.nan
    return Problem(p.q, p.k, p.v, p.kwargs, upstream={"o": do})


def _bias(*shape: int) -> Callable[[], Problem]:
    return lambda: padded(**SHAPE).with_(bias=torch.randn(shape))


CASES: dict[str, Case] = {name: _feature(name) for name in FEATURES}
CASES |= {
    "causal_row_on_tile_edge": Case(lambda: padded(b=1, h=1, sq=49, sk=49, d=16, causal=True)),
    "size_one": Case(lambda: padded(b=1, h=1, sq=1, sk=1, d=1)),
    "one_query": Case(lambda: padded(b=1, h=4, hk=2, sq=1, sk=50, d=16, causal="bottom_right")),
    "wide_values": Case(lambda: padded(b=1, h=2, sq=20, sk=33, d=17, dv=40)),
    "strided": Case(_strided),
    "nan_beyond_lengths": Case(_nan_beyond_lengths, may_hold_nan=True),
    "masked_rows": Case(lambda: padded(**SHAPE).with_(mask=torch.rand(2, 1, 37, 1) < 0.5)),
    "finfo_min": Case(
        lambda: padded(**SHAPE).with_(
            bias=torch.zeros(37, 45).masked_fill(torch.rand(37, 45) < 0.5, -1e38)
        )
    ),
    "bias_shared_by_heads": Case(_bias(2, 1, 37, 45)),
    "bias_shared_by_batch": Case(_bias(1, 4, 37, 45)),
    "bias_of_rows": Case(_bias(4, 37, 1)),
    "bias_of_keys": Case(_bias(1, 1, 1, 45)),
    "packed": Case(lambda: packed([21, 0, 40], [30, 5, 0], h=4, hk=2, d=24)),
    "packed_causal": Case(
        lambda: packed([21, 1, 40], h=2, d=16, slack=3, causal=True, dropout_p=0.4, seed=3)
    ),
    "packed_bottom_right": Case(
        lambda: packed([9, 33], [40, 20], h=2, d=16, causal="bottom_right", softcap=2.0)
    ),
    "bf16": _feature("causal", dtype=torch.bfloat16, d=32),
    "fp16": _feature("causal", dtype=torch.float16, d=32),
    "bf16_all": _feature("all", dtype=torch.bfloat16),
    "atomics": Case(lambda: featured("causal", **SHAPE), deterministic=False),
    "atomics_bias": Case(_bias(1, 1, 37, 45), deterministic=False),
}


def far_apart(dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Rows 2^29 elements apart: the fifth begins beyond 2^31. Of 6 GB of zeros that nobody wrote
    only the pages of the rows exist."""
    import numpy as np

    stride = 1 << 29
    room = torch.from_numpy(np.zeros(6 * stride, np.uint16)).view(dtype)

    def rows(at: int) -> Tensor:
        x = torch.as_strided(room, (1, 2, 6, 16), (64, 16, stride, 1), at)
        return x.copy_(torch.randn(x.shape))

    q, k, v, do = (rows(1024 * i) for i in range(4))
    return Problem(q, k, v, {"causal": True}, upstream={"o": do})


def far_keys() -> Problem:
    """Keys 2^27 elements apart: the second tile of 16 begins at 2^31."""
    import numpy as np

    stride = 1 << 27
    room = torch.from_numpy(np.zeros(20 * stride, np.uint16)).view(torch.bfloat16)
    k = torch.as_strided(room, (1, 1, 20, 16), (64, 16, stride, 1))
    k.copy_(torch.randn(k.shape))
    q, v = (torch.randn(1, 1, n, 16).bfloat16() for n in (5, 20))
    return Problem(q, k, v)


# Of their own: 6 GB of addresses (and a few pages) each.
FAR = {"far_apart": Case(far_apart), "far_keys": Case(far_keys)}


def case_named(name: str) -> Case:
    return (CASES | FAR)[name]
