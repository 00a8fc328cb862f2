// LayerNorm + FFN backward by rows: dx, and what a norm in front adds to its parameters' gradients.
// The algorithm is in layernorm_ffn_bwd.cu.
//
//   for a block of rows, of which xn and dz stay:  dxn = 0
//     for a tile of hidden units:
//       u = xn W1^T;  da = dz W2;  du;  dxn += du W1      (gated: also g and dg)
//   dx = dxn through the norm, + ds
//
// A warp has 16 rows and all columns of dxn, kD / 2 registers a thread. Shared memory: the rows of
// xn and dz, and tiles of w1, w2 (and w_gate), in two stages where they fit 99 KB. At D = 256 those
// with a gate have half of the warps. Bound as the forward is.
#include "layernorm_ffn_grad.cuh"
#include "mma.cuh"

namespace fastattn::cuda {
namespace {

template <typename T_, int kD_, bool kGated_>
struct Config {
  using T = T_;
  static constexpr int kD = kD_;
  static constexpr bool kGated = kGated_;  // has room for a gate
  static constexpr bool k16Bit = sizeof(T) == 2;
  static constexpr int kN = k16Bit ? 32 : 16;
  static constexpr int kWBytes = kN * kD * int(sizeof(T));
  static constexpr int kStageBytes = (kGated ? 3 : 2) * kWBytes;
  static constexpr int row_bytes(int warps) { return 16 * warps * kD * int(sizeof(T)); }
  static constexpr int one_stage(int warps) { return 2 * row_bytes(warps) + kStageBytes; }
  static constexpr int kWarps = most_warps(one_stage), kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kXBytes = row_bytes(kWarps);
  static constexpr int kStages = one_stage(kWarps) + kStageBytes <= kMostShared ? 2 : 1;
  // At the end: dxn in fp32, and each warp's sums of two results.
  static constexpr int kEnd = kRows * kD * 4 + kWarps * 2 * kD * 4;
  static constexpr int kTiles = 2 * kXBytes + kStages * kStageBytes;
  static constexpr int kShared = kTiles > kEnd ? kTiles : kEnd;
  static_assert(kShared <= kMostShared);
};

// d = x y for 16 rows of x (a tile of kD columns) and a (kD, kN) tile y.
template <typename T, int kD, int kN>
__device__ __forceinline__ void multiply_tiles(float (&d)[1][kN / 8][4], const unsigned char* s_x,
                                               const unsigned char* s_y) {
  const auto x = rows_then_chunks<T, kD>(ptx::shared_address(s_x));
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) d[0][n][e] = 0.f;
  if constexpr (sizeof(T) == 2) {
    const auto y = rows_then_chunks<T, kN>(ptx::shared_address(s_y));
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, x.at(0, 2 * step));
#pragma unroll
      for (int n = 0; n < kN / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, y.at(16 * step, 2 * n));
        ptx::mma(d[0][2 * n], a, b[0], b[1], T());
        ptx::mma(d[0][2 * n + 1], a, b[2], b[3], T());
      }
    }
  } else {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    // As in scores(): longer loops spill, and long sums are cut.
#pragma unroll 1
    for (int first = 0; first < kD; first += 16) {
      float part[kN / 8][4] = {};
#pragma unroll
      for (int k = 0; k < 16; k += 8) {
        uint32_t raw[4];
        ptx::ldmatrix_x4(raw, x.at(0, (first + k) / 4));
        const FragmentA<T> a(raw);
#pragma unroll
        for (int n = 0; n < kN / 8; ++n) {
          const auto value = [&](int row) {
            return *reinterpret_cast<const uint32_t*>(
                s_y + Tile<T, kN>::element_at(first + k + row, 8 * n + g));
          };
          multiply<T>(part[n], a, FragmentB<T>(value(t), value(t + 4)));
        }
      }
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) d[0][n][e] += part[n][e];
    }
  }
}

