"""Bugs planted in the CPU kernels of LSTM, GRU and RNN, one at a time: some case must fail for
each.

The machinery is mutation_lab.py, the rule that of tools.py. Barriers are for
ThreadSanitizer, in a program of its own: a missing one shows in the values only by luck.
"""

import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutation_lab import HERE, Lab, build, check_names, check_place
from mutations import Mutation, sample
from mutations_recurrent import (
    EDITS,
    GRU_MUTATIONS,
    LSTM_MUTATIONS,
    RACES,
    TILE_MUTATIONS,
    WIDE_MUTATIONS,
)
from tools import assert_within, one_thread
from torch import Tensor

from fastattn.backends import cpu_isas
from fastattn.reference.recurrent import GATES, GRU, LSTM, RNN_RELU, RNN_TANH, recurrence

# name -> sizes and options. Portable vectors have 4 lanes. With threads the plan cuts the batch
# ("slices") or the hidden units ("team"): see plan_recurrence.
LSTM_CASES: dict[str, dict[str, Any]] = {
    "masked": {"T": 5, "B": 3, "H": 19, "D": 2, "mask": True},
    "lengths": {"T": 6, "B": 5, "H": 10, "D": 2, "lengths": [2, 6, 0, 1, 4], "mask": True},
    "packed": {"T": 6, "B": 5, "H": 9, "D": 2, "packed": [6, 5, 5, 2, 1]},
    "projected": {"T": 5, "B": 4, "H": 27, "P": 18, "D": 2, "lengths": [2, 5, 0, 4], "mask": True},
    "one_step": {"T": 1, "B": 4, "H": 6, "D": 2, "lengths": [0, 1, 0, 1], "mask": True, "gh": True},
    "many_rows": {"T": 2, "B": 100, "H": 5},
    "parts": {"T": 7, "B": 3, "H": 10, "D": 2, "bounds": [0, 3, 4, 7], "mask": True},
    "parts_team": {"T": 6, "B": 3, "H": 66, "threads": 2, "bounds": [0, 1, 6]},
    "slices": {"T": 4, "B": 9, "H": 64, "lengths": [1, 4, 2, 4, 3, 4, 4, 2, 4], "threads": 2},
    "team": {"T": 6, "B": 3, "H": 66, "D": 2, "threads": 4},
    "team_of_three": {"T": 5, "B": 3, "H": 79, "threads": 3},
    "team_projected": {"T": 6, "B": 3, "H": 70, "P": 62, "lengths": [3, 6, 6], "threads": 2},
}  # fmt: skip
GRU_CASES: dict[str, dict[str, Any]] = {
    "gru": {"cell": GRU, "T": 5, "B": 3, "H": 19, "D": 2, "mask": True},
    "gru_lengths": {"cell": GRU, "T": 6, "B": 5, "H": 10, "D": 2, "lengths": [2, 6, 0, 1, 4]},
    "gru_packed": {"cell": GRU, "T": 6, "B": 5, "H": 9, "D": 2, "packed": [6, 5, 5, 2, 1]},
    "gru_parts": {"cell": GRU, "T": 6, "B": 5, "H": 9, "D": 2, "packed": [6, 5, 5, 2, 1],
                  "bounds": [0, 1, 4, 6]},
    "gru_one_step": {"cell": GRU, "T": 1, "B": 4, "H": 6, "D": 2, "mask": True, "gh": True},
    "gru_team": {"cell": GRU, "T": 6, "B": 3, "H": 75, "threads": 2},
    "tanh": {"cell": RNN_TANH, "T": 5, "B": 3, "H": 37, "D": 2, "mask": True},
    "relu": {"cell": RNN_RELU, "T": 5, "B": 4, "H": 37, "D": 2, "lengths": [2, 5, 0, 4]},
    "tanh_team": {"cell": RNN_TANH, "T": 6, "B": 3, "H": 130, "threads": 2},
}  # fmt: skip
# 16 lanes; a piece of K is 96 long.
WIDE_CASES: dict[str, dict[str, Any]] = {
    "lengths": {"T": 3, "B": 5, "H": 19, "D": 2, "lengths": [2, 3, 0, 1, 3], "mask": True},
    "pieces": {"T": 3, "B": 13, "H": 130},
    "projected": {"T": 3, "B": 20, "H": 117, "P": 100},
}  # fmt: skip
# Those of AMX, bf16: tiles of 16 rows and of 32 in k. Both ways through them (at most two steps of
# k, or more), an odd number of row tiles, of column tiles (GRU's three gates) and of columns.
TILE_CASES: dict[str, dict[str, Any]] = {
    "two_steps": {"T": 3, "B": 35, "H": 40, "D": 2, "mask": True, "half": True},
    "one_step_of_k": {"T": 3, "B": 17, "H": 21, "lengths": [3, 1] * 8 + [0], "half": True},
    "blocks": {"T": 3, "B": 35, "H": 83, "half": True},
    "projected": {"T": 3, "B": 19, "H": 75, "P": 37, "D": 2, "half": True},
    "team": {"T": 4, "B": 20, "H": 130, "threads": 2, "half": True},
    "parts": {"T": 5, "B": 17, "H": 21, "bounds": [0, 2, 5], "half": True},
    "gru_tiles": {"cell": GRU, "T": 3, "B": 35, "H": 37, "mask": True, "half": True},
    "gru_blocks": {"cell": GRU, "T": 3, "B": 49, "H": 71, "half": True},
}  # fmt: skip


