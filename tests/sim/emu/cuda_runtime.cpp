// The CUDA runtime calls that launchers make, and what a launch may ask for.
#include <cuda_runtime_api.h>

#include <map>

#include "runtime.h"

namespace fastattn::emu {

namespace {
cudaError_t last_error = cudaSuccess;
std::map<const void*, int> dynamic_limit;  // by kernel: what cudaFuncSetAttribute allowed
constexpr size_t kDefaultShared = 48 << 10;
}  // namespace

cudaError_t set_error(cudaError_t e) {
  if (e != cudaSuccess) last_error = e;
  return e;
}

// What the driver would refuse; 0 blocks or too many threads among it.
cudaError_t launch_error(const void* kernel, dim3 g, dim3 b, size_t shared, bool cooperative) {
  const auto blocks = static_cast<uint64_t>(g.x) * g.y * g.z;
  const auto threads = static_cast<uint64_t>(b.x) * b.y * b.z;
  if (blocks == 0 || g.y > 65535 || g.z > 65535 || g.x > 0x7fffffffu) return cudaErrorInvalidValue;
  if (threads == 0 || threads > 1024 || b.z > 64) return cudaErrorInvalidConfiguration;
  const auto allowed = dynamic_limit.find(kernel);
  const size_t limit =
      allowed == dynamic_limit.end() ? kDefaultShared : static_cast<size_t>(allowed->second);
  if (shared > limit && shared > kDefaultShared) return cudaErrorInvalidValue;
  if (cooperative && blocks > options.max_cooperative) return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

}  // namespace fastattn::emu

using fastattn::emu::options;

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t e = fastattn::emu::last_error;
  fastattn::emu::last_error = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError() { return fastattn::emu::last_error; }
const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "an error of the emulated runtime";
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute what, int value) {
  if (what != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > options.shared_limit) {
    return fastattn::emu::set_error(cudaErrorInvalidValue);
  }
  fastattn::emu::dynamic_limit[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrMultiProcessorCount:
      *value = static_cast<int>(options.max_cooperative);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(options.shared_limit);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(fastattn::emu::kDefaultShared);
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    default:
      fastattn::emu::fault("launch", fastattn::emu::Site(), "cudaDeviceGetAttribute(%d)",
                           static_cast<int>(what));
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  __builtin_memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

}  // extern "C"
