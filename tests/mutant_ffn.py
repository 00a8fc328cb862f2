"""Runs the parts of layernorm_ffn, cross-entropy and embedding; see mutant.py."""

import ctypes

import mutant
import numpy as np

_INTS = ("M", "N", "F", "norm", "act", "seed", "threads", "half")
_DOUBLES = ("eps", "dropout_p", "smoothing")
_POINTERS = (
    "x", "residual", "bias", "weight", "shift", "y", "s", "mean", "rstd", "dy", "dsum", "ds", "dx",
    "dweight", "dshift", "dbias", "u", "g", "b1", "b_gate", "a", "da", "du", "dg", "db1", "db_gate",
    "a_again", "w1", "w_gate", "w2", "ffn_y", "ffn_u", "ffn_a", "scale", "target", "loss",
    "dlogits", "dclass_bias", "emb_y", "emb_dwords", "emb_dpositions", "emb_dweight", "emb_dshift",
)  # fmt: skip
# A result -> the argument whose shape it has.
RESULTS = {
    "y": "x", "s": "x", "ds": "x", "dx": "x", "dweight": "weight", "dshift": "shift",
    "dbias": "bias", "a": "u", "du": "u", "dg": "g", "db1": "b1", "db_gate": "b_gate",
    "a_again": "u", "ffn_y": "x", "ffn_u": "u", "ffn_a": "u",
    "loss": "scale", "dlogits": "u", "dclass_bias": "b1",
    "emb_y": "x", "emb_dwords": "w1", "emb_dpositions": "residual", "emb_dweight": "weight",
    "emb_dshift": "shift",
}  # fmt: skip


class MutantFfn(ctypes.Structure):
    """mutant_ffn_shim.cpp's struct of the same name."""

    _fields_ = mutant.fields(_INTS, _DOUBLES, _POINTERS)


def run(library: ctypes.CDLL, case: mutant.Arrays) -> mutant.Arrays:
    """One case: every result by its name in RESULTS."""
    out = {n: np.full_like(case[like], np.nan) for n, like in RESULTS.items() if like in case}
    out["dlogits"] = case["u"].copy()
    stats = {n: np.full(int(case["M"]), np.nan, np.float32) for n in ("mean", "rstd")}
    call = MutantFfn()
    mutant.fill(call, {**case, **out, **stats})
    mutant.launch(library, call)
    return out


if __name__ == "__main__":
    mutant.main(run)
