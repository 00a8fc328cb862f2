"""What the programs mutant_*.py share. Each runs the kernels of one library made from the shim of
its name, without torch, in a process of its own: a mutant that crashes or hangs takes nothing with
it.

    python tests/mutant_ffn.py LIBRARY IN.npz OUT.npz

IN holds the arguments of the cases as arrays called "CASE/NAME", numbers among them, with the names
of the shim's struct, OUT the results in the same way; see mutation_lab.py.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def fields(
    ints: tuple[str, ...], numbers: tuple[str, ...], pointers: tuple[str, ...]
) -> list[tuple[str, Any]]:
    """Of a struct that has these in this order."""
    kinds = ((ints, ctypes.c_int64), (numbers, ctypes.c_double), (pointers, ctypes.c_void_p))
    return [(name, kind) for names, kind in kinds for name in names]


def fill(call: ctypes.Structure, given: Mapping[str, Any]) -> None:
    """Numbers by value, arrays by address: an absent one is null."""
    for name, kind, *_ in call._fields_:
        x = given.get(name)
        if kind is ctypes.c_void_p:
            setattr(call, name, None if x is None else x.ctypes.data)
        elif kind in (ctypes.c_int64, ctypes.c_double):
            setattr(call, name, given[name].item())


def launch(library: ctypes.CDLL, call: ctypes.Structure) -> None:
    """The library's one entry point."""
    status = library.mutant_run(ctypes.byref(call), ctypes.c_int64(ctypes.sizeof(call)))
    assert status == 0, f"{type(call).__name__} is not the struct of the shim"


def nested(flat: Mapping[str, np.ndarray]) -> dict[str, Arrays]:
    """{"CASE/NAME": array} by case."""
    cases: dict[str, Arrays] = {}
    for key, x in flat.items():
        case, name = key.split("/")
        cases.setdefault(case, {})[name] = x
    return cases


def flat(cases: Mapping[str, Mapping[str, np.ndarray]]) -> Arrays:
    return {f"{case}/{name}": x for case, named in cases.items() for name, x in named.items()}


def main(run: Callable[[ctypes.CDLL, Arrays], Arrays]) -> None:
    """run: the results of one case, NaN where nothing was written."""
    library_path, in_path, out_path = sys.argv[1:]
    library = ctypes.CDLL(library_path)
    with np.load(in_path) as file:
        cases = nested(dict(file))
    np.savez(out_path, **flat({c: run(library, case) for c, case in cases.items()}))