// u, g and da of a tile become du, dg. row, j: of this lane's first number.
template <int kN, bool kGated>
__device__ __forceinline__ void hidden_grads(float (&u)[1][kN / 8][4], float (&g)[1][kN / 8][4],
                                             const float (&da)[1][kN / 8][4], const FfnCall& c,
                                             uint64_t seed, int64_t row, int j) {
  const LayerNormFfnParams& p = c.p;
  const bool gated = kGated && p.w_gate.ptr;
  with_act(p.act, [&](auto act) {
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      float b1[2], b_gate[2] = {};
      load_bias(b1, p.b1, j + 8 * n, p.F);
      if (gated) load_bias(b_gate, p.b_gate, j + 8 * n, p.F);
      uint32_t words[4] = {};
      if (c.hidden.threshold)
        philox_fragment(words, seed, uint32_t(row), j + 8 * n, uint32_t(row >> 32), kHiddenSite);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float keep = words[e] < c.hidden.threshold ? 0.f : c.hidden.keep_scale;
        const float up = u[0][n][e] + b1[e % 2], d = da[0][n][e];
        if (gated) {
          const float gate = g[0][n][e] + b_gate[e % 2];
          u[0][n][e] = hidden_grad<act.value>(up, gate, d, keep, true, FfnPart::kUp);
          g[0][n][e] = hidden_grad<act.value>(up, gate, d, keep, true, FfnPart::kGate);
        } else {
          u[0][n][e] = hidden_grad<act.value>(up, 0.f, d, keep, false, FfnPart::kUp);
        }
      }
    }
  });
}

