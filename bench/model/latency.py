"""How long things take that no pipe is busy with: cycles of a round trip, a launch, DRAM at work.

Every figure is a pair, (best, worst): for L2 its near and its far half, else what the sources give
or, where they are silent, a range that is marked as an assumption. Sources, by the letter below;
[U] and [X] were read as files of repositories, [L] as an abstract:

  [U] github.com/te42kyfo/gpu-benches, commit 1c36d50, measured: gpu-latency/{a100_80,h100_pcie,
      l40}.txt (pointer chase by buffer size, cycles), gpu-small-kernels/*.txt (GB/s of a copy of
      64 KB: A100 25 in a stream, 49 in a graph; H200 27, 52), gpu-stream/*.txt (DRAM of 2039 GB/s:
      A100 1759 to 1892; H100 PCIe 1832 to 2018), gpu-l2-cache/*.txt (A100 5.4 TB/s at 1.41 GHz,
      H100 PCIe 7.0 at 1.755 GHz)
  [X] github.com/HPMLL/NVIDIA-Hopper-Benchmark (arXiv 2402.13499), RegularUnits/random_latency/
      {a100_pcie,h800_pcie,rtx4090}.txt: the same chase by others, within 4 % of [U]
  [L] arXiv 2606.22588, its abstract: L2 of an L40, 222 to 339 cycles by SM
  [A] NVIDIA A100 Tensor Core GPU Architecture: 5120 bytes a cycle from L2

Not confirmed, so ranges by assumption: MMA (arXiv 2206.02874 is said to have 25 cycles for
m16n8k16 on an A100; its tables could not be read), SHARED, LOADED, and L2 and DRAM of sm_86 and
sm_120, which are a wider sm_89.
"""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[float, float]


@dataclass(frozen=True)
class RoundTrip:
    """Cycles of a load that nothing else delays."""

    l1: float
    l2: Pair  # the half beside the SM, the other one
    dram: Pair


ROUND_TRIPS = {
    "sm_80": RoundTrip(36, (203, 423), (565, 571)),  # [U] [X]
    "sm_86": RoundTrip(36, (200, 340), (500, 800)),  # assumed
    "sm_89": RoundTrip(36, (222, 339), (566, 632)),  # [U] [X] [L]
    "sm_90": RoundTrip(34, (264, 498), (644, 657)),  # [U] [X]
    "sm_120": RoundTrip(36, (200, 340), (500, 800)),  # assumed
}
SHARED: Pair = (20.0, 30.0)  # assumed: shared memory
MMA: Pair = (25.0, 35.0)  # assumed: mma.sync m16n8k16 to the next one of its chain
# Bytes a cycle from L2: all of it [A] to [U], and through an SM's port, 64 assumed at most.
L2_BYTES: Pair = (5120.0, 3840.0)
L2_BYTES_OF_SM: Pair = (64.0, 35.0)
# Seconds of the smallest kernel behind another one: in a graph, in a stream [U].
KERNEL_S: Pair = (1.3e-6, 2.6e-6)
# Of the DRAM's bytes a second those that reading takes [U].
DRAM_SHARE: Pair = (0.95, 0.86)
# A round trip while DRAM is busy, over one while it is not. Assumed: [U]'s read of 8 bytes a
# thread on a full A100 (2048 threads an SM, 1769 GB/s) holds each of them for 1 us.
LOADED: Pair = (1.0, 1.9)
