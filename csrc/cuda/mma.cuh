// Tensor-core products of warp tiles, for every dtype with one geometry.
//
// One k step reads 32 bytes of a row: 16 columns of bf16 / fp16 (m16n8k16), 8 of fp32. fp32 runs as
// three tf32 products of operands split in two (big + small, each rounded to nearest; the product
// of the small parts is below fp32's rounding): 3xTF32, Ootomo & Yokota, 2203.03341. Tensor cores
// round their sums towards zero, so long sums are cut: fp32 callers add short ones in registers.
//
// For the names g and t, and what a lane holds, see ptx.cuh.
#pragma once

#include "tile.cuh"

namespace fastattn::cuda {

// x in two tf32 numbers. An infinity has no small part: inf - inf would be NaN.
__device__ __forceinline__ void split(uint32_t raw, uint32_t& big, uint32_t& small) {
  const float x = __uint_as_float(raw);
  big = ptx::to_tf32(x);
  const float rest = x - __uint_as_float(big);
  small = isfinite(rest) ? ptx::to_tf32(rest) : 0u;
}

template <typename T>
struct FragmentA {  // 16 rows, one k step
  uint32_t r[4];
  __device__ explicit FragmentA(const uint32_t (&raw)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = raw[i];
  }
};
template <>
struct FragmentA<float> {
  uint32_t big[4], small[4];
  __device__ explicit FragmentA(const uint32_t (&raw)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) split(raw[i], big[i], small[i]);
  }
};

template <typename T>
struct FragmentB {  // one k step, 8 columns
  uint32_t r[2];
  FragmentB() = default;
  __device__ FragmentB(uint32_t b0, uint32_t b1) : r{b0, b1} {}
};
template <>
struct FragmentB<float> {
  uint32_t big[2], small[2];
  FragmentB() = default;
  __device__ FragmentB(uint32_t b0, uint32_t b1) {
    split(b0, big[0], small[0]);
    split(b1, big[1], small[1]);
  }
};

// kSwapped: the transposed product, its sums in the order in which a^T and b^T had them.
template <typename T, bool kSwapped = false>
__device__ __forceinline__ void multiply(float (&d)[4], const FragmentA<T>& a,
                                         const FragmentB<T>& b) {
  if constexpr (sizeof(T) == 4) {
    if constexpr (kSwapped) ptx::mma_tf32(d, a.big, b.small[0], b.small[1]);
    ptx::mma_tf32(d, a.small, b.big[0], b.big[1]);
    if constexpr (!kSwapped) ptx::mma_tf32(d, a.big, b.small[0], b.small[1]);
    ptx::mma_tf32(d, a.big, b.big[0], b.big[1]);
  } else {
    ptx::mma(d, a.r, b.r[0], b.r[1], T());
  }
}

// One lane's address in a tile, moved by whole 8 rows and even chunks: a swizzle is an XOR of lane
// bits, so such moves are an XOR and an addition of constants, and no address needs a register of
// its own.
template <typename T, int kCols>
struct LaneAddress {
  uint32_t base;
  static constexpr int kMask = Tile<T, kCols>::kChunks % 8 == 0 ? 7 : 3;

  // row % 8 == 0, chunk even, both known to the compiler.
  __device__ __forceinline__ uint32_t at(int row, int chunk) const {
    return (base ^ uint32_t((chunk & kMask) * 16)) +
           uint32_t((chunk & ~kMask) * 16 + row * Tile<T, kCols>::kRowBytes);
  }
};

// For ldmatrix_x4 of 16 rows x 32 bytes; r[0], r[1] are the rows' first chunk (rows 0..7, 8..15),
// r[2], r[3] the second: operand A, or the transposed operand B of two n tiles.
template <typename T, int kCols>
__device__ __forceinline__ LaneAddress<T, kCols> rows_then_chunks(uint32_t tile) {
  const int lane = lane_id();
  return {tile + uint32_t(Tile<T, kCols>::chunk_at(lane % 16, lane / 16))};
}
// r[0], r[1] are rows 0..7 (first and second chunk), r[2], r[3] rows 8..15: operand B of two n
// tiles whose columns are the tile's rows.
template <typename T, int kCols>
__device__ __forceinline__ LaneAddress<T, kCols> chunks_then_rows(uint32_t tile) {
  const int lane = lane_id();
  return {tile + uint32_t(Tile<T, kCols>::chunk_at(lane / 16 * 8 + lane % 8, lane / 8 % 2))};
}

// d += q k^T over kSteps k steps from `chunk` on: kM * 16 rows of q, kN keys.
template <typename T, int kD, int kM, int kN, int kSteps, bool kSwapped>
__device__ __forceinline__ void add_scores(float (&d)[kM][kN / 8][4], const LaneAddress<T, kD>& q,
                                           const LaneAddress<T, kD>& k, int chunk) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t b[kN / 16][4];
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) ptx::ldmatrix_x4(b[n], k.at(16 * n, chunk + 2 * step));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t raw[4];
      ptx::ldmatrix_x4(raw, q.at(16 * m, chunk + 2 * step));
      const FragmentA<T> a(raw);
