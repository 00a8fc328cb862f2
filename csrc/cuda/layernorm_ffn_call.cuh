// A call of layernorm_ffn as the kernels see it, and what forward and backward share: rows at the
// ends, tiles of the weights, and the hidden layer of a tile from its first product.
#pragma once

#include <cmath>

#include "activation.cuh"
#include "launch.cuh"
#include "norm.cuh"
#include "tile.cuh"

namespace fastattn::cuda {

constexpr uint32_t kHiddenSite = 1, kOutputSite = 2;  // fastattn/reference/layernorm_ffn.py
constexpr int kMostShared = 99 << 10;                 // bytes a block has on sm_86, 89 and 120

// One of the two dropouts.
struct Dropout {
  uint64_t threshold = 0;  // 0 = off
  float keep_scale = 1.f;

  Dropout() = default;
  explicit Dropout(double p)
      : threshold(uint64_t(std::nearbyint(p * 4294967296.0))), keep_scale(float(1.0 / (1.0 - p))) {}
};

struct FfnCall {
  LayerNormFfnParams p;
  Dropout hidden, output;
  Norm pre, post;  // of which one is none
  bool x_fours, y_fours, s_fours;
  bool w1_vec, w_gate_vec, w2_vec;  // 16-byte accesses are possible
  int hidden_part;                  // hidden units of one of p.splits parts
  int partial_stride;               // of p.partials

  explicit FfnCall(const LayerNormFfnParams& params)
      : p(params),
        hidden(params.hidden_dropout_p),
        output(params.dropout_p),
        hidden_part(params.F) {
    partial_stride = layernorm_ffn_stride(p.Dout);
    pre = p.pre_norm ? p.norm : Norm::kNone, post = p.pre_norm ? Norm::kNone : p.norm;
    x_fours = fours(p.x, p.D), y_fours = fours(p.y, p.Dout), s_fours = fours(p.s, p.Dout);
    w1_vec = vectors(p.w1, p.D), w_gate_vec = vectors(p.w_gate, p.D), w2_vec = vectors(p.w2, p.F);
  }

  static bool vectors(const Matrix& m, int width) {
    const int n = m.dtype == DType::kF32 ? 4 : 8;
    return reinterpret_cast<uintptr_t>(m.ptr) % 16 == 0 && m.stride % n == 0 && width % n == 0;
  }
};

__device__ __forceinline__ uint64_t seed_of(const FfnCall& c) {
  return c.p.seed ? uint64_t(*c.p.seed) : 0;
}

// Rows of w1 or w_gate, and the part of w2 that belongs to hidden units from `first` on.
template <typename T>
__device__ __forceinline__ Rows<const T> rows_of(const Matrix& m, int width, bool vectors) {
  return {static_cast<const T*>(m.ptr), m.stride, 1, width, vectors};
}
template <typename T>
__device__ __forceinline__ Rows<const T> columns_of(const FfnCall& c, int first) {
  return {static_cast<const T*>(c.p.w2.ptr) + first, c.p.w2.stride, 1, c.p.F - first, c.w2_vec};
}

// copy_in, also by fewer threads than a row has chunks.
template <typename T, int kCols, int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(unsigned char* s_tile, const Rows<const T>& from,
                                          int first, int limit) {
  using Layout = Tile<T, kCols>;
  if constexpr (kThreads >= Layout::kChunks) {
    copy_in<T, kCols, kRows, kThreads>(s_tile, from, first, limit);
  } else {
    if (!from.vectors) return copy_in<T, kCols, kRows, kThreads>(s_tile, from, first, limit);
    const uint32_t to = ptx::shared_address(s_tile);
    for (int i = thread_id(); i < kRows * Layout::kChunks; i += kThreads) {
      const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
      const int64_t at = int64_t(first + row) * from.stride + chunk * Layout::kVec;
      const bool valid = first + row < limit && chunk * Layout::kVec < from.width;
      ptx::cp_async_16(to + uint32_t(Layout::chunk_at(row, chunk)), from.base + (valid ? at : 0),
                       valid);
    }
  }
}

// Biases of the two columns of a C fragment whose first is hidden unit j.
__device__ __forceinline__ void load_bias(float (&b)[2], const Parameter& p, int j, int F) {
#pragma unroll
  for (int e = 0; e < 2; ++e) b[e] = p.ptr && j + e < F ? load_float(p.ptr, p.dtype, j + e) : 0.f;
}

// u (and, gated, g), the products W1 norm(x) and Wg norm(x) of a tile, become a in u: biases,
// activation, gate, dropout. row: the tile's first of this lane, j: its first hidden unit.
template <int kM, int kN>
__device__ __forceinline__ void hidden_layer(float (&u)[kM][kN / 8][4], float (&g)[kM][kN / 8][4],
                                             const FfnCall& c, uint64_t seed, int64_t row, int j) {
  const LayerNormFfnParams& p = c.p;
  const bool gated = p.w_gate.ptr != nullptr;
  with_act(p.act, [&](auto act) {
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      float b1[2], b_gate[2] = {};
      load_bias(b1, p.b1, j + 8 * n, p.F);
      if (gated) load_bias(b_gate, p.b_gate, j + 8 * n, p.F);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float up = u[m][n][e] + b1[e % 2];
          u[m][n][e] = gated ? activate<act.value>(g[m][n][e] + b_gate[e % 2]) * up
                             : activate<act.value>(up);
        }
    }
  });
  if (c.hidden.threshold) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        uint32_t words[4];
        philox_fragment(words, seed, uint32_t(row + 16 * m), j + 8 * n, uint32_t(row >> 32),
                        kHiddenSite);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          u[m][n][e] = words[e] < c.hidden.threshold ? 0.f : u[m][n][e] * c.hidden.keep_scale;
      }
  }
}

