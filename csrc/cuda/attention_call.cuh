// A call of attention as the kernels see it: the public parameters, and what follows from them.
//
// Tiles hold logits in units of `unit`: plain ones (no softcap, ALiBi or bias) are q k^T itself and
// `unit` is the scale, others are the logits and `unit` is 1. A probability is
// exp2((x - m) * c) with c = unit * log2 e: subtracting first keeps huge logits exact.
#pragma once

#include <cfloat>
#include <cmath>

#include "philox.cuh"
#include "sequence.cuh"
#include "tile.cuh"

namespace fastattn::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

struct Call {
  AttentionParams p;
  float unit, c;
  float to_logits;  // what makes q k^T the logits before softcap, ALiBi and bias; 1 where plain
  uint64_t threshold;
  float keep_scale;
  int group;                 // query heads a key head
  bool laden;                // more than scale, causal, window, lengths and sinks
  bool q_vec, k_vec, v_vec;  // 16-byte accesses are possible
  bool o_vec;

  explicit Call(const AttentionParams& params) : p(params) {
    const bool plain = p.scale >= FLT_MIN && p.softcap == 0.f && !p.alibi && !p.bias.ptr;
    unit = plain ? p.scale : 1.f;
    to_logits = plain ? 1.f : p.scale;
    c = float(unit * kLog2E);
    threshold = uint64_t(std::nearbyint(p.dropout_p * 4294967296.0));
    keep_scale = float(1.0 / (1.0 - p.dropout_p));
    group = p.Hk > 0 ? p.H / p.Hk : 1;
    laden = !plain || p.mask.ptr || p.dropout_p > 0.;
    q_vec = vectors(p.q, p.D), k_vec = vectors(p.k, p.D), v_vec = vectors(p.v, p.Dv);
    o_vec = vectors(p.o, p.Dv);
  }

  // Whether every row of x can be read 16 bytes at a time.
  bool vectors(const Operand& x, int width) const {
    const int n = p.dtype == DType::kF32 ? 4 : 8;
    return x.d == 1 && width % n == 0 && reinterpret_cast<uintptr_t>(x.ptr) % 16 == 0 &&
           x.b % n == 0 && x.h % n == 0 && x.s % n == 0;
  }
};

// The rows of one head of one sequence.
template <typename T>
__device__ __forceinline__ Rows<T> rows_of(const Operand& x, int b, int h, int64_t start, int width,
                                           bool vectors) {
  T* base = static_cast<T*>(x.ptr) + int64_t(b) * x.b + int64_t(h) * x.h + start * x.s;
  return {base, x.s, x.d, width, vectors};
}

// Where a sequence's rows begin in lse and its like, (B, H, S) or packed (H, T).
__device__ __forceinline__ int64_t first_row_of(const AttentionParams& p, int b, int h,
                                                int64_t start) {
  return p.cu_q.ptr ? int64_t(h) * p.Tq + start : (int64_t(b) * p.H + h) * p.Sq;
}

// lse as a tile's logits are measured; in fp64, for forward and backward must round alike.
__device__ __forceinline__ float lse_in_units(float lse, float unit) {
  return float(double(lse) / double(unit));
}

__device__ __forceinline__ float read_float(const void* x, DType dtype, int64_t at) {
  if (dtype == DType::kF32) return static_cast<const float*>(x)[at];
  if (dtype == DType::kBf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(x)[at]);
  return __half2float(static_cast<const __half*>(x)[at]);
}

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(x);
  } else {
    return __bfloat162float(x);
  }
}
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Cephes' tanhf: a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would lose what is small.
__device__ __forceinline__ float tanh_of(float x) {
  const float z = x * x;
  float y = -5.70498872745e-3f * z + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  y = y * z * x + x;
  const float size = fabsf(x);
  const float far = 1.f - 2.f / (ptx::exp2_approx(size * 2.8853900817779268f) + 1.f);  // 2 log2 e
  return size < 0.625f ? y : copysignf(far, x);
}

// From q k^T to logits for one head, a C fragment at a time: scale -> softcap -> ALiBi -> bias ->
// mask. And dropout.
struct Features {
  const Call& call;
  int q_len, k_len;
  float slope = 0.f;
  int64_t bias_at = 0, mask_at = 0;
  uint32_t bh;
  uint64_t seed = 0;

