// Attention backward by rows: dq of a block of rows, and dbias where one row or one pair has one
// owner. The algorithm is in attention_bwd.cu.
//
//   q, do stay;  for a tile of keys that some row sees:
//     S = q k^T;  dP = do v^T;  P, dS;  dq += dS k;  (dbias = dS, or its sum over keys)
//
// A warp has 16 rows (16 bit without features up to D = 96: 32) and all columns of dq, in registers
// (128 at most). Shared memory: q and do (64 rows; 128 where a warp has 32; 32 at fp32 D = 256),
// two stages of keys of k and v (one where two do not fit 99 KB): 50 KB at 16 bit D = 64, 65 KB at
// D = 128, two blocks, 8 warps an SM on sm_80. 32 rows a warp at D = 128 would take 98 KB, one
// block an SM. Bound by reads of shared memory where a warp has 16 rows, see attention_bwd_keys.cu.
#include "attention_grad.cuh"
#include "softmax.cuh"

namespace fastattn::cuda {
namespace {

// What a block works on; in shared memory, see attention_fwd.cu.
struct Work {
  Place at;
  Sequence q, k;
  int last;    // row of the tile that lies in the sequence
  int unused;  // as in Sequence
};

template <typename T_, int kD_, bool kLaden_>
struct Config {
  using T = T_;
  static constexpr int kD = kD_;
  static constexpr bool kLaden = kLaden_, k16Bit = sizeof(T) == 2;
  static constexpr bool kWide = std::is_same_v<T, __half>;
  static constexpr int kWarps = !k16Bit && kD == 256 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kM = k16Bit && !kLaden && kD <= 96 ? 2 : 1;
  static constexpr int kRows = 16 * kM * kWarps;
  static constexpr int kN =
      k16Bit ? (kD <= 64 && kM == 1 && !kLaden ? 64 : 32) : (kD <= 64 && !kLaden ? 32 : 16);
  static constexpr int kQBytes = kRows * kD * int(sizeof(T));
  static constexpr int kKBytes = kN * kD * int(sizeof(T));
  static constexpr int kOneStage =
      2 * kQBytes + 2 * kKBytes + int(sizeof(RowStats<kRows>)) + int(sizeof(Work));
  static constexpr int kStages = kOneStage + 2 * kKBytes <= kMostShared ? 2 : 1;
  static constexpr int kShared = kOneStage + (kStages - 1) * 2 * kKBytes;
  static_assert(kShared <= kMostShared);
  static_assert(kM == 1 || !kLaden);
};

// Issues the copy of a tile of keys.
template <typename C>
__device__ __forceinline__ void load_keys(const GradCall& c, const Work& work, unsigned char* to,
                                          int j0) {
  using T = typename C::T;
  const AttentionParams& p = c.call.p;
  const int b = work.at.b, hk = work.at.h / c.call.group;
  const auto k = rows_of<const T>(p.k, b, hk, work.k.start, p.D, c.call.k_vec);
  const auto v = rows_of<const T>(p.v, b, hk, work.k.start, p.Dv, c.call.v_vec);
  copy_in<T, C::kD, C::kN, C::kThreads>(to, k, j0, work.k.length);
  copy_in<T, C::kD, C::kN, C::kThreads>(to + C::kKBytes, v, j0, work.k.length);
  ptx::cp_async_commit();
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_bwd_rows_kernel(const __grid_constant__ GradCall c, BiasGrad mode) {
  using T = typename C::T;
  constexpr int kD = C::kD, kM = C::kM, kN = C::kN, kRows = C::kRows, kThreads = C::kThreads;
  FASTATTN_DYNAMIC_SHARED(s_all);
  unsigned char* const s_q = s_all;
  unsigned char* const s_do = s_q + C::kQBytes;
  unsigned char* const s_stages = s_do + C::kQBytes;
  auto* const s_stats = reinterpret_cast<RowStats<kRows>*>(s_stages + C::kStages * 2 * C::kKBytes);
  Work* const s_work = reinterpret_cast<Work*>(s_stats + 1);

  const AttentionParams& p = c.call.p;
  int j0, hi;
  {
    const Place at = place_of<kRows>(p, int64_t(blockIdx.x));
    Work work = {at, sequence_of(at.b, p.q_lens, p.cu_q, p.Sq, p.Tq),
                 sequence_of(at.b, p.k_lens, p.cu_k, p.Sk, p.Tk), 0, 0};
    const int length = work.q.length, last = min(at.first + kRows, length) - 1;
    work.last = last;
    const Visible seen(p, length, work.k.length);
    j0 = seen.lo(at.first) / kN * kN;
    hi = last < at.first ? 0 : seen.hi(last);
    if (threadIdx.x == 0) *s_work = work;
    const auto q = rows_of<const T>(p.q, at.b, at.h, work.q.start, p.D, c.call.q_vec);
    const auto d_o = rows_of<const T>(c.g.d_o, at.b, at.h, work.q.start, p.Dv, c.do_vec);
    copy_in<T, kD, kRows, kThreads>(s_q, q, at.first, length);
    copy_in<T, kD, kRows, kThreads>(s_do, d_o, at.first, c.g.d_o.ptr ? length : 0);
    copy_stats<kRows, kThreads>(s_stats, c, first_row_of(p, at.b, at.h, work.q.start), at.first,
                                length);
    ptx::cp_async_commit();  // also where no key follows
    if (j0 < hi) load_keys<C>(c, work, s_stages, j0);
  }

  float acc[kM][kD / 8][4] = {};
  float sums[2] = {};
  int stage = 0;
#pragma unroll 1
  for (; j0 < hi; j0 += kN) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is there; nobody reads the last one any more
    const unsigned char* const s_k = s_stages + stage * 2 * C::kKBytes;
    if (C::kStages == 2 && j0 + kN < hi) {
      stage ^= 1;
      load_keys<C>(c, *s_work, s_stages + stage * 2 * C::kKBytes, j0 + kN);
    }
    const int warp_at = thread_id() / 32 * 16 * kM * Tile<T, kD>::kRowBytes;
    float s[kM][kN / 8][4], dp[kM][kN / 8][4];
    scores<T, kD, kM, kN>(s, s_q + warp_at, s_k);
    scores<T, kD, kM, kN>(dp, s_do + warp_at, s_k + C::kKBytes);
    {
      const Work work = *s_work;
      const TileGrads<C::kLaden, false> grads(c, work.at.b, work.at.h, work.q.length,
                                              work.k.length);
      const bool full = j0 >= grads.seen.lo(work.last) && j0 + kN <= grads.seen.hi(work.at.first);
      const int key = j0 + lane_id() % 4 * 2;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int in_tile = (thread_id() / 32 * kM + m) * 16 + lane_id() / 4;
        const int row = work.at.first + in_tile;
        const FragmentStats stats(s_stats, in_tile, 8);
#pragma unroll
        for (int n = 0; n < kN / 8; ++n) {
          float ds[4];
          grads(s[m][n], dp[m][n], ds, stats, full, row, key + 8 * n);
          if constexpr (C::kLaden) {
            if (mode == BiasGrad::kStore) grads.store_bias(ds, row, key + 8 * n, false);
            sums[0] += ds[0] + ds[1], sums[1] += ds[2] + ds[3];
          }
        }
      }
    }
    if (c.g.dq.ptr) add_products<T, C::kWide, kD, kM, kN>(acc, dp, s_k, p.D);
    if (C::kStages == 1) {
      __syncthreads();  // nobody reads this tile any more
      if (j0 + kN < hi) load_keys<C>(c, *s_work, s_stages, j0 + kN);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // where there was no key, q is still under way

  const Work work = *s_work;
  const int warp_row = thread_id() / 32 * 16 * kM, first = work.at.first + warp_row;
  if constexpr (C::kLaden) {
    if (mode == BiasGrad::kRows) {
      const int lane = lane_id();
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float sum = sum_of_row(sums[e]);
        const int row = first + lane / 4 + 8 * e;
        if (lane % 4 == 0 && row < work.q.length)
          static_cast<float*>(
              c.g.dbias)[work.at.b * c.g.dbias_b + work.at.h * c.g.dbias_h + row * c.g.dbias_i] =
              sum;
      }
    }
  }
  if (!c.g.dq.ptr) return;
  // A padded batch has rows beyond its length, to be zeroed; a packed one has other sequences.
  const int limit = p.cu_q.ptr ? work.q.length : p.Sq;
  const auto dq = rows_of<T>(c.g.dq, work.at.b, work.at.h, work.q.start, p.D, c.dq_vec);
  store_rows<T, kD, kM>(acc, p.scale, s_q, warp_row, dq, first, work.q.length, limit);
}

// ---- launch ------------------------------------------------------------------------------------

template <typename T, int kD, bool kLaden>
constexpr Variant<GradCall, BiasGrad> variant(DType dtype) {
  using C = Config<T, kD, kLaden>;
  return {
      {"attention_bwd_rows_kernel", dtype, kD, kLaden, C::kRows, C::kN, C::kThreads, C::kShared},
      attention_bwd_rows_kernel<C>};
}

#ifdef FASTATTN_BWD_ROWS_VARIANTS  // tests that compile often want few
const Variant<GradCall, BiasGrad> kVariants[] = {FASTATTN_BWD_ROWS_VARIANTS};
#else
#define FASTATTN_DIMS(T, dtype)                                                                  \
  variant<T, 32, false>(dtype), variant<T, 64, false>(dtype), variant<T, 96, false>(dtype),      \
      variant<T, 128, false>(dtype), variant<T, 256, false>(dtype), variant<T, 64, true>(dtype), \
      variant<T, 128, true>(dtype), variant<T, 256, true>(dtype)
// All that is compiled: 3 dtypes x (5 head dims plain, 3 laden).
const Variant<GradCall, BiasGrad> kVariants[] = {
    FASTATTN_DIMS(__nv_bfloat16, DType::kBf16),
    FASTATTN_DIMS(__half, DType::kF16),
    FASTATTN_DIMS(float, DType::kF32),
};
#undef FASTATTN_DIMS
#endif

}  // namespace

Launch launch_by_rows(const GradCall& c, BiasGrad mode, cudaStream_t stream) {
  const AttentionParams& p = c.call.p;
  const int width = p.D > p.Dv ? p.D : p.Dv;
  Launch out;
  out.kernel = kVariants[0].kernel;
  for (const auto& v : kVariants) {
    if (v.dtype != p.dtype || v.laden != c.laden || v.head_dim < width) continue;
    const int64_t tiles = row_tiles(p, v.rows);
    if (tiles > 0) launch(out, v, tiles, stream, c, mode);
    return out;
  }
  out.error = cudaErrorInvalidValue;
  return out;
}

int list_by_rows(VariantInfo* out, int capacity) { return list(kVariants, out, capacity); }

}  // namespace fastattn::cuda
