// o and lse of a row from the parts of its splits, in their order: after attention_kv_cache.cu.
//
//   m = max m_s;  w_s = exp(m_s - m);  l = sum w_s l_s;  acc = sum w_s acc_s;  then as one split
//
// Reads 4 (Dv + 2) bytes a row and split: bound by that, by its launch, or by a round trip to L2
// for each kAtOnce splits. A warp a row.
#include "attention_kv_cache_call.cuh"
#include "norm.cuh"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 128, kRows = kThreads / 32;
constexpr int kGroups = kMaxHeadDim / 128;  // a lane has 4 columns of each 128
// Splits whose parts are under way together, by way of shared memory: of loads into registers the
// compiler makes one after the other, a round trip to L2 each, and there are up to 64.
constexpr int kAtOnce = 8, kSplitsALane = kMaxSplits / 32;
static_assert(kSplitsALane == 2 && 32 % kAtOnce == 0);

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
  FASTATTN_STATIC_SHARED(float4[kRows * kAtOnce * kGroups * 32], s_parts);
  float4* const own = s_parts + thread_id() / 32 * kAtOnce * kGroups * 32 + lane_id();
  const AttentionParams& p = c.call.p;
  const int64_t at = int64_t(blockIdx.x) * kRows + thread_id() / 32;  // (b, hk, packed row)
  const int64_t outer = at / c.packed;
  const int row = int(at % c.packed), i = row / c.call.group;
  const int b = int(outer / p.Hk), h = int(outer % p.Hk) * c.call.group + row % c.call.group;
  if (b >= p.B) return;
  const CachedSequence s(c, b);
  const int64_t first = outer * c.splits * c.packed + row;
  // A lane has the sums of splits `lane` and `lane` + 32.
  float m_of[kSplitsALane], l_of[kSplitsALane], m = -INFINITY, l = 0.f;
#pragma unroll
  for (int k = 0; k < kSplitsALane; ++k) {
    const int split = lane_id() + 32 * k;
    const bool there = split < c.splits;
    const float* const sums = c.sums + 2 * (first + int64_t(split) * c.packed);
    m_of[k] = there ? sums[0] : -INFINITY, l_of[k] = there ? sums[1] : 0.f;
    m = fmaxf(m, m_of[k]);
  }
  m = max_of_warp(m);
  const float base = m == -INFINITY ? 0.f : m;
  float4 acc[kGroups] = {};
#pragma unroll 1
  for (int k0 = 0; k0 < c.splits; k0 += kAtOnce) {
    float m_k[kAtOnce], l_k[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      m_k[e] = __shfl_sync(0xffffffffu, k0 < 32 ? m_of[0] : m_of[1], k0 % 32 + e);
      l_k[e] = __shfl_sync(0xffffffffu, k0 < 32 ? l_of[0] : l_of[1], k0 % 32 + e);
    }
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      const float* const part = c.parts + (first + int64_t(k0 + e) * c.packed) * c.width;
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const int col = 128 * n + 4 * lane_id();
        const bool written = l_k[e] != 0.f;  // else it has no key
        const bool valid = written && col < p.Dv;
        ptx::cp_async_16(ptx::shared_address(own + (e * kGroups + n) * 32),
                         valid ? part + col : c.parts, valid);
      }
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();  // a lane reads what it copied itself
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      const float weight = l_k[e] == 0.f ? 0.f : ptx::exp2_approx((m_k[e] - base) * c.call.c);
      l += l_k[e] * weight;
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const float4 x = own[(e * kGroups + n) * 32];
        acc[n].x += weight * x.x, acc[n].y += weight * x.y;
        acc[n].z += weight * x.z, acc[n].w += weight * x.w;
      }
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
  if (c.splits > kMaxSplits) out.error = cudaErrorInvalidValue;
  for (const auto& v : kVariants)
    if (out.error == cudaSuccess && v.dtype == p.dtype && rows > 0)
      launch(out, v, (rows + kRows - 1) / kRows, stream, c);
  return out;
}

int list_kv_merge(VariantInfo* out, int capacity) { return list(kVariants, out, capacity); }

}  // namespace fastattn::cuda
