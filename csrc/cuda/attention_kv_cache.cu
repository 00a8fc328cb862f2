// Attention of a few new rows over a KV cache, by splits over the keys (FlashDecoding, Dao et al.
// 2023; block tables as in PagedAttention, Kwon et al., 2309.06180).
//
//   for a block of rows and a split of the keys:
//     q = rotate(q);  online softmax as in attention_fwd.cu, a tile of keys at a time: what the
//     cache holds comes from there, a new key from k, rotated on the way
//     one split: o and lse;  several: m, l and acc, for attention_kv_merge.cu
//   the new rows:  rotate(k) and v into the cache
//
// q (B, H, Sq, D); caches (entries, Hk, S, D) and (entries, Hk, S, Dv), an entry being a sequence
// or a page; new k (B, Hk, Sn, D), v (B, Hk, Sn, Dv). A block has rows of one kv head, those of its
// group of query heads packed, so a key is read once for all of them. 2 H Sq S (D + Dv) FLOPs;
// every key and value that a row sees is read once a block of rows. Bound by bandwidth: of an A100
// (1.56 TB/s, 312 TFLOP/s in bf16) a key of D = 128 takes 330 ps to read and its products with 64
// rows 105 ps; in fp32, three products of tf32 each, 660 and 630.
//
// Two tiers. Up to 16 rows: a block is one row tile, its warps share out the keys of a tile of k,
// each with a softmax of its own, and meet at the end: no reduction crosses warps on the way. More:
// 64 rows, a warp has 16 of them and all keys. Tiles arrive as in attention_fwd.cu; where their
// rows lie is looked up a tile ahead.
//
// No block reads a row of the cache that its launch writes. A few new rows are appended by the way:
// by the first block of a kv head, whether or not any row attends to it. More of them
// attention_kv_append.cu writes before.
#include "attention_kv_cache_call.cuh"
#include "mma.cuh"
#include "softmax.cuh"

namespace fastattn::cuda {
namespace {

template <typename T_, int kD_, int kRowWarps_>
struct Config {
  using T = T_;
  static constexpr int kD = kD_;                // holds D and Dv; what they lack is zeros
  static constexpr int kRowWarps = kRowWarps_;  // a warp has 16 rows
  static constexpr bool kFew = kRowWarps == 1, k16Bit = sizeof(T) == 2;
  // Few rows: 16 keys a warp and tile, which the products want at least, 32 where two tiles of 64
  // keys would be only 16 KB under way. fp32 at D = 256: two warps, for all must fit the 99 KB of
  // sm_86 and sm_120. Many rows: the keys of attention_fwd.cu's tiles of 64 rows.
  static constexpr int kWarps = kFew && !k16Bit && kD == 256 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kKeyWarps = kWarps / kRowWarps;
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kN = kFew     ? (k16Bit && kD == 64 ? 32 : 16) * kWarps
                            : k16Bit ? (kD == 256 ? 32 : 64)
                                     : (kD == 64 ? 32 : 16);
  static constexpr int kWarpKeys = kN / kKeyWarps;
  static constexpr int kQBytes = kRows * kD * int(sizeof(T));
  static constexpr int kKBytes = kN * kD * int(sizeof(T));
  // At the end, in the same place: acc of 16 rows a warp.
  static constexpr int kPartBytes = kWarps * 16 * kD * int(sizeof(float));
  static constexpr int kTileBytes =
      kQBytes + 2 * kKBytes > kPartBytes ? kQBytes + 2 * kKBytes : kPartBytes;

