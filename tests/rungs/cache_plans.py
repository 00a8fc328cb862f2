"""Calls over a KV cache as Triton's launcher serves them, which bench/model reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from bench.model.archs import ARCHS
from bench.model.decode import Call
from bench.model.decode_list import ARCHITECTURES, CASES, plan
from fastattn.kernels import attention_kv_cache as kernels
from fastattn.kernels import configs

from .calls import tiles_of
from .launches import Launch, recorded, specialise, target

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compiled(launch: Launch, arch: str, to: Path) -> Any:
    """The launch's kernel as Triton compiles it, its cubin at `to`."""
    special = specialise(launch, target(arch))
    made = triton.compile(
        special.source, target=target(arch), options=special.options.__dict__
    )  # fmt: skip
    to.write_bytes(made.kernel)
    return made


def write(folder: Path, archs: Iterable[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """cache_kernels and cache_plans of bench/model/decode_list.py. A kernel is compiled once a
    dtype, head dim and way of paging: sizes and splits are not constants of it."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    plans = []
    for arch in archs:
        for call in CASES if arch in ARCHITECTURES else ():
            made = {x.name: x for x in launches(arch, call)}
            attend = made["cached_attention_kernel"]
            kind = f"{call.dtype} d{call.D}"
            names = {
                "cached_attention_kernel": f"cached_attention_kernel {kind}"
                + (" paged" if call.page else ""),
                "merge_kernel": f"merge_kernel {kind}",
            }
            for name, launch in made.items():
                if (arch, names[name]) not in entries:
                    entries[arch, names[name]] = _entry(folder, arch, names[name], launch)
            splits = attend.bound["splits"]
            plans.append(plan(arch, call, splits, *names.values()))
    return list(entries.values()), plans


def launches(arch: str, call: Call) -> list[Launch]:
    """Of one step: its rows are appended by the kernel itself. The tensors are never touched."""
    dtype = _DTYPES[call.dtype]

    def rows(heads: int, n: int, entries: int = call.B) -> torch.Tensor:
        return torch.empty(entries, heads, n, call.D, dtype=dtype)

    pages = -(-call.Sk // call.page) if call.page else 0
    slots, entries = (call.page, call.B * pages) if pages else (call.Sk, call.B)
    table = torch.empty(call.B, pages, dtype=torch.int32) if pages else None
    new = rows(call.Hk, call.Sq)
    rest = (
        new, new, None, table, None, None, None, None, None, None, call.D**-0.5, 0.0, True, -1, -1,
        False,
    )  # fmt: skip
    lens = torch.empty(call.B, dtype=torch.int32)
    sms = ARCHS[arch].sms
    with (
        tiles_of(arch), recorded() as found,
        mock.patch.object(configs, "multiprocessors", return_value=sms),
    ):  # fmt: skip
        kernels.attention_kv_cache(
            rows(call.H, call.Sq), rows(call.Hk, slots, entries), rows(call.Hk, slots, entries),
            lens, *rest,
        )  # fmt: skip
    return found


def _entry(folder: Path, arch: str, name: str, launch: Launch) -> dict[str, Any]:
    cubin = f"{name.replace(' ', '.')}.{arch}.cubin"
    made = compiled(launch, arch, folder / cubin)
    return {
        "id": name,
        "arch": arch,
        "cubin": cubin,
        "function": made.metadata.name,
        "threads": made.metadata.num_warps * 32,
        "shared": made.metadata.shared,
        "rows": launch.bound.get("BLOCK_M", 1),
        "keys": launch.bound.get("BLOCK_N", 0),
        "stages": launch.meta["num_stages"],
        "at_once": launch.bound.get("BLOCK_S"),
    }
