// Attention backward by keys: dk and dv of a block of keys, and with atomics dq. The algorithm is
// in attention_bwd.cu.
//
//   k, v stay;  for the heads that share them, for a tile of rows that see some key:
//     S^T = k q^T;  dP^T = v do^T;  P^T, dS^T;  dv += P^T do;  dk += dS^T q;  (dq += dS k, atomics)
//
// Tiles are (keys, rows): P^T and dS^T are A operands as they lie in registers, and nothing is
// transposed. A warp has 16 keys (16 bit up to D = 64: 32), all rows of a tile and all columns of
// dk and dv, in registers up to D = 128 (128 of them). At D = 256 they would be all 256: there a
// block makes dk or dv, and S^T is made twice (five products instead of four).
//
// Shared memory: k and v (64 keys; 128 at 16 bit up to D = 64; 32 at fp32 D = 256), two stages of
// rows of q, do, lse and delta (one where two do not fit 99 KB), and with atomics a tile of dS, for
// dq sums over all warps' keys. 48 KB at 16 bit D = 64, 64 KB at D = 128: two blocks, 8 warps an SM
// on sm_80, which is also what 255 registers allow. Bound by reads of shared memory as much as by
// the tensor cores where a B fragment serves 16 keys alone (at D = 128 80 ldmatrix.x4, 320 cycles
// of an SM at 128 bytes each, for 128 mma.m16n8k16, 256 cycles of sm_80), by the latter at 32.
#include "attention_grad.cuh"
#include "softmax.cuh"

namespace fastattn::cuda {
namespace {

// What a block works on; in shared memory, see attention_fwd.cu.
struct Work {
  Place at;
  Sequence q, k;
  int lo, hi;  // rows that see some of its keys, from a tile's edge on
};

template <typename T_, int kD_, bool kLaden_, bool kFused_>
struct Config {
  using T = T_;
  using U = typename Stored<T>::U;
  static constexpr int kD = kD_;
  static constexpr bool kLaden = kLaden_, kFused = kFused_;
  static constexpr bool k16Bit = sizeof(T) == 2;
  static constexpr bool kWide = std::is_same_v<T, __half>;
  static constexpr bool kSplit = kD == 256;  // dk and dv by different blocks
  static constexpr int kWarps = !k16Bit && kD == 256 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kM = k16Bit && !kLaden && !kFused && kD <= 64 ? 2 : 1;
  static constexpr int kKeys = 16 * kM * kWarps;
  static constexpr int kN = k16Bit ? (kD <= 64 && !kLaden && kM == 1 ? 64
                                      : kFused && kD == 256          ? 16
                                                                     : 32)
                                   : (kD <= 32 ? 32 : 16);
  static constexpr int kKBytes = kKeys * kD * int(sizeof(T));
  static constexpr int kQBytes = kN * kD * int(sizeof(T));
  // Tiles begin at multiples of 128 bytes, as LaneAddress wants them.
  static constexpr int kStageBytes = 2 * kQBytes + (int(sizeof(RowStats<kN>)) + 127) / 128 * 128;
  static constexpr int kDsBytes = kFused ? kN * kKeys * int(sizeof(U)) : 0;
  static constexpr int kOneStage = 2 * kKBytes + kStageBytes + kDsBytes + int(sizeof(Work));
  static constexpr int kStages = kOneStage + kStageBytes <= kMostShared ? 2 : 1;
  static constexpr int kShared = kOneStage + (kStages - 1) * kStageBytes;
  static_assert(kShared <= kMostShared);
  static_assert(kM == 1 || (!kLaden && !kFused));
};

// One stage of what streams.
template <typename C>
struct Stage {
  unsigned char *q, *d_o;
  RowStats<C::kN>* stats;

  __device__ explicit Stage(unsigned char* base)
      : q(base),
        d_o(base + C::kQBytes),
        stats(reinterpret_cast<RowStats<C::kN>*>(base + 2 * C::kQBytes)) {}

