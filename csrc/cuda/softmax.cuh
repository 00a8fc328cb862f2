// Online softmax of the rows of a warp (Milakov & Gimelshein, 1805.02867), over C fragments.
#pragma once

#include "ptx.cuh"

namespace fastattn::cuda {

// Over the 4 lanes that share a row.
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <int kM>
struct OnlineSoftmax {
  float m[kM][2];  // of rows g and g + 8 of row tile kM: maximum so far, in units
  float l[kM][2];  // this lane's part of sum exp(x - m)

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kM; ++i) m[i][0] = m[i][1] = -INFINITY, l[i][0] = l[i][1] = 0.f;
  }

  // x becomes exp(x - m') and alpha exp(m - m'), with the new maximum m'; c turns units into log2.
  template <int kTiles>
  __device__ __forceinline__ void update(float (&x)[kM][kTiles][4], float (&alpha)[kM][2],
                                         float c) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = x[i][0][2 * half];
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          top = fmaxf(top, fmaxf(x[i][n][2 * half], x[i][n][2 * half + 1]));
        top = fmaxf(m[i][half], max_of_row(top));
        const float base = top == -INFINITY ? 0.f : top;  // no key yet: exp2(-inf - 0) = 0
        alpha[i][half] = ptx::exp2_approx((m[i][half] - base) * c);
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            x[i][n][e] = ptx::exp2_approx((x[i][n][e] - base) * c);
            sum += x[i][n][e];
          }
        l[i][half] = l[i][half] * alpha[i][half] + sum;
        m[i][half] = top;
      }
  }
};

}  // namespace fastattn::cuda
