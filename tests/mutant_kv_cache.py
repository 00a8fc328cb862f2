"""Runs the kernels of one library made from mutant_kv_cache_shim.cpp, in a process of its own.

    python tests/mutant_kv_cache.py LIBRARY IN.npz OUT.npz

Arrays are called "CASE/NAME", with the names of the struct; see test_mutations_kv_cache.py.
"""

import ctypes
import sys
from typing import Any

import numpy as np
from mutant import nested

_INTS = (
    "B", "H", "Hk", "Sq", "Sn", "D", "Dv", "slots", "columns", "ragged", "half", "interleaved",
    "causal", "left", "right", "alibi_b", "threads",
)  # fmt: skip
_NUMBERS = ("scale", "softcap")
_POINTERS = (
    "cache_lens", "new_lens", "block_table", "cache_index", "mask", "q", "k_cache", "v_cache", "k",
    "v", "cos", "sin", "alibi", "sinks", "o", "lse",
)  # fmt: skip


class MutantKVCache(ctypes.Structure):
    """mutant_kv_cache_shim.cpp's struct of the same name."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in _INTS),
        *((n, ctypes.c_double) for n in _NUMBERS),
        *((n, ctypes.c_void_p) for n in _POINTERS),
    ]


def run(library: ctypes.CDLL, case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One case: o, lse and the caches afterwards."""
    B, H, Sq, Dv = (int(case[n]) for n in ("B", "H", "Sq", "Dv"))
    # NaN: whatever a kernel leaves unwritten shows.
    out = {
        "o": np.full((B, H, Sq, Dv), np.nan, np.float32),
        "lse": np.full((B, H, Sq), np.nan, np.float32),
        "k_cache": case["k_cache"].copy(),
        "v_cache": case["v_cache"].copy(),
    }
    given: dict[str, Any] = {**case, **out}
    call = MutantKVCache()
    for n in (*_INTS, *_NUMBERS):
        setattr(call, n, case[n].item())
    for n in _POINTERS:
        x = given.get(n)
        setattr(call, n, None if x is None else x.ctypes.data)
    status = library.mutant_kv_cache_run(ctypes.byref(call), ctypes.c_int64(ctypes.sizeof(call)))
    assert status == 0, "MutantKVCache is not the struct of mutant_kv_cache_shim.cpp"
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