  struct Shared {
    Slot slots[2][kN];                     // of this tile and the next
    float m[16 * kWarps], l[16 * kWarps];  // of the warps' rows; m becomes a part's weight
    float factor[kRows];
  };
  static constexpr int kShared = kTileBytes + int(sizeof(Shared));
};

// ---- tiles -------------------------------------------------------------------------------------

// Keys [begin, end) of a block. Those below `old` lie in the cache: all of a sequence without new
// rows, or whose new rows were appended before.
struct Keys {
  int begin, end, old;
};

// Where the rows of the tile from key j0 on lie.
template <class C>
__device__ __forceinline__ void find_slots(Slot* s_slots, const KVCache& cache, int b, int j0,
                                           const Keys& keys) {
  const int j = j0 + thread_id();
  if (thread_id() < C::kN && j < min(keys.old, keys.end))
    s_slots[thread_id()] = slot_of(cache, b, j);
}

// The tile of keys from j0 on, out of k's or v's cache and new rows; zeros beyond the keys and the
// columns, as in copy_in. Asynchronous where the cache can be read in vectors.
template <class C, typename T = typename C::T>
__device__ __forceinline__ void copy_keys_in(unsigned char* s_tile, const CacheCall& c,
                                             const CacheRows<const T>& cache,
                                             const Rows<const T>& fresh, bool turns,
                                             const Slot* s_slots, int j0, const Keys& keys) {
  using Layout = Tile<T, C::kD>;
  constexpr int kChunks = Layout::kChunks, kStep = C::kThreads / kChunks;
  static_assert(C::kThreads % kChunks == 0 && C::kN % kStep == 0);
  const int old = min(keys.old, keys.end);
  if (cache.vectors) {
    const int row = thread_id() / kChunks, chunk = thread_id() % kChunks;
    const uint32_t to = ptx::shared_address(s_tile);
    const int limit = chunk * Layout::kVec < cache.width ? old : 0;
#pragma unroll
    for (int at = 0; at < C::kN; at += kStep) {
      const int j = j0 + row + at;
      const bool valid = j < limit;
      const T* src = cache.base;
      if (valid) src = cache.at(s_slots[row + at]) + chunk * Layout::kVec;
      if (j < old || j >= keys.end)
        ptx::cp_async_16(to + uint32_t(Layout::chunk_at(row + at, chunk)), src, valid);
    }
  }
  // What is left: new rows, or all.
  const int first = cache.vectors ? max(j0, old) : j0;
  const int last = cache.vectors ? min(j0 + C::kN, keys.end) : j0 + C::kN;
#pragma unroll 1
  for (int i = thread_id(); i < (last - first) * kChunks; i += C::kThreads) {
    const int j = first + i / kChunks, chunk = i % kChunks;
    const bool is_new = j >= old;
    alignas(16) T x[Layout::kVec] = {};
    if (j < keys.end) {
      const Rows<const T> from = {
          is_new ? fresh.base + (j - keys.old) * fresh.stride : cache.at(s_slots[j - j0]), 0,
          is_new ? fresh.stride_d : 1, cache.width, is_new && fresh.vectors};
      read_chunk(x, from.base, from, chunk, is_new && turns ? Turn(c, j) : Turn());
    }
    *reinterpret_cast<uint4*>(s_tile + Layout::chunk_at(j - j0, chunk)) =
        *reinterpret_cast<const uint4*>(x);
  }
}

// What a block works on.
struct Work {
  int first, split, b, hk;
  int64_t part;  // of the rows of its split

