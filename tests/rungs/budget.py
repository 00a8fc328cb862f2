"""The budget of rung (d): what each shipped kernel may take on each architecture.

A row is a kernel as the launchers launch it for an architecture: dtype, head dim, features, tile.
`budgets.json` has one line a row; `python -m rungs budgets --write` makes it. A figure worse than
its line fails, and whatever the file says: spills must be 0, shared memory below the architecture's
limit, and a 16-bit kernel must use the tensor cores in its loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tools import featured

from . import budget_file, cache_budget, recurrent_budget, row_budget
from .aot import ARCHS, CompileError, Figures, all_figures
from .calls import attend, tiles_of
from .driver import SHARED_LIMIT
from .launches import Launch, recorded

FILE = Path(__file__).with_name("budgets.json")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (32, 64, 128, 256)
# "everything": every branch of the kernels at once, in 16 bit. "atomics": the backward's other way.
FEATURES = ("plain", "causal", "everything", "atomics")
# prepare has a product only for dweights
NO_DOT = (
    "prepare_kernel", "dsinks_kernel", *row_budget.KERNELS, "ffn_block_finish_kernel",
    "append_kernel", "merge_kernel",
)  # fmt: skip

_COLUMNS = ("BLOCK_N", "BLOCK_F", "BLOCK_U", "BLOCK_H")


@dataclass(frozen=True)
class Row:
    arch: str
    dtype: str
    head_dim: int
    feature: str
    launch: Launch

    @property
    def name(self) -> str:
        sizes = self.launch.bound
        columns = next((sizes[n] for n in _COLUMNS if n in sizes), "-")
        tile = f"{sizes.get('BLOCK_M', sizes.get('BLOCK_B', '-'))}x{columns}"
        options = f"w{self.launch.meta['num_warps']}"
        if "num_stages" in self.launch.meta:
            options += f" s{self.launch.meta['num_stages']}"
        return f"{self.dtype} d{self.head_dim} {self.feature} {self.launch.name} {tile} {options}"


def rows(
    archs: Sequence[str], dtypes: Sequence[str], head_dims: Sequence[int], features: Sequence[str]
) -> Iterator[Row]:
    """Every launch of a forward and backward of each combination; nothing runs."""
    for arch in archs:
        for dtype in dtypes:
            for d in head_dims:
                for feature in features:
                    for launch in launches(arch, DTYPES[dtype], d, feature):
                        yield Row(arch, dtype, d, feature, launch)


def launches(arch: str, dtype: torch.dtype, head_dim: int, feature: str) -> list[Launch]:
    torch.manual_seed(0)
    name = {"everything": "all", "atomics": "causal"}.get(feature, feature)
    problem = featured(name, b=2, h=4, hk=2, sq=256, sk=256, d=head_dim, dtype=dtype)
    with tiles_of(arch), recorded() as found:
        attend(problem, deterministic=feature != "atomics")
    keep = {"atomics": ("by_keys_kernel",)}.get(feature)
    return [x for x in found if keep is None or x.name in keep]


def row_rows(
    archs: Sequence[str], dtypes: Sequence[str], widths: Sequence[int], features: Sequence[str],
    kernels: Sequence[str] = row_budget.KERNELS,
) -> Iterator[Row]:  # fmt: skip
    """The same of layernorm_ffn and its parts; a width stands where a head dim does."""
    for arch in archs:
        for dtype in dtypes:
            for n in widths:
                for feature in features:
                    for launch in row_budget.launches(arch, DTYPES[dtype], n, feature, kernels):
                        yield Row(arch, dtype, n, feature, launch)


def block_rows(archs: Sequence[str], dtypes: Sequence[str]) -> Iterator[Row]:
    """layernorm_ffn in one kernel."""
    of = row_budget
    for dtype in dtypes:
        widths = of.BLOCK_WIDTHS[: 1 if dtype == "fp32" else None]
        yield from row_rows(archs, [dtype], widths, of.BLOCK_FEATURES, of.BLOCK_KERNELS)


def recurrent_rows(
    archs: Sequence[str], dtypes: Sequence[str], features: Sequence[str],
    kernels: Sequence[str] = recurrent_budget.KERNELS,
) -> Iterator[Row]:  # fmt: skip
    """LSTM, GRU and RNN; H stands where a head dim does."""
    for arch in archs:
        for dtype in dtypes:
            for feature in features:
                found = recurrent_budget.launches(arch, DTYPES[dtype], feature, kernels)
                for H, launch in found:
                    yield Row(arch, dtype, H, feature, launch)


def cache_rows(
    archs: Sequence[str], dtypes: Sequence[str], head_dims: Sequence[int], features: Sequence[str]
) -> Iterator[Row]:
    """Attention over a KV cache."""
    for arch in archs:
        for dtype in dtypes:
            for d in head_dims:
                for feature in features:
                    for launch in cache_budget.launches(arch, DTYPES[dtype], d, feature):
                        yield Row(arch, dtype, d, feature, launch)


def sample() -> list[Row]:
    """What `make verify` compiles: the usual sizes, each architecture once or twice."""
    found = list(rows(ARCHS, ["bf16"], [64], ["causal"]))
    found += rows(["sm_80", "sm_90"], ["bf16"], [128], ["plain"])
    found += rows(["sm_80"], ["fp32", "fp16"], [64], ["plain"])
    found = [row for row in found if row.launch.name not in NO_DOT]
    most = ("norm_forward_kernel", "norm_backward_kernel", "act_backward_kernel")
    found += row_rows(ARCHS, ["bf16"], [768], ["rows"], most)
    found += row_rows(["sm_80"], ["bf16"], [768], ["everything"])
    of = recurrent_budget.KERNELS
    found += recurrent_rows(["sm_80", "gfx942"], ["bf16"], ["lstm few"], of[2:4])
    found += recurrent_rows(["sm_86", "sm_90"], ["bf16"], ["gru whole"], of[:2])
    found += recurrent_rows(["sm_80"], ["fp32"], ["rnn whole"], of[:1])
    found += recurrent_rows(["sm_86"], ["fp32"], ["gru whole"], of[1:2])
    found += [
        row for row in cache_rows(["sm_80", "sm_86", "sm_90", "sm_120"], ["bf16"], [128], ["paged"])
        if row.launch.name not in NO_DOT
    ]  # fmt: skip
    found += cache_rows(["sm_80"], ["bf16"], [64], ["decode"])
    found += cache_rows(["sm_100", "gfx942"], ["fp32"], [32], ["decode"])
    return [*found, *block_rows(["sm_86", "sm_90"], ["bf16"])]


def full() -> list[Row]:
    found = list(rows(ARCHS, list(DTYPES), HEAD_DIMS, ["plain", "causal"]))
    found += rows(ARCHS, ["bf16"], [64, 128], ["everything", "atomics"])
    found += row_rows(ARCHS, ["bf16", "fp32"], row_budget.WIDTHS, ["rows"])
    found += row_rows(ARCHS, ["bf16", "fp32"], [768], ["everything"])
    found += block_rows(ARCHS, ["bf16", "fp32"])
    for dtype, features in cache_budget.FEATURES.items():
        found += cache_rows(ARCHS, [dtype], HEAD_DIMS, features)
    for dtype, features in recurrent_budget.FEATURES.items():
        found += recurrent_rows(ARCHS, [dtype], features)
    return found


def read() -> dict[str, dict[str, Figures]]:
    return budget_file.read(FILE, Figures)


def write(found: dict[str, dict[str, Figures]]) -> None:
    budget_file.write(FILE, found)


def rules(row: Row, now: Figures) -> list[str]:
    """What holds whatever the budget says."""
    wrong = []
    if now.spills:
        wrong.append(f"{now.spills} spill instructions in a shipped config")
    if now.shared > SHARED_LIMIT[row.arch]:
        wrong.append(f"shared {now.shared} > the limit {SHARED_LIMIT[row.arch]}")
    if row.dtype != "fp32" and row.launch.name not in NO_DOT and now.mma == 0:
        wrong.append("no tensor-core instruction in its loop")
    return wrong


def measure(found: Sequence[Row]) -> list[Figures | CompileError]:
    return all_figures([(row.launch, row.arch) for row in found])


def verdicts(found: Sequence[Row]) -> dict[str, list[str]]:
    """What is wrong, by row; empty if all is well."""
    budget = read()
    wrong: dict[str, list[str]] = {}
    for row, now in zip(found, measure(found), strict=True):
        if isinstance(now, CompileError):
            problems = [str(now)]
        else:
            allowed = budget.get(row.arch, {}).get(row.name)
            problems = rules(row, now)
            problems += ["is not in budgets.json"] if allowed is None else now.worse_than(allowed)
        if problems:
            wrong[f"{row.arch} {row.name}"] = problems
    return wrong
