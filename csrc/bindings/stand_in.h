// What differs where tests/sim builds a binding of GPU kernels for the CPU (FASTATTN_STAND_IN): the
// dispatch key, the device and stream that a launch goes to, and that the simulator is told which
// bytes a call may touch. A build that ships does none of it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include <cuda_runtime_api.h>

#ifdef FASTATTN_STAND_IN
#define FASTATTN_GPU_KEY CPU
extern "C" void stand_in_region(const void* data, int64_t bytes, int access, const char* name);
extern "C" void stand_in_forget();
// The device that tensors are said to be on, its current stream, and torch's guard of it.
extern "C" int stand_in_device();
extern "C" cudaStream_t stand_in_stream(int device);
extern "C" void stand_in_guard(int device, bool entered);
#else
#define FASTATTN_GPU_KEY CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fastattn::binding {

enum class Access : int { kRead = 0, kResult = 1, kFilledResult = 2 };

#ifdef FASTATTN_STAND_IN

inline int device_index(const torch::stable::Tensor&) { return stand_in_device(); }
inline cudaStream_t current_stream(int device) { return stand_in_stream(device); }

struct DeviceGuard {
  explicit DeviceGuard(int device) : device_(device) { stand_in_guard(device, true); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { stand_in_guard(device_, false), stand_in_forget(); }

 private:
  int device_;
};

inline void reachable(const torch::stable::Tensor& x, Access access, const char* name) {
  int64_t elements = x.numel() > 0;
  for (int64_t d = 0; elements && d < x.dim(); ++d) elements += (x.size(d) - 1) * x.stride(d);
  stand_in_region(x.const_data_ptr(), elements * int64_t(x.element_size()), int(access), name);
}

#else

inline int device_index(const torch::stable::Tensor& x) { return x.get_device_index(); }
inline cudaStream_t current_stream(int device) {
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  return static_cast<cudaStream_t>(current);
}
using torch::stable::accelerator::DeviceGuard;

inline void reachable(const torch::stable::Tensor&, Access, const char*) {}

#endif

// While alive, x's device is current, and `stream` is torch's current stream there.
struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor& x) : guard(device_index(x)) {
    // The CUDA runtime is linked statically: this library's copy keeps a current device of its own.
    const int device = device_index(x);
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it again
    STD_TORCH_CHECK(error == cudaSuccess, "fastattn: cudaSetDevice(", device,
                    "): ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
    stream = current_stream(device);
  }
  DeviceGuard guard;
  cudaStream_t stream = nullptr;
};

}  // namespace fastattn::binding
