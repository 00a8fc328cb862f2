"""What an SM of each architecture does per cycle, how much it holds, and where that is documented.

Sources, by the letter in the table:

  [T] CUDA C++ Programming Guide 12.6, "Throughput of Native Arithmetic Instructions" (8.0 to 9.0);
      since CUDA 13 in the CUDA C++ Best Practices Guide, 12.1.1 (10.0, 12.0). Results per cycle per
      SM; the 16-bit row counts two results an instruction up to 9.0.
  [S] CUDA Programming Guide, "Compute Capabilities": technical specifications per SM. 32 banks of
      4 bytes a cycle; four schedulers that issue one warp instruction a cycle each.
  [A] NVIDIA A100 Tensor Core GPU Architecture: 1024 16-bit FMA a cycle an SM, 312 TFLOP/s.
  [G] NVIDIA Ampere GA102 GPU Architecture: RTX 3090, 71 TFLOP/s with fp32 sums.
  [D] NVIDIA Ada GPU Architecture: RTX 4090, 165.2 TFLOP/s with fp32 sums.
  [H] NVIDIA H100 Tensor Core GPU Architecture: SXM5, 989.4 TFLOP/s, twice A100 a cycle and SM.
  [B] NVIDIA RTX Blackwell GPU Architecture: RTX 5090, 209.5 TFLOP/s with fp32 sums.
  [M] not NVIDIA's: measured in "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture"
      (arXiv 2402.13499): mma.sync reaches 62.9 % of H100's peak on average, wgmma all of it. The
      peak of tf32 is half of 16 bits' [H].

A rate that none of these states is None, and what needs it has no prediction: mma.sync on sm_100 is
documented nowhere, and the shape of a tcgen05 product is not in its opcode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_KB = 1024


@dataclass(frozen=True)
class Arch:
    name: str
    product: str
    sms: int
    peak: float | None  # FLOP/s, dense, 16-bit operands, fp32 sums: what shares are shares of
    peak_per_cycle: float | None  # the same for one SM and cycle
    dram: float  # bytes a second
    rates: Mapping[str, float | None]  # kind of work (pipes.py) -> per cycle and SM
    warps: int  # resident, the most
    blocks: int
    shared: int  # bytes of an SM
    shared_block: int  # the most a block may ask for
    registers: int = 65536

    @property
    def clock(self) -> float | None:
        """Hz at which the peak is quoted (the boost clock)."""
        if self.peak is None or self.peak_per_cycle is None:
            return None
        return self.peak / self.peak_per_cycle / self.sms


def _rates(
    *, mma: float | None, tf32: float | None, fp32: float, half2: float, fp64: float,
    iadd: float = 64, wgmma: float | None = None,
) -> dict[str, float | None]:  # fmt: skip
    same = {
        "imad": 64,  # [T] 32-bit integer multiply-add
        "alu": 64,  # [T] logic, shift, compare, min, max
        "xu": 16,  # [T] reciprocal, log2, exp2; conversions
        "lsu": 128,  # [S] bytes of shared memory; warp shuffle, 32 lanes [T]
        "issue": 4,  # [S] warp instructions
    }
    own = {"mma": mma, "mma_tf32": tf32, "wgmma": wgmma, "tcgen05": None}
    return {**same, **own, "fp32": fp32, "half2": half2, "fp64": fp64, "iadd": iadd}


# half2 in lanes, so half of [T]'s results.
ARCHS = {
    arch.name: arch
    for arch in (
        Arch(
            "sm_80", "A100 80GB SXM4", 108, 312e12, 2048, 2.039e12,  # [A]
            _rates(mma=2048, tf32=1024, fp32=64, half2=128, fp64=32),  # [A] [T]
            warps=64, blocks=32, shared=164 * _KB, shared_block=163 * _KB,  # [S]
        ),
        Arch(
            "sm_86", "RTX 3090", 82, 71e12, 512, 0.936e12,  # [G]
            _rates(mma=512, tf32=256, fp32=128, half2=128, fp64=2),  # [G] [T]
            warps=48, blocks=16, shared=100 * _KB, shared_block=99 * _KB,  # [S]
        ),
        Arch(
            "sm_89", "RTX 4090", 128, 165.2e12, 512, 1.008e12,  # [D]
            _rates(mma=512, tf32=256, fp32=128, half2=64, fp64=2),  # [D] [T]
            warps=48, blocks=24, shared=100 * _KB, shared_block=99 * _KB,  # [S]
        ),
        Arch(
            "sm_90", "H100 80GB SXM5", 132, 989.4e12, 4096, 3.35e12,  # [H]
            _rates(
                mma=0.629 * 4096, tf32=0.629 * 2048, fp32=128, half2=128, fp64=64, wgmma=4096,
            ),  # [M] [H]
            warps=64, blocks=32, shared=228 * _KB, shared_block=227 * _KB,  # [S]
        ),
        Arch(
            "sm_100", "B200", 148, None, None, 8e12,
            _rates(mma=None, tf32=None, fp32=128, half2=64, fp64=64),  # [T]
            warps=64, blocks=32, shared=228 * _KB, shared_block=227 * _KB,  # [S]
        ),
        Arch(
            "sm_120", "RTX 5090", 170, 209.5e12, 512, 1.792e12,  # [B]
            _rates(mma=512, tf32=256, fp32=128, half2=64, fp64=2, iadd=128),  # [B] [T]
            warps=48, blocks=24, shared=100 * _KB, shared_block=99 * _KB,  # [S]
        ),
    )
}  # fmt: skip
