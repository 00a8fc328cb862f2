// What the bindings of attention share on every device: the arguments, checked so that no launch
// leaves its tensors, and results in the memory order of the contract. Values are not looked at
// here: on a device they cannot be.
//
// The Python layer has named every mistake already; what is checked here keeps a direct call of an
// op, or one compiled with other values, inside its tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../operands.h"

#define FASTATTN_CHECK(cond, ...) STD_TORCH_CHECK(cond, "fastattn::attention: ", __VA_ARGS__)

namespace fastattn::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Opt = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBf16;
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::Bool:
      return DType::kBool;
    default:
      FASTATTN_CHECK(false, name, " must be float32, bfloat16 or float16 for the kernels");
  }
}

inline int32_t code_of(DType dtype) {
  switch (dtype) {
    case DType::kBf16:
      return aoti_torch_dtype_bfloat16();
    case DType::kF16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

// The arguments that forward and backward share, in schema order.
struct Shared {
  Opt mask, bias, q_lens, k_lens, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed;
  double scale;
  int64_t causal, window_left, window_right;
  double softcap, dropout_p;
  int64_t weights, max_seqlen_q, max_seqlen_k;
};

inline Operand operand(const Tensor& x, bool packed) {
  Operand o;
  o.ptr = const_cast<void*>(x.const_data_ptr());
  if (packed)
    o.s = x.stride(0), o.h = x.stride(1), o.d = x.stride(2);
  else
    o.b = x.stride(0), o.h = x.stride(1), o.s = x.stride(2), o.d = x.stride(3);
  return o;
}

// x as a broadcast view of (B, H, Sq, Sk); limits are checked so that no index leaves it.
inline Broadcast broadcast(const Tensor& x, const int64_t (&limits)[4], const char* name) {
  Broadcast out;
  out.ptr = x.const_data_ptr();
  out.dtype = dtype_of(x, name);
  int64_t* const strides[4] = {&out.b, &out.h, &out.i, &out.j};
  FASTATTN_CHECK(x.dim() <= 4, name, " must have at most 4 dimensions, got ", x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) {
    const int64_t at = 4 - x.dim() + d, n = x.size(d);
    FASTATTN_CHECK(n == 1 || n >= limits[at], name, " dimension ", d, " must be 1 or ", limits[at],
                   ", got ", n);
    *strides[at] = n == 1 ? 0 : x.stride(d);
  }
  return out;
}

// A size in the integer type of a kernel's parameters.
template <class Int>
void set_size(Int& to, int64_t n, const char* name) {
  FASTATTN_CHECK(n <= std::numeric_limits<Int>::max(), name, " must be at most ",
                 std::numeric_limits<Int>::max(), " for the kernels, got ", n);
  to = Int(n);
}

// Tiles reach beyond a sequence's end: their indices stay below 2^31.
constexpr int64_t kLongest = (int64_t(1) << 31) - (1 << 16);

template <class Int>
void set_length(Int& to, int64_t n, const char* name) {
  FASTATTN_CHECK(n <= kLongest, name, " must be at most ", kLongest, " for the kernels, got ", n);
  to = Int(n);
}

// q, k and v; B, Sq and Sk of a padded call. Packed ones come from cu_seqlens, see the callers.
template <class Params>
void set_qkv(Params& p, const Tensor& q, const Tensor& k, const Tensor& v, bool packed) {
  const int64_t dims = packed ? 3 : 4;
  for (const Tensor* x : {&q, &k, &v}) {
    FASTATTN_CHECK(x->dim() == dims, "q, k and v must have ", dims, " dimensions, got ", x->dim());
    FASTATTN_CHECK(x->scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
  }
  p.dtype = dtype_of(q, "q");
  FASTATTN_CHECK(p.dtype != DType::kBool, "q must be float32, bfloat16 or float16");
  set_size(p.H, q.size(1), "heads"), set_size(p.Hk, k.size(1), "heads");
  set_size(p.D, q.size(-1), "head_dim"), set_size(p.Dv, v.size(-1), "head_dim");
  FASTATTN_CHECK(k.size(-1) == p.D, "k must have head_dim ", p.D, " to match q, got ", k.size(-1));
  FASTATTN_CHECK(v.size(1) == p.Hk, "v must have k's ", p.Hk, " heads, got ", v.size(1));
  FASTATTN_CHECK(p.H == p.Hk || (p.Hk > 0 && p.H % p.Hk == 0),
                 "q's heads must be a multiple of k's, got ", p.H, " and ", p.Hk);
  FASTATTN_CHECK(p.D > 0 && p.Dv > 0, "head_dim must be at least 1");
  p.q = operand(q, packed), p.k = operand(k, packed), p.v = operand(v, packed);
  if (packed) {
    FASTATTN_CHECK(v.size(0) == k.size(0), "v must have k's ", k.size(0), " tokens, got ",
                   v.size(0));
    return;
  }
  set_size(p.B, q.size(0), "batch"), set_length(p.Sq, q.size(2), "q's length");
  set_length(p.Sk, k.size(2), "k's length");
  FASTATTN_CHECK(k.size(0) == p.B && v.size(0) == p.B, "q, k and v must have one batch size");
  FASTATTN_CHECK(v.size(2) == p.Sk, "v must have k's length ", p.Sk, ", got ", v.size(2));
}

// mask, bias and the numbers, once the sizes are known.
template <class Params>
void set_features(Params& p, const Shared& a) {
  const int64_t limits[4] = {p.B, p.H, p.Sq, p.Sk};
  if (a.mask) {
    FASTATTN_CHECK(a.mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    p.mask = broadcast(*a.mask, limits, "mask");
  }
  if (a.bias) {
    p.bias = broadcast(*a.bias, limits, "bias");
    FASTATTN_CHECK(p.bias.dtype != DType::kBool, "bias must be float32, bfloat16 or float16");
  }
  if (a.alibi_slopes) {
    const bool two = a.alibi_slopes->dim() == 2;
    FASTATTN_CHECK(a.alibi_slopes->numel() == (two ? int64_t(p.B) : 1) * p.H,
                   "alibi_slopes must have shape (H,) or (B, H)");
    p.alibi_b = two ? p.H : 0;
  }
  if (a.sinks) FASTATTN_CHECK(a.sinks->numel() == p.H, "sinks must have shape (H,)");
  p.scale = float(a.scale), p.softcap = float(a.softcap);
  FASTATTN_CHECK(a.causal >= 0 && a.causal <= 2, "causal must be 0, 1 or 2, got ", a.causal);
  p.causal = Causal(a.causal);
  const int64_t furthest = int64_t(p.Sq) + p.Sk;  // further is no further
  set_size(p.window_left, std::min(a.window_left, furthest), "Sq + Sk");
  set_size(p.window_right, std::min(a.window_right, furthest), "Sq + Sk");
  FASTATTN_CHECK(a.dropout_p >= 0. && a.dropout_p < 1., "dropout_p must be in [0, 1), got ",
                 a.dropout_p);
  p.dropout_p = a.dropout_p;
  if (p.dropout_p > 0.)
    FASTATTN_CHECK(a.seed && a.seed->scalar_type() == ScalarType::Long && a.seed->numel() == 1,
                   "dropout needs seed, a 1-element int64 tensor");
  FASTATTN_CHECK(a.weights >= 0 && a.weights <= 2, "weights must be 0, 1 or 2");
  p.weights_mode = Weights(a.weights);
}

// Shape of the weights that a call returns: empty unless asked for.
template <class Params>
Shape weights_shape(const Params& p) {
  if (p.weights_mode == Weights::kFull) return {p.B, p.H, p.Sq, p.Sk};
  if (p.weights_mode == Weights::kMean) return {p.B, p.Sq, p.Sk};
  return {0};
}

template <class Params>
void set_weights(Params& p, const Tensor& w) {
  p.weights.ptr = const_cast<void*>(w.const_data_ptr());
  const int64_t map = int64_t(p.Sq) * p.Sk;
  if (p.weights_mode == Weights::kFull)
    p.weights.b = p.H * map, p.weights.h = map, p.weights.s = p.Sk;
  if (p.weights_mode == Weights::kMean) p.weights.b = map, p.weights.s = p.Sk;
  p.weights.d = 1;
}

// ---- results. `make(shape, strides, dtype code)` allocates, on whatever device.

template <class Make>
Tensor empty(Make&& make, const Shape& shape, int32_t dtype) {
  Shape strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;)
    strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  return make(shape, strides, dtype);
}

// The memory order of a result: see empty_as in kernels/contract.py.
template <class Make>
Tensor empty_as(Make&& make, const Tensor& x, int64_t width) {
  const int32_t dtype = code_of(dtype_of(x, "q"));
  if (x.dim() == 3) return empty(make, {x.size(0), x.size(1), width}, dtype);
  const int64_t B = x.size(0), H = x.size(1), S = x.size(2);
  if (x.is_contiguous()) return empty(make, {B, H, S, width}, dtype);
  const int64_t h = std::max<int64_t>(width, 1), s = std::max<int64_t>(H, 1) * h;
  return make({B, H, S, width}, {std::max<int64_t>(S, 1) * s, h, s, 1}, dtype);
}

}  // namespace fastattn::binding
