// LayerNorm + FFN backward by hidden units: dW1 and db1, dWg and dbg, dW2. The algorithm is in
// layernorm_ffn_bwd.cu.
//
//   for a block of hidden units, of which the rows of w1 (w_gate) and the columns of w2 stay:
//     for a tile of the rows of its chunk:
//       u^T = W1 xn^T;  da^T = W2^T dz^T;  du^T;  dW1 += du^T xn, or dWg += dg^T xn, dW2^T += a^T
//       dz
//
// Tiles are (hidden, rows): du^T is an A operand as it lies in registers, and nothing is transposed
// but the block's part of w2, once. A block makes one of the three: two would be all registers at
// D = 256. A warp has 16 hidden units and all columns. Shared memory: the weights, and xn and dz of
// a tile of rows in two stages where they fit 99 KB. Sums of a chunk of rows go to scratch in fp32.
#include "layernorm_ffn_grad.cuh"
#include "mma.cuh"
#include "softmax.cuh"

namespace fastattn::cuda {
namespace {

template <typename T_, int kD_, bool kGated_>
struct Config {
  using T = T_;
  static constexpr int kD = kD_;
  static constexpr bool kGated = kGated_;                          // has room for a gate
  static constexpr int kN = sizeof(T) == 2 && kD < 256 ? 32 : 16;  // rows of a tile
  static constexpr int kRowBytes = kN * kD * int(sizeof(T));
  static constexpr int kStageBytes = 2 * kRowBytes;
  static constexpr int weights(int warps) {
    return (kGated ? 3 : 2) * 16 * warps * kD * int(sizeof(T));
  }
  static constexpr int one_stage(int warps) { return weights(warps) + kStageBytes; }
  static constexpr int kWarps = most_warps(one_stage), kThreads = 32 * kWarps;
  static constexpr int kHidden = 16 * kWarps;
  static constexpr int kWBytes = kHidden * kD * int(sizeof(T));
  static constexpr int kStages = one_stage(kWarps) + kStageBytes <= kMostShared ? 2 : 1;
  static constexpr int kShared = weights(kWarps) + kStages * kStageBytes;
  static_assert(kShared <= kMostShared);
};

// Columns [first, first + kRows) of w2 as rows of a tile, zeros beyond what there is.
template <typename T, int kD, int kRows, int kThreads>
__device__ __forceinline__ void copy_in_transposed(unsigned char* s_tile, const FfnCall& c,
                                                   int first) {
  const Rows<const T> w2 = columns_of<T>(c, first);
  for (int i = thread_id(); i < kRows * kD; i += kThreads) {
    const int row = i % kRows, col = i / kRows;
    T x = T(0.f);
    if (row < w2.width && col < c.p.Dout) x = w2.base[int64_t(col) * w2.stride + row];
    *reinterpret_cast<T*>(s_tile + Tile<T, kD>::element_at(row, col)) = x;
  }
}

// u^T, g^T and da^T of a tile become what the block multiplies by rows. row, j: of this lane's
// first number; b1, b_gate: of its hidden units j and j + 8. Rows from `end` on are 0: with an a
// that overflows they would be NaN times the zeros of dz.
template <int kN>
__device__ __forceinline__ void hidden_part(float (&u)[1][kN / 8][4],
                                            const float (&g)[1][kN / 8][4],
                                            const float (&da)[1][kN / 8][4], const FfnCall& c,
                                            FfnPart part, bool gated, uint64_t seed, int64_t row,
                                            int64_t end, int j, const float (&b1)[2],
                                            const float (&b_gate)[2]) {
  with_act(c.p.act, [&](auto act) {
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      uint32_t words[4] = {};
      if (c.hidden.threshold)
        philox_fragment_transposed(words, seed, uint32_t(row) + 8 * n, j, uint32_t(row >> 32),
                                   kHiddenSite);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool there = row + 8 * n + e % 2 < end && words[e] >= c.hidden.threshold;
        const float keep = there ? c.hidden.keep_scale : 0.f;
        u[0][n][e] = hidden_grad<act.value>(u[0][n][e] + b1[e / 2], g[0][n][e] + b_gate[e / 2],
                                            da[0][n][e], keep, gated, part);
      }
    }
  });
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    layernorm_ffn_bwd_weights_kernel(const __grid_constant__ FfnGradCall c) {
  using T = typename C::T;
  constexpr int kD = C::kD, kN = C::kN, kHidden = C::kHidden, kThreads = C::kThreads;
  FASTATTN_DYNAMIC_SHARED(s_all);
  unsigned char* const s_w1 = s_all;
  unsigned char* const s_w2 = s_w1 + C::kWBytes;
  unsigned char* const s_gate = s_w2 + C::kWBytes;
  unsigned char* const s_stages = s_gate + (C::kGated ? C::kWBytes : 0);

  const FfnCall& call = c.call;
  const LayerNormFfnParams& p = call.p;
  const bool gated = C::kGated && p.w_gate.ptr;
  const int blocks = (p.F + kHidden - 1) / kHidden;
  const FfnPart part = c.part[blockIdx.x % unsigned(c.parts)];
  const int hidden = int(blockIdx.x / unsigned(c.parts) % unsigned(blocks)) * kHidden;
  const int64_t chunk = blockIdx.x / unsigned(c.parts) / unsigned(blocks);
  const int64_t lo = chunk * c.chunk_rows, hi = min(lo + c.chunk_rows, p.M);
  const auto load = [&](int64_t row) {
    unsigned char* const s_xn = s_stages + int((row - lo) / kN) % C::kStages * C::kStageBytes;
    const int here = int(min(int64_t(kN), hi - row));
    const Rows<const T> xn = {static_cast<const T*>(c.g.xn) + row * c.xn_stride, c.xn_stride, 1,
                              c.xn_stride, true};
    const Rows<const T> dz = {static_cast<const T*>(c.g.dz) + row * c.dz_stride, c.dz_stride, 1,
                              c.dz_stride, true};
    copy_rows<T, kD, kN, kThreads>(s_xn, xn, 0, here);
    copy_rows<T, kD, kN, kThreads>(s_xn + C::kRowBytes, dz, 0, here);
    ptx::cp_async_commit();
  };

  copy_rows<T, kD, kHidden, kThreads>(s_w1, rows_of<T>(p.w1, p.D, call.w1_vec), hidden, p.F);
  if (gated)
    copy_rows<T, kD, kHidden, kThreads>(s_gate, rows_of<T>(p.w_gate, p.D, call.w_gate_vec), hidden,
                                        p.F);
  copy_in_transposed<T, kD, kHidden, kThreads>(s_w2, call, hidden);
  if (lo < hi) load(lo);
  const uint64_t seed = seed_of(call);
  const int j = hidden + thread_id() / 32 * 16 + lane_id() / 4;
  float b1[2], b_gate[2] = {};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const bool inside = j + 8 * e < p.F;
    b1[e] = p.b1.ptr && inside ? load_float(p.b1.ptr, p.b1.dtype, j + 8 * e) : 0.f;
    if (gated && p.b_gate.ptr && inside)
      b_gate[e] = load_float(p.b_gate.ptr, p.b_gate.dtype, j + 8 * e);
  }
  float acc[1][kD / 8][4] = {}, sums[2] = {};
#pragma unroll 1
  for (int64_t row = lo; row < hi; row += kN) {
    const bool more = row + kN < hi;
    if (C::kStages == 2 && more) {
      load(row + kN);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();  // this stage is there
    const unsigned char* const s_xn = s_stages + int((row - lo) / kN) % C::kStages * C::kStageBytes;
    const unsigned char* const s_dz = s_xn + C::kRowBytes;
    const int warp_at = thread_id() / 32 * 16 * Tile<T, kD>::kRowBytes;
    // The bits of the forward's u: an activation with a corner must turn where it turned there.
    float u[1][kN / 8][4], g[1][kN / 8][4] = {}, da[1][kN / 8][4] = {};
    scores<T, kD, 1, kN, true>(u, s_w1 + warp_at, s_xn);
    if (gated) scores<T, kD, 1, kN, true>(g, s_gate + warp_at, s_xn);
    if (part != FfnPart::kDown) scores<T, kD, 1, kN>(da, s_w2 + warp_at, s_dz);
    hidden_part<kN>(u, g, da, call, part, gated, seed, row + lane_id() % 4 * 2, hi, j, b1, b_gate);
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e / 2] += u[0][n][e];
    const bool down = part == FfnPart::kDown;
    add_products<T, false, kD, 1, kN>(acc, u, down ? s_dz : s_xn, down ? p.Dout : p.D);
    __syncthreads();  // nobody reads this stage any more
    if (C::kStages == 1 && more) load(row + kN);
  }