class Case:
    """Arguments, and what is right."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.manual_seed(0)  # a case's numbers do not depend on the others
        given = {"cell": LSTM, "D": 1, "threads": 1, **spec}
        self.cell, D, T, B, H = (given[n] for n in ("cell", "D", "T", "B", "H"))
        P, G = given.get("P", H), GATES[self.cell]
        reverse = 2 if D == 2 else T % 2
        self.steps, self.ints, self.here = _steps(given)
        if "bounds" in given:  # of the parts that gx comes in
            self.ints["bounds"] = torch.tensor(given["bounds"])
        N = len(self.here)
        shapes = {
            "gx": (D, N, G * H), "w_hh": (D, G * H, P), "b_ih": (D, G * H), "b_hh": (D, G * H),
            "h0": (D, B, P), "dy": (N, D * P), "dh_n": (D, B, P),
        }  # fmt: skip
        if self.cell == LSTM:
            shapes |= {"c0": (D, B, H), "dc_n": (D, B, H)}
        if "P" in given:
            shapes["w_hr"] = (D, P, H)
        self.tensors = {n: torch.randn(s) for n, s in shapes.items()}
        self.tensors["w_hh"] *= P**-0.5
        if "P" in given:
            self.tensors["w_hr"] *= H**-0.5
        if given.get("mask"):
            self.tensors["h_mask"] = (torch.rand(D, B, P) < 0.7) / 0.7
        # Floats on their way in and out, bf16 in between.
        self.dtype = torch.bfloat16 if given.get("half") else torch.float32
        self.tensors = {n: x.to(self.dtype).float() for n, x in self.tensors.items()}
        self.numbers = {"T": T, "cell": self.cell, "reverse": reverse}
        with one_thread():
            self.right = self.results(torch.float64)
            self.plain = [self.results(self.dtype)]
        numbers = self.numbers | {"H": H, "P": P, "D": D, "B": B, "N": N}
        numbers["n_parts"] = max(0, len(given.get("bounds", ())) - 1)
        self.arrays = {n: np.asarray(x) for n, x in (self.tensors | self.ints).items()}
        self.arrays |= {n: np.asarray(x) for n, x in numbers.items()}
        self.arrays |= {"threads": np.asarray(given["threads"]), "here": self.here.numpy()}
        for n, rows in (("gx", (slice(None), ~self.here)), ("dy", ~self.here)):
            self.arrays[n] = self.arrays[n].copy()
            self.arrays[n][rows] = np.nan  # not the sequence's
        if given.get("gh"):
            h = self.tensors["h0"] * self.tensors.get("h_mask", 1.0)
            self.arrays["gh"] = (h @ self.tensors["w_hh"].mT).numpy()

    def results(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """By the oracle."""
        t = {n: x.to(dtype, copy=True).requires_grad_() for n, x in self.tensors.items()}
        H, b_hn = t["b_hh"].shape[1] // GATES[self.cell], []
        b_hh = t["b_hh"]
        if self.cell == GRU:
            b_hn = [b[2 * H :] for b in b_hh]
            b_hh = torch.cat((b_hh[:, : 2 * H], torch.zeros_like(b_hh[:, :H])), 1)
        gx = t["gx"] + (t["b_ih"] + b_hh)[:, None]
        upstream = [torch.where(self.here[:, None], t["dy"], 0.0), t["dh_n"]]
        upstream += [t["dc_n"]] if "dc_n" in t else []
        outputs = recurrence(
            gx, [*t["w_hh"]], b_hn, [*t["w_hr"]] if "w_hr" in t else [], t["h0"], t.get("c0"),
            t["h_mask"].detach() if "h_mask" in t else None, *self.steps, **self.numbers,
        )  # fmt: skip
        out = dict(zip(("y", "h_n", "c_n")[: len(upstream)], outputs, strict=False))
        names = ("gx", "h0", *(n for n in ("c0", "w_hr") if n in t), "b_hh")
        grads = torch.autograd.grad(
            [*out.values()], [t[n] for n in names], [u.detach() for u in upstream]
        )
        out |= {f"d{n}": g for n, g in zip(names, grads, strict=True)}
        db_hh = out.pop("db_hh")
        if self.cell == GRU:
            out["db_hn"] = db_hh[:, 2 * H :]
        if "w_hr" in t:
            beyond = (len(gx), int((~self.here).sum()), t["h0"].shape[2])
            out["dh_beyond"] = gx.new_zeros(beyond)
        return {n: x.detach() for n, x in out.items()}

    def verdict(self, results: dict[str, np.ndarray]) -> str | None:
        """None where the results are right, else what is wrong with them."""
        assert results.keys() == self.right.keys()
        try:
            for n, x in self.right.items():
                got = torch.from_numpy(results[n]).to(self.dtype)
                assert_within(n, got, x, [p[n] for p in self.plain])
        except AssertionError as error:
            return str(error).splitlines()[0]
        return None


def _steps(
    given: dict[str, Any],
) -> tuple[tuple[Tensor | None, Tensor | None], dict[str, Tensor], Tensor]:
    """offsets and lengths as the oracle takes them, as the kernels do, and which rows there are."""
    T, B = given["T"], given["B"]
    t = torch.arange(T)
    if "packed" in given:
        counts = (torch.tensor(given["packed"]) > t[:, None]).sum(1)
        offsets = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))
        return (offsets, None), {"offsets": offsets}, torch.ones(int(offsets[-1]), dtype=torch.bool)
    if "lengths" not in given:
        return (None, None), {}, torch.ones(T * B, dtype=torch.bool)
    lengths = torch.tensor(given["lengths"])
    here = lengths > t[:, None]
    falling, index = lengths.sort(descending=True, stable=True)
    ints = {"lengths": falling, "index": index, "active": here.sum(1)}
    return (None, lengths), ints, here.view(-1)


# name -> instruction set and its level, what is compiled, planted bugs, cases.
KINDS: dict[str, tuple[str, int, str, tuple[Mutation, ...], dict[str, dict[str, Any]]]] = {
    "lstm": ("portable", 0, "LSTM", LSTM_MUTATIONS, LSTM_CASES),
    "gru": ("portable", 0, "GRU", GRU_MUTATIONS, GRU_CASES),
    "wide": ("avx512", 2, "LSTM", WIDE_MUTATIONS, WIDE_CASES),
    "tiles": ("amx", 3, "TILES", TILE_MUTATIONS, TILE_CASES),
}
EVERY = (*LSTM_MUTATIONS, *GRU_MUTATIONS, *WIDE_MUTATIONS, *TILE_MUTATIONS, *RACES)


def runs_here(kind: str) -> bool:
    """A machine without AVX-512 never runs what needs it; one without AMX has its tiles made of
    that."""
    return KINDS[kind][0] in cpu_isas() or (kind == "tiles" and "avx512" in cpu_isas())


def definitions(isa: str, level: int, what: str) -> tuple[str, ...]:
    return (f"-DFASTATTN_ISA={isa}", f"-DFASTATTN_LEVEL={level}", f"-D{what}")


@pytest.fixture(scope="module", params=[kind for kind in KINDS if runs_here(kind)])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    kind = request.param
    isa, level, what, mutations, specs = KINDS[kind]
    headers = ("immintrin.h",) if level else ()
    if isa == "amx" and isa not in cpu_isas():
        headers = (str(HERE / "amx_stand_in.h"),)
    recipe = {
        "source": "recurrent_portable.cpp", "edits": EDITS, "flags": definitions(isa, level, what),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp(f"recurrent_mutants_{kind}")
    cases = {n: Case(spec) for n, spec in specs.items()}
    return Lab(folder, "recurrent", mutations, cases, recipe, headers)


def race(folder: Path, mutation: Mutation | None) -> str:
    """What ThreadSanitizer says of the program, or that it did not end: "" where nothing."""
    program = build(
        folder / (mutation.name if mutation else "none"), mutation,
        shim="mutant_recurrent_shim.cpp", source="recurrent_portable.cpp", edits=EDITS,
        flags=(*definitions("portable", 0, "LSTM"), "-DRACES"),
        form=("-fsanitize=thread", "-fno-pie", "-no-pie"),
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == -signal.SIGALRM:
        return "a thread waits for ever"
    assert done.returncode in (0, 66), f"{done.returncode}: {done.stderr}"
    assert ("data race" in done.stderr) == (done.returncode == 66), done.stderr
    return done.stderr


@pytest.mark.parametrize("mutation", EVERY, ids=lambda m: m.name)
def test_mutation_has_its_place(mutation: Mutation) -> None:
    check_place(mutation)


def test_names_are_unique() -> None:
    check_names(EVERY)


def test_the_kernels_themselves_pass(lab: Lab) -> None:
    assert lab.failures(None) == {}


@pytest.mark.slow
def test_a_sample_of_mutations_is_caught(lab: Lab) -> None:
    assert lab.survivors(sample(lab.mutations)) == []


@pytest.mark.full
def test_every_mutation_is_caught(lab: Lab) -> None:
    assert lab.survivors(lab.mutations) == []


def test_no_race(tmp_path: Path) -> None:
    assert race(tmp_path, None) == ""


@pytest.mark.slow
def test_a_sample_of_races_is_seen(tmp_path: Path) -> None:
    assert [m.name for m in sample(RACES) if not race(tmp_path, m)] == []


@pytest.mark.full
def test_every_race_is_seen(tmp_path: Path) -> None:
    assert [m.name for m in RACES if not race(tmp_path, m)] == []
