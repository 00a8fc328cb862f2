"""Cases of csrc/cuda/attention.h for the source emulator, with their values in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .emu import HERE, ROOT, Case, Program

_BF16, _FP16, _FP32 = (
    ("__nv_bfloat16", "DType::kBf16"),
    ("__half", "DType::kF16"),
    ("float", "DType::kF32"),
)


def only(*variants: tuple[tuple[str, str], int, bool]) -> str:
    """Lines of the forward's table, for -D: g++ takes minutes for all of it under a sanitizer."""
    lines = [f"variant<{t}, {d}, {str(laden).lower()}>({code})" for (t, code), d, laden in variants]
    return f"FASTATTN_FWD_VARIANTS={', '.join(lines)}"


PROGRAM = Program(
    (
        ROOT / "csrc" / "cuda" / "attention_fwd.cu",
        ROOT / "csrc" / "cuda" / "attention_weights.cu",
        HERE / "launchers" / "attention.cpp",
    ),
    (
        # 32 rows a warp, 16 rows a warp, the widest head; 16 and 32 bit.
        only(
            (_BF16, 64, False), (_BF16, 64, True), (_BF16, 256, False), (_FP16, 64, False),
            (_FP16, 64, True), (_FP32, 64, False), (_FP32, 64, True), (_FP16, 256, False),
            (_FP32, 256, False),
        ),
        "FASTATTN_WEIGHTS_VARIANTS=variant<__nv_bfloat16, 64>(DType::kBf16), "
        "variant<float, 64>(DType::kF32)",
    ),
)  # fmt: skip
NAN = float("nan")


@dataclass
class Forward:
    case: Case
    o: torch.Tensor  # fp64
    lse: torch.Tensor
    plain: torch.Tensor  # o by plain PyTorch in the case's dtype

    def check(self, got: dict[str, torch.Tensor]) -> None:
        """Within twice the error of plain PyTorch at the same dtype, and nothing left unwritten."""
        floor = 2e-6 if got["o"].dtype == torch.float32 else 1e-3
        allowed = 2 * float((self.plain.double() - self.o).abs().max()) + floor
        assert float((got["o"].double() - self.o).abs().max()) <= allowed
        seen = self.lse > -math.inf
        assert torch.equal(got["lse"] > -math.inf, seen)
        lse = got["lse"].double()[seen]
        assert float((lse - self.lse[seen]).abs().max()) <= 1e-5 * (1 + float(lse.abs().max()))
        assert not got["lse_lo"].isnan().any()


def forward(
    dtype: torch.dtype,
    *,
    B: int = 1,
    H: int = 1,
    Hk: int = 1,
    Sq: int = 70,
    Sk: int = 130,
    D: int = 64,
    causal: int = 0,  # 1 top left, 2 bottom right
    mask: bool = False,
    lead: int = 0,
) -> Forward:
    make = torch.Generator().manual_seed(Sq * Sk + D)
    q, k, v = (
        torch.randn(B, h, s, D, generator=make).to(dtype) for h, s in ((H, Sq), (Hk, Sk), (Hk, Sk))
    )
    numbers = {
        "scale": D**-0.5,
        "softcap": 0.0,
        "causal": causal,
        "window_left": -1,
        "window_right": -1,
        "dropout_p": 0.0,
    }
    tensors = {"q": q, "k": k, "v": v}
    visible = torch.ones(Sq, Sk, dtype=torch.bool)
    if causal:
        visible = visible.tril(Sk - Sq if causal == 2 else 0)
    if mask:
        tensors["mask"] = torch.rand(B, 1, Sq, Sk, generator=make) < 0.6
        visible = visible & tensors["mask"]
    outputs = {
        "o": torch.full((B, H, Sq, D), NAN, dtype=dtype),
        "lse": torch.full((B, H, Sq), NAN),
        "lse_lo": torch.full((B, H, Sq), NAN),
    }
    case = Case("attention_forward", numbers, tensors, outputs, dict.fromkeys("qkv", lead))

    def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        k, v = (x.repeat_interleave(H // Hk, 1) for x in (k, v))
        logits = (q @ k.mT * numbers["scale"]).masked_fill(~visible, -math.inf)
        return logits.softmax(-1).nan_to_num(0) @ v, logits.logsumexp(-1)

    o, lse = naive(q.double(), k.double(), v.double())
    return Forward(case, o, lse, naive(q, k, v)[0])
