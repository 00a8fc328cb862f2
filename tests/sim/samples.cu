// Kernels for the tests of the PTX simulator: what nvcc makes of tensor cores, asynchronous copies,
// shuffles, atomics, flags between blocks, local arrays and calls. Small on purpose; none is
// shipped.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {

constexpr int kRows = 64;  // of q a block, of k and v a tile
constexpr int kDim = 64;
constexpr int kPitch = kDim + 8;  // bf16; rows 144 bytes apart: ldmatrix without bank conflicts

__device__ void copy16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0));
}

__device__ void ldmatrix4(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

__device__ void ldmatrix4_trans(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Rows [first, first + 64) of a (S, 64) matrix into shared memory; rows beyond S become zeros.
__device__ void load_tile(uint32_t to, const __nv_bfloat16* from, int first, int S) {
  for (int i = threadIdx.x; i < kRows * kDim / 8; i += blockDim.x) {
    const int row = i / (kDim / 8), chunk = i % (kDim / 8);
    const bool there = first + row < S;
    copy16(to + (row * kPitch + chunk * 8) * 2,
           from + size_t(there ? first + row : 0) * kDim + chunk * 8, there);
  }
}

}  // namespace

// FlashAttention-2's forward in bf16: q, k, v, o (BH, S, 64), contiguous; grid (S / 64 up, BH),
// 4 warps of 16 rows, k and v tiles in two stages.
extern "C" __global__ void __launch_bounds__(128)
    attention(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
              __nv_bfloat16* o, int S, float scale_log2) {
  extern __shared__ __align__(128) char smem[];
  const uint32_t base = __cvta_generic_to_shared(smem);
  constexpr uint32_t kTile = kRows * kPitch * 2;
  const uint32_t s_q = base;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const size_t head = size_t(blockIdx.y) * S * kDim;
  const int first = blockIdx.x * kRows, tiles = (S + kRows - 1) / kRows;
  load_tile(s_q, q + head, first, S);
  load_tile(base + kTile, k + head, 0, S);
  load_tile(base + 2 * kTile, v + head, 0, S);
  asm volatile("cp.async.commit_group;");

  uint32_t r_q[4][4];
  float r_o[8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0};
  for (int j = 0; j < tiles; ++j) {
    const uint32_t s_k = base + kTile * (1 + 2 * (j & 1)), s_v = s_k + kTile;
    if (j + 1 < tiles) {
      const uint32_t next = base + kTile * (1 + 2 * (~j & 1));
      load_tile(next, k + head, (j + 1) * kRows, S);
      load_tile(next + kTile, v + head, (j + 1) * kRows, S);
      asm volatile("cp.async.commit_group;");
      asm volatile("cp.async.wait_group 1;");
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();
    if (j == 0) {
      for (int d = 0; d < 4; ++d) {
        ldmatrix4(r_q[d], s_q + ((warp * 16 + lane % 16) * kPitch + d * 16 + lane / 16 * 8) * 2);
      }
    }
    float s[8][4] = {};
    for (int n = 0; n < 4; ++n) {
      for (int d = 0; d < 4; ++d) {
        uint32_t r_k[4];
        ldmatrix4(
            r_k,
            s_k + ((n * 16 + lane % 8 + lane / 16 * 8) * kPitch + d * 16 + lane / 8 % 2 * 8) * 2);
        mma(s[2 * n], r_q[d], r_k[0], r_k[1]);
        mma(s[2 * n + 1], r_q[d], r_k[2], r_k[3]);
      }
    }
    for (int half = 0; half < 2; ++half) {
      float m = row_max[half];
      for (int n = 0; n < 8; ++n) {
        for (int c = 0; c < 2; ++c) {
          float& x = s[n][2 * half + c];
          x = j * kRows + n * 8 + t * 2 + c < S ? x * scale_log2 : -INFINITY;
          m = fmaxf(m, x);
        }
      }
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      const float alpha = exp2f(row_max[half] - m);
      row_max[half] = m;
      float sum = 0;
      for (int n = 0; n < 8; ++n) {
        for (int c = 0; c < 2; ++c) {
          float& x = s[n][2 * half + c];
          x = exp2f(x - m);
          sum += x;
          r_o[n][2 * half + c] *= alpha;
        }
      }
      row_sum[half] = row_sum[half] * alpha + sum;
    }
    for (int n = 0; n < 4; ++n) {
      const uint32_t r_p[4] = {pack(s[2 * n][0], s[2 * n][1]), pack(s[2 * n][2], s[2 * n][3]),
                               pack(s[2 * n + 1][0], s[2 * n + 1][1]),
                               pack(s[2 * n + 1][2], s[2 * n + 1][3])};
      for (int d = 0; d < 4; ++d) {
        uint32_t r_v[4];
        ldmatrix4_trans(r_v, s_v + ((n * 16 + lane % 16) * kPitch + d * 16 + lane / 16 * 8) * 2);
        mma(r_o[2 * d], r_p, r_v[0], r_v[1]);
        mma(r_o[2 * d + 1], r_p, r_v[2], r_v[3]);
      }
    }
    __syncthreads();  // the next round copies into what was read here
  }
  for (int half = 0; half < 2; ++half) {
    float sum = row_sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int row = first + warp * 16 + g + 8 * half;
    if (row < S) {
      for (int n = 0; n < 8; ++n) {
        *reinterpret_cast<uint32_t*>(o + head + size_t(row) * kDim + n * 8 + t * 2) =
            pack(r_o[n][2 * half] / sum, r_o[n][2 * half + 1] / sum);
      }
    }
  }
}

// Sums of x over a grid: shuffles, shared memory, a partial sum a block, and the block that comes
// last (by an atomic ticket) adds them up in order.
extern "C" __global__ void total(const float* x, int n, float* partial, unsigned* ticket,
                                 float* out) {
  __shared__ float sums[32];
  __shared__ bool last;
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int d = 16; d; d /= 2) v += __shfl_down_sync(~0u, v, d);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    v = 0;
    for (int w = 0; w < int(blockDim.x) / 32; ++w) v += sums[w];
    partial[blockIdx.x] = v;
    __threadfence();
    last = atomicAdd(ticket, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    __threadfence();
    v = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) v += partial[b];
    *out = v;
  }
}

