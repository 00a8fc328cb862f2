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
#else
#define FASTATTN_GPU_KEY CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fastattn::binding {

enum class Access : int { kRead = 0, kResult = 1, kFilledResult = 2 };

#ifdef FASTATTN_STAND_IN

struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
  ~OnDeviceOf() { stand_in_forget(); }
  cudaStream_t stream = nullptr;
};

inline void reachable(const torch::stable::Tensor& x, Access access, const char* name) {
  int64_t elements = x.numel() > 0;
  for (int64_t d = 0; elements && d < x.dim(); ++d) elements += (x.size(d) - 1) * x.stride(d);
  stand_in_region(x.const_data_ptr(), elements * int64_t(x.element_size()), int(access), name);
}

#else

// While alive, x's device is current, and `stream` is torch's current stream there.
struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor& x) : guard(x.get_device_index()) {
    // The CUDA runtime is linked statically: this library's copy keeps a current device of its own.
    const cudaError_t error = cudaSetDevice(x.get_device_index());
    STD_TORCH_CHECK(error == cudaSuccess, "fastattn: cudaSetDevice(", x.get_device_index(),
                    "): ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};

inline void reachable(const torch::stable::Tensor&, Access, const char*) {}

#endif

}  // namespace fastattn::binding