  __device__ Features(const Call& call_, int b, int h, int q_len_, int k_len_)
      : call(call_), q_len(q_len_), k_len(k_len_), bh(uint32_t(b) * uint32_t(call_.p.H) + h) {
    const AttentionParams& p = call.p;
    if (p.alibi) slope = p.alibi[b * p.alibi_b + h];
    bias_at = b * p.bias.b + h * p.bias.h;
    mask_at = b * p.mask.b + h * p.mask.h;
    if (call.threshold) seed = uint64_t(*p.seed);
  }

  __device__ __forceinline__ float logit(float x, int i, int j) const {
    float derivative;
    return logit(x, i, j, derivative);
  }
  // derivative: of the logit, by scale * q k^T.
  __device__ __forceinline__ float logit(float x, int i, int j, float& derivative) const {
    const AttentionParams& p = call.p;
    x *= call.to_logits;
    derivative = 1.f;
    if (p.softcap != 0.f) {
      const float t = tanh_of(x / p.softcap);
      derivative = 1.f - t * t;
      x = p.softcap * t;
    }
    if (p.alibi) x -= slope * float(abs(i + (k_len - q_len) - j));
    if (i >= q_len || j >= k_len) return x;
    if (p.bias.ptr)
      x += read_float(p.bias.ptr, p.bias.dtype, bias_at + i * p.bias.i + j * p.bias.j);
    if (p.mask.ptr) {
      const int64_t at = mask_at + i * p.mask.i + j * p.mask.j;
      if (!static_cast<const unsigned char*>(p.mask.ptr)[at]) x = -INFINITY;
    }
    return x;
  }

  // x: a C fragment whose first number is row i, key j.
  __device__ __forceinline__ void logits(float (&x)[4], int i, int j) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = logit(x[e], i + e / 2 * 8, j + e % 2);
  }
  __device__ __forceinline__ void drop(float (&x)[4], int i, int j) const {
    uint32_t words[4];
    philox_fragment(words, seed, i, j, bh);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (words[e] < call.threshold) x[e] = 0.f;
  }
};

// Keys outside a row's [lo, hi) are hidden; x as above.
__device__ __forceinline__ void hide(float (&x)[4], const Visible& seen, int i, int j) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int row = i + e / 2 * 8, key = j + e % 2;
    if (key < seen.lo(row) || key >= seen.hi(row)) x[e] = -INFINITY;
  }
}

// Ends a row: writes its lse (and, kLow, what that rounds away) where wanted, and returns what acc
// is multiplied by. m, l: of the whole row.
template <bool kLow = true>
__device__ __forceinline__ float finish_row(const Call& call, float m, float l, bool inside, int h,
                                            float* lse, float* lse_lo) {
  const AttentionParams& p = call.p;
  // No key, or no row: output 0, whatever the sink. A NaN is not 0 and stays.
  const bool none = l == 0.f || !inside;
  double top = none ? 0. : double(m);
  float value = -INFINITY, factor = 1.f;
  if (p.sinks) {
    // What the sum stands on, in units: the row's maximum, or a sink above it. Never their
    // difference: beside a row of FLT_MIN it would drown both.
    const float raw = p.sinks[h];
    const double sink = double(raw) / double(call.unit);
    const double lift = fmax(sink - top, 0.) * double(call.c);
    factor = ptx::exp2_approx(float(-lift));
    l = l * factor + ptx::exp2_approx(float((sink - top) * double(call.c) - lift));
    top = fmax(top, sink);
    if (inside) value = raw;
  }
  if (none) l = 1.f;
  const double log2_l = double(log2f(l));
  if (!none) value = float(top * double(call.unit) + log2_l * kLn2);
  const double shown = double(lse_in_units(value, call.unit));
  if (lse) *lse = value;
  if constexpr (kLow)
    if (lse) *lse_lo = none ? 0.f : float(log2_l + (top - shown) * double(call.c));
  return none ? 0.f : factor * call.keep_scale / l;
}

}  // namespace fastattn::cuda
