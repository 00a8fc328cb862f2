"""What rung (c) asks of the attention launchers behind the stand-in driver."""

from __future__ import annotations

import torch
from tools import DTYPES, Problem, featured, padded
from torch import Tensor

from .calls import attend, check, tiles_of
from .cases import CASES
from .driver import StandIn, standing_in


def misaligned(x: Tensor) -> Tensor:
    """The same values one element beyond an aligned address."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    assert room.data_ptr() % 16
    return room.copy_(x)


def odd_rows(x: Tensor) -> Tensor:
    """The same values, rows an odd number of elements apart."""
    room = torch.empty(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    return room[..., : x.shape[-1]].copy_(x)


def spread_columns(x: Tensor) -> Tensor:
    """The same values, every other element: no stride is 1."""
    room = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    return room[..., ::2].copy_(x)


def layouts(dtype: torch.dtype = torch.bfloat16) -> dict[str, Problem]:
    """Calls that fall into different specialisations of the same kernels."""
    torch.manual_seed(0)
    p = padded(b=2, h=2, hk=1, sq=37, sk=45, d=32, dtype=dtype, causal=True)
    q, k, v = p.q, p.k, p.v
    up = torch.randn(q.shape).to(dtype)
    return {
        "aligned": Problem(q, k, v, p.kwargs),
        "misaligned": Problem(
            *map(misaligned, (q, k, v)), p.kwargs, upstream={"o": misaligned(up)}
        ),
        "odd_rows": Problem(*map(odd_rows, (q, k, v)), p.kwargs),
        "spread_columns": Problem(*map(spread_columns, (q, k, v)), p.kwargs),
        "expanded": Problem(
            q[:1].expand_as(q), k[:, :, :1].expand_as(k), v, p.kwargs,
            upstream={"o": torch.ones((), dtype=dtype).expand_as(up)},
        ),
        "size_one": CASES["size_one"].problem(),
        "one_query": CASES["one_query"].problem(),
    }  # fmt: skip


def runs_everywhere(name: str, cc: int) -> StandIn:
    """Compiles for the device, and gives the right values in just that specialisation."""
    with standing_in(cc, values=True) as gpu:
        check(layouts()[name])
    return gpu


def compiles_while_growing(cc: int) -> dict[str, int]:
    """How many binaries a kernel needs while a sequence grows from 17 to 40 keys, head dim 64."""
    with standing_in(cc) as gpu:
        for n in range(17, 41):
            attend(padded(b=1, h=2, sq=n, sk=n, d=64, causal=True), backward=n < 20)
    return dict(gpu.compiled)


def compiles_over_settings(cc: int) -> dict[str, int]:
    """The same with batch, heads, window and scale changing from call to call."""
    with standing_in(cc) as gpu:
        for b, h, left, scale in ((1, 2, 7, 0.1), (2, 4, 1, 1.0), (3, 16, 16, 2.0), (1, 1, 0, 0.5)):
            attend(
                padded(b=b, h=h, sq=21, sk=30, d=64, window=(left, None), scale=scale),
                backward=False,
            )
    return dict(gpu.compiled)


def fits(arch: str, head_dim: int, dtype: torch.dtype, feature: str = "causal") -> StandIn:
    """The shipped tiles of an architecture: shared memory and threads within its limits."""
    assert dtype in DTYPES
    problem = featured(feature, b=1, h=2, hk=1, sq=70, sk=90, d=head_dim, dtype=dtype)
    with tiles_of(arch), standing_in(int(arch[3:])) as gpu:
        attend(problem)
    return gpu
