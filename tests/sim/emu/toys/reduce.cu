// out[row] = sum of a row of x (rows, n) fp32 through shuffles and static shared memory, a block of
// 128 a row; then each warp reverses 32 of the row's numbers. kBug plants one fault.
#include <utility>

#include "../../../../csrc/cuda/ptx.cuh"

#ifdef FASTATTN_EMULATE
#include "../case.h"
#endif

namespace fastattn::cuda::toys {
namespace {

enum Bug {
  kNone,
  kNoBarrier,        // warp sums are read before they are written
  kNoSyncWarp,       // a lane reads what another lane stored
  kShuffleFromGone,  // lanes that have left are read
  kTwoBarriers,      // halves of the block wait at different barriers
  kSpin,             // a warp waits for a flag that is set behind a barrier it holds up
  kUnwritten,        // one sum too many is read
  kPlainSum,         // += by all warps without an atomic
  kNotInMask,        // a lane shuffles with a mask that lacks it
  kBarrierBranch,    // a warp passes the barrier by and waits at the next
  kBugs
};

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

template <Bug kBug>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const float* x, float* out, float* reversed, unsigned* flag, int n) {
  FASTATTN_STATIC_SHARED(float[2 * kWarps], s_sums);
  FASTATTN_STATIC_SHARED(float[kThreads], s_values);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const float* row = x + int64_t(blockIdx.x) * n;
  float sum = 0.f;
  for (int i = thread; i < n; i += kThreads) sum += row[i];
  if (kBug == kShuffleFromGone && lane >= 30) return;
  const unsigned mask = kBug == kNotInMask && lane == 3 ? kAll & ~8u : kAll;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
  if (lane == 0) s_sums[warp] = sum;
  if (kBug == kSpin && warp == 1) {
    while (ptx::ld_acquire(flag) == 0u) __nanosleep(32);
  }
  if (kBug == kTwoBarriers) {
    if (warp < 2) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (kBug == kBarrierBranch) {
    if (warp != 2) __syncthreads();
  } else if (kBug != kNoBarrier) {
    __syncthreads();
  }
  if (kBug == kSpin && thread == 0) ptx::st_release(flag, 1u);
  if (kBug == kPlainSum) {
    if (lane == 0) out[blockIdx.x] += sum;
  } else if (thread == 0) {
    float total = 0.f;
    for (int w = 0; w < (kBug == kUnwritten ? kWarps + 1 : kWarps); ++w) total += s_sums[w];
    out[blockIdx.x] = total;
  }
  s_values[thread] = thread < n ? row[thread] : 0.f;
  if (kBug != kNoSyncWarp) __syncwarp();
  const float mirrored = s_values[32 * warp + 31 - lane];
  reversed[int64_t(blockIdx.x) * kThreads + thread] = mirrored;
  if (kBug == kBarrierBranch) __syncthreads();
}

using Kernel = void (*)(const float*, float*, float*, unsigned*, int);
template <int... kBug>
Kernel kernel_of(int bug, std::integer_sequence<int, kBug...>) {
  const Kernel all[] = {reduce_kernel<Bug(kBug)>...};
  return all[bug];
}

}  // namespace

#ifdef FASTATTN_EMULATE
FASTATTN_EMU_LAUNCHER(reduce) {
  emu::Tensor& x = c.tensor("x");
  const Kernel kernel = kernel_of(int(c.integer("bug")), std::make_integer_sequence<int, kBugs>());
  FASTATTN_LAUNCH(kernel, unsigned(x.sizes[0]), kThreads, 0, nullptr, x.data<float>(),
                  c.tensor("out").data<float>(), c.tensor("reversed").data<float>(),
                  c.tensor("flag").data<unsigned>(), int(x.sizes[1]));
  return cudaGetLastError();
}
#else
// For nvcc: makes it emit every kernel.
Kernel emit_reduce(int bug) { return kernel_of(bug, std::make_integer_sequence<int, kBugs>()); }
#endif

}  // namespace fastattn::cuda::toys