// acc += a w2^T for kM * 16 rows of a (C fragments, kN hidden units) and a (kD, kN) tile of w2; kD
// columns of acc. Columns from `width` on are skipped in groups: see add_values in mma.cuh.
template <typename T, int kD, int kM, int kN>
__device__ __forceinline__ void add_transposed(float (&acc)[kM][kD / 8][4],
                                               const float (&a)[kM][kN / 8][4],
                                               const unsigned char* s_w2, int width) {
  if constexpr (sizeof(T) == 2) {
    const auto w2 = chunks_then_rows<T, kN>(ptx::shared_address(s_w2));
#pragma unroll
    for (int step = 0; step < kN / 16; ++step) {
      uint32_t r_a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const float (&left)[4] = a[m][2 * step];
        const float (&right)[4] = a[m][2 * step + 1];
        r_a[m][0] = pack(left[0], left[1], T());
        r_a[m][1] = pack(left[2], left[3], T());
        r_a[m][2] = pack(right[0], right[1], T());
        r_a[m][3] = pack(right[2], right[3], T());
      }
#pragma unroll
      for (int n = 0; n < kD / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, w2.at(16 * n, 2 * step));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma(acc[m][2 * n], r_a[m], b[0], b[1], T());
          ptx::mma(acc[m][2 * n + 1], r_a[m], b[2], b[3], T());
        }
      }
    }
  } else {
    // a's C fragments are A fragments with a k step's units in the order 0 2 4 6 1 3 5 7.
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int first = 0; first < kD / 8; first += 4) {
      if (8 * first >= width) break;
#pragma unroll
      for (int n = first; n < first + 4; ++n) {
        float part[kM][4] = {};
#pragma unroll
        for (int step = 0; step < kN / 8; ++step) {
          const uint2 pair = *reinterpret_cast<const uint2*>(
              s_w2 + Tile<T, kN>::element_at(8 * n + g, 8 * step + 2 * t));
          const FragmentB<T> b(pair.x, pair.y);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            const float (&x)[4] = a[m][step];
            const uint32_t raw[4] = {__float_as_uint(x[0]), __float_as_uint(x[2]),
                                     __float_as_uint(x[1]), __float_as_uint(x[3])};
            multiply<T>(part[m], FragmentA<T>(raw), b);
          }
        }
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][n][e] += part[m][e];
      }
    }
  }
}

// A tile of fp32 rows in shared memory, over what the products no longer need: C fragments in,
// parts of rows out. Swizzled as operands are, in 16-byte chunks.
template <int kD, int kM>
__device__ __forceinline__ void stage(unsigned char* s_rows, int first,
                                      const float (&acc)[kM][kD / 8][4]) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kD / 8; ++n)
        *reinterpret_cast<float2*>(
            s_rows + Tile<float, kD>::element_at(first + 16 * m + 8 * half + g, 8 * n + 2 * t)) =
            make_float2(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
}
template <int kD>
__device__ __forceinline__ void staged_row(RowPart<kD>& row, const unsigned char* s_rows, int at) {
  row.fill(0.f);
#pragma unroll
  for (int i = 0; i < RowPart<kD>::kGroups; ++i) {
    const int chunk = 32 * i + lane_id();
    if (chunk >= kD / 4) continue;
    const float4 a =
        *reinterpret_cast<const float4*>(s_rows + Tile<float, kD>::chunk_at(at, chunk));
    row.v[i][0] = a.x, row.v[i][1] = a.y, row.v[i][2] = a.z, row.v[i][3] = a.w;
  }
}

// What ends a row: z + b2, dropout, residual, norm. The parameters stay in registers for the rows
// of a warp.
template <int kD>
struct RowEnd {
  const FfnCall& c;
  RowPart<kD> b2, weight, shift;
  uint64_t seed;

  __device__ explicit RowEnd(const FfnCall& call) : c(call), seed(seed_of(call)) {
    load_parameter(b2, c.p.b2, c.p.Dout, 0.f);
    if (c.post != Norm::kNone) {
      load_parameter(weight, c.p.norm_weight, c.p.Dout, 1.f);
      load_parameter(shift, c.p.shift, c.p.Dout, 0.f);
    }
  }

  __device__ __forceinline__ void operator()(RowPart<kD>& z, int64_t row) const {
    const LayerNormFfnParams& p = c.p;
    const int N = p.Dout;
#pragma unroll
    for (int i = 0; i < RowPart<kD>::kGroups; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) z.v[i][e] += b2.v[i][e];
    if (c.output.threshold)
      drop_row(z, seed, c.output.threshold, c.output.keep_scale, row, kOutputSite);
    if (p.residual) {
      RowPart<kD> x;
      load_row(x, p.x.ptr, p.x.dtype, row * p.x.stride, N, c.x_fours);
#pragma unroll
      for (int i = 0; i < RowPart<kD>::kGroups; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) z.v[i][e] += x.v[i][e];
    }
    if (c.post != Norm::kNone) {
      // The norm is of the sum as it is stored, whether it is or not: inference has the same bits.
      z.each(N, [&](float& v, int) { v = rounded(v, p.x.dtype); });
      if (p.s.ptr) store_row(z, p.s.ptr, p.s.dtype, row * p.s.stride, N, c.s_fours);
      const Moments m = moments(z, N, c.post, p.eps);
      if (lane_id() == 0) {
        if (p.mean) p.mean[row] = m.mean / m.scale;
        if (p.rstd) p.rstd[row] = m.rstd * m.scale;
      }
      normalise(z, m, weight, shift);
    }
    store_row(z, p.y.ptr, p.y.dtype, row * p.y.stride, N, c.y_fours);
  }
};

}  // namespace fastattn::cuda