  __device__ explicit Work(const CacheCall& c) {
    const int block = int(blockIdx.x), outer = block / c.blocks / c.splits;
    first = block % c.blocks * c.rows, split = block / c.blocks % c.splits;
    b = outer / c.call.p.Hk, hk = outer % c.call.p.Hk;
    part = (int64_t(outer) * c.splits + split) * c.packed;
  }
};

// The rows of q from `first` on, turned; zeros where there is none.
template <class C, typename T = typename C::T>
__device__ __forceinline__ void copy_q_in(unsigned char* s_q, const CacheCall& c, const Work& work,
                                          const CachedSequence& s) {
  using Layout = Tile<T, C::kD>;
  const AttentionParams& p = c.call.p;
#pragma unroll 1
  for (int k = thread_id(); k < C::kRows * Layout::kChunks; k += C::kThreads) {
    const int row = work.first + k / Layout::kChunks, chunk = k % Layout::kChunks;
    const int i = row / c.call.group, h = work.hk * c.call.group + row % c.call.group;
    alignas(16) T x[Layout::kVec] = {};
    if (i < s.q_len) {
      const auto q = rows_of<const T>(p.q, work.b, h, i, p.D, c.call.q_vec);
      read_chunk(x, q.base, q, chunk, Turn(c, s.shift + i));
    }
    *reinterpret_cast<uint4*>(s_q + Layout::chunk_at(k / Layout::kChunks, chunk)) =
        *reinterpret_cast<const uint4*>(x);
  }
}

// ---- the end -----------------------------------------------------------------------------------

// A thread a row: what its warps' parts weigh, and the row's m and l, or lse.
template <class C>
__device__ __forceinline__ void finish_rows(const CacheCall& c, const Work& work,
                                            const CachedSequence& s, typename C::Shared* shared) {
  const int in_tile = thread_id(), row = work.first + in_tile;
  if (in_tile >= C::kRows || row >= c.packed) return;
  const AttentionParams& p = c.call.p;
  const int i = row / c.call.group, h = work.hk * c.call.group + row % c.call.group;
  float m = -INFINITY, l = 0.f;
#pragma unroll
  for (int k = 0; k < C::kKeyWarps; ++k) m = fmaxf(m, shared->m[k * C::kRows + in_tile]);
  const float base = m == -INFINITY ? 0.f : m;
#pragma unroll
  for (int k = 0; k < C::kKeyWarps; ++k) {
    const int at = k * C::kRows + in_tile;
    const float weight = ptx::exp2_approx((shared->m[at] - base) * c.call.c);
    shared->m[at] = weight;
    l += shared->l[at] * weight;
  }
  if (c.splits > 1) {
    c.sums[2 * (work.part + row)] = m, c.sums[2 * (work.part + row) + 1] = l;
    shared->factor[in_tile] = l == 0.f ? 0.f : 1.f;
  } else {
    float* const lse = p.lse + first_row_of(p, work.b, h, 0) + i;
    shared->factor[in_tile] =
        finish_row<false>(c.call, m, l, i < s.q_len && i + s.shift >= 0, h, lse, nullptr);
  }
}

// o, or a split's part of it. A row without keys is 0 even where v held NaN; of a split nobody
// reads it.
template <class C, typename T = typename C::T>
__device__ __forceinline__ void write_rows(const CacheCall& c, const Work& work,
                                           const unsigned char* s_parts,
                                           const typename C::Shared* shared) {
  using Layout = Tile<float, C::kD>;
  constexpr int kVec = 16 / int(sizeof(T)), kGroups = C::kD / kVec;
  const AttentionParams& p = c.call.p;
#pragma unroll 1
  for (int k = thread_id(); k < C::kRows * kGroups; k += C::kThreads) {
    const int in_tile = k / kGroups, group = k % kGroups, row = work.first + in_tile;
    if (row >= c.packed || group * kVec >= p.Dv) continue;
    const float factor = shared->factor[in_tile];
    float x[kVec] = {};
#pragma unroll
    for (int part = 0; part < C::kKeyWarps; ++part) {
      const int at = part * C::kRows + in_tile;
      const float weight = shared->m[at];
#pragma unroll
      for (int e = 0; e < kVec; e += 4) {
        const float4 y = *reinterpret_cast<const float4*>(
            s_parts + Layout::chunk_at(at, (group * kVec + e) / 4));
        x[e] += weight * y.x, x[e + 1] += weight * y.y;
        x[e + 2] += weight * y.z, x[e + 3] += weight * y.w;
      }
    }
    if (c.splits > 1) {
      if (factor == 0.f) continue;
      float* const to = c.parts + (work.part + row) * c.width + group * kVec;
#pragma unroll
      for (int e = 0; e < kVec; e += 4)
        *reinterpret_cast<float4*>(to + e) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
    } else {
      alignas(16) T y[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) y[e] = from_float<T>(factor == 0.f ? 0.f : x[e] * factor);
      const int h = work.hk * c.call.group + row % c.call.group;
      T* const to = rows_of<T>(p.o, work.b, h, row / c.call.group, p.Dv, false).base;
      write_chunk(to, p.Dv, c.call.o_vec, group, y);
    }
  }
}

// ---- the kernels -------------------------------------------------------------------------------

// Logits with their features, and what a row does not see hidden; x: 16 rows of a warp from packed
// row `row` on, keys from `key` on, both the lane's.
template <int kTiles>
__device__ __forceinline__ void see(float (&x)[kTiles][4], const CacheCall& c, const Work& work,
                                    const CachedSequence& s, const Visible& seen, bool full,
                                    int row, int key) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half, i = r / c.call.group;
    if (c.call.laden) {
      const int h = work.hk * c.call.group + r % c.call.group;
      const Features features(c.call, work.b, h, s.q_len, s.total);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          x[n][2 * half + e] = features.logit(x[n][2 * half + e], i, key + 8 * n + e);
    }
    if (full) continue;
    const int lo = seen.lo(i), hi = seen.hi(i);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = key + 8 * n + e;
        if (j < lo || j >= hi) x[n][2 * half + e] = -INFINITY;
      }
  }
}

