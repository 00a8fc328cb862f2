"""Rung (e): each planted bug of mutations.py must be caught, by the check that is named for it.

A mutant is a copy of kernels/ with one bug, imported as fastattn.kernels in a process of its own,
forked from one that has torch and Triton loaded but no kernels. What counts as caught is a
verdict of a rung; any other error (a bug in this file, say) is red.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import multiprocessing.connection
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "build" / "mutants"
TABLE = Path(__file__).with_name("MUTATIONS.md")
JOBS, TIMEOUT = 2, 300.0  # seconds from one answer to the next
COLUMNS = ("interpreter", "ttsem", "driver", "budget")
ROWS = "row_"  # how the cases of row_cases.py begin: layernorm_ffn and its parts
RECURRENT = "rec_"  # and those of recurrent_cases.py
CACHE = "cache_"  # and of cache_cases.py: attention over a KV cache


@dataclass(frozen=True)
class Outcome:
    kind: str  # "" survived; values, oob_read, race, ..., compile, launch, budget; crash, error
    text: str = ""

    @property
    def caught(self) -> bool:
        return self.kind not in ("", "crash", "error")  # a crash names no cause


NO_ANSWER = Outcome("error", "no answer")


# --------------------------------------------------------------- the checks, run inside a mutant


def small_cases(name: str) -> Any:
    """The module of the cases that a name belongs to; attention's are of another kind: None."""
    if name.startswith(RECURRENT):
        from . import recurrent_cases

        return recurrent_cases
    if name.startswith(ROWS):
        from . import row_cases

        return row_cases
    if name.startswith(CACHE):
        from . import cache_cases

        return cache_cases
    return None


def by_ttsem(name: str) -> None:
    cases = small_cases(name)
    if cases is not None:
        from .semantics import semantics

        with semantics():
            cases.check(name)
        return
    from .calls import check
    from .cases import case_named
    from .semantics import semantics

    case = case_named(name)
    with semantics(may_hold_nan=case.may_hold_nan):
        check(case.problem(), backward=case.backward, deterministic=case.deterministic)


def by_interpreter(name: str) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "triton"))
    import interpreter

    cases = small_cases(name)
    if cases is not None:
        from .launches import unwritten_is_nan

        with interpreter.interpreted(), unwritten_is_nan():
            cases.check(name)
        return
    from .calls import check
    from .cases import case_named
    from .launches import unwritten_is_nan

    case = case_named(name)
    with interpreter.interpreted(), unwritten_is_nan():
        check(case.problem(), backward=case.backward, deterministic=case.deterministic)


def by_driver(what: str) -> None:
    import torch
    from tools import padded

    from . import jit
    from .calls import attend
    from .driver import standing_in

    if what.startswith(ROWS):
        _rows_by_driver(what)
        return
    if what.startswith(RECURRENT):
        _recurrent_by_driver(what)
        return
    if what.startswith(CACHE):
        _cache_by_driver(what)
        return
    if what == "growing":
        compiled = jit.compiles_while_growing(80)
        assert set(compiled.values()) == {1}, f"needless binaries: {compiled}"
    elif what.startswith("sm_"):
        jit.fits(what, 128, torch.bfloat16)
    else:
        with standing_in(80):
            attend(padded(b=1, h=2, hk=1, sq=37, sk=45, d=32), backward=False)


def _rows_by_driver(what: str) -> None:
    from ffn_tools import run

    from . import row_cases, row_jit
    from .driver import standing_in

    if what == "row_growing":
        compiled = row_jit.compiles_while_growing(80)
        few = compiled.pop("sum_parts_kernel", 2) == 2 and set(compiled.values()) == {1}
        assert few, f"needless binaries: {compiled}"
    else:
        with standing_in(80):
            run(row_cases.case_named(what), "triton")


def _recurrent_by_driver(what: str) -> None:
    from recurrence_calls import RNN_TANH, run

    from . import recurrent_cases, recurrent_jit
    from .driver import standing_in

    if what == "rec_growing":
        compiled = recurrent_jit.compiles_while_growing("_sequence", 80)
        assert set(compiled.values()) == {1}, f"needless binaries: {compiled}"
    elif what == "rec_weights":
        again = recurrent_jit.weights_in_the_loop(RNN_TANH)
        assert not again, f"weights are read in the loop over time: {again[0][:200]}"
    else:
        with recurrent_cases.tier_of(what), standing_in(80):
            run(recurrent_cases.case_named(what))


