// LayerNorm + FFN forward in one kernel: the hidden layer exists a tile at a time, in registers.
//
//   for a block of rows:  xn = norm(x);  acc = 0
//     for a tile of hidden units:
//       u = xn W1^T (gated: g = xn Wg^T);  a = hidden_dropout(act(u + b1));  acc += a W2^T
//   y = x + dropout(acc + b2), or its norm
//
// x (M, D), w1 and w_gate (F, D), w2 (Dout, F). 2 M F (D + Dout) FLOPs, gated 2 M F (2 D + Dout).
// x, y and the weights move once; the weights again for every block of rows, from L2: 64 rows make
// 64 FLOPs a byte of a 16-bit weight. Bound by the tensor cores and, as B fragments serve 16 rows
// alone, by shared memory as much; with few rows by the reads of the weights, for which F is cut
// into parts of blocks of their own: partial sums in fp32 to scratch, and a second kernel adds them
// up in order and ends the rows. A GEMM that reads and writes u and a moves 4 M F elements more.
//
// A block is 4 warps (fp32, D > 128: 2) of 16 rows each, so that no reduction crosses warps. acc is
// kD / 2 registers a thread, which is what ends at D = 256. Shared memory: rows of xn, one tile of
// w1 (and w_gate) and one of w2: while u is multiplied the tile of w2 arrives, and the next of w1
// during the activation and the second product.
#include "layernorm_ffn_call.cuh"
#include "mma.cuh"

