// What the kernels of attention over a KV cache share: a call, where a sequence's keys lie, and
// rows read in chunks of 16 bytes, rotated on the way (Su et al., 2104.09864).
#pragma once

#include "attention_call.cuh"
#include "attention_kv_cache.h"
#include "launch.cuh"

namespace fastattn::cuda {

struct CacheCall {
  Call call;
  KVCache cache;
  int packed;  // rows of a kv head: row r is row r / group of q's head hk * group + r % group
  int rows;    // of them a block has
  int blocks;  // of them
  int splits;  // of the keys
  bool apart;  // the new rows lie in the cache already
  bool new_k_vec, new_v_vec;
  bool whole;    // a chunk turns with a chunk, or within itself
  float* sums;   // (B Hk, splits, packed, 2): m, l of a part
  float* parts;  // (B Hk, splits, packed, width): acc of a part
  int width;     // Dv, up to whole chunks

  CacheCall(const AttentionKVCacheParams& p, const AttentionKVCachePlan& plan, float* scratch)
      : call(p.attention), cache(p.cache) {
    packed = call.group * call.p.Sq;
    rows = plan.rows, blocks = (packed + rows - 1) / rows;
    splits = plan.splits, apart = plan.apart;
    new_k_vec = call.vectors(cache.k, call.p.D), new_v_vec = call.vectors(cache.v, call.p.Dv);
    whole = cache.interleaved || cache.half % (call.p.dtype == DType::kF32 ? 4 : 8) == 0;
    width = (call.p.Dv + 7) / 8 * 8;
    // Parts come first: they are written 16 bytes at a time.
    const int64_t n = int64_t(call.p.B) * call.p.Hk * splits * packed;
    parts = scratch, sums = scratch + n * width;
  }
};

// More splits than this would cost their merge more than they gain, which has two of them a lane.
constexpr int kMaxSplits = 64;

// The launches that attention_kv_cache is made of, and their tables.
Launch launch_kv_append(const CacheCall& c, cudaStream_t stream);
Launch launch_kv_merge(const CacheCall& c, cudaStream_t stream);
int list_kv_append(VariantInfo* out, int capacity);
int list_kv_merge(VariantInfo* out, int capacity);

// ---- where a sequence's keys lie ---------------------------------------------------------------

struct CachedSequence {
  int cached;  // keys in the cache before the call
  int total;   // with the new ones
  int q_len;   // rows of q that count
  int shift;   // row i stands at key i + shift; below 0 it does not count

  __device__ CachedSequence(const CacheCall& c, int b) {
    const AttentionParams& p = c.call.p;
    const KVCache& cache = c.cache;
    cached = int(clamp(read(cache.cache_lens, b), 0, p.Sk));
    const int room = min(cache.Sn, p.Sk - cached);
    const bool ragged = cache.new_lens.ptr != nullptr;
    const int n = ragged ? int(clamp(read(cache.new_lens, b), 0, room)) : room;
    total = cached + n;
    q_len = ragged ? min(n, p.Sq) : p.Sq;
    shift = ragged ? cached : total - p.Sq;
  }
};

struct Slot {
  int entry, row;
};

// Of key j of sequence b, j below the capacity.
__device__ __forceinline__ Slot slot_of(const KVCache& cache, int b, int j) {
  Slot slot = {b, j};
  if (cache.table.ptr) {
    slot.entry = int(clamp(read(cache.table, int64_t(b) * cache.columns + j / cache.page_size), 0,
                           cache.entries - 1));
    slot.row = j % cache.page_size;
  } else if (cache.index.ptr) {
    slot.entry = int(clamp(read(cache.index, b), 0, cache.entries - 1));
  }
  return slot;
}

// The rows of one kv head of a cache.
template <typename T>
struct CacheRows {
  T* base;
  int64_t stride_entry, stride;  // elements
  int width;                     // columns
  bool vectors;                  // 16-byte accesses are possible

  __device__ CacheRows(const Operand& x, int hk, int width_, bool vectors_)
      : base(static_cast<T*>(x.ptr) + int64_t(hk) * x.h),
        stride_entry(x.b),
        stride(x.s),
        width(width_),
        vectors(vectors_) {}
  __device__ __forceinline__ T* at(Slot slot) const {
    return base + slot.entry * stride_entry + slot.row * stride;
  }
};

// ---- rows in chunks of 16 bytes ----------------------------------------------------------------

// How the row of one position turns; cos null = not at all.
struct Turn {
  const float *cos = nullptr, *sin = nullptr;
  int half = 0;
  bool interleaved = false, whole = true;

