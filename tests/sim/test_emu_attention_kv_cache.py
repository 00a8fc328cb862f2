"""Attention over a KV cache in CUDA C++, compiled for the host, under the sanitizers."""

from typing import Any

import pytest
import torch
from kv_cache_tools import featured, make, table

from sim.emu import agreeing, run
from sim.emu_attention_kv_cache import PROGRAM, case_of, check

pytestmark = pytest.mark.sampled(3)

BF16, F32 = torch.bfloat16, torch.float32
# Feature, sizes, splits. Two tiles of keys a split at least; pages that end within a tile; new rows
# that lie in a tile of their own, and whose append is a launch of its own.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "few": ("rotary", {"lens": (140, 0), "capacity": 150, "dtype": BF16}, 1),
    "few_split": ("sinks", {"lens": (240, 3), "capacity": 300, "d": 20, "dv": 24}, 2),
    "everything": ("everything", {"lens": (140, 3), "new_lens": (3, 1), "capacity": 150}, 1),
    "pages": ("rotary_pairs", {"lens": (140, 0), "capacity": 150, "page_size": 7,
                               "dtype": BF16}, 1),
    "many": ("ragged", {"lens": (70, 5), "sq": 20, "new_lens": (20, 7), "capacity": 100,
                        "dtype": BF16, "page_size": 9, "h": 2, "hk": 1}, 1),
    "many_split": ("many_rows", {"lens": (250,), "sq": 17, "capacity": 300, "dtype": BF16,
                                 "h": 2, "hk": 1}, 2),
}  # fmt: skip


@pytest.mark.full  # the PTX simulator sees what leaves a tensor in every test
@pytest.mark.parametrize("name", CASES)
def test_bounds_and_values(name: str) -> None:
    feature, sizes, splits = CASES[name]
    call = featured(feature, **sizes)
    check(call, agreeing(PROGRAM, case_of(call, splits), "asan", schedules=("forward", "reverse")))


@pytest.mark.parametrize("name", CASES)
def test_no_races(name: str) -> None:
    feature, sizes, splits = CASES[name]
    call = featured(feature, **sizes)
    for schedule in ("forward", "reverse"):
        check(call, run(PROGRAM, case_of(call, splits), "tsan", schedule=schedule))


def test_more_splits_than_a_warp_has_lanes() -> None:
    """102 tiles of 64 keys in 44 splits of three: the last two with keys are a lane's second."""
    call = make((6520,), h=2, hk=1, d=16, capacity=6528)
    check(call, run(PROGRAM, case_of(call, 44, multiprocessors=40), "tsan"))


@pytest.mark.parametrize("sn", [3, 20])
def test_blocks_do_not_read_what_others_append(sn: int) -> None:
    """Every split and block of rows sees the new rows; the cache's are written by one."""
    call = make((200,), h=2, hk=1, sq=70, sn=sn, d=16, capacity=300, dtype=BF16, page_size=16,
                rotary=table(300, 4))  # fmt: skip
    for schedule in ("random:7", "random:2"):
        got = run(PROGRAM, case_of(call, 2), "tsan", schedule=schedule, resident=6)
        check(call, got)
