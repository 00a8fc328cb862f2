// Small kernels that use each part of the runtime that the stand-in plays, and some that misuse it.

#include <cuda_runtime_api.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Mixed {  // a parameter with padding
  float* out;
  int n;
  double y;
  char tag;
};

__device__ float table[4] = {1.f, 2.f, 4.f, 8.f};

template <int kTimes>
__global__ void mixed(Mixed m, float add, int8_t small, const float* in) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < m.n)
    m.out[i] = kTimes * in[i] + add + float(m.y) + float(small) + float(m.tag) + table[i % 4];
}

// out[z][y][x] of the whole grid: its own coordinates as one number.
__global__ void where(int* out) {
  const int x = int(blockIdx.x * blockDim.x + threadIdx.x), X = int(gridDim.x * blockDim.x);
  const int y = int(blockIdx.y * blockDim.y + threadIdx.y), Y = int(gridDim.y * blockDim.y);
  const int z = int(blockIdx.z * blockDim.z + threadIdx.z);
  out[(z * Y + y) * X + x] = 10000 * z + 100 * y + x;
}

__global__ void reversed(float* x, int n) {
  extern __shared__ float s_x[];
  s_x[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s_x[n - 1 - int(threadIdx.x)];
}

__global__ void __launch_bounds__(64) bounded(float* x) { x[threadIdx.x] = 1.f; }

}  // namespace

EXPORT int toy_mixed(float* out, const float* in, int n, int times) {
  const Mixed m{out, n, 0.25, 3};
  if (times == 2)
    mixed<2><<<(n + 31) / 32, 32>>>(m, 0.5f, -7, in);
  else
    mixed<3><<<(n + 31) / 32, 32>>>(m, 0.5f, -7, in);
  return cudaGetLastError();
}
EXPORT int toy_where(int* out, const unsigned* g, const unsigned* b, void* stream) {
  where<<<dim3(g[0], g[1], g[2]), dim3(b[0], b[1], b[2]), 0, static_cast<cudaStream_t>(stream)>>>(
      out);
  return cudaGetLastError();
}
EXPORT int toy_reversed(float* x, int n, int shared, int ask) {
  if (ask) {
    const int error =
        cudaFuncSetAttribute(reversed, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error) return error;
  }
  reversed<<<1, n, size_t(shared)>>>(x, n);
  return cudaGetLastError();
}
EXPORT int toy_bounded(float* x, int threads) {
  bounded<<<1, threads>>>(x);
  return cudaGetLastError();
}
EXPORT int toy_cooperative(int* out, unsigned blocks) {
  void* args[] = {&out};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(where), dim3(blocks), dim3(32),
                                     args, 0, nullptr);
}
EXPORT int toy_by_pointer(int* out, unsigned blocks) {
  void* args[] = {&out};
  return cudaLaunchKernel(reinterpret_cast<const void*>(where), dim3(blocks), dim3(32), args, 0,
                          nullptr);
}
EXPORT int toy_unknown() {
  void* args[] = {nullptr};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&toy_unknown), dim3(1), dim3(1), args, 0,
                          nullptr);
}
EXPORT int toy_last_error() { return cudaGetLastError(); }
EXPORT const char* toy_error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }
EXPORT int toy_attribute(int attribute, int* value) {
  return cudaDeviceGetAttribute(value, cudaDeviceAttr(attribute), 0);
}
EXPORT int toy_occupancy(int threads, int shared) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, where, threads, size_t(shared));
  return blocks;
}
