"""Cases of csrc/cuda/layernorm_ffn.h for the source emulator, with their values in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastattn import reference

from .emu import HERE, ROOT, Case, Program

NAN = float("nan")
_CUDA = ROOT / "csrc" / "cuda"
_BF16, _FP32 = ("__nv_bfloat16", "DType::kBf16"), ("float", "DType::kF32")
_NORMS = {None: 0, "layer": 1, "rms": 2}
_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "relu2": 3, "silu": 4}


def only(*variants: tuple[tuple[str, str], int]) -> tuple[str, str]:
    """Lines of the tables, for -D: g++ takes minutes for all of them under a sanitizer."""
    lines = [f"make<{t}, {d}>({code})" for (t, code), d in variants]
    grads = [f"make<{t}, {d}, true>({code})" for (t, code), d in variants]
    return (
        f"FASTATTN_FFN_VARIANTS(make)={', '.join(lines)}",
        f"FASTATTN_FFN_BWD_VARIANTS(make)={', '.join(grads)}",
    )


def program(*variants: tuple[tuple[str, str], int], cuda: Path = _CUDA) -> Program:
    """Forward and backward with these variants, of csrc/cuda or of a copy that names its own."""
    kernels = ("fwd", "bwd", "bwd_rows", "bwd_weights")
    sources = tuple(cuda / f"layernorm_ffn_{name}.cu" for name in kernels)
    return Program(
        (*sources, HERE / "launchers" / "layernorm_ffn.cpp"),
        (*(only(*variants) if variants else ()), "FASTATTN_EMU_BACKWARD"),
    )


PROGRAM = program((_BF16, 64), (_FP32, 64))


@dataclass
class Pass:
    case: Case
    right: dict[str, Tensor]  # fp64
    plain: dict[str, Tensor]  # by plain PyTorch in the case's dtypes

    def check(self, got: dict[str, Tensor]) -> None:
        """Within twice the error of plain PyTorch at the same dtype, and nothing left unwritten."""
        for name, right in self.right.items():
            x, plain = got[name].double(), self.plain[name].double()
            assert not x.isnan().any(), name
            unit = 1e-5 if self.case.tensors["w1"].dtype == torch.float32 else 1e-2
            allowed = 2 * float((plain - right).norm()) + unit * float(right.norm()) + 1e-6
            error = float((x - right).norm())
            assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def passes(
    dtype: torch.dtype,
    *,
    M: int = 70,
    D: int = 40,
    F: int = 75,
    gated: bool = False,
    norm: str | None = "layer",
    pre_norm: bool = True,
    activation: str = "gelu",
    dropout: float = 0.0,
    splits: int = 1,
    chunks: int = 1,
    lead: int = 0,
) -> tuple[Pass, Pass]:
    """The forward and the backward of one call; the latter gets fp64's statistics."""
    make = torch.Generator().manual_seed(M * F + D)

    def randn(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=make) * size).to(dtype)

    leaves = {"x": randn(M, D), "w1": randn(F, D, size=D**-0.5), "b1": randn(F)}
    leaves |= {"w2": randn(D, F, size=F**-0.5), "b2": randn(D)}
    if gated:
        leaves |= {"w_gate": randn(F, D, size=D**-0.5), "b_gate": randn(F)}
    if norm:
        leaves |= {"norm_weight": randn(D), "norm_bias": randn(D)}
    dy, seed = randn(M, D), torch.tensor([77])
    given = {"norm": norm, "pre_norm": pre_norm, "activation": activation, "dropout_p": dropout,
             "hidden_dropout_p": dropout, "seed": seed}  # fmt: skip

    def by_reference(cast: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs = {n: t.to(cast).requires_grad_() for n, t in leaves.items()}
        y = reference.layernorm_ffn(**inputs, **given)
        grads = torch.autograd.grad(y, list(inputs.values()), dy.to(cast))
        return {"y": y.detach()}, {f"d{n}": g for n, g in zip(inputs, grads, strict=True)}

    (y, grads), (plain_y, plain_grads) = by_reference(torch.float64), by_reference(dtype)
    with torch.no_grad():
        s = leaves["x"].double()
        if not pre_norm:
            without = {n: t.double() for n, t in leaves.items() if not n.startswith("norm")}
            s = reference.layernorm_ffn(**without, **{**given, "norm": None})
        s = s.to(dtype)
        mean = s.double().mean(-1) if norm == "layer" else torch.zeros(M, dtype=torch.float64)
        rstd = ((s.double() - mean[:, None]).square().mean(-1) + 1e-5).rsqrt()
    numbers = {
        "norm": _NORMS[norm],
        "act": _ACTIVATIONS[activation],
        "eps": 1e-5,
        "residual": 1,
        "pre_norm": int(pre_norm),
        "dropout_p": dropout,
        "hidden_dropout_p": dropout,
    }
    tensors = dict(leaves) | ({"seed": seed} if dropout else {})
    stats = {n: t.float() for n, t in {"mean": mean, "rstd": rstd}.items()
             if norm == "layer" or (norm and n == "rstd")}  # fmt: skip
    if norm and not pre_norm:
        stats["s"] = s
    outputs = {"y": torch.full((M, D), NAN, dtype=dtype)}
    outputs |= {n: torch.full_like(t, NAN) for n, t in stats.items()}
    leads = dict.fromkeys(("x", "w1", "w2"), lead)
    forward = Case("layernorm_ffn_forward", {**numbers, "splits": splits}, tensors, outputs, leads)
    results = {  # the parameters' but the weights' are fp32
        n: torch.full_like(g, NAN, dtype=dtype if n in _OF_WEIGHTS else torch.float32)
        for n, g in grads.items()
    }
    backward = Case(
        "layernorm_ffn_backward", {**numbers, "chunks": chunks},
        {**tensors, **stats, "dy": dy}, results, leads,
    )  # fmt: skip
    return Pass(forward, {**y, **_double(stats)}, {**plain_y, **stats}), Pass(
        backward, grads, plain_grads
    )


_OF_WEIGHTS = ("dx", "dw1", "dw2", "dw_gate")


def _double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() for n, t in tensors.items()}
