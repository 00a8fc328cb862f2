"""Each planted bug of mutations.py must be caught, by the check named for it and in the way that is
written down: nothing is caught by luck.

A mutant is a copy of csrc with one bug and few variants in its tables, built and run in a process
of its own. The checks:

| rung      | what runs                                                                    |
|-----------|------------------------------------------------------------------------------|
| ptx       | `backend="cuda"`: binding, launcher and sm_80 PTX in the simulator, judged   |
|           | against the fp64 oracle                                                      |
| tsan/asan | the source, compiled for the host, in the emulator; plain: without sanitizer |
| conflicts | ptx, and no shared-memory access takes more wavefronts than it must          |
| budget    | machine code for an architecture: spills                                     |
"""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ffn_tools import Call, ffn
from ffn_tools import judge as judge_ffn
from recurrence_calls import GRU, cuda
from recurrence_calls import call as recurrence
from recurrence_calls import judge as judge_recurrence
from rungs.mutants import mutate
from tools import Problem, featured, judge, packed, padded

import fastattn

from . import build, kv_cache_cases, mutations_ffn, mutations_kv_cache, mutations_recurrent
from .mutations import (
    BF16,
    BIAS,
    FORWARD,
    FWD,
    KEYS,
    ROWS,
    WEIGHTS,
    Mutation,
    Variant,
)
from .mutations_backward import BACKWARD
from .mutations_ffn import FFN
from .mutations_kv_cache import KV_CACHE
from .mutations_recurrent import RECURRENT

MUTATIONS = (*FORWARD, *BACKWARD, *FFN, *RECURRENT, *KV_CACHE)
JOBS, TIMEOUT = 2, 280.0  # seconds for one mutant, its compilation included
TABLE = Path(__file__).with_name("MUTATIONS.md")
_CODES = {"__nv_bfloat16": "DType::kBf16", "__half": "DType::kF16", "float": "DType::kF32"}
_DTYPES = {"__nv_bfloat16": torch.bfloat16, "__half": torch.float16, "float": torch.float32}


@dataclass(frozen=True)
class Outcome:
    kind: str  # "" = nothing seen
    text: str = ""


# ------------------------------------------------------------------------------------------ cases


def _wide_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """x as a view of rows of `width` columns, NaN behind it."""
    room = torch.full((*x.shape[:-1], width), torch.nan, dtype=x.dtype)
    room[..., : x.shape[-1]] = x
    return room[..., : x.shape[-1]]


def _in_wide_rows(problem: Problem) -> Problem:
    return replace(problem, **{name: _wide_rows(getattr(problem, name), 64) for name in "qkv"})


def _poisoned_tail(dtype: torch.dtype) -> Problem:
    """NaN behind the keys' lengths."""
    problem = padded(b=2, h=2, sq=70, sk=140, d=64, dtype=dtype, k_lens=torch.tensor([70, 133]))
    for b, n in enumerate((70, 133)):
        problem.k[b, :, n:], problem.v[b, :, n:] = torch.nan, torch.nan
    return problem


