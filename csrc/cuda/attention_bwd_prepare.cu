// Attention backward: what comes before and after its tiles, one number or one row at a time. See
// attention_bwd.cu. All bound by the bytes they read and write.
#include "attention_grad.cuh"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 128;

// ---- delta = rowsum(do * o) - dlse, and lse in units (+inf for a row without keys) -------------

constexpr int kRows = 64;
constexpr int kLanes = 8;  // that share a row

// This lane's part of the product of a row of x and of y.
template <typename T>
__device__ __forceinline__ float dot(const Rows<const T>& x, const Rows<const T>& y, int row) {
  const T* const a = x.base + int64_t(row) * x.stride;
  const T* const b = y.base + int64_t(row) * y.stride;
  const int lane = lane_id() % kLanes;
  float sum = 0.f;
  if (x.vectors && y.vectors) {
    constexpr int kVec = 16 / int(sizeof(T));
    for (int d = lane * kVec; d < x.width; d += kLanes * kVec) {
      alignas(16) T u[kVec], v[kVec];
      *reinterpret_cast<uint4*>(u) = *reinterpret_cast<const uint4*>(a + d);
      *reinterpret_cast<uint4*>(v) = *reinterpret_cast<const uint4*>(b + d);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum += to_float(u[i]) * to_float(v[i]);
    }
  } else {
    for (int d = lane; d < x.width; d += kLanes)
      sum += to_float(a[d * x.stride_d]) * to_float(b[d * y.stride_d]);
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_prepare_kernel(const __grid_constant__ GradCall c) {
  const AttentionParams& p = c.call.p;
  const Place at = place_of<kRows>(p, int64_t(blockIdx.x));
  const Sequence qs = sequence_of(at.b, p.q_lens, p.cu_q, p.Sq, p.Tq);
  const int limit = p.cu_q.ptr ? qs.length : p.Sq;
  const int64_t row_at = first_row_of(p, at.b, at.h, qs.start);
  const auto o = rows_of<const T>(p.o, at.b, at.h, qs.start, p.Dv, c.call.o_vec);
  const auto d_o = rows_of<const T>(c.g.d_o, at.b, at.h, qs.start, p.Dv, c.do_vec);
  for (int i = thread_id() / kLanes; i < kRows; i += kThreads / kLanes) {
    const int row = at.first + i;
    const bool inside = row < qs.length;
    const float lse = inside ? p.lse[row_at + row] : -INFINITY;
    const bool none = lse == -INFINITY;
    float delta = 0.f;
    if (c.g.d_o.ptr && p.o.ptr && inside) delta = dot(o, d_o, row);
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
      delta += __shfl_xor_sync(0xffffffffu, delta, lanes);
    if (c.g.dlse.ptr && inside)
      delta -= static_cast<const float*>(
          c.g.dlse.ptr)[at.b * c.g.dlse.b + at.h * c.g.dlse.h + (qs.start + row) * c.g.dlse.s];
    if (thread_id() % kLanes != 0 || row >= limit) continue;
    c.g.delta[row_at + row] = none ? 0.f : delta;
    c.g.lse_units[row_at + row] = none ? INFINITY : lse_in_units(lse, c.call.unit);
  }
}

// ---- dsinks[h] = -sum over b, i of exp(sink - lse) delta, in a fixed order ----------------------

__global__ void __launch_bounds__(kThreads)
    attention_bwd_dsinks_kernel(const __grid_constant__ GradCall c) {
  FASTATTN_DYNAMIC_SHARED(s_all);
  double* const s_sums = reinterpret_cast<double*>(s_all);
  const AttentionParams& p = c.call.p;
  const int h = int(blockIdx.x), thread = thread_id();
  const bool packed = p.cu_q.ptr != nullptr;
  const int64_t rows = packed ? p.Tq : p.Sq;
  const double sink = double(p.sinks[h]) / double(c.call.unit);
  double total = 0.;
  for (int b = 0; b < (packed ? 1 : p.B); ++b) {
    const int64_t first = (packed ? int64_t(h) : int64_t(b) * p.H + h) * rows;
    for (int64_t i = thread; i < rows; i += kThreads) {
      const float lse = c.g.lse_units[first + i];
      if (!(lse < INFINITY)) continue;  // no key, or no row
      const double x = (sink - double(lse)) * double(c.call.c) - double(p.lse_lo[first + i]);
      total -= double(ptx::exp2_approx(float(x)) * c.g.delta[first + i]);
    }
  }
  s_sums[thread] = total;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) s_sums[thread] += s_sums[thread + half];
  }
  if (thread == 0) c.g.dsinks[h] = float(s_sums[0]);
}

