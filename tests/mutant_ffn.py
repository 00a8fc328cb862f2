"""Runs the kernels of one library made from mutant_ffn_shim.cpp, in a process of its own.

    python tests/mutant_ffn.py LIBRARY IN.npz OUT.npz

Arrays are called "CASE/NAME", with the names of the struct; see test_mutations_ffn.py.
"""

import ctypes
import sys

import numpy as np
from mutant import nested

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

    _fields_ = [
        *((n, ctypes.c_int64) for n in _INTS),
        *((n, ctypes.c_double) for n in _DOUBLES),
        *((n, ctypes.c_void_p) for n in _POINTERS),
    ]


def run(library: ctypes.CDLL, case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One case: every result by its name in RESULTS, NaN where nothing was written."""
    out = {n: np.full_like(case[like], np.nan) for n, like in RESULTS.items() if like in case}
    out["dlogits"] = case["u"].copy()
    stats = {n: np.full(int(case["M"]), np.nan, np.float32) for n in ("mean", "rstd")}
    call = MutantFfn()
    for n in (*_INTS, *_DOUBLES):
        setattr(call, n, case[n].item())
    for n in _POINTERS:
        x = {**case, **out, **stats}.get(n)
        setattr(call, n, None if x is None else x.ctypes.data)
    status = library.mutant_ffn_run(ctypes.byref(call), ctypes.c_int64(ctypes.sizeof(call)))
    assert status == 0, "MutantFfn is not the struct of mutant_ffn_shim.cpp"
    return out


def main() -> None:
    library_path, in_path, out_path = sys.argv[1:]
    library = ctypes.CDLL(library_path)
    with np.load(in_path) as file:
        cases = nested(dict(file))
    results = {c: run(library, case) for c, case in cases.items()}
    np.savez(out_path, **{f"{c}/{n}": x for c, out in results.items() for n, x in out.items()})


if __name__ == "__main__":
    main()