  // Issues the copy of a tile of rows of head h.
  __device__ __forceinline__ void load(const GradCall& c, const Work& work, int h, int i0) const {
    using T = typename C::T;
    const AttentionParams& p = c.call.p;
    const int b = work.at.b, length = work.q.length;
    const auto from_q = rows_of<const T>(p.q, b, h, work.q.start, p.D, c.call.q_vec);
    copy_in<T, C::kD, C::kN, C::kThreads>(q, from_q, i0, length);
    const auto from_do = rows_of<const T>(c.g.d_o, b, h, work.q.start, p.Dv, c.do_vec);
    copy_in<T, C::kD, C::kN, C::kThreads>(d_o, from_do, i0, c.g.d_o.ptr ? length : 0);
    copy_stats<C::kN, C::kThreads>(stats, c, first_row_of(p, b, h, work.q.start), i0, length);
    ptx::cp_async_commit();
  }
};

// dq += dS k into fp32 memory: dS^T (C fragments, a warp's keys) through shared memory, for a row's
// sum is over all warps' keys.
template <typename C>
__device__ __forceinline__ void add_dq(const GradCall& c, const Work& work, int h, int i0,
                                       const float (&ds)[C::kN / 8][4], unsigned char* s_ds,
                                       const unsigned char* s_k) {
  using T = typename C::T;
  using U = typename C::U;
  constexpr int kD = C::kD, kN = C::kN, kKeys = C::kKeys;
  const int warp = thread_id() / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = 8 * n + 2 * t + e % 2, key = 16 * warp + g + e / 2 * 8;
      *reinterpret_cast<U*>(s_ds + Tile<U, kKeys>::element_at(row, key)) = U(ds[n][e]);
    }
  __syncthreads();
  constexpr int kRowTiles = kN / 16, kColumns = 32 * int(sizeof(T)) / 16;  // chunks
  static_assert(kRowTiles <= C::kWarps);
  const AttentionParams& p = c.call.p;
  const int first = warp % kRowTiles * 16;
  float* const to = c.g.dq_sums + first_row_of(p, work.at.b, h, work.q.start) * p.D;
#pragma unroll 1
  for (int group = warp / kRowTiles; 32 * group < p.D; group += C::kWarps / kRowTiles) {
    float dq[4][4];
    multiply_stored<T, kD, kKeys>(dq, s_ds + first * Tile<U, kKeys>::kRowBytes, s_k,
                                  group * kColumns);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = i0 + first + g + 8 * half, col = 32 * group + 2 * t;
      if (row >= work.q.length) continue;
      float* const at = to + int64_t(row) * p.D + col;
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (col + 8 * n + e < p.D) atomicAdd(at + 8 * n + e, dq[n][2 * half + e] * p.scale);
    }
  }
}

// Sums over the 8 lanes that share a column of C fragments.
__device__ __forceinline__ float sum_of_column(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 4);
  x += __shfl_xor_sync(0xffffffffu, x, 8);
  return x + __shfl_xor_sync(0xffffffffu, x, 16);
}