  const int t = lane_id() % 4;
  float* const bias = part == FfnPart::kUp     ? c.db1_parts
                      : part == FfnPart::kGate ? c.db_gate_parts
                                               : nullptr;
  float* const to = part == FfnPart::kUp     ? c.dw1_parts
                    : part == FfnPart::kGate ? c.dw_gate_parts
                                             : c.dw2_parts;
  const bool down = part == FfnPart::kDown;
  const int width = down ? p.Dout : p.D;
  float* const matrix = to ? to + chunk * p.F * width : nullptr;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_of_row(sums[half]);
    const int unit = j + 8 * half;
    if (unit >= p.F) continue;
    if (bias && t == 0) bias[chunk * p.F + unit] = sum;
    if (!matrix) continue;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = 8 * n + 2 * t + e;
        if (col >= width) continue;
        // dW2 is (Dout, F).
        matrix[down ? int64_t(col) * p.F + unit : int64_t(unit) * width + col] =
            acc[0][n][2 * half + e];
      }
  }
}

// ---- launch ------------------------------------------------------------------------------------

template <typename T, int kD, bool kGated>
constexpr Variant<FfnGradCall> variant(DType dtype) {
  using C = Config<T, kD, kGated>;
  return {{"layernorm_ffn_bwd_weights_kernel", dtype, kD, kGated, C::kHidden, C::kN, C::kThreads,
           C::kShared},
          layernorm_ffn_bwd_weights_kernel<C>};
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

int ffn_hidden_of_block(const LayerNormFfnParams& p) {
  const auto* v = find(kVariants, p);
  return v ? v->rows : 0;
}

Launch launch_ffn_weights(const FfnGradCall& c, cudaStream_t stream) {
  const LayerNormFfnParams& p = c.call.p;
  Launch out;
  out.kernel = kVariants[0].kernel;
  const auto* v = find(kVariants, p);
  out.error = v ? cudaSuccess : cudaErrorInvalidValue;
  if (!v) return out;
  const int64_t blocks = (p.F + v->rows - 1) / v->rows;
  launch(out, *v, blocks * c.parts * c.g.chunks, stream, c);
  return out;
}

int list_ffn_weights(VariantInfo* out, int capacity) { return list(kVariants, out, capacity); }

}  // namespace fastattn::cuda
