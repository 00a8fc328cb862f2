// fp32 matrix products for tiles that fit the cache: C (+)= A B with a 6-row micro-kernel.
//
// Registers: 6 x 4 vectors of C, 4 of B, 1 broadcast of A = 29 of 32 (AVX-512); 6 x 2 + 2 + 1 = 15
// of 16 (AVX2). Per k: 6 broadcasts and 4 loads for 24 FMAs, so the FMA ports bound it, not the
// loads. The sum stays in registers over K; K is cut into chunks so that a panel of B stays in L1.

namespace fastattn {
namespace FASTATTN_ISA {

inline constexpr int kMR = 6;
inline constexpr int kNV = FASTATTN_LEVEL >= 2 ? 4 : 2;
inline constexpr int kPanel = kNV * W;  // columns of B a pass

// How element (m, k) of A is reached: row tile m / 6, row m % 6.
struct ALayout {
  int64_t tile, k;
};
// How column panel p and row k of B are reached.
struct BLayout {
  int64_t panel, k;
};

// T: how B is stored. What is in C is added to the sum of this K, not summed on from: the error of
// a gradient over thousands of rows grows with their blocks, not with the rows (blocked summation,
// Higham 2002, 4.2).
template <int MR, int NV, int kARow, class T>
FASTATTN_NOINLINE void micro_kernel(bool accumulate, int64_t K, const float* A, int64_t a_k,
                                    const T* B, int64_t b_k, float* C, int64_t ldc) {
  vf c[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) c[r][v] = vf{};
  for (int64_t k = 0; k < K; ++k, A += a_k, B += b_k) {
    vf b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(B + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const vf a = set1(A[r * kARow]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) c[r][v] = fma(a, b[v], c[r][v]);
    }
  }
  if (accumulate) {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) c[r][v] += load(C + r * ldc + v * W);
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(C + r * ldc + v * W, c[r][v]);
}

// MR rows of n columns (n <= kPanel, n % W == 0).
template <int MR, int kARow, class T>
FASTATTN_INLINE void row_tile(bool accumulate, int64_t n, int64_t K, const float* A, int64_t a_k,
                              const T* B, int64_t b_k, float* C, int64_t ldc) {
  if (n == kPanel) return micro_kernel<MR, kNV, kARow>(accumulate, K, A, a_k, B, b_k, C, ldc);
  for (; n >= 2 * W; n -= 2 * W, B += 2 * W, C += 2 * W)
    micro_kernel<MR, 2, kARow>(accumulate, K, A, a_k, B, b_k, C, ldc);
  if (n > 0) micro_kernel<MR, 1, kARow>(accumulate, K, A, a_k, B, b_k, C, ldc);
}

// One chunk of K. A tail of rows is taken as 4 + 2 + 1.
template <int kARow, class T>
void gemm_chunk(bool accumulate, int64_t M, int64_t N, int64_t K, const float* A, ALayout a,
                const T* B, BLayout b, float* C, int64_t ldc) {
  for (int64_t n0 = 0; n0 < N; n0 += kPanel) {
    const int64_t n = std::min<int64_t>(kPanel, N - n0);
    const T* Bp = B + n0 / kPanel * b.panel;
    const float* Am = A;
    float* Cm = C + n0;
    int64_t m = M;
    for (; m >= kMR; m -= kMR, Am += a.tile, Cm += kMR * ldc)
      row_tile<kMR, kARow>(accumulate, n, K, Am, a.k, Bp, b.k, Cm, ldc);
    if (m & 4) {
      row_tile<4, kARow>(accumulate, n, K, Am, a.k, Bp, b.k, Cm, ldc);
      Am += 4 * kARow, Cm += 4 * ldc;
    }
    if (m & 2) {
      row_tile<2, kARow>(accumulate, n, K, Am, a.k, Bp, b.k, Cm, ldc);
      Am += 2 * kARow, Cm += 2 * ldc;
    }
    if (m & 1) row_tile<1, kARow>(accumulate, n, K, Am, a.k, Bp, b.k, Cm, ldc);
  }
}

inline constexpr int64_t kKc = 96;  // 96 x 64 floats of B = 24 KB: half of L1

// C (M x N, row stride ldc) = or += A B over K. N % W == 0. kARow: elements between rows of a tile
// of A, a constant so that six rows share one address register.
template <int kARow, class T>
void gemm(bool accumulate, int64_t M, int64_t N, int64_t K, const float* A, ALayout a, const T* B,
          BLayout b, float* C, int64_t ldc) {
  // Chunks of one size: a remainder just above kKc is split in halves.
  const int64_t chunks = std::max<int64_t>(1, div_up(K, kKc)), step = div_up(K, chunks);
  for (int64_t c = 0; c < chunks; ++c, accumulate = true) {
    const int64_t k0 = c * step;
    gemm_chunk<kARow>(accumulate, M, N, std::min(step, K - k0), A + k0 * a.k, a, B + k0 * b.k, b, C,
                      ldc);
  }
}

// ---- packing: rows of a tensor into fp32 tiles ------------------------------------------------

// Rows of T with strides into dst (rows x cols_padded), zero beyond cols.
template <class T>
void pack_rows(const T* src, int64_t stride, int64_t stride_d, int64_t rows, int64_t cols,
               int64_t cols_padded, float* dst) {
  for (int64_t r = 0; r < rows; ++r, src += stride, dst += cols_padded) {
    int64_t c = 0;
    if (stride_d == 1)
      for (; c + W <= cols; c += W) store(dst + c, load(src + c));
    for (; c < cols; ++c) dst[c] = to_float(src[c * stride_d]);
    for (; c < cols_padded; ++c) dst[c] = 0.f;
  }
}

// Up to W elements, zero beyond.
template <class T>
FASTATTN_INLINE vf load_part(const T* src, int64_t n) {
  if (n >= W) return load(src);
  T part[W] = {};
  std::memcpy(part, src, size_t(n) * sizeof(T));
  return load(part);
}

#if FASTATTN_LEVEL >= 2
// One panel of `here` <= kWidth rows with unit stride. Rows up to the next multiple of 2 W are zero
// (of kMR: all six). A panel of six is written 16 wide, each column over the end of the one before
// it: up to 10 floats beyond the panel are touched.
template <int kWidth, class T>
FASTATTN_NOINLINE void transpose_panel(const T* src, int64_t stride, int64_t here, int64_t cols,
                                       float* dst) {
  constexpr int kGroup = kWidth < W ? kWidth : W;  // rows a transpose
  const int64_t end = kWidth < W ? kWidth : round_up(here, 2 * W);
  for (int64_t r = 0; r < end; r += kGroup) {
    const T* s = src + r * stride;
    const int64_t rows = here - r;
    if (rows <= 0) {
      for (int64_t c = 0; c < cols; ++c) store(dst + c * kWidth + r, vf{});
      continue;
    }
    for (int64_t c = 0; c < cols; c += W, s += W) {
      vf t[16] = {};
#pragma GCC unroll 16
      for (int x = 0; x < kGroup; ++x)
        if (x < rows) {
          t[x] = load_part(s + x * stride, cols - c);
          prefetch(s + (x + kGroup) * stride);
        }
      transpose16(t);
      float* to = dst + c * kWidth + r;
      const int64_t n = std::min<int64_t>(W, cols - c);
#pragma GCC unroll 16
      for (int x = 0; x < W; ++x)
        if (x < n) store(to + x * kWidth, t[x]);
    }
  }
}
#endif

// Floats that a transposed copy of rows x cols takes.
template <int kWidth>
constexpr int64_t transposed_size(int64_t rows, int64_t cols) {
  return round_up(rows, kWidth) * cols + W;  // W: see transpose_panel
}

// Rows of T transposed into panels of kWidth rows: dst[(r / kWidth) * cols * kWidth + c * kWidth +
// r % kWidth]. Rows up to the next multiple of 2 W (panels of kMR: of kMR) are zero.
template <int kWidth, class T>
void pack_transposed(const T* src, int64_t stride, int64_t stride_d, int64_t rows, int64_t cols,
                     float* dst) {
  for (int64_t r0 = 0; r0 < rows; r0 += kWidth, dst += cols * kWidth) {
    const int64_t here = std::min<int64_t>(kWidth, rows - r0);
#if FASTATTN_LEVEL >= 2
    if (stride_d == 1) {
      transpose_panel<kWidth>(src + r0 * stride, stride, here, cols, dst);
      continue;
    }
#endif
    for (int64_t r = 0; r < here; ++r) {
      const T* s = src + (r0 + r) * stride;
      for (int64_t c = 0; c < cols; ++c) dst[c * kWidth + r] = to_float(s[c * stride_d]);
    }
    for (int64_t c = 0; c < cols; ++c)
      std::fill(dst + c * kWidth + here, dst + (c + 1) * kWidth, 0.f);
  }
}

// The same by run-time dtype: storage is a matter of packing alone, so the passes exist once.
inline void pack_rows(DType dtype, const void* src, int64_t stride, int64_t stride_d, int64_t rows,
                      int64_t cols, int64_t padded, float* dst) {
  switch (dtype) {
    case DType::kBf16:
      return pack_rows(static_cast<const bf16*>(src), stride, stride_d, rows, cols, padded, dst);
    case DType::kF16:
      return pack_rows(static_cast<const f16*>(src), stride, stride_d, rows, cols, padded, dst);
    default:
      return pack_rows(static_cast<const float*>(src), stride, stride_d, rows, cols, padded, dst);
  }
}
template <int kWidth>
void pack_transposed(DType dtype, const void* src, int64_t stride, int64_t stride_d, int64_t rows,
                     int64_t cols, float* dst) {
  switch (dtype) {
    case DType::kBf16:
      return pack_transposed<kWidth>(static_cast<const bf16*>(src), stride, stride_d, rows, cols,
                                     dst);
    case DType::kF16:
      return pack_transposed<kWidth>(static_cast<const f16*>(src), stride, stride_d, rows, cols,
                                     dst);
    default:
      return pack_transposed<kWidth>(static_cast<const float*>(src), stride, stride_d, rows, cols,
                                     dst);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