  Turn() = default;
  __device__ Turn(const CacheCall& c, int position) {
    if (!c.cache.cos) return;
    half = c.cache.half, interleaved = c.cache.interleaved, whole = c.whole;
    const int64_t at = clamp(position, 0, c.cache.positions - 1) * half;
    cos = c.cache.cos + at, sin = c.cache.sin + at;
  }
  __device__ __forceinline__ bool leads(int t) const { return interleaved ? t % 2 == 0 : t < half; }
  __device__ __forceinline__ int partner(int t) const {
    return interleaved ? t ^ 1 : t < half ? t + half : t - half;
  }
  __device__ __forceinline__ int pair(int t) const {
    return interleaved ? t / 2 : t < half ? t : t - half;
  }
};

// Chunk `chunk` of the row at `row`, turned in fp32 and rounded once, without FMAs: every backend
// puts the same bits into a cache. Zeros beyond the width. `from` says how rows lie.
template <typename T, int kVec = 16 / int(sizeof(T))>
__device__ __forceinline__ void read_chunk(T (&x)[kVec], const T* row, const Rows<const T>& from,
                                           int chunk, const Turn& turn) {
  const int first = chunk * kVec, end = 2 * turn.half;
  alignas(16) T y[kVec];
  if (from.vectors && turn.whole) {
    *reinterpret_cast<uint4*>(x) = make_uint4(0, 0, 0, 0);
    if (first < from.width)
      *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(row + first);
    if (first >= end) return;
    if (turn.interleaved) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) y[e] = x[e ^ 1];
    } else {
      *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(row + turn.partner(first));
    }
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const int t = first + e;
      x[e] = t < from.width ? row[t * from.stride_d] : T(0.f);
      y[e] = t < end ? row[turn.partner(t) * from.stride_d] : T(0.f);
    }
  }
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    const int t = first + e;
    if (t >= end) break;
    const float a = __fmul_rn(to_float(x[e]), turn.cos[turn.pair(t)]);
    const float b = __fmul_rn(to_float(y[e]), turn.sin[turn.pair(t)]);
    x[e] = from_float<T>(turn.leads(t) ? __fsub_rn(a, b) : __fadd_rn(a, b));
  }
}

template <typename T, int kVec = 16 / int(sizeof(T))>
__device__ __forceinline__ void write_chunk(T* row, int width, bool vectors, int chunk,
                                            const T (&x)[kVec]) {
  const int first = chunk * kVec;
  if (vectors) {
    if (first < width) *reinterpret_cast<uint4*>(row + first) = *reinterpret_cast<const uint4*>(x);
    return;
  }
#pragma unroll
  for (int e = 0; e < kVec; ++e)
    if (first + e < width) row[first + e] = x[e];
}

// The new rows [first, last) of a kv head into their slots, k turned.
template <typename T, int kThreads>
__device__ __forceinline__ void append_rows(const CacheCall& c, const CachedSequence& s, int b,
                                            int hk, int first, int last) {
  constexpr int kVec = 16 / int(sizeof(T));
  const AttentionParams& p = c.call.p;
  const auto k = rows_of<const T>(c.cache.k, b, hk, 0, p.D, c.new_k_vec);
  const auto v = rows_of<const T>(c.cache.v, b, hk, 0, p.Dv, c.new_v_vec);
  const CacheRows<T> to_k(p.k, hk, p.D, c.call.k_vec), to_v(p.v, hk, p.Dv, c.call.v_vec);
  const int of_k = (p.D + kVec - 1) / kVec, chunks = of_k + (p.Dv + kVec - 1) / kVec;
#pragma unroll 1
  for (int i = thread_id(); i < (last - first) * chunks; i += kThreads) {
    const int t = first + i / chunks, chunk = i % chunks;
    const bool is_k = chunk < of_k;
    const auto from = is_k ? k : v;
    const auto to = is_k ? to_k : to_v;
    const int column = is_k ? chunk : chunk - of_k;
    alignas(16) T x[kVec];
    read_chunk(x, from.base + t * from.stride, from, column, is_k ? Turn(c, s.cached + t) : Turn());
    write_chunk(to.at(slot_of(c.cache, b, s.cached + t)), to.width, to.vectors, column, x);
  }
}

}  // namespace fastattn::cuda
