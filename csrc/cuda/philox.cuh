// Philox-4x32-10 (Salmon et al., SC11), the dropout mask of every backend.
//
// Key = 64-bit seed; counter = (j >> 2, i, b * H + h, site); word j & 3 decides on key j: dropped
// iff word < threshold = round(p * 2^32). Recomputed wherever it is needed, never stored. An op of
// plain rows has the upper half of its row in place of b * H + h.
#pragma once

#include "platform.cuh"

namespace fastattn::cuda {

__device__ __forceinline__ uint4 philox(uint64_t seed, uint4 c) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t m0 = uint64_t(c.x) * 0xD2511F53u, m1 = uint64_t(c.z) * 0xCD9E8D57u;
    c = make_uint4(uint32_t(m1 >> 32) ^ c.y ^ k0, uint32_t(m1), uint32_t(m0 >> 32) ^ c.w ^ k1,
                   uint32_t(m0));
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c;
}

// The words of a C fragment: words[e] decides on row i + 8 (e / 2), key j + e % 2, where i, j are
// this lane's first row and key (j = 2t of an n tile). A call makes 4 keys of one row, of which a
// lane owns 2 and its neighbour the others: even lanes make row i, odd ones row i + 8.
__device__ __forceinline__ void philox_fragment(uint32_t (&words)[4], uint64_t seed, uint32_t i,
                                                int j, uint32_t bh, uint32_t site = 0u) {
  const bool odd = j / 2 % 2 != 0;
  const uint4 w = philox(seed, make_uint4(uint32_t(j / 4), odd ? i + 8u : i, bh, site));
  const uint32_t from0 = __shfl_xor_sync(0xffffffffu, odd ? w.x : w.z, 1);
  const uint32_t from1 = __shfl_xor_sync(0xffffffffu, odd ? w.y : w.w, 1);
  words[0] = odd ? from0 : w.x;
  words[1] = odd ? from1 : w.y;
  words[2] = odd ? w.z : from0;
  words[3] = odd ? w.w : from1;
}

// The same where the fragment is a transposed one, rows of keys: words[e] decides on row i + e % 2,
// key j + 8 (e / 2). A call's 4 keys lie in the lanes of 4 neighbouring g: each makes the call of
// one e, and the 4 x 4 words are transposed.
__device__ __forceinline__ void philox_fragment_transposed(uint32_t (&words)[4], uint64_t seed,
                                                           uint32_t i, int j, uint32_t bh,
                                                           uint32_t site = 0u) {
  const int e = j % 4;
  const uint4 w =
      philox(seed, make_uint4(uint32_t(j / 4 + e / 2 * 2), i + uint32_t(e % 2), bh, site));
  const bool odd = e % 2 != 0, high = e / 2 != 0;
  const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? w.x : w.y, 4);
  const uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? w.z : w.w, 4);
  // Of calls e & ~1 and e | 1: words 0 or 1, and 2 or 3, as this lane's key is even or odd.
  const uint32_t low0 = odd ? a : w.x, low1 = odd ? w.y : a;
  const uint32_t high0 = odd ? b : w.z, high1 = odd ? w.w : b;
  const uint32_t x = __shfl_xor_sync(0xffffffffu, high ? low0 : high0, 8);
  const uint32_t y = __shfl_xor_sync(0xffffffffu, high ? low1 : high1, 8);
  words[0] = high ? x : low0;
  words[1] = high ? y : low1;
  words[2] = high ? high0 : x;
  words[3] = high ? high1 : y;
}

}  // namespace fastattn::cuda
