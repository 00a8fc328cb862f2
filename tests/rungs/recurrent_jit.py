"""What rung (c) asks of the recurrence's launchers behind the stand-in driver."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from recurrence_calls import GRU, LSTM, Call, judge, run
from recurrence_calls import call as make

from .calls import tiles_of
from .driver import StandIn, standing_in
from .jit import misaligned
from .launches import recorded, specialise, target
from .recurrent_cases import tier_of
from .semantics import stage_text

BF16 = torch.bfloat16


def layouts() -> dict[str, Call]:
    """Calls that fall into different specialisations of the same kernels."""
    torch.manual_seed(0)
    lstm = make(H=16, D=2, T=2, B=3, lengths=[1, 2, 0], dtype=BF16)
    apart = {n: misaligned(x) for n, x in lstm.tensors.items()}
    return {
        "aligned_steps": lstm,
        "misaligned_steps": replace(lstm, tensors=apart),
        "one_steps": make(GRU, H=1, T=1, B=1),
        "projected_steps": make(H=16, P=5, T=1, B=2, mask=True),
        "aligned_sequence": lstm,
        "one_sequence": make(GRU, H=1, T=1, B=1),
    }


def runs_everywhere(name: str, cc: int) -> StandIn:
    """Compiles for the device, and gives the right values in just that specialisation."""
    with tier_of(name), standing_in(cc, values=True) as gpu:
        judge(layouts()[name])
    return gpu


def compiles_while_growing(name: str, cc: int) -> dict[str, int]:
    """How many binaries a kernel needs while T, B and the rows change, packed or not."""
    with tier_of(name), standing_in(cc) as gpu:
        for T, B in ((1, 1), (2, 16), (3, 5), (16, 2)):
            run(make(LSTM, T=T, B=B, H=16))
    return dict(gpu.compiled)


def fits(arch: str, cell: int, H: int, B: int, dtype: torch.dtype) -> StandIn:
    """The shipped tiles of an architecture: shared memory and threads within its limits."""
    with tiles_of(arch), standing_in(int(arch[3:])) as gpu:
        run(make(cell, T=1, B=B, H=H, dtype=dtype, mask=True))
    return gpu


def weights_in_the_loop(cell: int, cc: int = 80) -> list[str]:
    """Loads of, and copies into shared memory of, W x W weights in the loop over time: the sequence
    tier is to have read them before it."""
    W = 64
    with tiles_of(f"sm_{cc}"), tier_of("_sequence"), recorded() as launches:
        run(make(cell, T=1, B=2, H=W, D=2, dtype=BF16, mask=True, lengths=[1, 0]))
    found = []
    for launch in launches:
        lines = stage_text(specialise(launch, target(cc)), "ttgir", cc).splitlines()
        loop = next(i for i, line in enumerate(lines) if '"scf.for"' in line)
        assert any(f"tensor<{W}x{W}x" in line for line in lines[:loop])  # they are read before it
        found += [
            f"{launch.name}: {line.strip()}"
            for line in lines[loop:]
            if re.search(rf'"(tt\.load|ttg\.local_alloc|ttg\.local_store)".*{W}x{W}x', line)
        ]
    return found