CASES: dict[str, Callable[[torch.dtype], Problem]] = {
    # Two row tiles, four key tiles, tails of both, two heads a group.
    "plain": lambda t: padded(b=1, h=4, hk=2, sq=150, sk=200, d=64, dtype=t),
    "no_keys": lambda t: padded(b=1, h=1, sq=200, sk=20, d=64, dtype=t, causal="bottom_right"),
    "poisoned_tail": _poisoned_tail,
    "narrow": lambda t: _in_wide_rows(padded(b=1, h=2, sq=70, sk=70, d=40, dtype=t)),
    "odd_head_dim": lambda t: _in_wide_rows(padded(b=1, h=2, sq=70, sk=70, d=60, dtype=t)),
    "odd_rows": lambda t: padded(b=1, h=2, sq=67, sk=70, d=64, dtype=t),
    "fp32": lambda t: padded(b=1, h=2, sq=70, sk=90, d=64, dtype=t),
    "sinks": lambda t: featured("sinks", b=1, h=2, sq=70, sk=90, d=64, dtype=t),
    "causal": lambda t: padded(b=1, h=2, sq=150, sk=150, d=64, dtype=t, causal=True),
    "window": lambda t: padded(b=1, h=2, sq=150, sk=200, d=64, dtype=t, window=(30, 5)),
    "bottom_right": lambda t: padded(b=1, h=2, sq=70, sk=150, d=64, dtype=t, causal="bottom_right"),
    "packed": lambda t: packed([9, 0, 137, 20], [5, 3, 140, 7], h=2, d=64, dtype=t),
    "features": lambda t: featured("all", b=2, h=4, hk=2, sq=70, sk=90, d=64, dtype=t),
    "bias": lambda t: featured("bias", b=1, h=2, sq=66, sk=70, d=64, dtype=t),
    # Neither has a row or a key to spare.
    "bias_and_mask": lambda t: padded(b=1, h=1, sq=67, sk=70, d=64, dtype=t, bias=torch.randn(
        67, 70), mask=torch.rand(67, 70) < 0.8),
    "dropout": lambda t: padded(b=1, h=2, sq=70, sk=90, d=64, dtype=t, dropout_p=0.3, seed=7),
    "weights_mean": lambda t: padded(b=1, h=4, sq=40, sk=50, d=64, dtype=t, mask=torch.ones(
        1, 1, 40, 50, dtype=torch.bool), return_weights="mean"),
    "weights_causal": lambda t: padded(b=1, h=2, sq=40, sk=50, d=64, dtype=t, causal=True,
        mask=torch.ones(1, 1, 40, 50, dtype=torch.bool), return_weights=True),
    # Rows of 50 columns: 100 bytes.
    "unaligned": lambda t: padded(b=1, h=2, sq=67, sk=70, d=50, dtype=t),
    "wide_head": lambda t: padded(b=1, h=1, sq=70, sk=70, d=256, dtype=t),
    # Sequences without rows, without keys, without either.
    "no_rows": lambda t: packed([0, 9, 0, 3], [5, 0, 0, 3], h=2, d=64, dtype=t),
    "huge": lambda t: padded(b=1, h=2, hk=1, sq=70, sk=90, d=24, dtype=t, kind="huge"),
    "softcap": lambda t: padded(b=1, h=2, sq=70, sk=90, d=64, dtype=t, softcap=1.5),
    "bias_of_keys": lambda t: padded(b=1, h=4, hk=2, sq=70, sk=90, d=64, dtype=t,
        bias=torch.randn(4, 1, 90)),
    "bias_of_rows": lambda t: padded(b=1, h=2, sq=70, sk=90, d=64, dtype=t,
        bias=torch.randn(70, 1)),
    "bias_of_batch": lambda t: padded(b=2, h=2, sq=70, sk=90, d=64, dtype=t,
        bias=torch.randn(2, 70, 90)),
}  # fmt: skip


def _ffn_overflow(dtype: torch.dtype) -> Call:
    """act(b1) is beyond fp16, act(u) is 0 for every row."""
    call = ffn(5, d=32, f=48, dtype=dtype, activation="relu2", norm=None)
    call.tensors["b1"] = torch.full((48,), 300.0, dtype=dtype)
    call.tensors["x"] = -call.tensors["x"].abs() - 1
    call.tensors["w1"] = torch.full((48, 32), 20.0, dtype=dtype)
    return call


FFN_CASES: dict[str, Callable[[torch.dtype], Call]] = {
    # Two blocks of rows, two tiles of hidden units, tails of all.
    "ffn": lambda t: ffn(70, d=40, f=45, dtype=t),
    "ffn_gated": lambda t: ffn(20, d=64, f=72, dtype=t, gated=True),
    "ffn_gated_wide": lambda t: ffn(3, d=256, f=20, dtype=t, gated=True),
    "ffn_parts": lambda t: ffn(7, d=40, f=300, dtype=t),
    "ffn_chunks": lambda t: ffn(600, d=16, f=40, dtype=t),
    "ffn_dropout": lambda t: ffn(
        20, d=40, f=45, dtype=t, dropout_p=0.3, hidden_dropout_p=0.4, seed=7
    ),
    "ffn_overflow": _ffn_overflow,
}


