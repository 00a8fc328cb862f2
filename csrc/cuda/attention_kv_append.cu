// The new rows of a prompt into a KV cache, k rotated: before attention_kv_cache.cu, which then
// reads them there. B Hk Sn (D + Dv) elements are read and written, 16 bytes at a time where they
// lie so: bound by that.
#include "attention_kv_cache_call.cuh"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 128, kRows = 16;

// A block a (b, hk, kRows new rows).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_kv_append_kernel(const __grid_constant__ CacheCall c) {
  const int tiles = (c.cache.Sn + kRows - 1) / kRows;
  const int first = int(blockIdx.x) % tiles * kRows, outer = int(blockIdx.x) / tiles;
  const int b = outer / c.call.p.Hk, hk = outer % c.call.p.Hk;
  const CachedSequence s(c, b);
  append_rows<T, kThreads>(c, s, b, hk, first, min(first + kRows, s.total - s.cached));
}

template <typename T>
constexpr Variant<CacheCall> variant(DType dtype) {
  return {{"attention_kv_append_kernel", dtype, kMaxHeadDim, true, kRows, 0, kThreads, 0},
          attention_kv_append_kernel<T>};
}
const Variant<CacheCall> kVariants[] = {variant<__nv_bfloat16>(DType::kBf16),
                                        variant<__half>(DType::kF16), variant<float>(DType::kF32)};

}  // namespace

Launch launch_kv_append(const CacheCall& c, cudaStream_t stream) {
  const AttentionParams& p = c.call.p;
  Launch out;
  out.kernel = kVariants[0].kernel;
  const int64_t blocks = int64_t(p.B) * p.Hk * ((int64_t(c.cache.Sn) + kRows - 1) / kRows);
  for (const auto& v : kVariants)
    if (v.dtype == p.dtype && blocks > 0) launch(out, v, blocks, stream, c);
  return out;
}

int list_kv_append(VariantInfo* out, int capacity) { return list(kVariants, out, capacity); }

}  // namespace fastattn::cuda
