// The products of ffn_blocks.h in bf16 on AMX tiles.
//
// At 256 rows a block needs 256 FLOPs for each byte of weights: bound by the tiles, not by L3.
// Scratch a worker, D = 768, 256 rows: x^T 384 KB, u^T chunk 256 KB, a^T chunk 128 KB, y^T 768 KB.
// 128 rows at D = 768 fit L2 better, but the weights come twice as often: slower.
#if FASTATTN_LEVEL >= 3

namespace fastattn {
namespace FASTATTN_ISA {

struct TileProducts {
  using Item = bf16;
  using Scope = TileScope;
  static constexpr DType kDtype = DType::kBf16;
  static constexpr int64_t kRows = 256, kChunk = 256;
  static constexpr int64_t kDepth = 384;  // of the sum a pass
  static constexpr Grade kGrade = Grade::kCoarse;
  static constexpr bool kInPlace = false;

  static bool serve(const FfnParams& p) {
    return p.w1.dtype == DType::kBf16 && p.D % 32 == 0 && p.F % 32 == 0 && p.Dout % 32 == 0;
  }
  static Panels panels(int64_t columns) { return {columns, columns}; }
  static int64_t packed_size(int64_t rows, int64_t K) { return rows * K; }

  static void pack(const bf16* from, int64_t stride, int64_t rows, int64_t K, const Panels&,
                   bf16* to) {
    pack_tiles_transposed(from, stride, 1, rows, K, to);
  }

  // Two row tiles of w stay in L1 (kDepth of their columns: 24 KB) while B streams from L2, so
  // memory is read once, in order.
  static void product(const Rows& w, int64_t r0, int64_t k0, int64_t n, int64_t k, const bf16* b,
                      int64_t, const Panels& panels, bool accumulate, float* c, int64_t) {
    const int64_t row = w.stride * 2, steps = k / 32, parts = div_up(k, kDepth), M = panels.columns;
    const int64_t part = div_up(steps, parts);
    const char* bp = reinterpret_cast<const char*>(b);
    for (int64_t s0 = 0; s0 < steps; s0 += part, accumulate = true) {
      const int64_t s = std::min(part, steps - s0);
      for (int64_t i = 0; i < n; i += 32) {
        const char* a = row_of(w, r0 + i) + k0 * 2 + s0 * 64;
        const int64_t ahead = 32 * 32 / M + 1;  // rows of the next tiles a block
        for (int64_t m = 0, next = 32; m < M; m += 32) {
          if (i + 32 < n)
            for (const int64_t end = std::min<int64_t>(next + ahead, 64); next < end; ++next)
              for (int64_t x = 0; x < s; ++x) __builtin_prefetch(a + next * row + x * 64, 0, 2);
          tile_block<2, 2>(accumulate, s, a, 16 * row, 64, row,
                           bp + (m / 16 * steps + s0) * kTileBytes, steps * kTileBytes, kTileBytes,
                           c + i * M + m, M);
        }
      }
    }
  }

  // Two rows of a^T side by side are the pairs that the second product reads.
  static FASTATTN_INLINE void hidden(const vf (&a)[4], int64_t f, int64_t m, int64_t n, bf16* b) {
    bf16* tile = b + (m / 16 * (n / 32) + f / 32) * 512 + f % 32 / 2 * 32;
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += 2)
      _mm512_store_si512(tile + j * 16, pairs(__m256i(_mm512_cvtneps_pbh(a[j])),
                                              __m256i(_mm512_cvtneps_pbh(a[j + 1]))));
  }

  static FASTATTN_INLINE void store32(vf a, vf b, char* dst) {
    _mm512_storeu_si512(dst, __m512i(_mm512_cvtne2ps_pbh(b, a)));
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
#endif