# The recurrence: name, the call's options and the first tier to be considered. `only` names the
# units of a block, which is the tier: 128 all of them (0), 16 a slice (1); the step tier is 2.
_RAGGED = {"H": 20, "D": 2, "reverse": 2, "lengths": [4, 1, 0, 3, 2]}
RECURRENT_CASES: dict[str, tuple[dict[str, Any], int]] = {
    "rnn_grid": ({"H": 40, "B": 5, "mask": True}, 1),
    "rnn_gru": ({"H": 20, "B": 5, "T": 3, "cell": GRU}, 1),
    "rnn_ragged": (_RAGGED, 1),
    "rnn_torn": ({"H": 40, "B": 5}, 1),  # warps in random order, torn apart
    "rnn_tiles": ({"H": 100, "B": 40, "T": 2}, 1),
    "rnn_block": ({"H": 40, "B": 5, "T": 3}, 0),
    "rnn_step": ({**_RAGGED, "mask": True}, 2),
    "rnn_projected": ({**_RAGGED, "P": 7}, 2),
}


# --------------------------------------------------------------- the checks, run inside a mutant


def _by_ptx(case: str, mutation: Mutation | None, sources: Path, only: Variant) -> None:
    from . import operators, ptx

    _use(mutation, sources, () if case in RECURRENT_CASES or case.startswith("kv_") else (FWD,))
    with operators.on_cpu() as gpu:
        try:
            if case == "hostile_lengths":
                _hostile_lengths()
            elif case == "ffn_huge":
                _ffn_huge()
            elif case in RECURRENT_CASES:
                if case == "rnn_torn":
                    gpu.schedule = ptx.Schedule(seed=3, order="random")
                options, tier = RECURRENT_CASES[case]
                judge_recurrence(recurrence(dtype=_DTYPES[only[0]], **options), cuda(tier))
            elif case.startswith("kv_"):
                kv_cache_cases.check(case, _DTYPES[only[0]])
            elif case in FFN_CASES:
                judge_ffn(FFN_CASES[case](_DTYPES[only[0]]), "cuda")
            else:
                name, _, way = case.partition("+")
                judge(CASES[name](_DTYPES[only[0]]), "cuda", deterministic=way != "atomics")
        except RuntimeError:  # what a fault of the simulator is below a torch op
            if not gpu.faults:
                raise
            raise gpu.faults[0] from None


def _hostile_lengths() -> None:
    """Far beyond the tensors; nobody reads them on the host."""
    q, k, v = torch.randn(3, 2, 1, 70, 64, dtype=torch.bfloat16)
    lens = torch.tensor([10**6, -5])
    numbers = (0.125, 0, -1, -1, 0.0, 0.0, 0, 0, 0)
    tensors = (None, None, lens, lens, None, None, None, None, None)
    torch.ops.fastattn.attention_cuda_kernel_fwd(q, k, v, *tensors, *numbers)


def _ffn_huge() -> None:
    """Rows that fp32 cannot square, of equal elements, with a mean of 1000. Plain PyTorch has NaN
    for some of them, so it is no measure."""
    rows = torch.randn(40) * 1e30, torch.full((40,), 3.0), 1000 + torch.randn(40)
    call = ffn(3, d=40, f=48, x=torch.stack(rows), residual=False)
    with torch.no_grad():
        y = call.run(fastattn, call.leaves(), backend="cuda")["y"]
    right = call.run(fastattn.reference, {n: t.double() for n, t in call.tensors.items()})["y"]
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)


def _by_conflicts(case: str, mutation: Mutation | None, sources: Path, only: Variant) -> None:
    from . import operators, ptx

    _use(mutation, sources)
    with operators.on_cpu() as gpu:
        gpu.schedule = ptx.Schedule(traffic=True)
        judge(CASES[case](_DTYPES[only[0]]), "cuda")
        # Rows of fragments that are written for o in pairs take what their banks allow.
        found = [
            t
            for launch in gpu.launches
            for t in launch.report.traffic
            if t.space == "shared" and "ldmatrix" in t.site and t.ratio > 1
        ]
    if found:
        raise ConflictError(f"{found[0].site}: {found[0].ratio:.0f} ways")


class ConflictError(AssertionError):
    """A shared-memory access that its layout makes slow."""


