// Attention backward: sums over tiles that no pass over keys or rows owns alone. The algorithm is
// in attention_bwd.cu.
//
//   shared: dbias of an (Sq, Sk) slice that heads or batch entries share: a block is a tile of it
//   and
//     adds up dS of the sharers one after the other, in order. 2 H Sq Sk (D + Dv) FLOPs.
//   weights: delta += rowsum(P * dropout(dweights)): a block is 64 rows (fp32 D = 256: 32) of a
//   head.
//     2 H Sq Sk D FLOPs, and dweights read once.
//
// Tiles lie in shared memory, in one stage: these are rare, and their products few.
#include "attention_grad.cuh"
#include "softmax.cuh"

namespace fastattn::cuda {
namespace {

template <typename T_, int kD_>
struct Config {
  using T = T_;
  static constexpr int kD = kD_;
  static constexpr bool k16Bit = sizeof(T) == 2;
  static constexpr int kWarps = !k16Bit && kD == 256 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps, kN = k16Bit ? 32 : 16;
  static constexpr int kQBytes = kRows * kD * int(sizeof(T));
  static constexpr int kKBytes = kN * kD * int(sizeof(T));
  static constexpr int kShared = 2 * kQBytes + 2 * kKBytes + int(sizeof(RowStats<kRows>));
  static_assert(kShared <= kMostShared);
};

template <typename C>
struct Tiles {
  static constexpr int kRows = C::kRows;
  unsigned char *q, *d_o, *k, *v;
  RowStats<kRows>* stats;

  __device__ explicit Tiles(unsigned char* base)
      : q(base),
        d_o(q + C::kQBytes),
        k(d_o + C::kQBytes),
        v(k + C::kKBytes),
        stats(reinterpret_cast<RowStats<kRows>*>(v + C::kKBytes)) {}
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_bwd_shared_kernel(const __grid_constant__ GradCall c) {
  using T = typename C::T;
  constexpr int kD = C::kD, kN = C::kN, kRows = C::kRows, kThreads = C::kThreads;
  FASTATTN_DYNAMIC_SHARED(s_all);
  const Tiles<C> tiles(s_all);
  const AttentionParams& p = c.call.p;
  const int64_t blocks_n = (p.Sk + kN - 1) / kN, blocks_m = (p.Sq + kRows - 1) / kRows;
  const int64_t tile = int64_t(blockIdx.x), outer = tile / blocks_n / blocks_m;
  const int j0 = int(tile % blocks_n) * kN, first = int(tile / blocks_n % blocks_m) * kRows;
  const int at_b = int(outer / c.g.bias_h), at_h = int(outer % c.g.bias_h);
  const int share_b = p.B / c.g.bias_b, share_h = p.H / c.g.bias_h;

  float total[kN / 8][4] = {};
#pragma unroll 1
  for (int sharer = 0; sharer < share_b * share_h; ++sharer) {
    const int b = at_b * share_b + sharer / share_h, h = at_h * share_h + sharer % share_h;
    const Sequence qs = sequence_of(b, p.q_lens, p.cu_q, p.Sq, p.Tq);
    const Sequence ks = sequence_of(b, p.k_lens, p.cu_k, p.Sk, p.Tk);
    const int hk = h / c.call.group, rows_do = c.g.d_o.ptr ? qs.length : 0;
    __syncthreads();  // nobody reads the last sharer's tiles any more
    copy_in<T, kD, kRows, kThreads>(
        tiles.q, rows_of<const T>(p.q, b, h, qs.start, p.D, c.call.q_vec), first, qs.length);
    copy_in<T, kD, kRows, kThreads>(
        tiles.d_o, rows_of<const T>(c.g.d_o, b, h, qs.start, p.Dv, c.do_vec), first, rows_do);
    copy_in<T, kD, kN, kThreads>(tiles.k, rows_of<const T>(p.k, b, hk, ks.start, p.D, c.call.k_vec),
                                 j0, ks.length);
    copy_in<T, kD, kN, kThreads>(
        tiles.v, rows_of<const T>(p.v, b, hk, ks.start, p.Dv, c.call.v_vec), j0, ks.length);
    copy_stats<kRows, kThreads>(tiles.stats, c, first_row_of(p, b, h, qs.start), first, qs.length);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const int warp_at = thread_id() / 32 * 16 * Tile<T, kD>::kRowBytes;
    float s[1][kN / 8][4], dp[1][kN / 8][4];
    scores<T, kD, 1, kN>(s, tiles.q + warp_at, tiles.k);
    scores<T, kD, 1, kN>(dp, tiles.d_o + warp_at, tiles.v);
    const TileGrads<true, false> grads(c, b, h, qs.length, ks.length);
    const int in_tile = thread_id() / 32 * 16 + lane_id() / 4, key = j0 + lane_id() % 4 * 2;
    const FragmentStats stats(tiles.stats, in_tile, 8);
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      float ds[4];
      grads(s[0][n], dp[0][n], ds, stats, false, first + in_tile, key + 8 * n);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[n][e] += ds[e];
    }
  }