#pragma unroll
      for (int n = 0; n < kN / 16; ++n) {
        multiply<T, kSwapped>(d[m][2 * n], a, FragmentB<T>(b[n][0], b[n][1]));
        multiply<T, kSwapped>(d[m][2 * n + 1], a, FragmentB<T>(b[n][2], b[n][3]));
      }
    }
  }
}

// s = q k^T for kM * 16 rows of q and kN keys, head dim kD. s[m][n] is a C fragment. s_q: the
// warp's first row, a multiple of 8 in its tile. kSwapped: q is k and k is q, and s has the bits of
// the other product: what the backward recomputes is what lse was made from.
template <typename T, int kD, int kM, int kN, bool kSwapped = false>
__device__ __forceinline__ void scores(float (&s)[kM][kN / 8][4], const unsigned char* s_q,
                                       const unsigned char* s_k) {
  constexpr int kSteps = kD * int(sizeof(T)) / 32;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] = 0.f;
  const auto q = rows_then_chunks<T, kD>(ptx::shared_address(s_q));
  const auto k = chunks_then_rows<T, kD>(ptx::shared_address(s_k));
  if constexpr (sizeof(T) == 2) {
    add_scores<T, kD, kM, kN, kSteps, kSwapped>(s, q, k, 0);
  } else {
    constexpr int kShort = 2;  // longer: ptxas splits so many operands ahead that it spills
#pragma unroll 1
    for (int first = 0; first < kSteps; first += kShort) {
      float part[kM][kN / 8][4] = {};
      add_scores<T, kD, kM, kN, kShort, kSwapped>(part, q, k, 2 * first);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][n][e] += part[m][n][e];
    }
  }
}

// Two fp32 numbers in the lower and upper half of a register.
__device__ __forceinline__ uint32_t pack(float lower, float upper, __nv_bfloat16) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(lower, upper);
  return reinterpret_cast<const uint32_t&>(x);
}
__device__ __forceinline__ uint32_t pack(float lower, float upper, __half) {
  const __half2 x = __floats2half2_rn(lower, upper);
  return reinterpret_cast<const uint32_t&>(x);
}

// acc = alpha * acc + p v for kM * 16 rows of p (C fragments, kN keys) and a (kN, kD) tile of v.
// p's C fragments are its A fragments as they lie: in 16 bit two n tiles are one k step; in fp32
// one n tile is, with its keys taken in the order 2t, 2t + 1.
template <typename T, int kD, int kM, int kN>
__device__ __forceinline__ void add_values(float (&acc)[kM][kD / 8][4],
                                           const float (&p)[kM][kN / 8][4],
                                           const float (&alpha)[kM][2], const unsigned char* s_v,
                                           int width) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kD / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][n][e] *= alpha[m][e / 2];
    const auto v = rows_then_chunks<T, kD>(ptx::shared_address(s_v));
#pragma unroll
    for (int step = 0; step < kN / 16; ++step) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const float (&left)[4] = p[m][2 * step];
        const float (&right)[4] = p[m][2 * step + 1];
        a[m][0] = pack(left[0], left[1], T());
        a[m][1] = pack(left[2], left[3], T());
        a[m][2] = pack(right[0], right[1], T());
        a[m][3] = pack(right[2], right[3], T());
      }
#pragma unroll
      for (int n = 0; n < kD / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, v.at(16 * step, 2 * n));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma(acc[m][2 * n], a[m], b[0], b[1], T());
          ptx::mma(acc[m][2 * n + 1], a[m], b[2], b[3], T());
        }
      }
    }
  } else {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    const LaneAddress<T, kD> even = {uint32_t(Tile<T, kD>::element_at(2 * t, g))};
    const LaneAddress<T, kD> odd = {uint32_t(Tile<T, kD>::element_at(2 * t + 1, g))};
    const auto value = [&](const LaneAddress<T, kD>& from, int key, int chunk) {
      return *reinterpret_cast<const uint32_t*>(s_v + from.at(key, chunk));
    };
    // Groups of columns that are not there are skipped. And the branches keep ptxas from starting
    // so many loads and splits at once that it spills.
#pragma unroll
    for (int first = 0; first < kD / 8; first += 4) {
      if (8 * first >= width) break;
#pragma unroll
      for (int n = first; n < first + 4; ++n) {
        float part[kM][4] = {};
#pragma unroll
        for (int step = 0; step < kN / 8; ++step) {
          const FragmentB<T> b(value(even, 8 * step, 2 * n), value(odd, 8 * step, 2 * n));
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            const float (&c)[4] = p[m][step];
            const uint32_t raw[4] = {__float_as_uint(c[0]), __float_as_uint(c[2]),
                                     __float_as_uint(c[1]), __float_as_uint(c[3])};
            multiply<T>(part[m], FragmentA<T>(raw), b);
          }
        }
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][n][e] = acc[m][n][e] * alpha[m][e / 2] + part[m][e];
      }
    }
  }
}

}  // namespace fastattn::cuda
