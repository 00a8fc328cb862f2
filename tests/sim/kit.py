"""Small PTX kernels for the tests of the simulator: one instruction, or one bug, at a time."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from . import ptx

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %h<32>;
    .reg .b32 %r<64>;
    .reg .b64 %d<64>;
    .reg .f32 %f<32>;
    .reg .f64 %g<16>;
"""
WIDTH_OF = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
            "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
            "f16x2": 4, "bf16x2": 4, "tf32": 4}  # fmt: skip
_REGISTER = {1: ("h", "b8"), 2: ("h", "b16"), 4: ("r", "b32"), 8: ("d", "b64")}


def kernel(body: str, params: int = 1, variables: str = "", head: str = "") -> ptx.Module:
    """A kernel `k` whose parameters are pointers, in %d0, %d1, ...; %r0 is the thread (x)."""
    declared = ", ".join(f".param .u64 q{i}" for i in range(params))
    loads = "".join(f"ld.param.u64 %d{i}, [q{i}];\n" for i in range(params))
    return ptx.load(
        f"{HEADER}{head}\n.visible .entry k({declared})\n{{\n{REGISTERS}{variables}\n{loads}"
        f"mov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


def launch(
    module: ptx.Module,
    arrays: Sequence[Any],
    grid: int = 1,
    block: int = 32,
    shared: int = 0,
    written: bool = True,
    cooperative: bool = False,
    **schedule: Any,
) -> ptx.Report:
    memory = ptx.Memory()
    for i, x in enumerate(arrays):
        memory.add_array(x, written=written or i > 0, name=f"a{i}")
    return module.launch(
        "k", (grid,), (block,), module.kernels["k"].pack(arrays), shared, memory,
        ptx.Schedule(**schedule), cooperative,
    )  # fmt: skip


def evaluate(
    instruction: str, inputs: Sequence[tuple[str, Any]], out: str, mode: str = ""
) -> np.ndarray:
    """One lane an element. The instruction names its result {d} and its operands {0}, {1}, ...;
    types tell the registers. `mode` "pred" turns a predicate {d} into 1 or 0 of type u32.
    Further instructions are separated by `;`."""
    n = len(inputs[0][1])
    block = min(256, n)
    grid = -(-n // block)
    names: dict[str, str] = {}
    body = "mov.u32 %r60, %ctaid.x;\nmov.u32 %r61, %ntid.x;\nmad.lo.u32 %r0, %r60, %r61, %r0;\n"
    body += f"setp.ge.u32 %p15, %r0, {n};\n@%p15 exit;\n"
    arrays: list[Any] = []
    for i, (kind, values) in enumerate(inputs):
        size = WIDTH_OF[kind]
        letter, load = _REGISTER[size]
        name = f"%{letter}{i + 20}"
        names[str(i)] = name
        arrays.append(np.ascontiguousarray(values))
        assert arrays[-1].itemsize == size, (kind, arrays[-1].dtype)
        body += f"mad.wide.u32 %d50, %r0, {size}, %d{i};\nld.global.{load} {name}, [%d50];\n"
    size = WIDTH_OF[out]
    letter, store = _REGISTER[size]
    names["d"] = "%p1" if mode == "pred" else f"%{letter}15"
    text = instruction
    for key, name in names.items():
        text = text.replace("{" + key + "}", name)
    body += text + ";\n"
    if mode == "pred":
        body += "selp.u32 %r15, 1, 0, %p1;\n"
    body += f"mad.wide.u32 %d50, %r0, {size}, %d{len(inputs)};\n"
    body += f"st.global.{store} [%d50], %{letter}15;\n"
    result = np.zeros(n, f"u{size}")
    module = kernel(body, len(inputs) + 1)
    launch(module, [*arrays, result], grid, block)
    return result


# ------------------------------------------------------------- arithmetic done another way

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127),
           "f64": (53, -1022, 1023), "tf32": (11, -126, 127)}  # fmt: skip


def exactly(x: Fraction, form: str, mode: str = "rn") -> float:
    """An exact number rounded to a format, by integer arithmetic alone."""
    if x == 0:
        return 0.0
    p, emin, emax = FORMATS[form]
    sign, a = (-1 if x < 0 else 1), abs(x)
    e = a.numerator.bit_length() - a.denominator.bit_length()
    while Fraction(2) ** e > a:
        e -= 1
    while Fraction(2) ** (e + 1) <= a:
        e += 1
    ulp = Fraction(2) ** (max(e, emin) - p + 1)
    low, rest = divmod(a, ulp)
    twice = 2 * rest / ulp
    up = {
        "rn": twice > 1 or (twice == 1 and low % 2 == 1),
        "rna": twice >= 1,
        "rz": False,
        "rm": sign < 0 and rest != 0,
        "rp": sign > 0 and rest != 0,
    }[mode]
    rounded = (low + up) * ulp
    largest = (2 - Fraction(2) ** (1 - p)) * Fraction(2) ** emax
    if rounded > largest:
        stops = mode == "rz" or (mode == "rm" and sign > 0) or (mode == "rp" and sign < 0)
        return sign * (float(largest) if stops else float("inf"))
    return sign * float(rounded)


def integers(kind: str, n: int, seed: int) -> np.ndarray:
    """Random bits of a type, with the edges."""
    size = WIDTH_OF[kind]
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 63, n, dtype=np.uint64) << np.uint64(1)
    bits ^= rng.integers(0, 1 << 63, n, dtype=np.uint64)
    bits >>= rng.integers(0, 8 * size, n, dtype=np.uint64)  # small ones as well
    top = 1 << (8 * size - 1)
    edges = [0, 1, 2, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2]
    out = (bits & np.uint64(2 * top - 1)).astype(f"u{size}")
    k = len(edges)
    out[: k * k] = (np.repeat if seed % 2 else np.tile)(np.array(edges, f"u{size}"), k)[:n]
    return out.view(f"{'i' if kind[0] == 's' else 'u'}{size}")


def floats(form: str, n: int, seed: int, special: bool = True) -> np.ndarray:
    """fp32 or fp64 values over many magnitudes, with zeros, subnormals, infinities and NaN."""
    dtype = np.float32 if form == "f32" else np.float64
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 2.0 ** rng.integers(-20, 20, n)).astype(dtype)
    tiny = np.finfo(dtype).smallest_subnormal
    edges = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, tiny, -tiny, np.finfo(dtype).tiny,
             np.finfo(dtype).max, -np.finfo(dtype).max, 0.5, 1.5, 2.5, -2.5]  # fmt: skip
    if special:
        k = len(edges)
        x[: k * k] = (np.repeat if seed % 2 else np.tile)(np.array(edges, dtype), k)[:n]
    return x


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """By way of torch."""
    import torch

    y = torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16()
    return y.view(torch.uint16).numpy()


def bf16_values(bits: np.ndarray) -> np.ndarray:
    import torch

    y = torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16)
    return y.float().numpy()


def same_floats(got: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bitwise, but any NaN equals any NaN."""
    nan = np.isnan(got) & np.isnan(right)
    return nan | ((got == right) & (np.signbit(got) == np.signbit(right)))
