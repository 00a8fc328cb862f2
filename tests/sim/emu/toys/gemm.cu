// C = A B^T with the tools of the real kernels: cp.async into two swizzled stages, ldmatrix, mma.
// A (M, K), B (N, K) bf16, C (M, N) fp32; K a multiple of 8. kBug plants one fault.
#include <utility>

#include "../../../../csrc/cuda/ptx.cuh"

#ifdef FASTATTN_EMULATE
#include "../case.h"
#endif

namespace fastattn::cuda::toys {
namespace {

enum Bug {
  kNone,
  kNoWait,             // stages are read while their copies are under way
  kWrongWait,          // one group too many may be under way
  kNoBarrierBefore,    // a thread sees its own copies only
  kNoBarrierAfter,     // a stage is overwritten while others still read it
  kRowTooFar,          // row M of A is read
  kMisaligned,         // source of a copy off by an element
  kDivergedMma,        // a lane skips the product
  kLdmatrixTooFar,     // rows beyond shared memory
  kTailNotZeroed,      // what lies beyond K stays unwritten
  kStoreTooFar,        // column N of C is written
  kOverlappingStages,  // second stage starts within the first
  kBugs
};

constexpr int kTile = 64, kDepth = 32, kThreads = 128;
constexpr int kStage = kTile * kDepth * 2, kBytes = 4 * kStage;

// Byte offset of a 16-byte chunk of a row of 64 bytes: two rows make a line of eight banks.
__device__ int chunk_at(int row, int chunk) { return row * 64 + (chunk ^ (row >> 1 & 3)) * 16; }

template <Bug kBug>
__device__ void load(uint32_t s_tile, const __nv_bfloat16* x, int first, int rows, int k, int K) {
  const int limit = kBug == kRowTooFar ? rows + 1 : rows;
  for (int i = int(threadIdx.x); i < kTile * kDepth / 8; i += kThreads) {
    const int row = i / 4, chunk = i % 4, column = k + 8 * chunk;
    const bool valid = first + row < limit && column < K;
    if (kBug == kTailNotZeroed && !valid) continue;
    const __nv_bfloat16* from = valid ? x + int64_t(first + row) * K + column : x;
    if (kBug == kMisaligned && valid && column + 8 < K) from += 1;
    ptx::cp_async_16(s_tile + uint32_t(chunk_at(row, chunk)), from, valid);
  }
}

template <Bug kBug>
__global__ void __launch_bounds__(kThreads)
    gemm_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int M, int N, int K) {
  FASTATTN_DYNAMIC_SHARED(s_all);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int m0 = int(blockIdx.x) * kTile, n0 = int(blockIdx.y) * kTile;
  const uint32_t s_base = ptx::shared_address(s_all);
  const auto stage = [&](int s) {
    return s_base + uint32_t((s & 1) * (kBug == kOverlappingStages ? kStage : 2 * kStage));
  };
  const auto fetch = [&](int step) {
    load<kBug>(stage(step), a, m0, M, step * kDepth, K);
    load<kBug == kRowTooFar ? kNone : kBug>(stage(step) + kStage, b, n0, N, step * kDepth, K);
  };

  float acc[kTile / 8][4] = {};
  const int steps = (K + kDepth - 1) / kDepth;
  fetch(0);
  ptx::cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch(step + 1);
    ptx::cp_async_commit();
    if (kBug != kNoWait) ptx::cp_async_wait<kBug == kWrongWait ? 2 : 1>();
    if (kBug != kNoBarrierBefore) __syncthreads();
    const uint32_t s_a = stage(step), s_b = s_a + kStage;
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t ra[4];
      const int row = 16 * warp + lane % 16 + (kBug == kLdmatrixTooFar && step % 2 ? 2 * kTile : 0);
      ptx::ldmatrix_x4(ra, s_a + uint32_t(chunk_at(row, 2 * k + lane / 16)));
      for (int n = 0; n < kTile / 16; ++n) {
        uint32_t rb[4];
        ptx::ldmatrix_x4(
            rb, s_b + uint32_t(chunk_at(16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2)));
        if (kBug == kDivergedMma && lane == 5) continue;
        ptx::mma(acc[2 * n], ra, rb[0], rb[1], __nv_bfloat16());
        ptx::mma(acc[2 * n + 1], ra, rb[2], rb[3], __nv_bfloat16());
      }
    }
    if (kBug != kNoBarrierAfter) __syncthreads();
  }
  const int limit = kBug == kStoreTooFar ? N + 1 : N;
  for (int n = 0; n < kTile / 8; ++n)
    for (int e = 0; e < 4; ++e) {
      const int row = m0 + 16 * warp + lane / 4 + e / 2 * 8,
                column = n0 + 8 * n + lane % 4 * 2 + e % 2;
      if (row < M && column < limit) c[int64_t(row) * N + column] = acc[n][e];
    }
}

using Kernel = void (*)(const __nv_bfloat16*, const __nv_bfloat16*, float*, int, int, int);
template <int... kBug>
Kernel kernel_of(int bug, std::integer_sequence<int, kBug...>) {
  const Kernel all[] = {gemm_kernel<Bug(kBug)>...};
  return all[bug];
}

}  // namespace

#ifdef FASTATTN_EMULATE
FASTATTN_EMU_LAUNCHER(gemm) {
  emu::Tensor &a = c.tensor("a"), &b = c.tensor("b"), &out = c.tensor("c");
  const int M = int(a.sizes[0]), N = int(b.sizes[0]), K = int(a.sizes[1]);
  const Kernel kernel = kernel_of(int(c.integer("bug")), std::make_integer_sequence<int, kBugs>());
  const dim3 grid(unsigned(M + kTile - 1) / kTile, unsigned(N + kTile - 1) / kTile);
  FASTATTN_LAUNCH(kernel, grid, kThreads, kBytes, nullptr, a.data<__nv_bfloat16>(),
                  b.data<__nv_bfloat16>(), out.data<float>(), M, N, K);
  return cudaGetLastError();
}
#else
// For nvcc: makes it emit every kernel.
Kernel emit_gemm(int bug) { return kernel_of(bug, std::make_integer_sequence<int, kBugs>()); }
#endif

}  // namespace fastattn::cuda::toys
