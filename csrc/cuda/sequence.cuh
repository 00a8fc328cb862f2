// Which tile a block owns, and which keys its rows see. Rows i and keys j are local to a sequence.
//
// Lengths and cu_seqlens lie on the device and nobody has read them: whatever they hold, what is
// returned here stays inside the tensors.
#pragma once

#include "attention.h"
#include "platform.cuh"

namespace fastattn::cuda {

__device__ __forceinline__ int64_t read(const Integers& x, int64_t i) {
  return x.wide ? static_cast<const int64_t*>(x.ptr)[i]
                : int64_t(static_cast<const int32_t*>(x.ptr)[i]);
}

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t lo, int64_t hi) {
  return x < lo ? lo : x > hi ? hi : x;
}

struct Sequence {
  int64_t start = 0;  // packed: its first token
  int length = 0;
  int unused = 0;  // no hole: it is copied as a whole, through shared memory too
};

__device__ __forceinline__ Sequence sequence_of(int b, const Integers& lens, const Integers& cu,
                                                int S, int64_t T) {
  Sequence out;
  out.length = S;
  if (cu.ptr) {
    out.start = clamp(read(cu, b), 0, T);
    const int64_t room = T - out.start < S ? T - out.start : S;
    out.length = int(clamp(read(cu, b + 1) - out.start, 0, room));
  } else if (lens.ptr) {
    out.length = int(clamp(read(lens, b), 0, S));
  }
  return out;
}

// What a block works on: batch entry, head, first row.
struct Place {
  int b = 0, h = 0, first = 0;
  int unused = 0;  // as above
};

// Batch entry and first row of tile `tile` of a packed batch. Sequence b owns the tiles from
// cu[b] / kBlock + b on, which leaves room for its last, partial one: so T / kBlock + B tiles serve
// any lengths, and no host reads them.
template <int kBlock>
__device__ __forceinline__ Place packed_place(const Integers& cu, int64_t tile, int B) {
  const auto first_of = [&](int b) { return read(cu, b) / kBlock + b; };
  int lo = 0, hi = B;
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (first_of(mid) <= tile) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  Place out;
  out.b = lo;
  // Never outside the numbers that an int holds, whatever the device holds.
  out.first = int(clamp(tile - first_of(lo), 0, (int64_t(1) << 30) / kBlock)) * kBlock;
  return out;
}

// Grid: (head, tile) where packed. Else, where all rows cost the same, (b, head, block of rows):
// one head's blocks are neighbours, and share k and v in L2. Causal: (block, b, head) from the last
// rows on, which see the most keys: the longest work first.
template <int kBlock>
__device__ __forceinline__ Place place_of(const AttentionParams& p, int64_t tile) {
  if (p.cu_q.ptr) {
    const int64_t tiles = p.Tq / kBlock + p.B;
    Place out = packed_place<kBlock>(p.cu_q, tile % tiles, p.B);
    out.h = int(tile / tiles);
    return out;
  }
  const int blocks = (p.Sq + kBlock - 1) / kBlock;
  const int64_t heads = int64_t(p.B) * p.H;
  const bool causal = p.causal != Causal::kNone;
  const int64_t bh = causal ? tile % heads : tile / blocks;
  const int block = causal ? blocks - 1 - int(tile / heads) : int(tile % blocks);
  Place out;
  out.b = int(bh / p.H), out.h = int(bh % p.H), out.first = block * kBlock;
  return out;
}

// How many tiles that grid has.
inline int64_t row_tiles(const AttentionParams& p, int rows) {
  if (p.B == 0) return 0;
  if (p.cu_q.ptr) return p.H * (p.Tq / rows + p.B);
  return int64_t(p.B) * p.H * ((p.Sq + rows - 1) / rows);
}

// The same of the keys of a kv head (Place::h). Causal: from the first keys on, which most rows
// see.
template <int kBlock>
__device__ __forceinline__ Place key_place_of(const AttentionParams& p, int64_t tile) {
  if (p.cu_k.ptr) {
    const int64_t tiles = p.Tk / kBlock + p.B;
    Place out = packed_place<kBlock>(p.cu_k, tile % tiles, p.B);
    out.h = int(tile / tiles);
    return out;
  }
  const int blocks = (p.Sk + kBlock - 1) / kBlock;
  const int64_t heads = int64_t(p.B) * p.Hk;
  const bool causal = p.causal != Causal::kNone;
  const int64_t bh = causal ? tile % heads : tile / blocks;
  Place out;
  out.b = int(bh / p.Hk), out.h = int(bh % p.Hk);
  out.first = int(causal ? tile / heads : tile % blocks) * kBlock;
  return out;
}

inline int64_t key_tiles(const AttentionParams& p, int keys) {
  if (p.B == 0) return 0;
  if (p.cu_k.ptr) return p.Hk * (p.Tk / keys + p.B);
  return int64_t(p.B) * p.Hk * ((p.Sk + keys - 1) / keys);
}

// Which keys take part, as far as indices decide it.
struct Visible {
  int q_len, k_len;
  int shift;        // row i stands at key i + shift
  int left, right;  // keys [i + shift - left, i + shift + right]; causal: right = 0

  __device__ Visible(const AttentionParams& p, int q_len_, int k_len_)
      : q_len(q_len_), k_len(k_len_) {
    constexpr int kFar = 1 << 30;  // Sq + Sk is less: no sum below overflows
    shift = p.causal == Causal::kBottomRight ? k_len - q_len : 0;
    left = p.window_left < 0 ? kFar : p.window_left;
    right = p.causal != Causal::kNone ? 0 : p.window_right < 0 ? kFar : p.window_right;
  }
  // Keys [lo, hi) of row i; both grow with i up to q_len.
  __device__ __forceinline__ int lo(int i) const { return max(i + shift - left, 0); }
  __device__ __forceinline__ int hi(int i) const {
    return i < q_len ? min(i + shift + right + 1, k_len) : 0;
  }
  // Rows [first_row, end_row) see key j; both grow with j up to k_len.
  __device__ __forceinline__ int first_row(int j) const { return max(j - shift - right, 0); }
  __device__ __forceinline__ int end_row(int j) const {
    return j < k_len ? min(j - shift + left + 1, q_len) : 0;
  }
};

}  // namespace fastattn::cuda