// Steps of a recurrence over the whole grid: every block reads what all wrote in the step before,
// behind a barrier of flags. h (2, n).
extern "C" __global__ void steps(float* h, int n, int count, unsigned* arrived) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int step = 0; step < count; ++step) {
    const float* from = h + (step & 1) * n;
    float* to = h + (~step & 1) * n;
    if (i < n) to[i] = 0.5f * from[i] + 0.25f * from[(i + n - 1) % n] + 0.25f * from[(i + 1) % n];
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1u);
      const unsigned wanted = (step + 1) * gridDim.x;
      while (*reinterpret_cast<volatile unsigned*>(arrived) < wanted) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  }
}

__constant__ float table[4] = {1.0f, 0.5f, -2.0f, 8.0f};

struct Arguments {
  const __half* x;
  float* y;
  int n;
  float weights[3];
};

__device__ __noinline__ float blend(float a, float b, int pick) {
  return pick & 1 ? a * b : fmaf(a, table[pick & 3], b);
}

// A struct by value, a device function that is called, a local array under a run-time index, and
// the mathematics of fp16, fp32 and fp64 that nvcc expands.
extern "C" __global__ void mixed(const Arguments p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  float local[5];
  for (int k = 0; k < 5; ++k) local[k] = __half2float(p.x[(i + k) % p.n]) * p.weights[k % 3];
  const float a = local[i % 5], b = local[(i * 3 + 1) % 5];
  const __half2 h = __hfma2(__floats2half2_rn(a, b), __float2half2_rn(0.5f), __half2half2(p.x[i]));
  const float e = expf(a) + tanhf(b) + logf(fabsf(a) + 1) + sqrtf(fabsf(b)) + 1 / (1 + expf(-a));
  const double d = double(a) / (1.0 + double(b) * double(b)) + sqrt(fabs(double(a)));
  p.y[i] = blend(e, __low2float(h) + __high2float(h), i) + float(d) + float(i / 7 % 5);
}