template <class C>
__device__ __forceinline__ void attend(const CacheCall& c) {
  using T = typename C::T;
  constexpr int kD = C::kD, kN = C::kN, kKeys = C::kWarpKeys, kRowBytes = kD * int(sizeof(T));
  FASTATTN_DYNAMIC_SHARED(s_all);
  unsigned char* const s_q = s_all;
  unsigned char* const s_k = s_q + C::kQBytes;
  unsigned char* const s_v = s_k + C::kKBytes;
  auto* const shared = reinterpret_cast<typename C::Shared*>(s_all + C::kTileBytes);

  const AttentionParams& p = c.call.p;
  const Work work(c);
  const CachedSequence s(c, work.b);
  Visible seen(p, s.q_len, s.total);
  seen.shift = s.shift;
  // Keys that some row sees, those of the first one from its very first key on: what lies before is
  // not read. Each split has its share of their tiles.
  const int i_first = work.first / c.call.group;
  const int i_last = min((work.first + C::kRows - 1) / c.call.group, s.q_len - 1);
  const int lo = seen.lo(i_first), hi = i_first > i_last ? 0 : seen.hi(i_last);
  const int share = ((max(hi - lo, 0) + kN - 1) / kN + c.splits - 1) / c.splits * kN;
  const int begin = lo + work.split * share;
  const Keys keys = {begin, min(hi, begin + share), c.apart ? s.total : s.cached};

  const CacheRows<const T> k_rows(p.k, work.hk, p.D, c.call.k_vec);
  const CacheRows<const T> v_rows(p.v, work.hk, p.Dv, c.call.v_vec);
  const auto new_k = rows_of<const T>(c.cache.k, work.b, work.hk, 0, p.D, c.new_k_vec);
  const auto new_v = rows_of<const T>(c.cache.v, work.b, work.hk, 0, p.Dv, c.new_v_vec);
  const auto copy_k = [&](int j0, int stage) {
    copy_keys_in<C>(s_k, c, k_rows, new_k, true, shared->slots[stage], j0, keys);
  };

  float acc[1][kD / 8][4] = {};
  OnlineSoftmax<1> softmax;
  const int warp = thread_id() / 32;
  const int row_warp = C::kFew ? 0 : warp, key_warp = C::kFew ? warp : 0;
  if (keys.begin < keys.end) {
    find_slots<C>(shared->slots[0], c.cache, work.b, keys.begin, keys);
    __syncthreads();  // slots are there
    copy_k(keys.begin, 0);
    ptx::cp_async_commit();
    copy_q_in<C>(s_q, c, work, s);
  }
  if (!c.apart && work.first == 0 && work.split == 0)
    append_rows<T, C::kThreads>(c, s, work.b, work.hk, 0, s.total - s.cached);
  int stage = 0;
#pragma unroll 1
  for (int j0 = keys.begin; j0 < keys.end; j0 += kN, stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // q and k are there; nobody reads the last v any more
    copy_keys_in<C>(s_v, c, v_rows, new_v, false, shared->slots[stage], j0, keys);
    ptx::cp_async_commit();
    find_slots<C>(shared->slots[stage ^ 1], c.cache, work.b, j0 + kN, keys);
    float x[1][kKeys / 8][4];
    scores<T, kD, 1, kKeys>(x, s_q + row_warp * 16 * kRowBytes, s_k + key_warp * kKeys * kRowBytes);
    ptx::cp_async_wait<0>();
    __syncthreads();  // v and the next slots are there; nobody reads k any more
    if (j0 + kN < keys.end) {
      copy_k(j0 + kN, stage ^ 1);
      ptx::cp_async_commit();
    }
    const bool full = j0 >= seen.lo(i_last) && j0 + kN <= seen.hi(i_first);
    see(x[0], c, work, s, seen, full, work.first + row_warp * 16 + lane_id() / 4,
        j0 + key_warp * kKeys + lane_id() % 4 * 2);
    float alpha[1][2];
    softmax.update(x, alpha, c.call.c);
    add_values<T, kD, 1, kKeys>(acc, x, alpha, s_v + key_warp * kKeys * kRowBytes, p.Dv);
  }
  __syncthreads();  // nobody reads a tile any more

  using Parts = Tile<float, kD>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = warp * 16 + 8 * half + lane_id() / 4;
    const float l = sum_of_row(softmax.l[0][half]);
    if (lane_id() % 4 == 0) shared->m[at] = softmax.m[0][half], shared->l[at] = l;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
      *reinterpret_cast<float2*>(s_all + Parts::element_at(at, 8 * n + lane_id() % 4 * 2)) =
          make_float2(acc[0][n][2 * half], acc[0][n][2 * half + 1]);
  }
  __syncthreads();  // every warp's part is there
  finish_rows<C>(c, work, s, shared);
  __syncthreads();  // weights and factors are there
  write_rows<C>(c, work, s_all, shared);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_kv_few_kernel(const __grid_constant__ CacheCall c) {
  attend<C>(c);
}
template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_kv_many_kernel(const __grid_constant__ CacheCall c) {
  attend<C>(c);
}

