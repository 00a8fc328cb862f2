// Tensors of a case as attention's launchers are told of them.
#pragma once

#include "../../../../csrc/cuda/attention.h"

#include "../case.h"

namespace fastattn::cuda {

using emu::Case;
using emu::Tensor;

inline DType dtype_of(const Tensor& t) {
  return t.dtype == "bf16"   ? DType::kBf16
         : t.dtype == "f16"  ? DType::kF16
         : t.dtype == "bool" ? DType::kBool
                             : DType::kF32;
}

inline Operand operand(Tensor& t) {
  if (t.sizes.size() == 3) return {t.data(), 0, t.strides[1], t.strides[0], t.strides[2]};
  return {t.data(), t.strides[0], t.strides[1], t.strides[2], t.strides[3]};
}

inline Broadcast broadcast(Case& c, const char* name) {
  Tensor* t = c.find(name);
  if (!t) return {};
  const auto stride = [&](size_t d) { return t->sizes[d] == 1 ? 0 : t->strides[d]; };
  return {t->data(), dtype_of(*t), stride(0), stride(1), stride(2), stride(3)};
}

inline Integers integers(Case& c, const char* name) {
  Tensor* t = c.find(name);
  return t ? Integers{t->data(), t->dtype == "i64"} : Integers{};
}

}  // namespace fastattn::cuda