// ---- dq from the sums of the atomics: a warp a row ----------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_dq_kernel(const __grid_constant__ GradCall c, int64_t n) {
  const AttentionParams& p = c.call.p;
  const int64_t at = int64_t(blockIdx.x) * (kThreads / 32) + thread_id() / 32;
  if (at >= n) return;
  const int64_t rows = p.cu_q.ptr ? p.Tq : p.Sq, row = at % rows, bh = at / rows;
  T* const to =
      static_cast<T*>(c.g.dq.ptr) + bh / p.H * c.g.dq.b + bh % p.H * c.g.dq.h + row * c.g.dq.s;
  for (int d = lane_id(); d < p.D; d += 32) to[d * c.g.dq.d] = T(c.g.dq_sums[at * p.D + d]);
}

// ---- launch ------------------------------------------------------------------------------------

// One kernel serves every head dim and every feature.
template <typename... Args>
constexpr Variant<Args...> variant(const char* name, DType dtype, int rows, int shared,
                                   void (*kernel)(Args...)) {
  return {{name, dtype, kMaxHeadDim, true, rows, 0, kThreads, shared}, kernel};
}

template <typename T>
constexpr Variant<GradCall> prepare(DType dtype) {
  return variant("attention_bwd_prepare_kernel", dtype, kRows, 0, attention_bwd_prepare_kernel<T>);
}
template <typename T>
constexpr Variant<GradCall, int64_t> dq_of_sums(DType dtype) {
  return variant("attention_bwd_dq_kernel", dtype, 0, 0, attention_bwd_dq_kernel<T>);
}

const Variant<GradCall> kPrepare[] = {prepare<__nv_bfloat16>(DType::kBf16),
                                      prepare<__half>(DType::kF16), prepare<float>(DType::kF32)};
const Variant<GradCall, int64_t> kDq[] = {dq_of_sums<__nv_bfloat16>(DType::kBf16),
                                          dq_of_sums<__half>(DType::kF16),
                                          dq_of_sums<float>(DType::kF32)};
const Variant<GradCall> kSinks[] = {variant("attention_bwd_dsinks_kernel", DType::kF32, 0,
                                            kThreads* int(sizeof(double)),
                                            attention_bwd_dsinks_kernel)};

}  // namespace

Launch launch_prepare(const GradCall& c, cudaStream_t stream) {
  const AttentionParams& p = c.call.p;
  const int64_t tiles = row_tiles(p, kRows);
  Launch out;
  out.kernel = kPrepare[0].kernel;
  out.error = cudaErrorInvalidValue;
  for (const auto& v : kPrepare) {
    if (v.dtype != p.dtype) continue;
    out.error = cudaSuccess;
    if (tiles > 0) launch(out, v, tiles, stream, c);
  }
  return out;
}

Launch launch_dsinks(const GradCall& c, cudaStream_t stream) {
  Launch out;
  out.kernel = kSinks[0].kernel;
  if (c.call.p.H > 0) launch(out, kSinks[0], c.call.p.H, stream, c);
  return out;
}

Launch launch_dq_of_sums(const GradCall& c, cudaStream_t stream) {
  const AttentionParams& p = c.call.p;
  const int64_t n = (p.cu_q.ptr ? p.Tq : int64_t(p.B) * p.Sq) * p.H;
  Launch out;
  out.kernel = kDq[0].kernel;
  out.error = cudaErrorInvalidValue;
  for (const auto& v : kDq) {
    if (v.dtype != p.dtype) continue;
    out.error = cudaSuccess;
    if (n > 0) launch(out, v, (n + kThreads / 32 - 1) / (kThreads / 32), stream, c, n);
  }
  return out;
}

int list_prepare(VariantInfo* out, int capacity) { return list(kPrepare, out, capacity); }
int list_dsinks(VariantInfo* out, int capacity) { return list(kSinks, out, capacity); }
int list_dq_of_sums(VariantInfo* out, int capacity) { return list(kDq, out, capacity); }

}  // namespace fastattn::cuda