def _cache_by_driver(what: str) -> None:
    from . import cache_cases, cache_jit
    from .driver import standing_in

    if what == "cache_growing":
        compiled = cache_jit.compiles_while_growing(80)
        assert set(compiled.values()) == {1}, f"needless binaries: {compiled}"
    else:
        with standing_in(80):
            cache_cases.case_named(what).run("triton")


def by_budget(what: str) -> None:
    """The forward's row for bf16, head dim 64, causal on sm_80; or those of another op."""
    from . import budget

    if what.startswith(ROWS):
        rows = list(budget.row_rows(["sm_80"], ["bf16"], [768], ["rows"]))
    elif what.startswith(RECURRENT):
        step = ["recurrent_step_kernel"]
        rows = list(budget.recurrent_rows(["sm_80"], ["bf16"], ["lstm few"], step))
    elif what.startswith(CACHE):
        rows = list(budget.cache_rows(["sm_80"], ["bf16"], [64], ["decode"]))
    else:
        rows = [
            row
            for row in budget.rows(["sm_80"], ["bf16"], [64], ["causal"])
            if row.launch.name == f"{what}_kernel"
        ]
    known, wrong = budget.read()["sm_80"], []
    for row, now in zip(rows, budget.measure(rows), strict=True):
        if not isinstance(now, budget.Figures):
            raise now
        # Of another tile than the budget's: the shipped one is the measure.
        prefix = row.name.split("_kernel")[0] + "_kernel "
        allowed = next(f for n, f in known.items() if n.startswith(prefix))
        wrong += [*budget.rules(row, now), *now.worse_than(allowed)]
    if wrong:
        raise BudgetError("; ".join(wrong))


class BudgetError(AssertionError):
    pass


CHECKS: dict[str, Callable[[str], None]] = {
    "ttsem": by_ttsem,
    "interpreter": by_interpreter,
    "driver": by_driver,
    "budget": by_budget,
}


def judge(check: str) -> Outcome:
    """Run a check; translate what it raises."""
    import triton
    from triton.runtime.errors import OutOfResources

    from .aot import CompileError
    from .driver import LaunchError
    from .semantics import FaultError

    rung, _, argument = check.partition(":")
    try:
        CHECKS[rung](argument)
    except FaultError as found:
        return Outcome(found.kind, str(found))
    except (triton.CompilationError, CompileError) as found:
        return Outcome("compile", str(found))
    except (LaunchError, OutOfResources) as found:
        return Outcome("launch", str(found))
    except BudgetError as found:
        return Outcome("budget", str(found))
    except AssertionError as found:
        return Outcome("values" if rung in ("ttsem", "interpreter") else "compiles", str(found))
    except Exception as found:
        return Outcome("error", f"{type(found).__name__}: {found}")
    return Outcome("")


# -------------------------------------------------------------------------------- the processes


def mutate(text: str, mutation: Mutation) -> str:
    if text.count(mutation.find) != 1:
        raise ValueError(
            f"{mutation.name}: its code stands {text.count(mutation.find)} times in {mutation.file}"
        )
    return text.replace(mutation.find, mutation.replace)


