// Attention forward: tiled online softmax (Milakov & Gimelshein, 1805.02867; Dao, 2307.08691).
//
//   for a block of query rows:  m = -inf, l = 0, acc = 0
//     for a tile of keys that some row sees:
//       S = q k^T;  m' = max(m, rowmax S);  P = exp(S - m');  a = exp(m - m')
//       l = a l + rowsum P;  acc = a acc + dropout(P) v
//   the sink joins l;  o = acc / l;  lse = m + log l
//
// q (B, H, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv), or (T, H, D) packed. 2 H Sq Sk (D + Dv)
// FLOPs; q, k, v read and o written once, k and v once more a block of rows, mostly from L2. Bound
// by the tensor cores for many rows, by bandwidth for few (no split over keys here).
//
// A block is 4 warps of kM * 16 rows each, so that no reduction crosses warps. P stays in
// registers. Shared memory holds the rows of q, one tile of k and one of v: while a tile of k is
// multiplied the tile of v arrives, and the next k during softmax and P v. o leaves through the
// rows of q.
#include "attention_call.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "softmax.cuh"

namespace fastattn::cuda {
namespace {

// What a block works on. It waits in shared memory, for the products need
// all registers.
struct Work {
  Place at;
  Sequence q;
  int k_len;
  int last;  // row of the tile that lies in the sequence
};

template <typename T_, int kD_, bool kLaden_>
struct Config {
  using T = T_;
  static constexpr int kD = kD_;  // holds D and Dv; what they lack is zeros
  static constexpr bool kLaden = kLaden_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr bool k16Bit = sizeof(T) == 2;
  // 128 rows, as FlashAttention-2 has for sm_80 (registers hold 32 rows of acc and S a warp up to
  // D = 128); indices and values of the features, or the halves of fp32 operands, take what the
  // second half of the rows would. Keys: its 128 at D = 32 and 64 at D = 96; at D = 64 Triton's 64,
  // for its 128 spill; at D = 128 its 32 for sm_86, for 64 spill on sm_90 or on sm_80, whatever the
  // order of the code. At D = 256 all three tiles fit the 99 KB of sm_86 and sm_120.
  static constexpr int kM = k16Bit && !kLaden && kD <= 128 ? 2 : 1;
  static constexpr int kRows = 16 * kM * kWarps;
  static constexpr int kN = k16Bit ? (kM == 2 && kD <= 32    ? 128
                                      : kD == 256            ? (kLaden ? 32 : 64)
                                      : kM == 2 && kD == 128 ? 32
                                                             : 64)
                                   : (kD <= 64 ? 32 : 16);
  static constexpr int kQBytes = kRows * kD * int(sizeof(T));
  static constexpr int kKBytes = kN * kD * int(sizeof(T));
  static constexpr int kShared = kQBytes + 2 * kKBytes + int(sizeof(Work));
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_fwd_kernel(const __grid_constant__ Call call) {
  using T = typename C::T;
  constexpr int kD = C::kD, kM = C::kM, kN = C::kN, kRows = C::kRows, kThreads = C::kThreads;
  FASTATTN_DYNAMIC_SHARED(s_all);
  unsigned char* const s_q = s_all;
  unsigned char* const s_k = s_q + C::kQBytes;
  unsigned char* const s_v = s_k + C::kKBytes;
  Work* const s_work = reinterpret_cast<Work*>(s_v + C::kKBytes);

  const AttentionParams& p = call.p;
  const Place at = place_of<kRows>(p, int64_t(blockIdx.x));
  const Sequence qs = sequence_of(at.b, p.q_lens, p.cu_q, p.Sq, p.Tq);
  const Sequence ks = sequence_of(at.b, p.k_lens, p.cu_k, p.Sk, p.Tk);
  // Keys [lo, hi): those that some row of the tile sees, from a tile's edge on.
  const int last = min(at.first + kRows, qs.length) - 1;
  const int lo = Visible(p, qs.length, ks.length).lo(at.first) / kN * kN;
  const int hi = last < at.first ? 0 : Visible(p, qs.length, ks.length).hi(last);
  const int hk = at.h / call.group;
  const auto q = rows_of<const T>(p.q, at.b, at.h, qs.start, p.D, call.q_vec);
  const auto k = rows_of<const T>(p.k, at.b, hk, ks.start, p.D, call.k_vec);
  const auto v = rows_of<const T>(p.v, at.b, hk, ks.start, p.Dv, call.v_vec);

  if (threadIdx.x == 0) *s_work = {at, qs, ks.length, last};
  float acc[kM][kD / 8][4] = {};
  OnlineSoftmax<kM> softmax;
  copy_in<T, kD, kRows, kThreads>(s_q, q, at.first, qs.length);
  if (lo < hi) copy_in<T, kD, kN, kThreads>(s_k, k, lo, ks.length);
  ptx::cp_async_commit();
#pragma unroll 1
  for (int j0 = lo; j0 < hi; j0 += kN) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // q and k are there; nobody reads the last v any more
    copy_in<T, kD, kN, kThreads>(s_v, v, j0, ks.length);
    ptx::cp_async_commit();
    float s[kM][kN / 8][4];
    scores<T, kD, kM, kN>(s, s_q + thread_id() / 32 * 16 * kM * Tile<T, kD>::kRowBytes, s_k);
    ptx::cp_async_wait<0>();
    __syncthreads();  // v is there; nobody reads k any more
    if (j0 + kN < hi) {
      copy_in<T, kD, kN, kThreads>(s_k, k, j0 + kN, ks.length);
      ptx::cp_async_commit();
    }
    const Work work = *s_work;
    const Visible seen(p, work.q.length, work.k_len);
    const bool full = j0 >= seen.lo(work.last) && j0 + kN <= seen.hi(work.at.first);
    const Features features(call, work.at.b, work.at.h, work.q.length, work.k_len);
    const int row = work.at.first + thread_id() / 32 * 16 * kM + lane_id() / 4;
    const int key = j0 + lane_id() % 4 * 2;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        if constexpr (C::kLaden) features.logits(s[m][n], row + 16 * m, key + 8 * n);
        if (!full) hide(s[m][n], seen, row + 16 * m, key + 8 * n);
      }
    float alpha[kM][2];
    softmax.update(s, alpha, call.c);
    if constexpr (C::kLaden) {
      if (call.threshold) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int n = 0; n < kN / 8; ++n) features.drop(s[m][n], row + 16 * m, key + 8 * n);
      }
    }
    add_values<T, kD, kM, kN>(acc, s, alpha, s_v, p.Dv);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // where there was no key, q is still under way