// ---- launch ------------------------------------------------------------------------------------

template <class C>
constexpr VariantInfo info(const char* kernel, DType dtype) {
  return {kernel, dtype, C::kD, true, C::kRows, C::kN, C::kThreads, C::kShared};
}
template <typename T, int kD>
constexpr Variant<CacheCall> few(DType dtype) {
  using C = Config<T, kD, 1>;
  return {info<C>("attention_kv_few_kernel", dtype), attention_kv_few_kernel<C>};
}
template <typename T, int kD>
constexpr Variant<CacheCall> many(DType dtype) {
  using C = Config<T, kD, 4>;
  return {info<C>("attention_kv_many_kernel", dtype), attention_kv_many_kernel<C>};
}

#ifdef FASTATTN_KV_VARIANTS  // tests that compile often want few
const Variant<CacheCall> kVariants[] = {FASTATTN_KV_VARIANTS};
#else
// All that is compiled: 3 dtypes x 3 head dims x 2 tiers. A head dim between is the next one's:
// what it lacks is not read, and reading is what takes the time.
#define FASTATTN_DIMS(make, T, dtype) make<T, 64>(dtype), make<T, 128>(dtype), make<T, 256>(dtype)
const Variant<CacheCall> kVariants[] = {
    FASTATTN_DIMS(few, __nv_bfloat16, DType::kBf16),
    FASTATTN_DIMS(few, __half, DType::kF16),
    FASTATTN_DIMS(few, float, DType::kF32),
    FASTATTN_DIMS(many, __nv_bfloat16, DType::kBf16),
    FASTATTN_DIMS(many, __half, DType::kF16),
    FASTATTN_DIMS(many, float, DType::kF32),
};
#undef FASTATTN_DIMS
#endif

constexpr int kFewRows = 16, kManyRows = 64;
// New rows up to this number are appended by the way: a launch of its own takes 3 us, which is more
// than it takes every block of a sequence to read and rotate them again.
constexpr int kAppendedByTheWay = 16;
// Less than two tiles a split would cost its merge more than it gains.
constexpr int kTilesASplit = 2;
// Two blocks an SM have two tiles under way, 32 KB or more; an H100's bandwidth times its latency
// (3.35 TB/s, 0.7 us) is 18 KB an SM.
constexpr int kBlocksAnSM = 2;

const Variant<CacheCall>* find(const AttentionParams& p, int rows) {
  const int width = p.D > p.Dv ? p.D : p.Dv;
  for (const auto& v : kVariants)
    if (v.dtype == p.dtype && v.rows == rows && v.head_dim >= width) return &v;
  return nullptr;
}