def _by_emulator(case: str, sources: Path, only: Variant) -> None:
    from .emu import HERE, Program, run
    from .emu_attention import forward

    rung, _, name = case.partition(":")
    if name in FFN_CASES:
        _ffn_by_emulator(rung, sources, only)
        return
    if name in RECURRENT_CASES:
        _recurrence_by_emulator(rung, name, sources, only)
        return
    if name in kv_cache_cases.CASES:
        _cache_by_emulator(rung, name, sources, only)
        return
    program = Program(
        (sources / FWD, sources / WEIGHTS, HERE / "launchers" / "attention.cpp"),
    )
    shapes: dict[str, dict[str, Any]] = {
        "plain": {"Sq": 70, "Sk": 200, "D": 64},
        "no_keys": {"Sq": 200, "Sk": 20, "D": 64, "causal": 2},
    }
    f = forward(_DTYPES[only[0]], **shapes[name])
    for schedule in ("forward", "reverse"):
        f.check(run(program, f.case, rung, schedule=schedule))


def _ffn_by_emulator(rung: str, sources: Path, only: Variant) -> None:
    from .emu import run
    from .emu_layernorm_ffn import passes, program

    built = program(cuda=sources)
    for one in passes(_DTYPES[only[0]], M=70, D=40, F=75):
        for schedule in ("forward", "reverse"):
            one.check(run(built, one.case, rung, schedule=schedule))


def _recurrence_by_emulator(rung: str, name: str, sources: Path, only: Variant) -> None:
    from .emu import run
    from .emu_recurrent import passes, program

    options, tier = RECURRENT_CASES[name]
    built = program(cuda=sources)
    for one in passes(_DTYPES[only[0]], tier=tier, **options):
        for schedule in ("forward", "reverse"):
            one.check(run(built, one.case, rung, schedule=schedule))


def _cache_by_emulator(rung: str, name: str, sources: Path, only: Variant) -> None:
    from .emu import run
    from .emu_attention_kv_cache import case_of, check, program

    call = kv_cache_cases.CASES[name](_DTYPES[only[0]])
    case = case_of(call, splits=2 if name == "kv_split" else 1)
    for schedule in ("forward", "reverse"):
        check(call, run(program(sources, named=True), case, rung, schedule=schedule))


def _by_budget(arch: str, mutation: Mutation | None, sources: Path) -> None:
    from . import budget

    spills = budget.of_source(sources / (mutation.compiled()[0] if mutation else FWD), arch)
    wrong = {name: found[1] for name, found in spills.items() if found[1]}
    if wrong:
        raise budget.BudgetError(f"spill instructions: {wrong}")


def judged(mutation: Mutation | None, check: str, only: Variant) -> Outcome:
    """Builds the mutant, runs the check, translates what it raises."""
    from .emu import EmulatorFault

    rung, _, argument = check.partition(":")
    sources = _plant(mutation, only)
    try:
        if rung == "ptx":
            _by_ptx(argument, mutation, sources, only)
        elif rung == "conflicts":
            _by_conflicts(argument, mutation, sources, only)
        elif rung == "budget":
            _by_budget(argument, mutation, sources)
        else:
            _by_emulator(check, sources, only)
    except EmulatorFault as found:
        return Outcome(found.kind, found.report)
    except AssertionError as found:
        name = type(found).__name__
        return Outcome("values" if name == "AssertionError" else name, str(found))
    except build.BuildError:
        raise
    except RuntimeError as found:  # the binding's, of a launch that failed
        return Outcome(type(found).__name__, str(found))
    return Outcome("")


# ---------------------------------------------------------------------------------- the processes


def _few(only: Variant) -> dict[str, str]:
    """What is written on top of a source, so that it has few variants."""
    element, head_dim, laden = only
    code, flag = _CODES[element], str(laden).lower()
    line = f"variant<{element}, {head_dim}, {flag}>({code})"
    keys = (f"variant<{element}, {head_dim}, {flag}, {way}>({code})" for way in ("false", "true"))
    made = {
        FWD: f"FASTATTN_FWD_VARIANTS {line}",
        WEIGHTS: f"FASTATTN_WEIGHTS_VARIANTS variant<{BF16}, 64>({_CODES[BF16]})",
        KEYS: f"FASTATTN_BWD_KEYS_VARIANTS {', '.join(keys)}",
        ROWS: f"FASTATTN_BWD_ROWS_VARIANTS {line}",
        BIAS: f"FASTATTN_BWD_BIAS_VARIANTS(make) make<{element}, {head_dim}>({code})",
        mutations_ffn.FWD: f"FASTATTN_FFN_VARIANTS(make) make<{element}, {head_dim}>({code})",
    }
    grads = f"FASTATTN_FFN_BWD_VARIANTS(make) make<{element}, {head_dim}, {flag}>({code})"
    made |= dict.fromkeys((mutations_ffn.ROWS, mutations_ffn.WEIGHTS), grads)
    tier = f"{'many' if laden else 'few'}<{element}, {head_dim}>({code})"
    made[mutations_kv_cache.CACHE] = f"FASTATTN_KV_VARIANTS {tier}"
    cells = f"FASTATTN_RECURRENT_VARIANTS(make) make<{element}, {head_dim}>({code})"
    made |= dict.fromkeys(mutations_recurrent.CELLS, cells)
    return {name: f"#define {text}\n" for name, text in made.items()}


