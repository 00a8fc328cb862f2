"""What bugs in attention over a KV cache are to break: small calls, and checks of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kv_cache_tools import CACHES, Call, featured, make, table

from fastattn.ops.attention_kv_cache_checks import Call as Arguments

CASES: dict[str, Callable[[torch.dtype], Call]] = {
    # Two splits, of which one sequence has but one; new keys in the last.
    "kv_split": lambda t: make((500, 3), sq=2, capacity=512, d=16, dtype=t),
    # Two tiles of keys in pages of 7, two heads a group, everything turned.
    "kv_pages": lambda t: make(
        (140, 5), sq=2, capacity=150, d=16, page_size=7, dtype=t, rotary=table(160, 8)
    ),
    "kv_odd_rotary": lambda t: make((20,), capacity=30, d=16, dtype=t, rotary=table(30, 5)),
    # The append is a launch of its own; two blocks of rows, two tiles of keys.
    "kv_prompt": lambda t: make(
        (70, 0), h=4, hk=1, sq=18, capacity=100, d=16, dtype=t, rotary=table(100, 8)
    ),
    "kv_many": lambda t: make((140,), h=2, hk=1, sq=20, capacity=170, d=16, dtype=t),
    "kv_window": lambda t: make(
        (200, 60), sq=2, capacity=210, d=16, dtype=t, causal=False, window=(50, 5)
    ),
    "kv_short": lambda t: featured("not_causal_short", dtype=t),
}  # fmt: skip


def check(name: str, dtype: torch.dtype) -> None:
    """A case by the oracle's rule, or a check by its name."""
    if name == "kv_beside":
        _beside_windows(dtype)
    elif name.startswith("kv_hostile_"):
        _hostile(name.rpartition("_")[2], dtype)
    else:
        CASES[name](dtype).judge("cuda")


def _beside_windows(dtype: torch.dtype) -> None:
    """NaN beside what the windows of the first and the last row see."""
    call = CASES["kv_window"](dtype)
    right = call.run("cuda")["o"]
    for name in CACHES:
        for b, n in enumerate((200, 60)):
            call.tensors[name][b, :, : n - 50] = torch.nan
    assert torch.equal(call.run("cuda")["o"], right)


def _hostile(what: str, dtype: torch.dtype) -> None:
    """Lengths, pages or positions outside the tensors; nobody reads them on the host."""
    call = make(
        (23, 0), sq=2, d=16, capacity=52, page_size=13 if what == "pages" else 0, dtype=dtype
    )
    t = call.copies()
    if what == "lengths":
        t["cache_lens"] = torch.tensor([-5, 51])
    if what == "pages":
        t["block_table"] = torch.tensor([[10**6, -1, 2, 99], [3, 2, 1, 2**31 - 1]])
    if what == "positions":
        t["cos"], t["sin"] = table(20, 8)
    numbers = (0.25, 0.0, True, -1, -1, False)
    torch.ops.fastattn.attention_kv_cache_cuda_kernel(*map(t.get, Arguments._fields), *numbers)
