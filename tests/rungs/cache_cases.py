"""Calls of attention over a KV cache for the rungs: small, several splits and tiles each way, one
feature or trap at a time.

They go through the public function, or where it would refuse them through the op: on CPU tensors
both take the Triton kernels wherever a hook takes the launches over, and no first-use check stands
between, so no fallback hides a mutant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from kv_cache_tools import CACHES, Call, featured, make, table

from fastattn import reference
from fastattn.kernels import attention_kv_cache as kernels

BF16, F16 = torch.bfloat16, torch.float16
# Two splits from 64 slots on (tiles of 16 keys, 8 processors: see kernels/configs.py).
LONG: dict[str, Any] = {"lens": (65, 7), "capacity": 70, "d": 16}


def _few_keys() -> Call:
    """More rows than keys, and a sequence whose keys are all hidden."""
    call = make((17, 0), h=2, sq=20, sn=2, capacity=24, d=16, causal=False, sinks=torch.randn(2))
    call.options["mask"] = torch.tensor([True, False]).view(2, 1, 1, 1)
    return call


def _ragged() -> Call:
    call = make((3, 0, 17), sq=3, new_lens=(2, 0, 3), capacity=20, d=16, rotary=table(20, 8))
    for b, n in enumerate((2, 0, 3)):
        for name in "qkv":
            call.tensors[name][b, :, n:] = torch.nan
    return call


def _far() -> Call:
    """Slots 2^27 elements apart: the second tile of 16 begins at 2^31."""
    call = make((37,), h=1, hk=1, sn=2, capacity=40, d=16, dtype=BF16)
    for name in CACHES:
        stride = 1 << 27
        room = torch.from_numpy(np.zeros(40 * stride, np.uint16)).view(BF16)
        apart = torch.as_strided(room, (1, 1, 40, 16), (64, 16, stride, 1))
        call.tensors[name] = apart.copy_(call.tensors[name])
    return call


CASES: dict[str, Callable[[], Call]] = {
    "cache_decode": lambda: make(**LONG),
    "cache_no_append": lambda: make((65, 0), capacity=70, sn=0, d=20, dv=24),
    "cache_one_split": lambda: make((17, 0), capacity=20, d=16),
    "cache_pages": lambda: make(
        (61, 6), sq=2, sn=3, capacity=70, d=16, page_size=7, dtype=BF16, rotary=table(80, 5)
    ),
    "cache_whole_pages": lambda: make(
        (90, 32), sq=2, capacity=96, d=16, page_size=32, index_dtype=torch.int64
    ),
    "cache_rows": lambda: make((60, 2), h=8, sq=5, capacity=70, d=16, dtype=F16),
    "cache_many_splits": lambda: make(  # whose maximum grows from split to split
        (141,), h=2, hk=1, sn=0, capacity=144, d=16, alibi_slopes=torch.tensor([0.05, 0.1])
    ),
    "cache_few_keys": _few_keys,
    "cache_prompt": lambda: make(
        (13, 0), h=2, hk=1, sq=20, capacity=40, d=16, page_size=7, rotary=table(40, 8)
    ),
    "cache_ragged": _ragged,
    "cache_index": lambda: make((61, 7), sn=2, capacity=70, d=16, cache_index=(4, 1), entries=5),
    "cache_window": lambda: make((80, 7), sq=3, capacity=90, d=16, window=(21, None)),
    "cache_beside_window": lambda: make((60, 41), capacity=70, d=16, window=(20, 0)),
    "cache_everything": lambda: featured(
        "everything", lens=(57, 7), new_lens=(3, 2), capacity=72, page_size=12, d=20, dv=17
    ),
    "cache_strides": lambda: make(sq=2, d=16, layout="bshd"),
}  # fmt: skip
# Of its own: 10 GB of addresses (and a few pages).
FAR: dict[str, Callable[[], Call]] = {"cache_far": _far}


def case_named(name: str) -> Call:
    torch.manual_seed(0)
    return (CASES | FAR)[name]()


def check(name: str) -> None:
    """AssertionError unless the call is as near to the fp64 oracle as plain PyTorch is (x 2)."""
    with mock.patch.object(kernels, "_MERGED_AT_ONCE", 2):  # so few have splits to spare
        if name.startswith("cache_wild"):
            wild(name)
        elif name == "cache_beside_window":
            beside_window(case_named(name))
        else:
            case_named(name).judge("triton")


def beside_window(call: Call) -> None:
    """What lies left of the only row's window is not used, whatever it is."""
    right = call.run("triton")["o"]
    for cache in CACHES:
        for b, cached in enumerate(call.tensors["cache_lens"].tolist()):
            call.tensors[cache][b, :, : cached - 20] = torch.nan
    if not torch.equal(call.run("triton")["o"], right):
        raise AssertionError("keys left of the window are used")


def wild(name: str) -> None:
    """What nobody checked on a GPU: any value, and no access outside of the tensors. Results are
    those of the reference, which clamps alike."""
    torch.manual_seed(0)
    call = make((61, 7), sq=3, capacity=70, d=16, page_size=7 if "pages" in name else 0)
    t, far = call.tensors, 2**40
    for cache in CACHES:
        t[cache].nan_to_num_(0.5)
    if name == "cache_wild_pages":
        del t["k"], t["v"]  # pages that two append to are a race
        t["block_table"] = torch.randint(-(2**31), 2**31 - 1, (2, 10), dtype=torch.int32)
    else:
        name = name.removeprefix("cache_wild_")
        if name == "cache_index":
            del t["k"], t["v"]
            t[name] = torch.tensor([-far, far])
        elif name == "rotary":
            call.options["rotary"] = table(5, 8)
        else:
            t[name] = torch.tensor([far, -far])
    given = call.copies()
    o, lse = as_op(given, call.options)
    right = call.copies()
    right_o, right_lse = reference.attention_with_kv_cache(**right, **call.options, return_lse=True)
    for what, got, want in (
        ("o", o, right_o), ("lse", lse, right_lse), *((n, given[n], right[n]) for n in CACHES),
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=what)


def as_op(tensors: dict[str, Any], options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The op, which checks shapes alone."""
    cos, sin = options.get("rotary", (None, None))
    names = ("k", "v", "new_lens", "block_table", "cache_index")
    o, lse = torch.ops.fastattn.attention_kv_cache_triton(
        *(tensors[n] for n in ("q", *CACHES, "cache_lens")), *map(tensors.get, names), cos, sin,
        None, None, None, tensors["q"].shape[-1] ** -0.5, 0.0, True, -1, -1, False,
    )  # fmt: skip
    return o, lse


WILD = (
    "cache_wild_cache_lens", "cache_wild_cache_index", "cache_wild_pages", "cache_wild_new_lens",
    "cache_wild_rotary",
)  # fmt: skip