// The rows of one warp, from dxn staged in shared memory to dx. sums: two of kD a warp.
template <int kD>
__device__ __forceinline__ void finish_rows(const FfnGradCall& c, const unsigned char* s_rows,
                                            int64_t first, int warp_row, float* s_sums) {
  const FfnCall& call = c.call;
  const LayerNormFfnParams& p = call.p;
  const bool normed = call.pre != Norm::kNone;
  RowPart<kD> weight, dweight, dshift;
  load_parameter(weight, p.norm_weight, p.pre_norm ? p.D : p.Dout, 1.f);
  dweight.fill(0.f), dshift.fill(0.f);
#pragma unroll 1
  for (int at = warp_row; at < warp_row + 16 && first + at < p.M; ++at) {
    const int64_t row = first + at;
    RowPart<kD> dx, dxn, x;
    staged_row(dxn, s_rows, at);
    dx = dxn;
    if (normed) {
      load_row(x, p.x.ptr, p.x.dtype, row * p.x.stride, p.D, call.x_fours);
      norm_backward(dx, x, p.mean ? p.mean[row] : 0.f, p.rstd[row], weight, p.D, call.pre);
#pragma unroll
      for (int i = 0; i < RowPart<kD>::kGroups; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dweight.v[i][e] += dxn.v[i][e] * x.v[i][e];
          dshift.v[i][e] += dxn.v[i][e];
        }
    }
    if (!c.g.dx.ptr) continue;
    if (p.residual) {
      RowPart<kD> ds;
      grad_of_sum(ds, x, c, weight, row);
#pragma unroll
      for (int i = 0; i < RowPart<kD>::kGroups; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) dx.v[i][e] += ds.v[i][e];
    }
    store_row(dx, c.g.dx.ptr, c.g.dx.dtype, row * c.g.dx.stride, p.D, c.dx_fours);
  }
  dweight.each(kD, [&](float& v, int col) { s_sums[col] = v; });
  dshift.each(kD, [&](float& v, int col) { s_sums[kD + col] = v; });
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    layernorm_ffn_bwd_rows_kernel(const __grid_constant__ FfnGradCall c) {
  using T = typename C::T;
  constexpr int kD = C::kD, kN = C::kN, kRows = C::kRows, kThreads = C::kThreads;
  FASTATTN_DYNAMIC_SHARED(s_all);
  unsigned char* const s_xn = s_all;
  unsigned char* const s_dz = s_xn + C::kXBytes;
  unsigned char* const s_stages = s_dz + C::kXBytes;

  const FfnCall& call = c.call;
  const LayerNormFfnParams& p = call.p;
  const bool gated = C::kGated && p.w_gate.ptr;
  const int64_t first = int64_t(blockIdx.x) * kRows;
  const int here = int(min(int64_t(kRows), p.M - first));
  const auto load = [&](int f) {
    unsigned char* const s_w1 = s_stages + f / kN % C::kStages * C::kStageBytes;
    copy_rows<T, kD, kN, kThreads>(s_w1, rows_of<T>(p.w1, p.D, call.w1_vec), f, p.F);
    copy_rows<T, kN, kD, kThreads>(s_w1 + C::kWBytes, columns_of<T>(call, f), 0, p.Dout);
    if (gated)
      copy_rows<T, kD, kN, kThreads>(s_w1 + 2 * C::kWBytes,
                                     rows_of<T>(p.w_gate, p.D, call.w_gate_vec), f, p.F);
    ptx::cp_async_commit();
  };

  const Rows<const T> xn = {static_cast<const T*>(c.g.xn) + first * c.xn_stride, c.xn_stride, 1,
                            c.xn_stride, true};
  const Rows<const T> dz = {static_cast<const T*>(c.g.dz) + first * c.dz_stride, c.dz_stride, 1,
                            c.dz_stride, true};
  copy_rows<T, kD, kRows, kThreads>(s_xn, xn, 0, here);
  copy_rows<T, kD, kRows, kThreads>(s_dz, dz, 0, here);
  load(0);
  const uint64_t seed = seed_of(call);
  float acc[1][kD / 8][4] = {};
#pragma unroll 1
  for (int f = 0; f < p.F; f += kN) {
    const bool more = f + kN < p.F;
    if (C::kStages == 2 && more) {
      load(f + kN);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();  // this stage is there
    const unsigned char* const s_w1 = s_stages + f / kN % C::kStages * C::kStageBytes;
    const int warp_at = thread_id() / 32 * 16 * Tile<T, kD>::kRowBytes;
    float u[1][kN / 8][4], g[1][kN / 8][4] = {}, da[1][kN / 8][4];
    scores<T, kD, 1, kN>(u, s_xn + warp_at, s_w1);
    if (gated) scores<T, kD, 1, kN>(g, s_xn + warp_at, s_w1 + 2 * C::kWBytes);
    multiply_tiles<T, kD, kN>(da, s_dz + warp_at, s_w1 + C::kWBytes);
    hidden_grads<kN, C::kGated>(u, g, da, call, seed, first + thread_id() / 32 * 16 + lane_id() / 4,
                                f + lane_id() % 4 * 2);
    add_products<T, false, kD, 1, kN>(acc, u, s_w1, p.D);
    if (gated) add_products<T, false, kD, 1, kN>(acc, g, s_w1 + 2 * C::kWBytes, p.D);
    __syncthreads();  // nobody reads this stage any more
    if (C::kStages == 1 && more) load(f + kN);
  }

  const int warp = thread_id() / 32, warp_row = 16 * warp;
  stage<kD, 1>(s_all, warp_row, acc);
  __syncwarp();  // a warp writes and reads its own rows alone
  float* const s_sums = reinterpret_cast<float*>(s_all + kRows * kD * 4);
  finish_rows<kD>(c, s_all, first, warp_row, s_sums + warp * 2 * kD);
  if (call.pre == Norm::kNone) return;
  __syncthreads();  // all warps' sums are there
  for (int i = thread_id(); i < 2 * kD; i += kThreads) {
    float* const to = i < kD ? c.dweight_parts : c.dshift_parts;
    const int col = i % kD;
    if (!to || col >= p.D) continue;
    float sum = 0.f;
    for (int other = 0; other < C::kWarps; ++other) sum += s_sums[other * 2 * kD + i];
    to[int64_t(blockIdx.x) * p.D + col] = sum;
  }
}

// ---- launch ------------------------------------------------------------------------------------

template <typename T, int kD, bool kGated>
constexpr Variant<FfnGradCall> variant(DType dtype) {
  using C = Config<T, kD, kGated>;
  return {{"layernorm_ffn_bwd_rows_kernel", dtype, kD, kGated, C::kRows, C::kN, C::kThreads,
           C::kShared},
          layernorm_ffn_bwd_rows_kernel<C>};
}

#ifdef FASTATTN_FFN_BWD_VARIANTS  // tests that compile often want few
const Variant<FfnGradCall> kVariants[] = {FASTATTN_FFN_BWD_VARIANTS(variant)};
#else
#define FASTATTN_DIMS(T, dtype)                                                             \
  variant<T, 64, true>(dtype), variant<T, 128, true>(dtype), variant<T, 256, false>(dtype), \
      variant<T, 256, true>(dtype)
// All that is compiled: 3 dtypes x 3 widths, the widest with and without room for a gate.
const Variant<FfnGradCall> kVariants[] = {FASTATTN_DIMS(__nv_bfloat16, DType::kBf16),
                                          FASTATTN_DIMS(__half, DType::kF16),
                                          FASTATTN_DIMS(float, DType::kF32)};
#undef FASTATTN_DIMS
#endif

}  // namespace

int ffn_rows_of_block(const LayerNormFfnParams& p) {
  const auto* v = find(kVariants, p);
  return v ? v->rows : 0;
}

Launch launch_ffn_rows(const FfnGradCall& c, cudaStream_t stream) {
  Launch out;
  out.kernel = kVariants[0].kernel;
  const auto* v = find(kVariants, c.call.p);
  out.error = v ? cudaSuccess : cudaErrorInvalidValue;
  if (v) launch(out, *v, (c.call.p.M + v->rows - 1) / v->rows, stream, c);
  return out;
}

int list_ffn_rows(VariantInfo* out, int capacity) { return list(kVariants, out, capacity); }

}  // namespace fastattn::cuda
