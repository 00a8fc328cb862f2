// bf16 matrix products on AMX tiles: C (+)= A B, 2 x 2 tiles of 16 x 16 fp32.
//
// A: 16 rows of 32 bf16 (64 bytes), any row stride. B: packed tiles of 1 KB, 16 rows of 16 column
// pairs: B[k / 2][n][k % 2]. Per step of 32 in k: 4 loads (32 KB/s of L1 a cycle is not the bound),
// 4 products of 16 cycles each. Tiles 0-3 hold C, 4-5 A, 6-7 B.
#if FASTATTN_LEVEL >= 3

namespace fastattn {
namespace FASTATTN_ISA {

inline constexpr int64_t kTileBytes = 1024;

// Tile state belongs to a thread; it is released so that context switches stay cheap.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t colsb[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.colsb[t] = 64, config.rows[t] = 16;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Byte strides of A: between tiles of 16 rows, between steps of 32 in k, between rows.
struct ATiles {
  const void* ptr;
  int64_t m, k, row;
};
// Byte strides of B: between tiles of 16 columns, between steps of 32 in k.
struct BTiles {
  const void* ptr;
  int64_t n, k;
};

template <int MT, int NT>
FASTATTN_NOINLINE void tile_block(bool accumulate, int64_t k_tiles, const char* a, int64_t a_m,
                                  int64_t a_k, int64_t a_row, const char* b, int64_t b_n,
                                  int64_t b_k, float* C, int64_t ldc) {
  const int64_t c_row = ldc * 4;
  float *c00 = C, *c01 = C + 16, *c10 = C + 16 * ldc, *c11 = C + 16 * ldc + 16;
  if (accumulate) {
    _tile_loadd(0, c00, c_row);
    if constexpr (NT == 2) _tile_loadd(1, c01, c_row);
    if constexpr (MT == 2) _tile_loadd(2, c10, c_row);
    if constexpr (MT == 2 && NT == 2) _tile_loadd(3, c11, c_row);
  } else {
    _tile_zero(0);
    if constexpr (NT == 2) _tile_zero(1);
    if constexpr (MT == 2) _tile_zero(2);
    if constexpr (MT == 2 && NT == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < k_tiles; ++k, a += a_k, b += b_k) {
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NT == 2) {
      _tile_loadd(7, b + b_n, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (MT == 2) {
      _tile_loadd(5, a + a_m, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (NT == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c00, c_row);
  if constexpr (NT == 2) _tile_stored(1, c01, c_row);
  if constexpr (MT == 2) _tile_stored(2, c10, c_row);
  if constexpr (MT == 2 && NT == 2) _tile_stored(3, c11, c_row);
}

// Two row tiles of A stay in registers while B streams by: KT <= 2 steps of k, half the tile loads.
template <int KT>
FASTATTN_NOINLINE void tile_stream(int64_t n_tiles, const char* a, int64_t a_m, int64_t a_k,
                                   int64_t a_row, const char* b, int64_t b_n, int64_t b_k, float* C,
                                   int64_t ldc) {
  static_assert(KT == 1 || KT == 2);
  const int64_t c_row = ldc * 4;
  float* C1 = C + 16 * ldc;
  _tile_loadd(4, a, a_row);
  _tile_loadd(5, a + a_m, a_row);
  if constexpr (KT == 2) {
    _tile_loadd(6, a + a_k, a_row);
    _tile_loadd(7, a + a_m + a_k, a_row);
  }
  for (int64_t n = 0; n < n_tiles; ++n, b += b_n, C += 16, C1 += 16) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(2, b, 64);
    _tile_dpbf16ps(0, 4, 2);
    _tile_dpbf16ps(1, 5, 2);
    if constexpr (KT == 2) {
      _tile_loadd(3, b + b_k, 64);
      _tile_dpbf16ps(0, 6, 3);
      _tile_dpbf16ps(1, 7, 3);
    }
    _tile_stored(0, C, c_row);
    _tile_stored(1, C1, c_row);
  }
}

// C is (16 m_tiles) x (16 n_tiles), row stride ldc floats.
FASTATTN_NOINLINE inline void tile_gemm(bool accumulate, int64_t m_tiles, int64_t n_tiles,
                                        int64_t k_tiles, ATiles A, BTiles B, float* C,
                                        int64_t ldc) {
  const char *a0 = static_cast<const char*>(A.ptr), *b0 = static_cast<const char*>(B.ptr);
  int64_t first = 0;
  if (!accumulate && k_tiles <= 2) {
    for (; first + 2 <= m_tiles; first += 2) {
      const char* a = a0 + first * A.m;
      float* c = C + first * 16 * ldc;
      if (k_tiles == 2)
        tile_stream<2>(n_tiles, a, A.m, A.k, A.row, b0, B.n, B.k, c, ldc);
      else
        tile_stream<1>(n_tiles, a, A.m, A.k, A.row, b0, B.n, B.k, c, ldc);
    }
  }
  for (int64_t n = 0; n < n_tiles; n += 2) {
    const char* b = b0 + n * B.n;
    for (int64_t m = first; m < m_tiles; m += 2) {
      const char* a = a0 + m * A.m;
      float* c = C + m * 16 * ldc + n * 16;
      const bool m2 = m + 1 < m_tiles, n2 = n + 1 < n_tiles;
      if (m2 && n2)
        tile_block<2, 2>(accumulate, k_tiles, a, A.m, A.k, A.row, b, B.n, B.k, c, ldc);
      else if (m2)
        tile_block<2, 1>(accumulate, k_tiles, a, A.m, A.k, A.row, b, B.n, B.k, c, ldc);
      else if (n2)
        tile_block<1, 2>(accumulate, k_tiles, a, A.m, A.k, A.row, b, B.n, B.k, c, ldc);
      else
        tile_block<1, 1>(accumulate, k_tiles, a, A.m, A.k, A.row, b, B.n, B.k, c, ldc);
    }
  }
}

// ---- packing ------------------------------------------------------------------------------------

// cols (<= 32) elements of a row as 32 bf16, zero beyond.
// ahead: elements to what comes next.
FASTATTN_INLINE __m512i load_row32(const bf16* src, int64_t stride_d, int64_t cols, int64_t ahead) {
  if (stride_d == 1) {
    prefetch(src + ahead);
    if (cols >= 32) return _mm512_loadu_si512(src);
    return _mm512_maskz_loadu_epi16((1u << cols) - 1u, src);
  }
  alignas(64) bf16 row[32] = {};
  for (int64_t c = 0; c < std::min<int64_t>(cols, 32); ++c) row[c] = src[c * stride_d];
  return _mm512_load_si512(row);
}

// Rows as B tiles with the rows as columns (B = rows^T): dst[row / 16][d / 32] of 1 KB tiles. Rows
// up to the next multiple of 32 are zero.
inline void pack_tiles_transposed(const bf16* src, int64_t stride, int64_t stride_d, int64_t rows,
                                  int64_t cols, bf16* dst) {
  for (int64_t r = 0; r < round_up(rows, 32); r += 16) {
    for (int64_t c = 0; c < cols; c += 32, dst += 512) {
      vf t[16];
      for (int x = 0; x < 16; ++x)
        t[x] = r + x < rows ? _mm512_castsi512_ps(load_row32(src + (r + x) * stride + c * stride_d,
                                                             stride_d, cols - c, 16 * stride))
                            : vf{};
      transpose16(t);
      for (int x = 0; x < 16; ++x) _mm512_store_ps(reinterpret_cast<float*>(dst) + 16 * x, t[x]);
    }
  }
}

// 16 pairs (a[c], b[c]).
FASTATTN_INLINE __m512i pairs(__m256i a, __m256i b) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}
// Two rows of 32 as two tile rows of pairs: lo = columns 0-15, hi = columns 16-31.
FASTATTN_INLINE void interleave(__m512i r0, __m512i r1, __m512i* lo, __m512i* hi) {
  *lo = pairs(_mm512_castsi512_si256(r0), _mm512_castsi512_si256(r1));
  *hi = pairs(_mm512_extracti64x4_epi64(r0, 1), _mm512_extracti64x4_epi64(r1, 1));
}

// Rows as B tiles with the rows as k: dst[row / 32][col / 16] of 1 KB tiles, 2 * div_up(cols, 32)
// tiles a row group. Rows up to the next multiple of 32 are zero.
inline void pack_tiles(const bf16* src, int64_t stride, int64_t stride_d, int64_t rows,
                       int64_t cols, bf16* dst) {
  for (int64_t r = 0; r < rows; r += 32) {
    for (int64_t c = 0; c < cols; c += 32, dst += 1024) {
      for (int64_t x = 0; x < 32; x += 2) {
        const bf16* s = src + (r + x) * stride + c * stride_d;
        const __m512i zero = _mm512_setzero_si512();
        const __m512i r0 = r + x < rows ? load_row32(s, stride_d, cols - c, 16 * stride) : zero;
        const __m512i r1 =
            r + x + 1 < rows ? load_row32(s + stride, stride_d, cols - c, 16 * stride) : zero;
        __m512i lo, hi;
        interleave(r0, r1, &lo, &hi);
        _mm512_store_si512(dst + x * 16, lo);
        _mm512_store_si512(dst + 512 + x * 16, hi);
      }
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
#endif
