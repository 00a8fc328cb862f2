// Tensors of any leading dimensions as rows for the kernels of layernorm_ffn, and the checks that
// keep a direct call of an op inside its tensors (the Python layer has named mistakes already).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>

#include "../cpu/layernorm_ffn.h"
#include "cpu.h"

namespace fastattn::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Opt = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

inline std::string text(const Tensor& x) {
  std::string s = "(";
  for (int64_t d = 0; d < x.dim(); ++d) s += (d ? ", " : "") + std::to_string(x.size(d));
  return s + (x.dim() == 1 ? ",)" : ")");
}

inline DType row_dtype(const char* op, const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBf16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      STD_TORCH_CHECK(false, "fastattn::", op, ": ", name,
                      " must be float32, bfloat16 or float16 for the kernels");
  }
}

inline int32_t dtype_code(DType dtype) {
  switch (dtype) {
    case DType::kBf16:
      return aoti_torch_dtype_bfloat16();
    case DType::kF16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

inline Tensor empty(const Shape& shape, DType dtype) {
  Shape strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;)
    strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  return empty_strided(shape, strides, dtype_code(dtype));
}
inline Tensor nothing(DType dtype = DType::kF32) { return empty({0}, dtype); }

inline Shape shape_of(const Tensor& x) {
  Shape s;
  for (int64_t d = 0; d < x.dim(); ++d) s.push_back(x.size(d));
  return s;
}

// A matrix that starts `offset` elements behind x's first.
inline Tensor view2(const Tensor& x, int64_t rows, int64_t cols, int64_t s0, int64_t s1,
                    int64_t offset = 0) {
  const int64_t sizes[] = {rows, cols}, strides[] = {s0, s1};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, offset, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& x) {
  return view2(x, x.size(1), x.size(0), x.stride(1), x.stride(0));
}

inline void* data(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }
inline float* floats(const Tensor& x) { return x.numel() ? static_cast<float*>(data(x)) : nullptr; }

// x as (M, N), N columns in its last dimensions: a view where its strides allow one, else a copy.
class RowView {
 public:
  RowView(const char* op, const Tensor& x, int64_t N, const char* name) : x_(x) {
    rows_.dtype = row_dtype(op, x, name);
    int64_t d = x.dim(), width = 1;
    for (; d > 0 && width < N; width *= x.size(d)) --d;
    STD_TORCH_CHECK(N > 0 && width == N, "fastattn::", op, ": the last dimensions of ", name,
                    " must have ", N, " elements, got shape ", text(x));
    M_ = x.numel() / N;
    if (!fits(d)) x_ = torch::stable::contiguous(x);
    rows_.ptr = data(x_);
    rows_.stride = N;
    for (int64_t r = d; r-- > 0;) {
      if (x_.size(r) == 1) continue;
      rows_.stride = x_.stride(r);
      break;
    }
  }
  int64_t M() const { return M_; }
  const Rows& rows() const { return rows_; }
  const Tensor& tensor() const { return x_; }

 private:
  // Whether dimensions [d, dim) are contiguous and those before d are one dimension.
  bool fits(int64_t d) const {
    int64_t expected = 1;
    for (int64_t r = x_.dim(); r-- > d;) {
      if (x_.size(r) != 1 && x_.stride(r) != expected) return false;
      expected *= x_.size(r);
    }
    bool first = true;
    for (int64_t r = d; r-- > 0;) {
      if (x_.size(r) == 1) continue;
      if (!first && x_.stride(r) != expected) return false;
      if (first && x_.stride(r) <= 0) return false;
      expected = x_.stride(r) * x_.size(r), first = false;
    }
    return true;
  }

  Tensor x_;
  int64_t M_ = 0;
  Rows rows_;
};

inline Rows rows_of(const Tensor& x, int64_t N, DType dtype) {
  if (x.numel() == 0) return {};
  return {data(x), dtype, N};
}

// A vector of N in any shape; contiguous.
inline Vec vec(const char* op, Opt& x, int64_t N, const char* name) {
  if (!x) return {};
  STD_TORCH_CHECK(x->numel() == N, "fastattn::", op, ": ", name, " must have ", N,
                  " elements, got shape ", text(*x));
  x = torch::stable::contiguous(*x);
  return {x->const_data_ptr(), row_dtype(op, *x, name)};
}

// Statistics that a forward returned, M in fp32: a direct call of a backward may hand over
// anything.
inline float* statistics(const char* op, const Tensor& x, int64_t M, const char* name) {
  STD_TORCH_CHECK(x.numel() == M && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
                  "fastattn::", op, ": ", name, " must be the forward's, ", M,
                  " elements of float32, got shape ", text(x));
  return floats(x);
}

inline DropoutSite dropout_site(const char* op, double p, const Opt& seed, uint32_t site) {
  STD_TORCH_CHECK(p >= 0. && p < 1., "fastattn::", op, ": dropout must be in [0, 1), got ", p);
  if (p == 0.) return {};
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "fastattn::", op, ": dropout needs seed, a 1-element int64 tensor");
  return {p, uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr())), site, 0};
}

// A sum in fp32 in the parameter's own dtype and shape.
inline Tensor as_parameter(const Tensor& sum, const Tensor& parameter) {
  if (parameter.scalar_type() == ScalarType::Float) return sum;
  return torch::stable::to(sum, parameter.scalar_type());
}

}  // namespace fastattn::binding