  const Work work = *s_work;
  const int warp_row = thread_id() / 32 * 16 * kM;  // in the tile
  // A padded batch has rows beyond its length, to be zeroed; a packed one has other sequences.
  const int limit = p.cu_q.ptr ? work.q.length : p.Sq;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  const int64_t row_at = first_row_of(p, work.at.b, work.at.h, work.q.start);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_tile = warp_row + 16 * m + 8 * half + g, row = work.at.first + in_tile;
      const bool writes = t == 0 && row < limit;
      const float factor = finish_row(
          call, softmax.m[m][half], sum_of_row(softmax.l[m][half]), row < work.q.length, work.at.h,
          writes ? p.lse + row_at + row : nullptr, writes ? p.lse_lo + row_at + row : nullptr);
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        // A row without keys is 0 even where v held NaN.
        const float x = factor == 0.f ? 0.f : acc[m][n][2 * half] * factor;
        const float y = factor == 0.f ? 0.f : acc[m][n][2 * half + 1] * factor;
        unsigned char* const to = s_q + Tile<T, kD>::element_at(in_tile, 8 * n + 2 * t);
        if constexpr (C::k16Bit) {
          *reinterpret_cast<uint32_t*>(to) = pack(x, y, T());
        } else {
          *reinterpret_cast<float2*>(to) = make_float2(x, y);
        }
      }
    }
  __syncwarp();  // a warp writes and reads its own rows alone
  const auto o = rows_of<T>(p.o, work.at.b, work.at.h, work.q.start, p.Dv, call.o_vec);
  copy_out<T, kD, 16 * kM>(s_q, warp_row, o, work.at.first + warp_row, limit);
}

// ---- launch ------------------------------------------------------------------------------------

template <typename T, int kD, bool kLaden>
constexpr Variant<Call> variant(DType dtype) {
  using C = Config<T, kD, kLaden>;
  return {{"attention_fwd_kernel", dtype, kD, kLaden, C::kRows, C::kN, C::kThreads, C::kShared},
          attention_fwd_kernel<C>};
}

#ifdef FASTATTN_FWD_VARIANTS  // tests that compile often want few
const Variant<Call> kVariants[] = {FASTATTN_FWD_VARIANTS};
#else
#define FASTATTN_DIMS(T, laden, dtype)                                                      \
  variant<T, 32, laden>(dtype), variant<T, 64, laden>(dtype), variant<T, 96, laden>(dtype), \
      variant<T, 128, laden>(dtype), variant<T, 256, laden>(dtype)
// All that is compiled: 3 dtypes x 5 head dims x (plain, laden).
const Variant<Call> kVariants[] = {
    FASTATTN_DIMS(__nv_bfloat16, false, DType::kBf16),
    FASTATTN_DIMS(__nv_bfloat16, true, DType::kBf16),
    FASTATTN_DIMS(__half, false, DType::kF16),
    FASTATTN_DIMS(__half, true, DType::kF16),
    FASTATTN_DIMS(float, false, DType::kF32),
    FASTATTN_DIMS(float, true, DType::kF32),
};
#undef FASTATTN_DIMS
#endif

}  // namespace

Launch attention_forward(const AttentionParams& p, cudaStream_t stream) {
  const Call call(p);
  const int width = p.D > p.Dv ? p.D : p.Dv;
  Launch out;
  out.kernel = kVariants[0].kernel;
  for (const auto& v : kVariants) {
    if (v.dtype != p.dtype || v.laden != call.laden || v.head_dim < width) continue;
    const int64_t tiles = row_tiles(p, v.rows);
    if (tiles > 0) launch(out, v, tiles, stream, call);
    return out;
  }
  out.error = cudaErrorInvalidValue;
  return out;
}

int attention_forward_variants(VariantInfo* out, int capacity) {
  return list(kVariants, out, capacity);
}

}  // namespace fastattn::cuda