// What of dbias a fragment (first row i, key j) adds; `sums`: of this lane's two keys, for kKeys.
template <typename Grads>
__device__ __forceinline__ void add_dbias(const GradCall& c, const Grads& grads, BiasGrad mode,
                                          const float (&ds)[4], int i, int j, float (&sums)[2]) {
  if (mode == BiasGrad::kKeys) {
    sums[0] += ds[0] + ds[1], sums[1] += ds[2] + ds[3];
  } else if (mode == BiasGrad::kRows) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float sum = sum_of_column(ds[e] + ds[e + 2]);
      if (lane_id() / 4 == 0 && i + e < grads.seen.q_len)
        atomicAdd(static_cast<float*>(c.g.dbias) + grads.b * c.g.dbias_b + grads.h * c.g.dbias_h +
                      (i + e) * c.g.dbias_i,
                  sum);
    }
  } else if (mode != BiasGrad::kNone) {
    grads.store_bias(ds, i, j, mode == BiasGrad::kShared);
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_bwd_keys_kernel(const __grid_constant__ GradCall c, BiasGrad mode) {
  using T = typename C::T;
  constexpr int kD = C::kD, kM = C::kM, kN = C::kN, kKeys = C::kKeys, kThreads = C::kThreads;
  FASTATTN_DYNAMIC_SHARED(s_all);
  unsigned char* const s_k = s_all;
  unsigned char* const s_v = s_k + C::kKBytes;
  unsigned char* const s_stages = s_v + C::kKBytes;
  unsigned char* const s_ds = s_stages + C::kStages * C::kStageBytes;
  Work* const s_work = reinterpret_cast<Work*>(s_ds + C::kDsBytes);

  const AttentionParams& p = c.call.p;
  // Which of dk and dv; dk's block also has what else needs dS.
  const bool part = C::kSplit && blockIdx.x % 2 != 0;
  const bool makes_dv = c.g.dv.ptr && (part || !C::kSplit);
  const bool makes_ds = !part && (c.g.dk.ptr || mode != BiasGrad::kNone || C::kFused);
  if (!makes_dv && !makes_ds) return;
  if (part) mode = BiasGrad::kNone;
  const Place at = key_place_of<kKeys>(p, int64_t(blockIdx.x) / (C::kSplit ? 2 : 1));
  int h = at.h * c.call.group, i0, hi;
  {
    Work work = {at, sequence_of(at.b, p.q_lens, p.cu_q, p.Sq, p.Tq),
                 sequence_of(at.b, p.k_lens, p.cu_k, p.Sk, p.Tk), 0, 0};
    const Visible seen(p, work.q.length, work.k.length);
    const int last = min(at.first + kKeys, work.k.length) - 1;
    work.lo = seen.first_row(at.first) / kN * kN;
    work.hi = last < at.first ? 0 : seen.end_row(last);
    i0 = work.lo, hi = work.hi;
    if (threadIdx.x == 0) *s_work = work;
    const auto k = rows_of<const T>(p.k, at.b, at.h, work.k.start, p.D, c.call.k_vec);
    const auto v = rows_of<const T>(p.v, at.b, at.h, work.k.start, p.Dv, c.call.v_vec);
    copy_in<T, kD, kKeys, kThreads>(s_k, k, at.first, work.k.length);
    copy_in<T, kD, kKeys, kThreads>(s_v, v, at.first, work.k.length);
    ptx::cp_async_commit();  // also where no row follows
    if (i0 < hi) Stage<C>(s_stages).load(c, work, h, i0);
  }

  float acc[C::kSplit ? 1 : 2][kM][kD / 8][4] = {};  // dk, dv
  float sums[2] = {};
  int heads = i0 < hi ? c.call.group : 0, stage = 0;
#pragma unroll 1
  while (heads > 0) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is there; nobody reads the last one, or its dS, any more
    const Stage<C> now(s_stages + stage * C::kStageBytes);
    const bool ends_head = i0 + kN >= s_work->hi;
    const int next_h = h + ends_head, next_i0 = ends_head ? s_work->lo : i0 + kN;
    heads -= ends_head;
    if (C::kStages == 2 && heads > 0) {
      stage ^= 1;
      Stage<C>(s_stages + stage * C::kStageBytes).load(c, *s_work, next_h, next_i0);
    }

    const int warp_at = thread_id() / 32 * 16 * kM * Tile<T, kD>::kRowBytes;
    float s[kM][kN / 8][4], dp[kM][kN / 8][4] = {};
    scores<T, kD, kM, kN, true>(s, s_k + warp_at, now.q);
    if (makes_ds) scores<T, kD, kM, kN>(dp, s_v + warp_at, now.d_o);
    {
      const Work work = *s_work;
      const TileGrads<C::kLaden, true> grads(c, work.at.b, h, work.q.length, work.k.length);
      const bool full = i0 + kN <= work.q.length && grads.seen.lo(i0 + kN - 1) <= work.at.first &&
                        grads.seen.hi(i0) >= work.at.first + kKeys;
      const int key = work.at.first + thread_id() / 32 * 16 * kM + lane_id() / 4;
      const int row = lane_id() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        float ds[4];
        const FragmentStats stats(now.stats, 8 * n + row, 1);
#pragma unroll
        for (int m = 0; m < kM; ++m)
          grads(s[m][n], dp[m][n], ds, stats, full, i0 + 8 * n + row, key + 16 * m);
        if constexpr (C::kLaden) add_dbias(c, grads, mode, ds, i0 + 8 * n + row, key, sums);
      }
      if constexpr (C::kLaden) {
        if (mode == BiasGrad::kKeys && ends_head && makes_ds) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float sum = sum_of_row(sums[e]);
            if (row == 0 && key + 8 * e < work.k.length)
              static_cast<float*>(c.g.dbias)[work.at.b * c.g.dbias_b + h * c.g.dbias_h +
                                             (key + 8 * e) * c.g.dbias_j] = sum;
            sums[e] = 0.f;
          }
        }
      }
    }
    if (makes_dv) add_products<T, false, kD, kM, kN>(acc[C::kSplit ? 0 : 1], s, now.d_o, p.Dv);
    if (makes_ds && c.g.dk.ptr) add_products<T, C::kWide, kD, kM, kN>(acc[0], dp, now.q, p.D);
    if constexpr (C::kFused) {
      if (makes_ds) add_dq<C>(c, *s_work, h, i0, dp[0], s_ds, s_k);
    }
    h = next_h, i0 = next_i0;
    if (C::kStages == 1) {
      __syncthreads();  // nobody reads this tile any more
      if (heads > 0) Stage<C>(s_stages).load(c, *s_work, h, i0);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // where there was no row, k and v are still under way; others read k for dq

  const Work work = *s_work;
  const int warp_row = thread_id() / 32 * 16 * kM, first = work.at.first + warp_row;
  // A padded batch has keys beyond its length, to be zeroed; a packed one has other sequences.
  const int valid = work.k.length, limit = p.cu_k.ptr ? valid : p.Sk;
  if (makes_dv) {
    const auto dv = rows_of<T>(c.g.dv, work.at.b, work.at.h, work.k.start, p.Dv, c.dv_vec);
    store_rows<T, kD, kM>(acc[C::kSplit ? 0 : 1], 1.f, s_v, warp_row, dv, first, valid, limit);
  }
  if (!part && c.g.dk.ptr) {
    const auto dk = rows_of<T>(c.g.dk, work.at.b, work.at.h, work.k.start, p.D, c.dk_vec);
    store_rows<T, kD, kM>(acc[0], p.scale, s_k, warp_row, dk, first, valid, limit);
  }
}

