// The weights of attention after dropout, (B, H, Sq, Sk) or their mean over the heads (B, Sq, Sk),
// from the lse that the forward saved: w = dropout(exp(logits - lse)).
//
// 2 H Sq Sk D FLOPs, and Sq x Sk weights to write: bound by their bytes. A block is a tile of 64
// rows and 64 keys (fp32: 32) of one head, or of all heads in order where the mean is asked for, so
// no head's weights but the mean ever lie in memory and no atomics are needed. Every element is
// written, 0 outside the sequences.
#include "attention_call.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace fastattn::cuda {
namespace {

template <typename T_, int kD_>
struct Config {
  using T = T_;
  static constexpr int kD = kD_, kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps, kN = sizeof(T) == 2 ? 64 : 32;
  static constexpr int kQBytes = kRows * kD * int(sizeof(T));
  static constexpr int kShared = kQBytes + kN * kD * int(sizeof(T));
};

// What a row's probabilities are made from.
struct RowLse {
  float units, lo;  // +inf where no key takes part: all probabilities 0

  __device__ RowLse(const Call& call, int64_t at, bool inside) : units(INFINITY), lo(0.f) {
    if (!inside) return;
    const float lse = call.p.lse[at];
    if (lse == -INFINITY) return;
    units = lse_in_units(lse, call.unit), lo = call.p.lse_lo[at];
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_weights_kernel(const __grid_constant__ Call call, int heads) {
  using T = typename C::T;
  constexpr int kD = C::kD, kN = C::kN, kRows = C::kRows, kThreads = C::kThreads;
  FASTATTN_DYNAMIC_SHARED(s_all);
  unsigned char* const s_q = s_all;
  unsigned char* const s_k = s_q + C::kQBytes;

  const AttentionParams& p = call.p;
  const int64_t blocks_n = (p.Sk + kN - 1) / kN, blocks_m = (p.Sq + kRows - 1) / kRows;
  const int64_t tile = int64_t(blockIdx.x), outer = tile / blocks_n / blocks_m;
  const int j0 = int(tile % blocks_n) * kN, first = int(tile / blocks_n % blocks_m) * kRows;
  const int groups = p.H / heads;
  const int b = int(outer / groups), h0 = int(outer % groups) * heads;
  const Sequence qs = sequence_of(b, p.q_lens, p.cu_q, p.Sq, p.Tq);
  const Sequence ks = sequence_of(b, p.k_lens, p.cu_k, p.Sk, p.Tk);
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  const int warp_row = thread_id() / 32 * 16, i = first + warp_row + g, key0 = j0 + 2 * t;

  float total[kN / 8][4] = {};
  for (int h = h0; h < h0 + heads; ++h) {
    const auto q = rows_of<const T>(p.q, b, h, qs.start, p.D, call.q_vec);
    const auto k = rows_of<const T>(p.k, b, h / call.group, ks.start, p.D, call.k_vec);
    __syncthreads();  // nobody reads the last head's tiles any more
    copy_in<T, kD, kRows, kThreads>(s_q, q, first, qs.length);
    copy_in<T, kD, kN, kThreads>(s_k, k, j0, ks.length);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    float s[1][kN / 8][4];
    scores<T, kD, 1, kN>(s, s_q + warp_row * Tile<T, kD>::kRowBytes, s_k);
    const Features features(call, b, h, qs.length, ks.length);
    const Visible seen(p, qs.length, ks.length);
    const int64_t row_at = first_row_of(p, b, h, qs.start);
    const RowLse lse[2] = {{call, row_at + i, i < qs.length},
                           {call, row_at + i + 8, i + 8 < qs.length}};
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      float (&x)[4] = s[0][n];
      features.logits(x, i, key0 + 8 * n);
      hide(x, seen, i, key0 + 8 * n);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        x[e] =
            call.keep_scale * ptx::exp2_approx((x[e] - lse[e / 2].units) * call.c - lse[e / 2].lo);
      if (call.threshold) features.drop(x, i, key0 + 8 * n);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[n][e] += x[e];
    }
  }

  T* const base = static_cast<T*>(p.weights.ptr) + b * p.weights.b + h0 * p.weights.h;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = i + e / 2 * 8, key = key0 + 8 * n + e % 2;
      if (row < p.Sq && key < p.Sk)
        base[row * p.weights.s + key * p.weights.d] = T(total[n][e] / float(heads));
    }
}

// ---- launch ------------------------------------------------------------------------------------

template <typename T, int kD>
constexpr Variant<Call, int> variant(DType dtype) {
  using C = Config<T, kD>;
  return {{"attention_weights_kernel", dtype, kD, true, C::kRows, C::kN, C::kThreads, C::kShared},
          attention_weights_kernel<C>};
}

#ifdef FASTATTN_WEIGHTS_VARIANTS  // tests that compile often want few
const Variant<Call, int> kVariants[] = {FASTATTN_WEIGHTS_VARIANTS};
#else
// All that is compiled: 3 dtypes x 3 head dims.
const Variant<Call, int> kVariants[] = {
    variant<__nv_bfloat16, 64>(DType::kBf16),  variant<__nv_bfloat16, 128>(DType::kBf16),
    variant<__nv_bfloat16, 256>(DType::kBf16), variant<__half, 64>(DType::kF16),
    variant<__half, 128>(DType::kF16),         variant<__half, 256>(DType::kF16),
    variant<float, 64>(DType::kF32),           variant<float, 128>(DType::kF32),
    variant<float, 256>(DType::kF32),
};
#endif

}  // namespace

Launch attention_weights(const AttentionParams& p, cudaStream_t stream) {
  const Call call(p);
  const int heads = p.weights_mode == Weights::kMean ? p.H : 1;
  Launch out;
  out.kernel = kVariants[0].kernel;
  if (p.weights_mode == Weights::kNone || p.B == 0 || p.H == 0) return out;
  for (const auto& v : kVariants) {
    if (v.dtype != p.dtype || v.head_dim < p.D) continue;
    const int64_t tiles = int64_t(p.B) * (p.H / heads) * ((p.Sq + v.rows - 1) / v.rows) *
                          ((p.Sk + v.keys - 1) / v.keys);
    if (tiles == 0) return out;
    launch(out, v, tiles, stream, call, heads);
    return out;
  }
  out.error = cudaErrorInvalidValue;
  return out;
}

int attention_weights_variants(VariantInfo* out, int capacity) {
  return list(kVariants, out, capacity);
}

}  // namespace fastattn::cuda
