// The compiler's side of CUDA: what nvcc gives a kernel, or what tests/sim/emu gives it instead
// when the same file is compiled for the host (FASTATTN_EMULATE).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef FASTATTN_EMULATE
#include "emulate.h"  // __global__, threadIdx, __syncthreads(), shuffles, FASTATTN_* below
#else

// Dynamic shared memory of the block, as bytes.
#define FASTATTN_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// A static object of the block; `type` may be an array type.
#define FASTATTN_STATIC_SHARED(type, name) __shared__ std::type_identity_t<type> name
// A launch; `kernel` is a pointer to a __global__ function.
#define FASTATTN_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (kernel)<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
// The same, with all blocks resident at once.
#define FASTATTN_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...) \
  ::fastattn::cuda::launch_cooperative((kernel), (grid), (block), (shared), (stream), __VA_ARGS__)

#endif

namespace fastattn::cuda {

#ifndef FASTATTN_EMULATE
template <class... P>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                        cudaStream_t stream, std::type_identity_t<P>... arguments) {
  void* pointers[] = {&arguments...};
  cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared,
                              stream);
}
#endif

// x, known from here on alone: what follows from it is not moved out of a loop, where it would hold
// registers throughout.
__device__ __forceinline__ int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int thread_id() { return fresh(int(threadIdx.x)); }
__device__ __forceinline__ int lane_id() { return thread_id() % 32; }

}  // namespace fastattn::cuda
