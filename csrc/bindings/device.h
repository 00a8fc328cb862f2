// What every binding of GPU kernels does with devices: say where a tensor is, allocate there, and
// put a failed launch into words.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "../cuda/variant.h"

namespace fastattn::binding {

struct Device {
  explicit Device(const torch::stable::Tensor& x) : index(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  }
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  int32_t type = 0, index = 0;
};

inline torch::stable::Tensor empty_on(const Device& device, const std::vector<int64_t>& shape,
                                      const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(),
                                                         strides.data(), dtype, device.type,
                                                         device.index, &handle));
  return torch::stable::Tensor(handle);
}

// How many multiprocessors the device of that index has.
inline int multiprocessors(int device, const char* op) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it again
  STD_TORCH_CHECK(error == cudaSuccess, "fastattn::", op,
                  ": cudaDeviceGetAttribute: ", cudaGetErrorString(error));
  return count;
}

// sizes: of the call, for the message.
template <class... Sizes>
void check_launch(const cuda::Launch& made, const char* op, const Sizes&... sizes) {
  if (made.error == cudaSuccess) return;
  cudaGetLastError();  // else the next launch would report this one's
  STD_TORCH_CHECK(false, "fastattn::", op, ": ", cudaGetErrorName(made.error), " (",
                  cudaGetErrorString(made.error), ") from ", made.kernel, ", grid ", made.grid,
                  ", block ", made.block, ", ", made.shared, " bytes of shared memory, ", sizes...);
}

}  // namespace fastattn::binding
