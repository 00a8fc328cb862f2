"""What rung (c) asks of the launcher of attention over a KV cache behind the stand-in driver."""

from __future__ import annotations

import torch
from kv_cache_tools import CACHES, Call, make, table

from .calls import tiles_of
from .driver import StandIn, standing_in
from .jit import misaligned, odd_rows

BF16 = torch.bfloat16


def _misaligned() -> Call:
    """But for the caches, which a run copies."""
    call = _aligned()
    for name in ("q", "k", "v"):
        call.tensors[name] = misaligned(call.tensors[name])
    return call


def _odd_rows() -> Call:
    call = _aligned()
    for name in ("q", *CACHES):
        call.tensors[name] = odd_rows(call.tensors[name])
    return call


def _aligned() -> Call:
    return make((61, 6), sq=2, capacity=70, d=16, page_size=16, dtype=BF16, rotary=table(80, 8))


LAYOUTS = {
    "aligned": _aligned,
    "misaligned": _misaligned,
    "odd_rows": _odd_rows,
    "one": lambda: make((0,), h=1, hk=1, capacity=1, d=1),
    "prompt": lambda: make((13, 0), h=2, sq=18, capacity=40, d=16, cache_index=(1, 0), dtype=BF16),
}


def runs_everywhere(name: str, cc: int) -> StandIn:
    """Compiles for the device, and gives the right values in just that specialisation."""
    torch.manual_seed(0)
    with standing_in(cc, values=True) as gpu:
        LAYOUTS[name]().judge("triton")
    return gpu


def compiles_while_growing(cc: int) -> dict[str, int]:
    """How many binaries a kernel needs while batch, rows, pages and lengths change."""
    with standing_in(cc) as gpu:
        for B, sq, columns in ((1, 1, 5), (2, 1, 16), (3, 2, 17), (16, 16, 32)):
            lens = range(1, B + 1)
            make(lens, h=2, sq=sq, capacity=16 * columns, page_size=16, d=16).run("triton")
        for sn in (17, 32):
            make((1, 7), h=1, hk=1, sn=sn, capacity=80, page_size=16, d=16).run("triton")
    compiled = dict(gpu.compiled)
    # One with the append in it, split and not, and one behind append_kernel.
    assert compiled.pop("cached_attention_kernel") == 3, f"needless binaries: {gpu.compiled}"
    return compiled


def fits(arch: str, head_dim: int, dtype: torch.dtype, rows: int) -> StandIn:
    """The shipped tiles of an architecture: shared memory and threads within its limits."""
    call = make((61, 6), h=8, sq=rows, d=head_dim, capacity=90, dtype=dtype)
    call.options["rotary"] = table(90, head_dim // 2)
    with tiles_of(arch), standing_in(int(arch[3:])) as gpu:
        call.run("triton")
    return gpu