class _Mutated:
    """Finds fastattn.kernels and its modules in a folder, before any other finder does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "fastattn.kernels" and not name.startswith("fastattn.kernels."):
            return None
        parts = name.split(".")[2:]
        if not parts:
            return importlib.util.spec_from_file_location(
                name, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)]
            )
        return importlib.util.spec_from_file_location(
            name, self.folder.joinpath(*parts).with_suffix(".py")
        )


def _child(mutation: Mutation | None, checks: Sequence[str], answer: Any) -> None:
    # The line number of a source is part of Triton's key of a compiled kernel, its folder is not.
    folder = LAB / (mutation.name if mutation else "none")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    if mutation:
        path = folder / mutation.file
        path.write_text(mutate(path.read_text(), mutation))
    assert "fastattn.kernels" not in sys.modules
    sys.meta_path.insert(0, _Mutated(folder))
    for check in checks:
        answer.send((check, judge(check)))
    answer.close()


def run(jobs: Iterable[tuple[Mutation | None, Sequence[str]]]) -> dict[str, dict[str, Outcome]]:
    """Outcome by mutant ("none": the kernels as they are) and check; two processes at a time."""
    if "fastattn.kernels" in sys.modules:
        raise RuntimeError("the kernels are already imported: run `python -m rungs mutants`")
    import torch
    import ttsem.sanitize  # noqa: F401  loaded once, before the forks

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    waiting, found = list(jobs), {}
    running: dict[Any, tuple[Any, str, Sequence[str], float]] = {}
    while waiting or running:
        while waiting and len(running) < JOBS:
            mutation, checks = waiting.pop(0)
            name = mutation.name if mutation else "none"
            found[name] = dict.fromkeys(checks, NO_ANSWER)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(mutation, checks, send))
            process.start()
            send.close()
            running[receive] = (process, name, checks, time.monotonic())
        for pipe in multiprocessing.connection.wait(list(running), timeout=1.0):
            process, name, checks, _ = running[pipe]
            try:
                check, outcome = pipe.recv()
                found[name][check] = outcome
                running[pipe] = (process, name, checks, time.monotonic())
            except EOFError:
                process.join()
                del running[pipe]
                _say_died(found[name], process.exitcode)
        for pipe, (process, name, checks, start) in list(running.items()):
            if time.monotonic() - start > TIMEOUT:
                process.kill()
                process.join()
                del running[pipe]
                found[name][checks[-1]] = Outcome("error", f"no end within {TIMEOUT:.0f} s")
    return found


def _say_died(found: dict[str, Outcome], status: int) -> None:
    """A mutant that corrupts the heap takes its process along: the check that ran then."""
    silent = [check for check, outcome in found.items() if outcome == NO_ANSWER]
    if silent and status < 0:
        found[silent[0]] = Outcome("crash", f"died of signal {-status}")


def panel(mutation: Mutation) -> list[str]:
    """Every rung's check for the table: the named one, and the others on the nearest case."""
    rung, _, argument = mutation.by.partition(":")
    case = mutation.case or argument
    checks = {"ttsem": f"ttsem:{case}", "driver": "driver:aligned", "budget": "budget:forward"}
    if case.startswith(ROWS):
        checks |= {"driver": f"driver:{case}", "budget": "budget:row_norm"}
    if case.startswith(RECURRENT):
        checks |= {"driver": f"driver:{case}", "budget": "budget:rec_step"}
    if case.startswith(CACHE):
        checks |= {"driver": f"driver:{case}", "budget": "budget:cache_attend"}
    checks |= {rung: mutation.by}
    return [*checks.values(), f"interpreter:{case}"]  # last: it may take the process along


def table(found: dict[str, dict[str, Outcome]]) -> str:
    lines = [
        "# Planted bugs in the Triton kernels, and who catches them",
        "",
        "Generated by `make mutations`; do not edit. Each row is a copy of `kernels/` with one",
        "bug. A word is what the rung says of it, a dash that it sees nothing. *interpreter*:",
        "Triton's interpreter against the fp64 oracle; *ttsem*: the semantics of the compiler's IR",
        "(values, bounds, races, unwritten reads); *driver*: Triton's JIT behind a stand-in driver",
        "(compiles, launches, compiles no more than it must); *budget*: machine code of the",
        "forward for sm_80. `make verify` runs the check in the last column alone.",
        "",
        "| bug | what it breaks | " + " | ".join(COLUMNS) + " | check |",
        "|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for m in MUTATIONS:
        by_rung = {c.partition(":")[0]: o for c, o in found[m.name].items()}
        cells = [by_rung[c].kind or "–" for c in COLUMNS]
        lines.append(f"| {m.name} | {m.breaks} | " + " | ".join(cells) + f" | `{m.by}` |")
    caught = {c: sum(any(x.startswith(c) and o.caught for x, o in found[m.name].items())
                     for m in MUTATIONS) for c in COLUMNS}  # fmt: skip
    total = ", ".join(f"{c} {n}" for c, n in caught.items())
    return "\n".join([*lines, "", f"{len(MUTATIONS)} bugs; caught by {total}.", ""])
