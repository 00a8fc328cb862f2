// Products of C fragments by tiles in shared memory, in the backward: x y for x = P, dS or their
// transposes, of which a warp holds the rows, and dq = dS k from a dS that lies in shared memory.
//
// fp16 keeps dS in tf32, which has fp16's mantissa and fp32's range: dS of a long row is below
// fp16's, and one of large values above. fp16 operands are exact in tf32.
//
// Products of 32-bit operands take a k step's 8 rows of y in the order 0 2 4 6 1 3 5 7 (C fragments
// are A fragments as they lie then, see mma.cuh; and ldmatrix.trans of fp16 gives a lane rows 2t
// and 2t + 1 of its column, which is what it then needs).
#pragma once

#include "mma.cuh"

namespace fastattn::cuda {

__device__ __forceinline__ uint32_t low_half(uint32_t x) {
  return __float_as_uint(__low2float(reinterpret_cast<const __half2&>(x)));
}
__device__ __forceinline__ uint32_t high_half(uint32_t x) {
  return __float_as_uint(__high2float(reinterpret_cast<const __half2&>(x)));
}

// A tf32 operand A from a C fragment.
__device__ __forceinline__ void tf32_of(uint32_t (&a)[4], const float (&c)[4]) {
  a[0] = ptx::to_tf32(c[0]);
  a[1] = ptx::to_tf32(c[2]);
  a[2] = ptx::to_tf32(c[1]);
  a[3] = ptx::to_tf32(c[3]);
}

// acc += x y for kM * 16 rows of x (C fragments, kN columns) and a (kN, kD) tile y. kWide: fp16's
// dS. Groups of columns at and beyond `width` are skipped where operands are 32 bit: as in
// add_values, the branches also keep ptxas from starting so many loads at once that it spills.
template <typename T, bool kWide, int kD, int kM, int kN>
__device__ __forceinline__ void add_products(float (&acc)[kM][kD / 8][4],
                                             const float (&x)[kM][kN / 8][4],
                                             const unsigned char* s_y, int width) {
  if constexpr (sizeof(T) == 4) {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    const LaneAddress<T, kD> even = {uint32_t(Tile<T, kD>::element_at(2 * t, g))};
    const LaneAddress<T, kD> odd = {uint32_t(Tile<T, kD>::element_at(2 * t + 1, g))};
    const auto value = [&](const LaneAddress<T, kD>& from, int row, int chunk) {
      return *reinterpret_cast<const uint32_t*>(s_y + from.at(row, chunk));
    };
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
            const float (&c)[4] = x[m][step];
            const uint32_t raw[4] = {__float_as_uint(c[0]), __float_as_uint(c[2]),
                                     __float_as_uint(c[1]), __float_as_uint(c[3])};
            multiply<T>(part[m], FragmentA<T>(raw), b);
          }
        }
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][n][e] += part[m][e];
      }
    }
  } else {
    const auto y = rows_then_chunks<T, kD>(ptx::shared_address(s_y));
#pragma unroll
    for (int step = 0; step < kN / 16; ++step) {
      uint32_t a[kM][kWide ? 2 : 1][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const float (&left)[4] = x[m][2 * step];
        const float (&right)[4] = x[m][2 * step + 1];
        if constexpr (kWide) {
          tf32_of(a[m][0], left), tf32_of(a[m][1], right);
        } else {
          a[m][0][0] = pack(left[0], left[1], T());
          a[m][0][1] = pack(left[2], left[3], T());
          a[m][0][2] = pack(right[0], right[1], T());
          a[m][0][3] = pack(right[2], right[3], T());
        }
      }
#pragma unroll
      for (int n = 0; n < kD / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, y.at(16 * step, 2 * n));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          if constexpr (kWide) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
              ptx::mma_tf32(acc[m][2 * n + i / 2], a[m][i % 2], low_half(b[i]), high_half(b[i]));
          } else {
            ptx::mma(acc[m][2 * n], a[m][0], b[0], b[1], T());
            ptx::mma(acc[m][2 * n + 1], a[m][0], b[2], b[3], T());
          }
        }
      }
    }
  }
}

// How a tile of dS lies in shared memory: bf16 as its operand, others in fp32.
template <typename T>
struct Stored {
  using U = float;
};
template <>
struct Stored<__nv_bfloat16> {
  using U = __nv_bfloat16;
};

// x y for 16 rows of a stored dS (`s_x`: the first, kKeys columns) and 32 columns of a (kKeys, kD)
// tile y, from 16-byte chunk `chunk` on (a multiple of what 32 columns are).
template <typename T, int kD, int kKeys>
__device__ __forceinline__ void multiply_stored(float (&d)[4][4], const unsigned char* s_x,
                                                const unsigned char* s_y, int chunk) {
  using U = typename Stored<T>::U;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) d[n][e] = 0.f;
  if constexpr (sizeof(U) == 2) {
    const auto x = rows_then_chunks<U, kKeys>(ptx::shared_address(s_x));
    const auto y = rows_then_chunks<T, kD>(ptx::shared_address(s_y));
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, x.at(0, 2 * step));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, y.at(16 * step, chunk + 2 * n));
        ptx::mma(d[2 * n], a, b[0], b[1], T());
        ptx::mma(d[2 * n + 1], a, b[2], b[3], T());
      }
    }
  } else {
    // Columns 2t and 2t + 1 of a row: the order of the head of this file.
    const auto pair = [&](int row, int col) {
      return *reinterpret_cast<const float2*>(s_x + Tile<U, kKeys>::element_at(row, col + 2 * t));
    };
#pragma unroll 1
    for (int step = 0; step < kKeys / 16; ++step) {
      float c[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 top = pair(g, 16 * step + 8 * half), low = pair(g + 8, 16 * step + 8 * half);
        c[half][0] = top.x, c[half][1] = top.y, c[half][2] = low.x, c[half][3] = low.y;
      }
      const unsigned char* const rows = s_y + 16 * step * Tile<T, kD>::kRowBytes;
      if constexpr (sizeof(T) == 2) {
        const auto y = rows_then_chunks<T, kD>(ptx::shared_address(rows));
        uint32_t a[2][4];
        tf32_of(a[0], c[0]), tf32_of(a[1], c[1]);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(b, y.at(0, chunk + 2 * n));
#pragma unroll
          for (int i = 0; i < 4; ++i)
            ptx::mma_tf32(d[2 * n + i / 2], a[i % 2], low_half(b[i]), high_half(b[i]));
        }
      } else {
        const LaneAddress<T, kD> even = {uint32_t(Tile<T, kD>::element_at(2 * t, g))};
        const LaneAddress<T, kD> odd = {uint32_t(Tile<T, kD>::element_at(2 * t + 1, g))};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float part[4] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const FragmentB<T> b(
                *reinterpret_cast<const uint32_t*>(rows + even.at(8 * half, chunk + 2 * n)),
                *reinterpret_cast<const uint32_t*>(rows + odd.at(8 * half, chunk + 2 * n)));
            const uint32_t raw[4] = {__float_as_uint(c[half][0]), __float_as_uint(c[half][2]),
                                     __float_as_uint(c[half][1]), __float_as_uint(c[half][3])};
            multiply<T>(part, FragmentA<T>(raw), b);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) d[n][e] += part[e];
        }
      }
    }
  }
}

}  // namespace fastattn::cuda
