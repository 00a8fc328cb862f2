"""Runs attention over a cache; see mutant.py."""

import ctypes

import mutant
import numpy as np

_INTS = (
    "B", "H", "Hk", "Sq", "Sn", "D", "Dv", "slots", "columns", "ragged", "half", "interleaved",
    "causal", "left", "right", "alibi_b", "threads", "bf16",
)  # fmt: skip
_NUMBERS = ("scale", "softcap")
_POINTERS = (
    "cache_lens", "new_lens", "block_table", "cache_index", "mask", "q", "k_cache", "v_cache", "k",
    "v", "o", "cos", "sin", "alibi", "sinks", "lse",
)  # fmt: skip


class MutantKVCache(ctypes.Structure):
    """mutant_kv_cache_shim.cpp's struct of the same name."""

    _fields_ = mutant.fields(_INTS, _NUMBERS, _POINTERS)


def run(library: ctypes.CDLL, case: mutant.Arrays) -> mutant.Arrays:
    """One case: o, lse and the caches afterwards; what is bf16 as int16."""
    B, H, Sq, Dv = (int(case[n]) for n in ("B", "H", "Sq", "Dv"))
    nan = np.int16(0x7FC0) if case["bf16"] else np.float32(np.nan)
    out = {
        "o": np.full((B, H, Sq, Dv), nan),
        "lse": np.full((B, H, Sq), np.nan, np.float32),
        "k_cache": case["k_cache"].copy(),
        "v_cache": case["v_cache"].copy(),
    }
    call = MutantKVCache()
    mutant.fill(call, {**case, **out})
    mutant.launch(library, call)
    return out


if __name__ == "__main__":
    mutant.main(run)
