// Norms of rows that a warp holds in registers (Ba et al., 1607.06450; Zhang & Sennrich,
// 1910.07467), forward and backward; and rows between registers and memory.
//
//   mean = sum x / N,  var = sum (x - mean)^2 / N  (rms: mean = 0),  rstd = 1 / sqrt(var + eps)
//   y = (x - mean) rstd weight + shift
//   h = dy weight,  dx = rstd (h - sum h / N - y_hat sum(h y_hat) / N)  (rms: without sum h)
//
// A lane has the columns 4 lane .. 4 lane + 3, and where a row is wider than 128 those 128 further
// on: 16-byte accesses, and just what one Philox call decides on.
#pragma once

#include "layernorm_ffn.h"
#include "mma.cuh"
#include "philox.cuh"

namespace fastattn::cuda {

__device__ __forceinline__ float load_float(const void* x, DType dtype, int64_t at) {
  if (dtype == DType::kF32) return static_cast<const float*>(x)[at];
  if (dtype == DType::kBf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(x)[at]);
  return __half2float(static_cast<const __half*>(x)[at]);
}
__device__ __forceinline__ void store_float(void* x, DType dtype, int64_t at, float value) {
  if (dtype == DType::kF32)
    static_cast<float*>(x)[at] = value;
  else if (dtype == DType::kBf16)
    static_cast<__nv_bfloat16*>(x)[at] = __float2bfloat16_rn(value);
  else
    static_cast<__half*>(x)[at] = __float2half_rn(value);
}
// value as memory of that dtype would give it back.
__device__ __forceinline__ float rounded(float value, DType dtype) {
  if (dtype == DType::kBf16) return __bfloat162float(__float2bfloat16_rn(value));
  if (dtype == DType::kF16) return __half2float(__float2half_rn(value));
  return value;
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}
__device__ __forceinline__ float max_of_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// A lane's part of a row of up to kWidth columns; beyond the row's own width it is 0.
template <int kWidth>
struct RowPart {
  static constexpr int kGroups = kWidth <= 128 ? 1 : kWidth / 128;
  float v[kGroups][4];

  // f(value, column) for the lane's columns below N.
  template <class F>
  __device__ __forceinline__ void each(int N, F&& f) {
    const int first = 4 * lane_id();
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int col = 128 * i + first + e;
        if (col < N) f(v[i][e], col);
      }
  }
  __device__ __forceinline__ void fill(float value) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) v[i][e] = value;
  }
};

// Whether rows of N elements may be read and written 4 elements at a time.
inline bool fours(const Matrix& m, int N) {
  const uintptr_t bytes = m.dtype == DType::kF32 ? 16 : 8;
  return reinterpret_cast<uintptr_t>(m.ptr) % bytes == 0 && m.stride % 4 == 0 && N % 4 == 0;
}

// Elements [at, at + N) of x.
template <int kWidth>
__device__ __forceinline__ void load_row(RowPart<kWidth>& row, const void* x, DType dtype,
                                         int64_t at, int N, bool fours) {
  row.fill(0.f);
  if (!fours) {
    row.each(N, [&](float& v, int col) { v = load_float(x, dtype, at + col); });
    return;
  }
#pragma unroll
  for (int i = 0; i < RowPart<kWidth>::kGroups; ++i) {
    const int col = 128 * i + 4 * lane_id();
    if (col >= N) continue;
    if (dtype == DType::kF32) {
      const float4 a = *reinterpret_cast<const float4*>(static_cast<const float*>(x) + at + col);
      row.v[i][0] = a.x, row.v[i][1] = a.y, row.v[i][2] = a.z, row.v[i][3] = a.w;
    } else {
      const uint2 a = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(x) + at + col);
      const uint32_t words[2] = {a.x, a.y};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t bits = words[e / 2] >> (16 * (e % 2)) & 0xffffu;
        row.v[i][e] = dtype == DType::kBf16 ? __uint_as_float(bits << 16)
                                            : __half2float(__ushort_as_half(uint16_t(bits)));
      }
    }
  }
}

template <int kWidth>
__device__ __forceinline__ void store_row(RowPart<kWidth>& row, void* x, DType dtype, int64_t at,
                                          int N, bool fours) {
  if (!fours) {
    row.each(N, [&](float& v, int col) { store_float(x, dtype, at + col, v); });
    return;
  }
#pragma unroll
  for (int i = 0; i < RowPart<kWidth>::kGroups; ++i) {
    const int col = 128 * i + 4 * lane_id();
    if (col >= N) continue;
    const float (&v)[4] = row.v[i];
    if (dtype == DType::kF32) {
      *reinterpret_cast<float4*>(static_cast<float*>(x) + at + col) =
          make_float4(v[0], v[1], v[2], v[3]);
    } else {
      const bool bf16 = dtype == DType::kBf16;
      const uint2 a =
          bf16 ? make_uint2(pack(v[0], v[1], __nv_bfloat16()), pack(v[2], v[3], __nv_bfloat16()))
               : make_uint2(pack(v[0], v[1], __half()), pack(v[2], v[3], __half()));
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(x) + at + col) = a;
    }
  }
}

