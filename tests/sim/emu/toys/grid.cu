// h <- tanh(W h) for some steps, one launch: a block owns some rows of W and all blocks meet
// between steps at a barrier of flags in global memory, as persistent recurrent kernels do. W (n,
// n), h (2, n) fp32, first state in h[0]. kBug plants one fault.
#include <utility>

#include "../../../../csrc/cuda/ptx.cuh"

#ifdef FASTATTN_EMULATE
#include "../case.h"
#endif

namespace fastattn::cuda::toys {
namespace {

enum Bug {
  kNone,
  kFences,           // no fault: relaxed atomics between fences
  kNoGridBarrier,    // blocks run ahead
  kRelaxed,          // the barrier counts but orders nothing
  kNoBarrierBefore,  // thread 0 arrives before its block has stored
  kNoBarrierAfter,   // threads go on before thread 0 has seen the others
  kFenceTooEarly,    // the fence comes before the stores
  kFenceOfBlock,     // the fence reaches the block only
  kOneTooMany,       // waits for a block that is not there
  kReadOnlyLoad,     // ld.global.nc of what the kernel writes
  kOneBuffer,        // the new state overwrites what others still read
  kPlainFlag,        // the flag is read without an atomic
  kNotCooperative,   // more blocks than are resident
  kBugs
};

constexpr int kThreads = 64;

template <Bug kBug>
__device__ void grid_barrier(unsigned* arrived, unsigned target) {
  constexpr bool kByFences = kBug == kFences || kBug == kFenceTooEarly || kBug == kFenceOfBlock;
  if (kBug != kNoBarrierBefore) __syncthreads();
  if (threadIdx.x == 0) {
    if (kByFences || kBug == kRelaxed) {
      if (kBug == kFences) ptx::fence();
      if (kBug == kFenceOfBlock) __threadfence_block();
      atomicAdd(arrived, 1u);
      while (ptx::ld_relaxed(arrived) < target) {
      }
      if (kByFences) ptx::fence();
    } else {
      ptx::red_release_add(arrived, 1u);
      if (kBug == kPlainFlag) {
        if (*arrived < target) __nanosleep(100);
      }
      while (ptx::ld_acquire(arrived) < target + (kBug == kOneTooMany ? 1u : 0u)) {
      }
    }
  }
  if (kBug != kNoBarrierAfter) __syncthreads();
}

template <Bug kBug>
__global__ void __launch_bounds__(kThreads)
    grid_kernel(const float* w, float* h, unsigned* arrived, int n, int steps) {
  const int row = int(blockIdx.x * kThreads + threadIdx.x);
  for (int step = 0; step < steps; ++step) {
    const float* now = h + step % 2 * n;
    float* next = h + (kBug == kOneBuffer ? step : step + 1) % 2 * n;
    float sum = 0.f;
    if (row < n) {
      for (int i = 0; i < n; ++i) {
        sum += w[int64_t(row) * n + i] * (kBug == kReadOnlyLoad ? __ldg(now + i) : now[i]);
      }
    }
    if (kBug == kFenceTooEarly) ptx::fence();
    if (row < n) next[row] = tanhf(sum);
    if (kBug == kNoGridBarrier) continue;
    grid_barrier<kBug>(arrived, unsigned(step + 1) * gridDim.x);
  }
}

using Kernel = void (*)(const float*, float*, unsigned*, int, int);
template <int... kBug>
Kernel kernel_of(int bug, std::integer_sequence<int, kBug...>) {
  const Kernel all[] = {grid_kernel<Bug(kBug)>...};
  return all[bug];
}

}  // namespace

#ifdef FASTATTN_EMULATE
FASTATTN_EMU_LAUNCHER(grid) {
  emu::Tensor &w = c.tensor("w"), &h = c.tensor("h");
  const int n = int(w.sizes[0]), bug = int(c.integer("bug")), steps = int(c.integer("steps"));
  const Kernel kernel = kernel_of(bug, std::make_integer_sequence<int, kBugs>());
  const unsigned blocks = unsigned(n + kThreads - 1) / kThreads;
  auto* arrived = c.tensor("arrived").data<unsigned>();
  if (bug == kNotCooperative) {
    FASTATTN_LAUNCH(kernel, blocks, kThreads, 0, nullptr, w.data<float>(), h.data<float>(), arrived,
                    n, steps);
  } else {
    FASTATTN_LAUNCH_COOPERATIVE(kernel, blocks, kThreads, 0, nullptr, w.data<float>(),
                                h.data<float>(), arrived, n, steps);
  }
  return cudaGetLastError();
}
#else
// For nvcc: makes it emit every kernel.
Kernel emit_grid(int bug) { return kernel_of(bug, std::make_integer_sequence<int, kBugs>()); }
#endif

}  // namespace fastattn::cuda::toys
