// What the kernels of the backward share: their parameters, a row's saved numbers, and from s = q
// k^T and dp = do v^T of a tile the weights after dropout and dS. See attention_bwd.cu.
#pragma once

#include "attention_call.cuh"
#include "launch.cuh"
#include "products.cuh"

namespace fastattn::cuda {

struct GradCall {
  Call call;
  AttentionGrads g;
  bool laden;
  bool do_vec, dq_vec, dk_vec, dv_vec;

  GradCall(const AttentionParams& p, const AttentionGrads& grads) : call(p), g(grads) {
    laden = call.laden || g.dweights.ptr;
    do_vec = call.vectors(g.d_o, p.Dv);
    dq_vec = call.vectors(g.dq, p.D), dk_vec = call.vectors(g.dk, p.D);
    dv_vec = call.vectors(g.dv, p.Dv);
  }
};

// The launches that attention_backward is made of, and their tables; `mode`: what of dbias the
// kernel makes.
Launch launch_prepare(const GradCall& c, cudaStream_t stream);        // delta, lse_units
Launch launch_weights_delta(const GradCall& c, cudaStream_t stream);  // delta of dweights
Launch launch_by_keys(const GradCall& c, BiasGrad mode, cudaStream_t stream);
Launch launch_by_rows(const GradCall& c, BiasGrad mode, cudaStream_t stream);
Launch launch_shared_bias(const GradCall& c, cudaStream_t stream);
Launch launch_dsinks(const GradCall& c, cudaStream_t stream);
Launch launch_dq_of_sums(const GradCall& c, cudaStream_t stream);
int list_prepare(VariantInfo* out, int capacity);
int list_weights_delta(VariantInfo* out, int capacity);
int list_by_keys(VariantInfo* out, int capacity);
int list_by_rows(VariantInfo* out, int capacity);
int list_shared_bias(VariantInfo* out, int capacity);
int list_dsinks(VariantInfo* out, int capacity);
int list_dq_of_sums(VariantInfo* out, int capacity);

// lse in units, lse_lo and delta of a tile's rows.
template <int kRows>
struct RowStats {
  float x[3][kRows];
};

// Rows [first, first + kRows) of a head whose first row lies at `at`; zeros from `limit` on: such
// rows must be hidden. Asynchronous, as copy_in.
template <int kRows, int kThreads>
__device__ __forceinline__ void copy_stats(RowStats<kRows>* to, const GradCall& c, int64_t at,
                                           int first, int limit) {
  const uint32_t s_to = ptx::shared_address(to);
#pragma unroll
  for (int start = 0; start < 3 * kRows; start += kThreads) {
    const int i = start + thread_id(), which = i / kRows, row = first + i % kRows;
    if (i >= 3 * kRows) break;
    const float* from = which == 0 ? c.g.lse_units : which == 1 ? c.call.p.lse_lo : c.g.delta;
    const bool valid = row < limit;
    ptx::cp_async_4(s_to + 4 * uint32_t(i), valid ? from + at + row : from, valid);
  }
}

// Four numbers of a warp's tile: a C fragment whose rows are rows, or keys where transposed.
template <bool kTransposed>
struct Order {
  __device__ static constexpr int row(int e) { return kTransposed ? e % 2 : e / 2; }
  __device__ static constexpr int row_step(int e) { return kTransposed ? e % 2 : e / 2 * 8; }
  __device__ static constexpr int key_step(int e) { return kTransposed ? e / 2 * 8 : e % 2; }
};

// The two rows of a fragment.
struct FragmentStats {
  float lse[2], lo[2], delta[2];

  // Rows first and first + step of the tile.
  template <int kRows>
  __device__ FragmentStats(const RowStats<kRows>* s, int first, int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lse[i] = s->x[0][first + i * step];
      lo[i] = s->x[1][first + i * step];
      delta[i] = s->x[2][first + i * step];
    }
  }
};

template <bool kLaden, bool kTransposed>
struct TileGrads {
  using At = Order<kTransposed>;
  const GradCall& c;
  const Features features;
  const Visible seen;
  const int b, h;

  __device__ TileGrads(const GradCall& c_, int b_, int h_, int q_len, int k_len)
      : c(c_),
        features(c_.call, b_, h_, q_len, k_len),
        seen(c_.call.p, q_len, k_len),
        b(b_),
        h(h_) {}

