"""Runs attention, forward and backward; see mutant.py, and `Case` in test_mutations.py, whose names
are those of attention.h."""

import ctypes
from typing import Any

import mutant
import numpy as np

_INTS = ("B", "H", "Hk", "D", "Dv", "Sq", "Sk", "threads")
_VIEWS = (
    "q", "k", "v", "o", "weights", "d_o", "dq", "dk", "dv", "mask", "bias", "dweights", "lse",
    "dbias",
)  # fmt: skip
_FLOATS = ("lse_lo", "dlse", "dsinks", "alibi", "sinks")
_LENGTHS = ("q_len", "k_len", "q_start", "k_start")
_MODES = ("alibi_b", "causal", "window_left", "window_right", "seed", "weights_mode", "dbias_once")
_NUMBERS = ("scale", "softcap", "dropout_p", "dweights_scale")
RESULTS = ("o", "lse", "weights", "dq", "dk", "dv", "dbias", "dsinks")


class View(ctypes.Structure):
    _fields_ = [("ptr", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]


class MutantCall(ctypes.Structure):
    """mutant_attention_shim.cpp's struct of the same name."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in _INTS),
        *((n, View) for n in _VIEWS),
        *((n, ctypes.c_void_p) for n in (*_FLOATS, *_LENGTHS)),
        *((n, ctypes.c_int64) for n in _MODES),
        *((n, ctypes.c_double) for n in _NUMBERS),
    ]


def _heads(x: np.ndarray, packed: bool) -> np.ndarray:
    """(B, H, S, X), or (T, H, X), as (B, H, S, X)."""
    return _batch_of_one(x.swapaxes(0, 1)) if packed else x


def _batch_of_one(x: np.ndarray) -> np.ndarray:
    """x behind a dimension of stride 0."""
    return np.broadcast_to(x, (1, *x.shape))


def _view(x: np.ndarray | None) -> View:
    if x is None:
        return View()
    strides = [n // x.itemsize for n in x.strides]
    return View(x.ctypes.data, (ctypes.c_int64 * 4)(*strides, *[0] * (4 - x.ndim)))


def run(library: ctypes.CDLL, case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One case, forward and backward: every result by its name in RESULTS."""
    packed = "q_start" in case
    q, k, v = (_heads(case[n], packed) for n in "qkv")
    batch = int(case["batch"]) if packed else len(q)
    sq, sk = int(case["Sq"]), int(case["Sk"])
    target = (batch, q.shape[1], sq, sk)
    mode = int(case["weights_mode"])

    # NaN: whatever a kernel leaves unwritten shows. What the caller zeroes is 0 (attention.h).
    def blank(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    out = {n: np.full_like(case[n], np.nan) for n in "qkv"}
    out = {f"d{n}": x for n, x in out.items()}
    out["o"] = blank(*case["q"].shape[:-1], v.shape[-1])
    out["lse"] = blank(q.shape[1], q.shape[2]) if packed else blank(*q.shape[:3])
    out["weights"] = blank(*(target, (batch, sq, sk))[mode - 1]) if mode else blank(0)
    out |= {f"d{n}": np.zeros_like(case[n]) for n in ("bias", "sinks") if n in case}
    if case["dbias_once"]:
        out["dbias"][:] = np.nan
    if packed:  # tokens of no sequence, see the binding
        out["o"][:], out["lse"][:], out["dq"][:], out["dk"][:], out["dv"][:] = 0, -np.inf, 0, 0, 0
    lse_lo = np.zeros_like(out["lse"])

    lse = _batch_of_one(out["lse"]) if packed else out["lse"]
    views: dict[str, Any] = {"q": q, "k": k, "v": v, "lse": lse}
    views |= {n: _heads(out[n], packed) for n in ("o", "dq", "dk", "dv")}
    views["d_o"] = _heads(case["d_o"], packed)
    views |= {n: np.broadcast_to(case[n], target) for n in ("mask", "bias") if n in case}
    if "dbias" in out:
        views["dbias"] = np.broadcast_to(out["dbias"], target)
    if mode:
        mean = mode == 2
        views["weights"] = out["weights"][:, None] if mean else out["weights"]
        dw = case["dweights"]
        views["dweights"] = np.broadcast_to(dw[:, None], target) if mean else dw
    pointers = {"lse_lo": lse_lo, "dsinks": out.get("dsinks")}
    pointers |= {n: case.get(n) for n in ("dlse", "alibi", "sinks", *_LENGTHS)}

    call = MutantCall(
        B=batch, H=q.shape[1], Hk=k.shape[1], D=q.shape[3], Dv=v.shape[3], Sq=sq, Sk=sk
    )
    call.dweights_scale = 1.0 / q.shape[1] if mode == 2 else 1.0
    for n in _VIEWS:
        setattr(call, n, _view(views.get(n)))
    for n, x in pointers.items():
        setattr(call, n, None if x is None else x.ctypes.data)
    for n in ("threads", *_MODES):
        setattr(call, n, int(case[n]))
    for n in ("scale", "softcap", "dropout_p"):
        setattr(call, n, float(case[n]))
    mutant.launch(library, call)
    return {n: out[n] for n in RESULTS if n in out}


if __name__ == "__main__":
    mutant.main(run)