namespace fastattn::cuda {
namespace {

template <typename T_, int kD_>
struct Config {
  using T = T_;
  static constexpr int kD = kD_;  // holds D and Dout; what they lack is zeros
  static constexpr bool k16Bit = sizeof(T) == 2;
  static constexpr int kWarps = !k16Bit && kD == 256 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kM = 1, kRows = 16 * kM * kWarps;
  static constexpr int kN = k16Bit ? 32 : 16;  // hidden units of a tile
  static constexpr int kXBytes = kRows * kD * int(sizeof(T));
  static constexpr int kWBytes = kN * kD * int(sizeof(T));
  // The rows of acc are staged in fp32 over everything.
  static constexpr int kStage = kRows * kD * 4;
  static constexpr int shared(bool gated) {
    const int tiles = kXBytes + (gated ? 3 : 2) * kWBytes;
    return tiles > kStage ? tiles : kStage;
  }
  static_assert(shared(true) <= kMostShared);
};

// norm(x) of the warp's rows, `first` the tile's first, into the tile s_x. Rows from M on are
// zeros.
template <typename C>
__device__ __forceinline__ void norm_rows(const FfnCall& c, int64_t first, unsigned char* s_x,
                                          bool saves) {
  using T = typename C::T;
  constexpr int kD = C::kD, kBatch = 4;  // rows whose reads are under way at once
  const LayerNormFfnParams& p = c.p;
  RowPart<kD> weight, shift;
  if (c.pre != Norm::kNone) {
    load_parameter(weight, p.norm_weight, p.D, 1.f);
    load_parameter(shift, p.shift, p.D, 0.f);
  }
  const int warp_row = thread_id() / 32 * 16 * C::kM;
#pragma unroll 1
  for (int at = warp_row; at < warp_row + 16 * C::kM; at += kBatch) {
    RowPart<kD> x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t row = first + at + i;
      if (row < p.M)
        load_row(x[i], p.x.ptr, p.x.dtype, row * p.x.stride, p.D, c.x_fours);
      else
        x[i].fill(0.f);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t row = first + at + i;
      if (c.pre != Norm::kNone && row < p.M) {
        const Moments m = moments(x[i], p.D, c.pre, p.eps);
        if (saves && lane_id() == 0) {
          if (p.mean) p.mean[row] = m.mean / m.scale;
          if (p.rstd) p.rstd[row] = m.rstd * m.scale;
        }
        normalise(x[i], m, weight, shift);
      }
#pragma unroll
      for (int group = 0; group < RowPart<kD>::kGroups; ++group) {
        const int col = 128 * group + 4 * lane_id();
        if (col >= kD) continue;
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = col + e < p.D ? x[i].v[group][e] : 0.f;
        unsigned char* const to = s_x + Tile<T, kD>::element_at(at + i, col);
        if constexpr (C::k16Bit) {
          *reinterpret_cast<uint2*>(to) = make_uint2(pack(v[0], v[1], T()), pack(v[2], v[3], T()));
        } else {
          *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
        }
      }
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    layernorm_ffn_fwd_kernel(const __grid_constant__ FfnCall c) {
  using T = typename C::T;
  constexpr int kD = C::kD, kM = C::kM, kN = C::kN, kThreads = C::kThreads;
  FASTATTN_DYNAMIC_SHARED(s_all);
  unsigned char* const s_x = s_all;
  unsigned char* const s_w1 = s_x + C::kXBytes;
  unsigned char* const s_w2 = s_w1 + C::kWBytes;
  unsigned char* const s_gate = s_w2 + C::kWBytes;  // not there without a gate

  const LayerNormFfnParams& p = c.p;
  const bool gated = p.w_gate.ptr != nullptr;
  const int64_t first = int64_t(blockIdx.x) / p.splits * C::kRows;
  const int part = int(blockIdx.x % unsigned(p.splits));
  const int lo = part * c.hidden_part, hi = min(lo + c.hidden_part, p.F);
  const auto load_w1 = [&](int f) {
    copy_in<T, kD, kN, kThreads>(s_w1, rows_of<T>(p.w1, p.D, c.w1_vec), f, p.F);
    if (gated)
      copy_in<T, kD, kN, kThreads>(s_gate, rows_of<T>(p.w_gate, p.D, c.w_gate_vec), f, p.F);
    ptx::cp_async_commit();
  };

  if (lo < hi) load_w1(lo);
  norm_rows<C>(c, first, s_x, part == 0);
  const uint64_t seed = seed_of(c);
  float acc[kM][kD / 8][4] = {};
#pragma unroll 1
  for (int f = lo; f < hi; f += kN) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // w1 is there; nobody reads the last w2 any more
    copy_in<T, kN, kD, kThreads>(s_w2, columns_of<T>(c, f), 0, p.Dout);
    ptx::cp_async_commit();
    float u[kM][kN / 8][4], g[kM][kN / 8][4];
    const unsigned char* const s_rows = s_x + thread_id() / 32 * 16 * kM * Tile<T, kD>::kRowBytes;
    scores<T, kD, kM, kN>(u, s_rows, s_w1);
    if (gated) scores<T, kD, kM, kN>(g, s_rows, s_gate);
    ptx::cp_async_wait<0>();
    __syncthreads();  // w2 is there; nobody reads w1 any more
    if (f + kN < hi) load_w1(f + kN);
    hidden_layer<kM, kN>(u, g, c, seed, first + thread_id() / 32 * 16 * kM + lane_id() / 4,
                         f + lane_id() % 4 * 2);
    add_transposed<T, kD, kM, kN>(acc, u, s_w2, p.Dout);
  }

  const int warp_row = thread_id() / 32 * 16 * kM;
  if (p.splits > 1) {
    const int stride = c.partial_stride;
    float* const to = p.partials + int64_t(part) * p.M * stride;
    const int lane = lane_id(), t = lane % 4;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first + warp_row + 16 * m + 8 * half + lane / 4;
#pragma unroll
        for (int n = 0; n < kD / 8; ++n)
          if (row < p.M && 8 * n + 2 * t < stride)
            *reinterpret_cast<float2*>(to + row * stride + 8 * n + 2 * t) =
                make_float2(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
      }
    return;
  }
  __syncthreads();  // nobody reads any tile any more
  stage<kD, kM>(s_all, warp_row, acc);
  __syncwarp();  // a warp writes and reads its own rows alone
  const RowEnd<kD> end(c);
#pragma unroll 1
  for (int at = warp_row; at < warp_row + 16 * kM && first + at < p.M; ++at) {
    RowPart<kD> z;
    staged_row(z, s_all, at);
    end(z, first + at);
  }
}

constexpr int kEndWarps = 4;

// A warp a row: the partial sums of the parts of F, in order, and the row's end.
__global__ void __launch_bounds__(32 * kEndWarps)
    layernorm_ffn_end_kernel(const __grid_constant__ FfnCall c) {
  const LayerNormFfnParams& p = c.p;
  const int64_t row = int64_t(blockIdx.x) * kEndWarps + thread_id() / 32;
  if (row >= p.M) return;
  const int stride = c.partial_stride;
  RowPart<kMaxFfnWidth> z, more;
  load_row(z, p.partials, DType::kF32, row * stride, stride, true);
#pragma unroll 1
  for (int part = 1; part < p.splits; ++part) {
    load_row(more, p.partials, DType::kF32, (int64_t(part) * p.M + row) * stride, stride, true);
#pragma unroll
    for (int i = 0; i < RowPart<kMaxFfnWidth>::kGroups; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) z.v[i][e] += more.v[i][e];
  }
  const RowEnd<kMaxFfnWidth> end(c);
  end(z, row);
}

// ---- launch ------------------------------------------------------------------------------------

template <typename T, int kD>
constexpr Variant<FfnCall> variant(DType dtype) {
  using C = Config<T, kD>;
  return {
      {"layernorm_ffn_fwd_kernel", dtype, kD, true, C::kRows, C::kN, C::kThreads, C::shared(true)},
      layernorm_ffn_fwd_kernel<C>};
}

#ifdef FASTATTN_FFN_VARIANTS  // tests that compile often want few
const Variant<FfnCall> kVariants[] = {FASTATTN_FFN_VARIANTS(variant)};
#else
#define FASTATTN_DIMS(T, dtype) \
  variant<T, 64>(dtype), variant<T, 128>(dtype), variant<T, 256>(dtype)
// All that is compiled: 3 dtypes x 3 widths.
const Variant<FfnCall> kVariants[] = {FASTATTN_DIMS(__nv_bfloat16, DType::kBf16),
                                      FASTATTN_DIMS(__half, DType::kF16),
                                      FASTATTN_DIMS(float, DType::kF32)};
#undef FASTATTN_DIMS
#endif

const Variant<FfnCall> kEnd[] = {
    {{"layernorm_ffn_end_kernel", DType::kF32, kMaxFfnWidth, true, kEndWarps, 0, 32 * kEndWarps, 0},
     layernorm_ffn_end_kernel}};

const Variant<FfnCall>* find(const LayerNormFfnParams& p) {
  const int width = p.D > p.Dout ? p.D : p.Dout;
  for (const auto& v : kVariants)
    if (v.dtype == p.dtype && v.head_dim >= width) return &v;
  return nullptr;
}

}  // namespace

int layernorm_ffn_splits(const LayerNormFfnParams& p, int multiprocessors) {
  const auto* v = find(p);
  if (!v || p.M == 0) return 1;
  // Two blocks fit a multiprocessor. A part of less than 4 tiles would wait for its first copies
  // and write its sums for next to no work.
  const int64_t tiles = (p.M + v->rows - 1) / v->rows;
  const int64_t wanted = 2 * int64_t(multiprocessors) / tiles;
  const int64_t hidden_tiles = (p.F + v->keys - 1) / v->keys, most = (hidden_tiles + 3) / 4;
  const int64_t splits = wanted < most ? wanted : most;
  if (splits <= 1) return 1;
  const int64_t part = (hidden_tiles + splits - 1) / splits;  // as layernorm_ffn_forward cuts it
  return int((hidden_tiles + part - 1) / part);
}

Launch layernorm_ffn_forward(const LayerNormFfnParams& p, cudaStream_t stream) {
  Launch out;
  out.kernel = kVariants[0].kernel;
  const auto* v = find(p);
  if (!v || (p.splits > 1 && !p.partials)) {
    out.error = cudaErrorInvalidValue;
    return out;
  }
  if (p.M == 0) return out;
  FfnCall c(p);
  const int tiles = (p.F + v->keys - 1) / v->keys;
  c.hidden_part = (tiles + p.splits - 1) / p.splits * v->keys;
  launch(out, *v, (p.M + v->rows - 1) / v->rows * p.splits, stream, c);
  if (out.error != cudaSuccess || p.splits == 1) return out;
  out.kernel = kEnd[0].kernel;
  launch(out, kEnd[0], (p.M + kEndWarps - 1) / kEndWarps, stream, c);
  return out;
}

int layernorm_ffn_forward_variants(VariantInfo* out, int capacity) {
  const int n = list(kVariants, out, capacity);
  return n + (n < capacity ? list(kEnd, out + n, capacity - n) : list(kEnd, nullptr, 0));
}

}  // namespace fastattn::cuda
