// Attention of the newest rows over cached keys on NVIDIA GPUs (sm_80 and newer): the torch-free
// interface.
//
//   append k, v to the cache;  o = softmax(features(scale * q K^T)) V,  K, V the cache's rows
//
// B sequences, H query heads, Hk heads of the cache, Sq rows of q, D and Dv head dims. The caller
// owns every pointer; a call writes o, lse, its scratch and the appended rows of the caches, and
// reads nothing beyond a sequence's keys. Lengths, pages and entries lie on the device, are read
// there and clamped so that no access leaves a tensor: lengths to the capacity (rows beyond it are
// dropped), pages, entries and rotary positions to their tables.
#pragma once

#include "attention.h"

namespace fastattn::cuda {

struct KVCache {
  int entries = 0;      // of both caches: sequences, or pages
  Integers cache_lens;  // (B,), keys there are before the call
  Integers new_lens;    // (B,): row i of q stands at cache_len + i, for i < new_len; absent: the
                        // rows of q are the last ones
  Integers index;       // (B,), entry of sequence b; absent = b
  Integers table;       // (B, columns), page of sequence b's keys [c page_size, (c + 1) page_size);
                        // absent = contiguous
  int columns = 0, page_size = 1;

  int Sn = 0;  // rows of k and v, (B, Hk, Sn, D) and (.., Dv); 0 = nothing is appended
  Operand k, v;

  // Rotation of the first 2 * half dims of q and k; (positions, half), contiguous; null = none.
  const float *cos = nullptr, *sin = nullptr;
  int positions = 0, half = 0;
  bool interleaved = false;  // dim t turns with t ^ 1, else with t + half
};

struct AttentionKVCacheParams {
  // q, o, lse, sizes and features. k and v are the caches: operand index b is the entry; unit
  // stride in d. Sk is the capacity: slots a sequence may use, 0 where there are no entries;
  // Sq + Sk < 2^30. causal: kBottomRight or kNone. No lse_lo, lengths, bias, dropout or weights.
  AttentionParams attention;
  KVCache cache;
};

// How a call is served; a function of shapes and the device alone.
struct AttentionKVCachePlan {
  int rows = 0;         // of q, those of a group of heads packed, that a block has: its tier
  int splits = 1;       // parts of a sequence's keys, merged in their order
  bool apart = false;   // the new rows are appended by a launch of their own
  int64_t scratch = 0;  // floats
};
AttentionKVCachePlan attention_kv_cache_plan(const AttentionKVCacheParams& p, int multiprocessors);

// D, Dv in [1, kMaxHeadDim], checked by the caller. Up to three launches; returns the last, or the
// first that failed.
Launch attention_kv_cache(const AttentionKVCacheParams& p, const AttentionKVCachePlan& plan,
                          float* scratch, cudaStream_t stream);

// Writes up to `capacity` entries and returns how many there are.
int attention_kv_cache_variants(VariantInfo* out, int capacity);

}  // namespace fastattn::cuda
