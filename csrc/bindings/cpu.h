// What every CPU binding needs: torch's threads for kernels that know no torch, and tensors for
// their results.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../cpu/huge_pages.h"
#include "../cpu/parallel.h"

namespace fastattn::binding {

inline Parallel threads() {
  Parallel p;
  p.threads = int(torch::stable::get_num_threads());
  p.run = [](int n, void (*fn)(void*, int), void* ctx) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) fn(ctx, int(w));
    });
  };
  return p;
}

// Through the C shim: new_empty by way of the dispatcher costs a small call as much as its kernel.
inline torch::stable::Tensor empty_strided(const std::vector<int64_t>& shape,
                                           const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(),
                                                         strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  torch::stable::Tensor x(handle);
  ask_for_huge_pages(x.const_data_ptr(), x.numel() * int64_t(x.element_size()));
  return x;
}

}  // namespace fastattn::binding
