// Attention of the newest rows over cached keys, on the CPU: the torch-free interface.
//
//   append k, v to the cache;  o = softmax(features(scale * q K^T)) V,  K, V the cache's rows
//
// B sequences, H query heads, Hk heads of the cache, Sq rows of q, D and Dv head dims. A sequence
// has cache_len + new_len keys; its rows of q are the last ones, or with `ragged` those from
// cache_len on. Strides are in elements. The caller owns every pointer; a call writes o, lse and
// the appended rows of the caches, and reads nothing beyond a sequence's keys. It allocates nothing
// of the size of a cache.
#pragma once

#include <cstdint>

#include "attention.h"

namespace fastattn {

// A small integer tensor in its own type; null = absent.
struct Indices {
  const void* ptr = nullptr;
  bool wide = true;          // int64, else int32
  int64_t row = 0, col = 0;  // strides

  int64_t at(int64_t r, int64_t c = 0) const {
    const int64_t i = r * row + c * col;
    return wide ? static_cast<const int64_t*>(ptr)[i] : static_cast<const int32_t*>(ptr)[i];
  }
};

struct AttentionKVCacheParams {
  // q, o, lse, sizes and features. k and v are the caches: operand index b is the entry, or the
  // page; unit stride in d. Sk is the capacity: slots a sequence may use. causal: kBottomRight or
  // kNone. lse_lo and the lengths are not used.
  AttentionParams attention;

  const int64_t *cache_len = nullptr, *new_len = nullptr;  // (B,), checked by the caller
  bool ragged = false;  // row i of q stands at cache_len + i, for i < new_len
  int64_t Sn = 0;       // rows of new_k; 0 = nothing is appended
  Operand new_k, new_v;

  Indices cache_index;  // entry of sequence b; absent = b
  Indices block_table;  // page of sequence b, column p; absent = contiguous
  int64_t page_size = 0;

  // Rotation of the first 2 * half dims of q and new_k; (positions, half), contiguous, or
  // (B, Sq, half) for as many rows of new_k.
  const float *cos = nullptr, *sin = nullptr;
  int64_t half = 0;
  bool tables_of_rows = false;
  bool interleaved = false;  // dim t turns with t ^ 1, else with t + half
};

void attention_kv_cache(const AttentionKVCacheParams& p, const Parallel& parallel);

FASTATTN_IN_EVERY_ISA(void attention_kv_cache(const AttentionKVCacheParams& p,
                                              const Parallel& parallel);)

}  // namespace fastattn