  // s becomes the weights after dropout, dp the gradient of scale * s, ds that of the bias. i, j:
  // of s[0]. full: every pair takes part as far as indices decide.
  __device__ __forceinline__ void operator()(float (&s)[4], float (&dp)[4], float (&ds)[4],
                                             const FragmentStats& row, bool full, int i,
                                             int j) const {
    float derivative[4];
    if constexpr (kLaden) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[e] = features.logit(s[e], i + At::row_step(e), j + At::key_step(e), derivative[e]);
    }
    if (!full) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = i + At::row_step(e), key = j + At::key_step(e);
        if (key < seen.lo(r) || key >= seen.hi(r)) s[e] = -INFINITY;
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      s[e] = ptx::exp2_approx((s[e] - row.lse[At::row(e)]) * c.call.c - row.lo[At::row(e)]);
    float p[4] = {s[0], s[1], s[2], s[3]};
    if constexpr (kLaden) {
      if (c.g.dweights.ptr) add_dweights(dp, p, i, j);
      if (c.call.threshold) drop(s, dp, i, j);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      ds[e] = p[e] * (dp[e] - row.delta[At::row(e)]);
      dp[e] = kLaden ? ds[e] * derivative[e] : ds[e];
    }
  }

  // Only where a key takes part: what autograd hands over elsewhere has no meaning.
  __device__ __forceinline__ void add_dweights(float (&dp)[4], const float (&p)[4], int i,
                                               int j) const {
    const Operand& dw = c.g.dweights;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = i + At::row_step(e), key = j + At::key_step(e);
      if (p[e] > 0.f && r < seen.q_len && key < seen.k_len)
        dp[e] += c.g.dweights_scale *
                 read_float(dw.ptr, c.call.p.dtype, b * dw.b + h * dw.h + r * dw.s + key * dw.d);
    }
  }

  __device__ __forceinline__ void drop(float (&w)[4], float (&dp)[4], int i, int j) const {
    uint32_t words[4];
    if constexpr (kTransposed) {
      philox_fragment_transposed(words, features.seed, i, j, features.bh);
    } else {
      philox_fragment(words, features.seed, i, j, features.bh);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float factor = words[e] < c.call.threshold ? 0.f : c.call.keep_scale;
      w[e] = factor == 0.f ? 0.f : w[e] * factor;
      dp[e] = factor == 0.f ? 0.f : dp[e] * factor;
    }
  }

  // dbias of a fragment: one owner an element, or atomics into fp32.
  __device__ __forceinline__ void store_bias(const float (&ds)[4], int i, int j,
                                             bool atomic) const {
    const AttentionGrads& g = c.g;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = i + At::row_step(e), key = j + At::key_step(e);
      if (r >= seen.q_len || key >= seen.k_len) continue;
      const int64_t at = b * g.dbias_b + h * g.dbias_h + r * g.dbias_i + key * g.dbias_j;
      if (atomic) {
        atomicAdd(static_cast<float*>(g.dbias) + at, ds[e]);
      } else {
        write_float(g.dbias, g.dbias_dtype, at, ds[e]);
      }
    }
  }

  __device__ __forceinline__ static void write_float(void* to, DType dtype, int64_t at, float x) {
    if (dtype == DType::kF32) {
      static_cast<float*>(to)[at] = x;
    } else if (dtype == DType::kBf16) {
      static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(x);
    } else {
      static_cast<__half*>(to)[at] = __float2half_rn(x);
    }
  }
};

// A warp's kM * 16 rows of acc, times `factor`, to rows [first, limit) of `to` through its rows
// (from `s_first` on) of a tile that no other warp reads any more. Rows from `valid` on are zeros.
template <typename T, int kD, int kM>
__device__ __forceinline__ void store_rows(const float (&acc)[kM][kD / 8][4], float factor,
                                           unsigned char* s_tile, int s_first, const Rows<T>& to,
                                           int first, int valid, int limit) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + 8 * half + g;
      const bool there = first + row < valid;
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        const float x = there ? acc[m][n][2 * half] * factor : 0.f;
        const float y = there ? acc[m][n][2 * half + 1] * factor : 0.f;
        unsigned char* const at = s_tile + Tile<T, kD>::element_at(s_first + row, 8 * n + 2 * t);
        if constexpr (sizeof(T) == 2) {
          *reinterpret_cast<uint32_t*>(at) = pack(x, y, T());
        } else {
          *reinterpret_cast<float2*>(at) = make_float2(x, y);
        }
      }
    }
  __syncwarp();
  copy_out<T, kD, 16 * kM>(s_tile, s_first, to, first, limit);
}

// Shared memory that every architecture from sm_80 on gives a block.
constexpr int kMostShared = 99 * 1024;

}  // namespace fastattn::cuda