def _plant(mutation: Mutation | None, only: Variant) -> Path:
    """A copy of csrc with the bug and few variants; its folder is named by what is in it."""
    texts = {p: p.read_text() for p in (build.CSRC / "cuda").glob("*.[ch]*")}
    texts |= {p: p.read_text() for p in build.CSRC.glob("*.h")}
    if mutation is not None:
        path = build.CSRC / "cuda" / mutation.file
        texts[path] = mutate(texts[path], mutation)
    for name, line in _few(only).items():
        path = build.CSRC / "cuda" / name
        texts[path] = line + texts[path]
    digest = hashlib.sha256(repr(sorted((p.name, t) for p, t in texts.items())).encode())
    folder = build.KEPT / "mutants" / digest.hexdigest()[:16]
    if not folder.exists():
        made = folder.with_suffix(f".{time.monotonic_ns()}")
        for path, text in texts.items():
            copy = made / path.relative_to(build.CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
        try:
            made.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(made)
    return folder / "cuda"


def _use(mutation: Mutation | None, sources: Path, sound: tuple[str, ...] = (FWD,)) -> None:
    """The binding is linked with the mutant's kernels (of none: with `sound`, of few variants);
    others are as they are. For this process, which ends with it."""
    planted = mutation.compiled() if mutation else sound

    def objects() -> list[Path]:
        return [
            build.cuda_object(sources / source.name if source.name in planted else source)
            for source in sorted((build.CSRC / "cuda").glob("*.cu"))
        ]

    build.cuda_objects = objects


def _answer(job: tuple[Mutation | None, str, Variant]) -> Outcome:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return judged(*job)


def run(jobs: Iterable[tuple[Mutation | None, str, Variant]]) -> list[Outcome]:
    """In order; two at a time, each in a process of its own: it loads its own library."""
    build.cuda_objects()  # once, not by the first two at the same time
    context = multiprocessing.get_context("fork")
    with context.Pool(JOBS, maxtasksperchild=1) as pool:
        waiting = [pool.apply_async(_answer, (job,)) for job in jobs]
        found = []
        for answer in waiting:
            try:
                found.append(answer.get(TIMEOUT))
            except multiprocessing.TimeoutError:
                found.append(Outcome("no answer"))
            except Exception as error:  # a bug of this file, a compiler's refusal: red, not caught
                found.append(Outcome("error", f"{type(error).__name__}: {error}"))
        return found


def all_jobs() -> list[tuple[Mutation | None, str, Variant]]:
    """Every mutant, and what must pass every check: the kernels as they are."""
    sound = sorted({(m.by, m.only) for m in MUTATIONS})
    return [*((None, by, only) for by, only in sound), *((m, m.by, m.only) for m in MUTATIONS)]


def table() -> str:
    lines = [
        "# Planted bugs in the CUDA kernels, and what catches them",
        "",
        "Made from `mutations*.py` by `make mutations`; `make verify-full` runs every row, `make",
        "verify` a sample of each file, and wants just this verdict of just this check.",
        "*ptx*: binding, launcher and sm_80 PTX in the simulator, against the fp64 oracle;",
        "*tsan*, *asan*: the source in the emulator; *conflicts*: shared memory's wavefronts;",
        "*budget*: machine code.",
        "",
        "| bug | what it breaks | check | verdict |",
        "|---|---|---|---|",
    ]
    lines += [f"| {m.name} | {m.breaks} | `{m.by}` | {m.sees} |" for m in MUTATIONS]
    return "\n".join([*lines, "", f"{len(MUTATIONS)} bugs.", ""])
