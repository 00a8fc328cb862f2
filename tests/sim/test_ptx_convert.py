"""cvt between floats and integers, against rational arithmetic and torch."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from .kit import bf16_bits, bf16_values, evaluate, exactly, floats, integers, same_floats

N = 320
ROUND = {
    "rni": lambda x: round(x),  # Python rounds ties to even
    "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil,
}  # fmt: skip


@pytest.mark.parametrize("source", ["f32", "f64", "f16"])
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_float_to_integer(source: str, to: str) -> None:
    x = floats("f32" if source == "f16" else source, N, 0)
    if source == "f16":
        with np.errstate(all="ignore"):
            half = x.astype(np.float16)
        bits, x = half.view("u2"), half.astype(np.float32)
    else:
        x[256:] *= 2.0**20
        bits = x
    width, low, high = int(to[1:]), 0, (1 << int(to[1:])) - 1
    if to[0] == "s":
        low, high = -(1 << width - 1), (1 << width - 1) - 1

    def right(v: float, mode: str) -> int:
        if math.isnan(v):
            if source == "f64" or width == 64:
                return low if to[0] == "s" else 1 << width - 1
            return 0
        if math.isinf(v):
            return high if v > 0 else low
        return max(low, min(high, ROUND[mode](Fraction(v))))

    for mode in ROUND:
        got = evaluate(f"cvt.{mode}.{to}.{source} {{d}}, {{0}}", [(source, bits)], to)
        assert got.tolist() == [right(v, mode) & (1 << width) - 1 for v in x.tolist()], mode


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_integer_to_f32(source: str, mode: str) -> None:
    x = integers(source, N, 0)
    got = evaluate(f"cvt.{mode}.f32.{source} {{d}}, {{0}}", [(source, x)], "f32").view("f4")
    assert got.tolist() == [exactly(Fraction(v), "f32", mode) for v in x.tolist()]


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
def test_integer_to_f64_and_halves(source: str) -> None:
    x = integers(source, N, 0)
    got = evaluate(f"cvt.rn.f64.{source} {{d}}, {{0}}", [(source, x)], "f64").view("f8")
    assert got.tolist() == [exactly(Fraction(v), "f64") for v in x.tolist()]
    if source[1:] == "32":
        got = evaluate(f"cvt.rn.f16.{source} {{d}}, {{0}}", [(source, x)], "f16").view("f2")
        assert got.tolist() == [exactly(Fraction(v), "f16") for v in x.tolist()]


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("form", ["f32", "f64"])
def test_to_whole_floats(mode: str, form: str) -> None:
    x = floats(form, N, 0)
    got = evaluate(f"cvt.{mode}.{form}.{form} {{d}}, {{0}}", [(form, x)], form).view(x.dtype)
    want = [v if not math.isfinite(v) else math.copysign(float(ROUND[mode](Fraction(v))), v)
            for v in x.tolist()]  # fmt: skip
    assert same_floats(got, np.array(want, x.dtype)).all()


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_f64_to_f32(mode: str) -> None:
    x = floats("f64", N, 0)
    x[256:300] *= 2.0**-140
    got = evaluate(f"cvt.{mode}.f32.f64 {{d}}, {{0}}", [("f64", x)], "f32").view("f4")
    want = [v if not math.isfinite(v) or v == 0 else
            math.copysign(exactly(Fraction(v), "f32", mode), v) for v in x.tolist()]  # fmt: skip
    assert same_floats(got, np.array(want, np.float32)).all()


def test_widening_is_exact() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    got = evaluate("cvt.f32.f16 {d}, {0}", [("f16", every)], "f32").view("f4")
    assert same_floats(got, torch.from_numpy(every.view(np.float16)).float().numpy()).all()
    got = evaluate("cvt.f32.bf16 {d}, {0}", [("bf16", every)], "f32").view("f4")
    assert same_floats(got, bf16_values(every)).all()
    x = floats("f32", N, 0)
    got = evaluate("cvt.f64.f32 {d}, {0}", [("f32", x)], "f64").view("f8")
    assert same_floats(got, x.astype(np.float64)).all()


def _hard(n: int = 4096) -> np.ndarray:
    """fp32 values at and beside the ties of the 16-bit formats."""
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32)
    k = n // 4
    bits[:k] = (bits[:k] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)  # ties of bf16
    bits[k : 2 * k] = (bits[:k] & np.uint32(0x8FFFE000)) | np.uint32(0x38001000)  # of fp16, tf32
    bits[2 * k : 3 * k] = bits[k : 2 * k] + np.where(np.arange(k) % 2, 1, -1).astype(np.uint32)
    x = bits.view(np.float32)
    x[3 * k : 3 * k + N] = floats("f32", N, 0)
    return x


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("form", ["f16", "bf16"])
def test_narrowing(form: str, mode: str) -> None:
    x = _hard()
    got = evaluate(f"cvt.{mode}.{form}.f32 {{d}}, {{0}}", [("f32", x)], form)
    values = got.view(np.float16).astype(np.float32) if form == "f16" else bf16_values(got)
    want = [v if not math.isfinite(v) or v == 0 else
            math.copysign(exactly(Fraction(v), form, mode), v) for v in x.tolist()]  # fmt: skip
    assert same_floats(values, np.array(want, np.float32)).all()
    if mode == "rn":  # and torch agrees
        kind = torch.float16 if form == "f16" else torch.bfloat16
        assert same_floats(values, torch.from_numpy(x).to(kind).float().numpy()).all()


def test_relu_and_saturation() -> None:
    x = _hard(2048)
    for form in ("f16", "bf16"):
        plain = evaluate(f"cvt.rn.{form}.f32 {{d}}, {{0}}", [("f32", x)], form)
        relu = evaluate(f"cvt.rn.relu.{form}.f32 {{d}}, {{0}}", [("f32", x)], form)
        assert (relu == np.where(plain & 0x8000, 0, plain)).all()
    got = evaluate("cvt.sat.f32.f32 {d}, {0}", [("f32", x)], "f32").view("f4")
    assert got.tolist() == [0.0 if math.isnan(v) else min(max(v, 0.0), 1.0) for v in x.tolist()]
    got = evaluate("cvt.rn.sat.f16.f32 {d}, {0}", [("f32", x)], "f16").view("f2")
    assert ((got >= 0) & (got <= 1)).all()


@pytest.mark.parametrize("form", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_packed_narrowing(form: str, mode: str) -> None:
    """The first source lies in the upper half."""
    a, b = _hard(2048), _hard(2048)[::-1].copy()
    inputs = [("f32", a), ("f32", b)]
    got = evaluate(f"cvt.{mode}.{form}x2.f32 {{d}}, {{0}}, {{1}}", inputs, f"{form}x2")
    single = [evaluate(f"cvt.{mode}.{form}.f32 {{d}}, {{0}}", [("f32", x)], form) for x in (a, b)]
    assert (got == single[0].astype("u4") << 16 | single[1]).all()


def test_tf32_rounds_ties_away() -> None:
    x = _hard()
    got = evaluate("cvt.rna.tf32.f32 {d}, {0}", [("f32", x)], "b32").view("f4")
    want = [v if not math.isfinite(v) or v == 0 else
            math.copysign(exactly(Fraction(v), "tf32", "rna"), v) for v in x.tolist()]  # fmt: skip
    assert same_floats(got, np.array(want, np.float32)).all()


def test_ftz_conversions() -> None:
    x = np.array([2.0**-130, -(2.0**-130), 1.0], np.float32)
    got = evaluate("cvt.ftz.f64.f32 {d}, {0}", [("f32", x)], "f64").view("f8")
    assert got.tolist() == [0.0, 0.0, 1.0]
    got = evaluate("cvt.rn.ftz.f32.f64 {d}, {0}", [("f64", x.astype("f8"))], "f32").view("f4")
    assert got.tolist() == [0.0, 0.0, 1.0]


def test_bf16_by_two_ways() -> None:
    """The helper that other tests rely on: torch against truncation of what is representable."""
    every = np.arange(1 << 16, dtype=np.uint16)
    good = ~np.isnan(bf16_values(every))
    assert (bf16_bits(bf16_values(every))[good] == every[good]).all()
