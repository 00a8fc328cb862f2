// Philox-4x32-10 (Salmon et al., SC11), the dropout mask of every backend.
//
// Key = 64-bit seed; counter = (j >> 2, i, b * H + h, site); word j & 3 decides on key j: dropped
// iff word < threshold = round(p * 2^32). Recomputed wherever it is needed, never stored.
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
__device__ __forceinline__ void philox_fragment(uint32_t (&words)[4], uint64_t seed, int i, int j,
                                                uint32_t bh) {
  const bool odd = j / 2 % 2 != 0;
  const uint4 w = philox(seed, make_uint4(uint32_t(j / 4), uint32_t(odd ? i + 8 : i), bh, 0u));
  const uint32_t from0 = __shfl_xor_sync(0xffffffffu, odd ? w.x : w.z, 1);
  const uint32_t from1 = __shfl_xor_sync(0xffffffffu, odd ? w.y : w.w, 1);
  words[0] = odd ? from0 : w.x;
  words[1] = odd ? from1 : w.y;
  words[2] = odd ? w.z : from0;
  words[3] = odd ? w.w : from1;
}

}  // namespace fastattn::cuda