// ---- launch ------------------------------------------------------------------------------------

struct KeysVariant : Variant<GradCall, BiasGrad> {
  int parts;  // blocks that share a block of keys
};

template <typename T, int kD, bool kLaden, bool kFused>
constexpr KeysVariant variant(DType dtype) {
  using C = Config<T, kD, kLaden, kFused>;
  return {{{"attention_bwd_keys_kernel", dtype, kD, kLaden, C::kN, C::kKeys, C::kThreads,
            C::kShared, kFused},
           attention_bwd_keys_kernel<C>},
          C::kSplit ? 2 : 1};
}

#ifdef FASTATTN_BWD_KEYS_VARIANTS  // tests that compile often want few
const KeysVariant kVariants[] = {FASTATTN_BWD_KEYS_VARIANTS};
#else
#define FASTATTN_DIMS(T, laden, fused, dtype)                                \
  variant<T, 64, laden, fused>(dtype), variant<T, 128, laden, fused>(dtype), \
      variant<T, 256, laden, fused>(dtype)
#define FASTATTN_DTYPE(T, dtype)                                                  \
  variant<T, 32, false, false>(dtype), variant<T, 64, false, false>(dtype),       \
      variant<T, 96, false, false>(dtype), variant<T, 128, false, false>(dtype),  \
      variant<T, 256, false, false>(dtype), FASTATTN_DIMS(T, true, false, dtype), \
      FASTATTN_DIMS(T, false, true, dtype), FASTATTN_DIMS(T, true, true, dtype)
// All that is compiled: 3 dtypes x (5 head dims plain, 3 laden; with atomics 3 each).
const KeysVariant kVariants[] = {
    FASTATTN_DTYPE(__nv_bfloat16, DType::kBf16),
    FASTATTN_DTYPE(__half, DType::kF16),
    FASTATTN_DTYPE(float, DType::kF32),
};
#undef FASTATTN_DTYPE
#undef FASTATTN_DIMS
#endif

}  // namespace

Launch launch_by_keys(const GradCall& c, BiasGrad mode, cudaStream_t stream) {
  const AttentionParams& p = c.call.p;
  const int width = p.D > p.Dv ? p.D : p.Dv;
  Launch out;
  out.kernel = kVariants[0].kernel;
  for (const auto& v : kVariants) {
    if (v.dtype != p.dtype || v.laden != c.laden || v.head_dim < width) continue;
    if (v.atomics != (c.g.dq_sums != nullptr)) continue;
    const int64_t tiles = key_tiles(p, v.keys);
    if (tiles > 0) launch(out, v, tiles * v.parts, stream, c, mode);
    return out;
  }
  out.error = cudaErrorInvalidValue;
  return out;
}

int list_by_keys(VariantInfo* out, int capacity) { return list(kVariants, out, capacity); }

}  // namespace fastattn::cuda
