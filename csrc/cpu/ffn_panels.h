// The products of ffn_blocks.h in fp32: six rows of a weight by 64 columns of x^T in registers.
//
// Per k 6 broadcasts straight from the weight's rows and 4 loads for 24 FMAs: the FMA ports bound
// it. A panel of B (kDepth x 64: 32 KB) stays in L1 while the rows of the weight stream past it.
// The library's GEMM copies both operands first, a tenth of its time at 128 rows; here x^T alone
// is. Scratch a worker, D = 768, 128 rows: x^T 384 KB, u^T chunk 126 KB, y^T 384 KB.
#if FASTATTN_LEVEL >= 2

namespace fastattn {
namespace FASTATTN_ISA {

// C (MR rows, NV vectors) = or += A B, summed as micro_kernel of gemm.h sums: row r of A at A + r *
// lda, row k of B at B + k * NV * W. What the next rows of A will be read at is asked for on the
// way: a row of W2 is pages from the next.
template <int MR, int NV>
FASTATTN_NOINLINE void panel_kernel(bool accumulate, int64_t K, const float* A, int64_t lda,
                                    const float* B, float* C) {
  constexpr int64_t ld = NV * W;
  vf c[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) c[r][v] = vf{};
  const float* a[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) a[r] = A + r * lda;
  constexpr int64_t kLine = 16;
  for (int64_t k0 = 0; k0 < K; k0 += kLine) {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) prefetch(a[r] + MR * lda + k0);
    const int64_t end = std::min(K, k0 + kLine);
#pragma GCC unroll 2
    for (int64_t k = k0; k < end; ++k, B += ld) {
      vf b[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) b[v] = load(B + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const vf x = set1(a[r][k]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) c[r][v] = fma(x, b[v], c[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* to = C + r * ld + v * W;
      store(to, accumulate ? c[r][v] + load(to) : c[r][v]);
    }
}

struct PanelProducts {
  using Item = float;
  struct Scope {};
  static constexpr DType kDtype = DType::kF32;
  static constexpr int64_t kRows = 128, kWidth = 64;
  static constexpr int64_t kChunk = 252;  // a multiple of 6 rows of a weight and of 4
  static constexpr int64_t kDepth = 128;  // of the sum a pass
  static constexpr Grade kGrade = Grade::kExact;
  static constexpr bool kInPlace = true;

  static bool serve(const FfnParams& p) { return p.w1.dtype == DType::kF32; }
  static Panels panels(int64_t columns) { return {kWidth, columns}; }
  static int64_t packed_size(int64_t rows, int64_t K) { return transposed_size<32>(rows, K); }

  static void pack(const float* from, int64_t stride, int64_t rows, int64_t K, const Panels& panels,
                   float* to) {
    for (int64_t m = 0; m < rows; m += kWidth) {
      const int64_t here = std::min(kWidth, rows - m);
      const float* src = from + m * stride;
      if (panels.width(m) == kWidth)
        transpose_panel<kWidth>(src, stride, here, K, to + m * K);
      else
        transpose_panel<32>(src, stride, here, K, to + m * K);
    }
  }

  static void product(const Rows& w, int64_t r0, int64_t k0, int64_t n, int64_t k, const float* b,
                      int64_t b_rows, const Panels& panels, bool accumulate, float* c,
                      int64_t c_rows) {
    const float* A = reinterpret_cast<const float*>(row_of(w, r0)) + k0;
    const int64_t step = div_up(k, div_up(k, kDepth));
    for (int64_t s = 0; s < k; s += step, accumulate = true) {
      const int64_t depth = std::min(step, k - s);
      for (int64_t m = 0; m < panels.columns; m += kWidth) {
        const int64_t width = panels.width(m);
        const float* B = b + m * b_rows + s * width;
        if (width == kWidth)
          panel<4>(accumulate, n, depth, A + s, w.stride, B, c + m * c_rows);
        else
          panel<2>(accumulate, n, depth, A + s, w.stride, B, c + m * c_rows);
      }
    }
  }

  static void store32(vf, vf, char*) {}  // 16-bit results: not of fp32 weights

 private:
  template <int NV>
  static void panel(bool accumulate, int64_t n, int64_t K, const float* A, int64_t lda,
                    const float* B, float* C) {
    constexpr int64_t ld = NV * W;
    for (; n >= 6; n -= 6, A += 6 * lda, C += 6 * ld)
      panel_kernel<6, NV>(accumulate, K, A, lda, B, C);
    if (n & 4) {
      panel_kernel<4, NV>(accumulate, K, A, lda, B, C);
      A += 4 * lda, C += 4 * ld;
    }
    if (n & 2) {
      panel_kernel<2, NV>(accumulate, K, A, lda, B, C);
      A += 2 * lda, C += 2 * ld;
    }
    if (n & 1) panel_kernel<1, NV>(accumulate, K, A, lda, B, C);
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
#endif