  const int row = first + thread_id() / 32 * 16 + lane_id() / 4, key = j0 + lane_id() % 4 * 2;
  const int64_t to = at_b * c.g.dbias_b + at_h * c.g.dbias_h;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = row + e / 2 * 8, j = key + 8 * n + e % 2;
      if (i < p.Sq && j < p.Sk)
        TileGrads<true, false>::write_float(c.g.dbias, c.g.dbias_dtype,
                                            to + i * c.g.dbias_i + j * c.g.dbias_j, total[n][e]);
    }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_bwd_weights_kernel(const __grid_constant__ GradCall c) {
  using T = typename C::T;
  constexpr int kD = C::kD, kN = C::kN, kRows = C::kRows, kThreads = C::kThreads;
  FASTATTN_DYNAMIC_SHARED(s_all);
  const Tiles<C> tiles(s_all);
  const AttentionParams& p = c.call.p;
  const Place at = place_of<kRows>(p, int64_t(blockIdx.x));
  const Sequence qs = sequence_of(at.b, p.q_lens, p.cu_q, p.Sq, p.Tq);
  const Sequence ks = sequence_of(at.b, p.k_lens, p.cu_k, p.Sk, p.Tk);
  const TileGrads<true, false> grads(c, at.b, at.h, qs.length, ks.length);
  const int last = min(at.first + kRows, qs.length) - 1;
  const int lo = grads.seen.lo(at.first) / kN * kN;
  const int hi = last < at.first ? 0 : grads.seen.hi(last);
  const int64_t row_at = first_row_of(p, at.b, at.h, qs.start);
  const int in_tile = thread_id() / 32 * 16 + lane_id() / 4, row = at.first + in_tile;
  copy_in<T, kD, kRows, kThreads>(
      tiles.q, rows_of<const T>(p.q, at.b, at.h, qs.start, p.D, c.call.q_vec), at.first, qs.length);
  copy_stats<kRows, kThreads>(tiles.stats, c, row_at, at.first, qs.length);
  ptx::cp_async_commit();  // also where no key follows
  float sums[2] = {};
#pragma unroll 1
  for (int j0 = lo; j0 < hi; j0 += kN) {
    __syncthreads();  // nobody reads the last k any more
    copy_in<T, kD, kN, kThreads>(
        tiles.k, rows_of<const T>(p.k, at.b, at.h / c.call.group, ks.start, p.D, c.call.k_vec), j0,
        ks.length);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    float s[1][kN / 8][4];
    scores<T, kD, 1, kN>(s, tiles.q + thread_id() / 32 * 16 * Tile<T, kD>::kRowBytes, tiles.k);
    // With delta 0 and no do, dS is P dropout(dweights), whose row sum is what delta lacks.
    FragmentStats stats(tiles.stats, in_tile, 8);
    stats.delta[0] = stats.delta[1] = 0.f;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      float ds[4], dp[4] = {};
      grads(s[0][n], dp, ds, stats, false, row, j0 + 8 * n + lane_id() % 4 * 2);
      sums[0] += ds[0] + ds[1], sums[1] += ds[2] + ds[3];
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // where there was no key, delta is still being read
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float sum = sum_of_row(sums[e]);
    const int i = row + 8 * e;
    // A row that sees no key keeps delta 0.
    if (lane_id() % 4 == 0 && i < qs.length && c.g.lse_units[row_at + i] < INFINITY)
      c.g.delta[row_at + i] += sum;
  }
}

// ---- launch ------------------------------------------------------------------------------------

template <typename T, int kD>
constexpr Variant<GradCall> shared(DType dtype) {
  using C = Config<T, kD>;
  return {
      {"attention_bwd_shared_kernel", dtype, kD, true, C::kRows, C::kN, C::kThreads, C::kShared},
      attention_bwd_shared_kernel<C>};
}
template <typename T, int kD>
constexpr Variant<GradCall> weights(DType dtype) {
  using C = Config<T, kD>;
  return {
      {"attention_bwd_weights_kernel", dtype, kD, true, C::kRows, C::kN, C::kThreads, C::kShared},
      attention_bwd_weights_kernel<C>};
}

#ifdef FASTATTN_BWD_BIAS_VARIANTS  // tests that compile often want few
const Variant<GradCall> kShared[] = {FASTATTN_BWD_BIAS_VARIANTS(shared)};
const Variant<GradCall> kWeights[] = {FASTATTN_BWD_BIAS_VARIANTS(weights)};
#else
#define FASTATTN_DIMS(make, T, dtype) make<T, 64>(dtype), make<T, 128>(dtype), make<T, 256>(dtype)
#define FASTATTN_DTYPES(make)                                                                 \
  FASTATTN_DIMS(make, __nv_bfloat16, DType::kBf16), FASTATTN_DIMS(make, __half, DType::kF16), \
      FASTATTN_DIMS(make, float, DType::kF32)
// All that is compiled: 3 dtypes x 3 head dims x 2 kernels.
const Variant<GradCall> kShared[] = {FASTATTN_DTYPES(shared)};
const Variant<GradCall> kWeights[] = {FASTATTN_DTYPES(weights)};
#undef FASTATTN_DTYPES
#undef FASTATTN_DIMS
#endif

// The variant of `all` that serves p; null where none does.
template <int kCount>
const Variant<GradCall>* find(const Variant<GradCall> (&all)[kCount], const AttentionParams& p) {
  const int width = p.D > p.Dv ? p.D : p.Dv;
  for (const auto& v : all)
    if (v.dtype == p.dtype && v.head_dim >= width) return &v;
  return nullptr;
}

}  // namespace

Launch launch_shared_bias(const GradCall& c, cudaStream_t stream) {
  const AttentionParams& p = c.call.p;
  Launch out;
  out.kernel = kShared[0].kernel;
  const auto* v = find(kShared, p);
  out.error = v ? cudaSuccess : cudaErrorInvalidValue;
  if (!v) return out;
  const int64_t tiles = int64_t(c.g.bias_b) * c.g.bias_h * ((p.Sq + v->rows - 1) / v->rows) *
                        ((p.Sk + v->keys - 1) / v->keys);
  if (tiles > 0) launch(out, *v, tiles, stream, c);
  return out;
}

Launch launch_weights_delta(const GradCall& c, cudaStream_t stream) {
  const AttentionParams& p = c.call.p;
  Launch out;
  out.kernel = kWeights[0].kernel;
  const auto* v = find(kWeights, p);
  out.error = v ? cudaSuccess : cudaErrorInvalidValue;
  if (!v) return out;
  const int64_t tiles = row_tiles(p, v->rows);
  if (tiles > 0) launch(out, *v, tiles, stream, c);
  return out;
}

int list_shared_bias(VariantInfo* out, int capacity) { return list(kShared, out, capacity); }
int list_weights_delta(VariantInfo* out, int capacity) { return list(kWeights, out, capacity); }

}  // namespace fastattn::cuda