// A parameter's values for this lane's columns; `otherwise` where it is absent.
template <int kWidth>
__device__ __forceinline__ void load_parameter(RowPart<kWidth>& row, const Parameter& p, int N,
                                               float otherwise) {
  row.fill(p.ptr ? 0.f : otherwise);
  if (p.ptr) row.each(N, [&](float& v, int col) { v = load_float(p.ptr, p.dtype, col); });
}

// Of a row times `scale`, a power of two that keeps the sum of its squares finite.
struct Moments {
  float scale, mean, rstd;
};

template <int kWidth>
__device__ __forceinline__ Moments moments(RowPart<kWidth>& x, int N, Norm norm, float eps) {
  float top = 0.f;
  x.each(N, [&](float& v, int) { top = fmaxf(top, fabsf(v)); });
  // 256 squares of twice 2^58 are below 2^126. An infinity or a NaN makes NaN either way.
  const float scale = max_of_warp(top) < 0x1p58f ? 1.f : 0x1p-80f;
  const float n = 1.f / float(N);
  float mean = 0.f;
  if (norm == Norm::kLayer) {
    // About the row's first element: a mean of 1000 costs no digits, equal elements none at all.
    const float first = __shfl_sync(0xffffffffu, x.v[0][0], 0) * scale;
    float sum = 0.f;
    x.each(N, [&](float& v, int) { sum += v * scale - first; });
    mean = first + sum_of_warp(sum) * n;
  }
  float sum = 0.f, squares = 0.f;
  x.each(N, [&](float& v, int) {
    const float d = v * scale - mean;
    sum += d, squares = fmaf(d, d, squares);
  });
  const float off = norm == Norm::kLayer ? sum_of_warp(sum) * n : 0.f;
  float var = sum_of_warp(squares) * n - off * off;
  if (var < 0.f) var = 0.f;  // a NaN stays
  if (scale == 1.f) return {scale, mean + off, 1.f / sqrtf(var + eps)};
  const double true_rstd = 1. / sqrt(double(var) * 0x1p160 + double(eps));
  return {scale, mean + off, float(true_rstd * 0x1p80)};
}

// x becomes norm(x); weight and shift are 1 and 0 where the norm has none.
template <int kWidth>
__device__ __forceinline__ void normalise(RowPart<kWidth>& x, const Moments& m,
                                          const RowPart<kWidth>& weight,
                                          const RowPart<kWidth>& shift) {
#pragma unroll
  for (int i = 0; i < RowPart<kWidth>::kGroups; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      x.v[i][e] = fmaf((x.v[i][e] * m.scale - m.mean) * m.rstd, weight.v[i][e], shift.v[i][e]);
}

// dy becomes dx, x becomes y_hat, from the forward's statistics; columns below N alone have a
// meaning.
template <int kWidth>
__device__ __forceinline__ void norm_backward(RowPart<kWidth>& dy, RowPart<kWidth>& x, float mean,
                                              float rstd, const RowPart<kWidth>& weight, int N,
                                              Norm norm) {
  const int first = 4 * lane_id();
  float sum = 0.f, projection = 0.f;
#pragma unroll
  for (int i = 0; i < RowPart<kWidth>::kGroups; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool inside = 128 * i + first + e < N;
      x.v[i][e] = inside ? (x.v[i][e] - mean) * rstd : 0.f;
      const float h = dy.v[i][e] * weight.v[i][e];
      sum += h, projection = fmaf(h, x.v[i][e], projection);
    }
  const float n = 1.f / float(N);
  const float c1 = norm == Norm::kLayer ? sum_of_warp(sum) * n : 0.f;
  const float c2 = sum_of_warp(projection) * n;
#pragma unroll
  for (int i = 0; i < RowPart<kWidth>::kGroups; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      dy.v[i][e] = rstd * (dy.v[i][e] * weight.v[i][e] - c1 - x.v[i][e] * c2);
}

// Drops what the mask of `site` drops of row `at`, and scales the rest.
template <int kWidth>
__device__ __forceinline__ void drop_row(RowPart<kWidth>& row, uint64_t seed, uint64_t threshold,
                                         float keep_scale, int64_t at, uint32_t site) {
#pragma unroll
  for (int i = 0; i < RowPart<kWidth>::kGroups; ++i) {
    const uint4 w = philox(
        seed, make_uint4(uint32_t(32 * i + lane_id()), uint32_t(at), uint32_t(at >> 32), site));
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int e = 0; e < 4; ++e)  // an infinity that is dropped is gone
      row.v[i][e] = words[e] < threshold ? 0.f : row.v[i][e] * keep_scale;
  }
}

}  // namespace fastattn::cuda
