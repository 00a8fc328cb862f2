// o and lse of a row from the parts of its splits, in their order: after attention_kv_cache.cu.
//
//   m = max m_s;  w_s = exp(m_s - m);  l = sum w_s l_s;  acc = sum w_s acc_s;  then as one split
//
// Reads 4 (Dv + 2) bytes a row and split: bound by that, or by its launch. A warp a row.
#include "attention_kv_cache_call.cuh"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 128, kRows = kThreads / 32;
constexpr int kGroups = kMaxHeadDim / 128;  // a lane has 4 columns of each 128

template <typename T>
__device__ __forceinline__ void write_four(T* row, int width, bool vectors, int col,
                                           const float4& x) {
  alignas(16) const T y[4] = {from_float<T>(x.x), from_float<T>(x.y), from_float<T>(x.z),
                              from_float<T>(x.w)};
  if (vectors) {
    using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
    *reinterpret_cast<Four*>(row + col) = *reinterpret_cast<const Four*>(y);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (col + e < width) row[col + e] = y[e];
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_kv_merge_kernel(const __grid_constant__ CacheCall c) {
  const AttentionParams& p = c.call.p;
  const int64_t at = int64_t(blockIdx.x) * kRows + thread_id() / 32;  // (b, hk, packed row)
  const int64_t outer = at / c.packed;
  const int row = int(at % c.packed), i = row / c.call.group;
  const int b = int(outer / p.Hk), h = int(outer % p.Hk) * c.call.group + row % c.call.group;
  if (b >= p.B) return;
  const CachedSequence s(c, b);
  const int64_t first = outer * c.splits * c.packed + row;
  const auto sums = [&](int split, int which) {
    return c.sums[2 * (first + int64_t(split) * c.packed) + which];
  };
  float m = -INFINITY, l = 0.f;
  for (int k = 0; k < c.splits; ++k) m = fmaxf(m, sums(k, 0));
  const float base = m == -INFINITY ? 0.f : m;
  float4 acc[kGroups] = {};
#pragma unroll 4
  for (int k = 0; k < c.splits; ++k) {
    const float l_k = sums(k, 1);
    if (l_k == 0.f) continue;  // no key: its part was not written
    const float weight = ptx::exp2_approx((sums(k, 0) - base) * c.call.c);
    l += l_k * weight;
    const float* const part = c.parts + (first + int64_t(k) * c.packed) * c.width;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const int col = 128 * n + 4 * lane_id();
      if (col >= p.Dv) continue;
      const float4 x = *reinterpret_cast<const float4*>(part + col);
      acc[n].x += weight * x.x, acc[n].y += weight * x.y;
      acc[n].z += weight * x.z, acc[n].w += weight * x.w;
    }
  }
  const bool writes = lane_id() == 0;
  const float factor =
      finish_row<false>(c.call, m, l, i < s.q_len && i + s.shift >= 0, h,
                        writes ? p.lse + first_row_of(p, b, h, 0) + i : nullptr, nullptr);
  T* const o = rows_of<T>(p.o, b, h, i, p.Dv, false).base;
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    const int col = 128 * n + 4 * lane_id();
    if (col >= p.Dv) continue;
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (factor != 0.f)
      x = make_float4(acc[n].x * factor, acc[n].y * factor, acc[n].z * factor, acc[n].w * factor);
    write_four<T>(o, p.Dv, c.call.o_vec, col, x);
  }
}

template <typename T>
constexpr Variant<CacheCall> variant(DType dtype) {
  return {{"attention_kv_merge_kernel", dtype, kMaxHeadDim, true, kRows, 0, kThreads, 0},
          attention_kv_merge_kernel<T>};
}
const Variant<CacheCall> kVariants[] = {variant<__nv_bfloat16>(DType::kBf16),
                                        variant<__half>(DType::kF16), variant<float>(DType::kF32)};

}  // namespace

Launch launch_kv_merge(const CacheCall& c, cudaStream_t stream) {
  const AttentionParams& p = c.call.p;
  Launch out;
  out.kernel = kVariants[0].kernel;
  const int64_t rows = int64_t(p.B) * p.Hk * c.packed;
  for (const auto& v : kVariants)
    if (v.dtype == p.dtype && rows > 0) launch(out, v, (rows + kRows - 1) / kRows, stream, c);
  return out;
}

int list_kv_merge(VariantInfo* out, int capacity) { return list(kVariants, out, capacity); }

}  // namespace fastattn::cuda