// The most tiles of keys that a block of rows can see.
int64_t most_tiles(const AttentionParams& p, const Variant<CacheCall>& v, int group) {
  int64_t keys = p.Sk;
  const bool right = p.causal != Causal::kNone || p.window_right >= 0;
  if (p.window_left >= 0 && right) {
    const int64_t ahead = p.causal != Causal::kNone ? 0 : p.window_right;
    const int64_t queries = (v.rows - 1) / group + 2;
    if (p.window_left + ahead + queries < keys) keys = p.window_left + ahead + queries;
  }
  return (keys + v.keys - 1) / v.keys;
}

// As FlashAttention-2 chooses them: the fewest within 85 % of the best use of the last wave.
int splits_of(int64_t blocks, int64_t tiles, int64_t resident) {
  int64_t most = tiles / kTilesASplit < resident ? tiles / kTilesASplit : resident;
  if (most > kMaxSplits) most = kMaxSplits;
  if (most < 2 || double(blocks) >= 0.8 * double(resident)) return 1;
  const auto use = [&](int64_t splits) {
    const int64_t waves = (blocks * splits + resident - 1) / resident;
    return double(blocks * splits) / double(resident) / double(waves);
  };
  double best = 0.;
  for (int64_t s = 1; s <= most; ++s) best = use(s) > best ? use(s) : best;
  int splits = 1;
  while (use(splits) < 0.85 * best) ++splits;
  return splits;
}

}  // namespace

// 16 rows where all of a kv head fit, so that little of a product is idle: a token of groups of up
// to 16 heads. Else 64, which up to 64 rows still take less time to multiply than their keys take
// to arrive (the head of this file); several blocks of rows read them again, mostly from L2.
AttentionKVCachePlan attention_kv_cache_plan(const AttentionKVCacheParams& params,
                                             int multiprocessors) {
  const AttentionParams& p = params.attention;
  const int group = p.Hk > 0 ? p.H / p.Hk : 1;
  const int64_t packed = int64_t(group) * p.Sq;
  AttentionKVCachePlan plan;
  plan.rows = packed <= kFewRows ? kFewRows : kManyRows;
  plan.apart = packed == 0 || params.cache.Sn > kAppendedByTheWay;  // without rows no way to go
  if (packed == 0) return plan;
  const int64_t heads = int64_t(p.B) * p.Hk,
                blocks = heads * ((packed + plan.rows - 1) / plan.rows);
  if (const Variant<CacheCall>* v = find(p, plan.rows))
    plan.splits =
        splits_of(blocks, most_tiles(p, *v, group), int64_t(kBlocksAnSM) * multiprocessors);
  if (plan.splits > 1) plan.scratch = heads * plan.splits * packed * ((p.Dv + 7) / 8 * 8 + 2);
  return plan;
}

Launch attention_kv_cache(const AttentionKVCacheParams& params, const AttentionKVCachePlan& plan,
                          float* scratch, cudaStream_t stream) {
  const AttentionParams& p = params.attention;
  const CacheCall c(params, plan, scratch);
  const Variant<CacheCall>* const v = find(p, plan.rows);
  Launch out;
  out.kernel = kVariants[0].kernel;
  if (!v) out.error = cudaErrorInvalidValue;
  const int64_t blocks = int64_t(p.B) * p.Hk * c.blocks * c.splits;
  if (!v) return out;
  const auto then = [&](bool wanted, auto launched) {
    if (wanted && out.error == cudaSuccess) out = launched();
  };
  then(c.apart, [&] { return launch_kv_append(c, stream); });
  then(blocks > 0, [&] {
    Launch made;
    made.kernel = v->kernel;
    launch(made, *v, blocks, stream, c);
    return made;
  });
  then(c.splits > 1, [&] { return launch_kv_merge(c, stream); });
  return out;
}

int attention_kv_cache_variants(VariantInfo* out, int capacity) {
  int n = list(kVariants, out, capacity);
  for (const auto part : {list_kv_append, list_kv_merge})
    n += n < capacity ? part(out + n, capacity - n) : part(nullptr, 0);
  return n;
}

}  // namespace fastattn::cuda
