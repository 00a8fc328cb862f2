"""Runs the recurrence, forward and backward; see mutant.py."""

import ctypes
from typing import Any

import mutant
import numpy as np

_INTS = ("cell", "H", "P", "D", "reverse", "T", "B", "N", "threads", "n_parts")
_POINTERS = (
    "offsets", "lengths", "index", "active", "bounds", "gx", "gh", "w_hh", "b_ih", "b_hh", "w_hr",
    "h0", "c0", "h_mask", "dy", "dh_n", "dc_n", "y", "h_n", "c_n", "gates", "cells", "dgx", "dghn",
    "dh0", "dc0", "dh",
)  # fmt: skip
LSTM, GRU = 0, 1


class MutantRecurrent(ctypes.Structure):
    """mutant_recurrent_shim.cpp's struct of the same name."""

    _fields_ = mutant.fields(_INTS, (), _POINTERS)


def run(library: ctypes.CDLL, case: mutant.Arrays) -> mutant.Arrays:
    """One case, forward and backward: every result, and sums that the weights' gradients are."""
    cell, H, P, D, B, N = (int(case[n]) for n in ("cell", "H", "P", "D", "B", "N"))
    shapes: dict[str, tuple[int, ...]] = {
        "y": (N, D * P), "h_n": (D, B, P), "dgx": case["gx"].shape, "dh0": (D, B, P),
    }  # fmt: skip
    if cell == LSTM:
        shapes |= {"c_n": (D, B, H), "dc0": (D, B, H), "cells": (D, N, H)}
    if cell == GRU:
        shapes |= {"gates": (D, N, 4 * H), "dghn": (D, N, H)}
    if "w_hr" in case:
        shapes["dh"] = (D, N, P)
    out = {n: np.full(s, np.nan, np.float32) for n, s in shapes.items()}
    gx = case["gx"].copy()
    given: dict[str, Any] = {**case, **out, "gx": gx}
    if cell == LSTM:
        given["gates"] = gx  # as the op has it

    call = MutantRecurrent()
    mutant.fill(call, given)
    mutant.launch(library, call)
    return _what_is_known(case, out, given["gates"] if cell in (LSTM, GRU) else None)


def _what_is_known(
    case: mutant.Arrays, out: mutant.Arrays, gates: np.ndarray | None
) -> mutant.Arrays:
    """The results that the oracle has too."""
    cells, gates = out.pop("cells", None), gates
    out.pop("gates", None)
    here, H = case["here"], int(case["H"])
    if "dh" in out:
        dh = out.pop("dh")
        out["dh_beyond"] = dh[:, ~here]
        m = gates[:, here, 3 * H :] * np.tanh(cells[:, here])
        out["dw_hr"] = dh[:, here].transpose(0, 2, 1) @ m
    d_product = out["dgx"]
    if "dghn" in out:
        dghn = out.pop("dghn")
        out["db_hn"] = dghn.sum(1)
        d_product = np.concatenate((d_product[:, :, : 2 * H], dghn), -1)
    if "gh" in case:  # the product's part is the caller's
        out["dh0"] += d_product @ case["w_hh"] * case.get("h_mask", np.float32(1))
    return out


if __name__ == "__main__":
    mutant.main(run)
