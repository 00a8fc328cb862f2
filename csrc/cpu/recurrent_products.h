// Products of the recurrence: rows of h (or of gradients) by packed panels of recurrent weights.
//
// The left operand is small and changes every step, the weights are read every step: they are
// packed once a call and stay in a thread's cache. A panel is V vectors wide: the gates of W hidden
// units, so that a unit's gates come out of one product, or 4 W columns side by side. A sum over k
// is taken in the order of k whatever the rows and the threads, so a result never depends on them.

namespace fastattn {
namespace FASTATTN_ISA {

inline constexpr int64_t kRowBlock = 96;  // rows of sums that wait for the cell: 24 KB at V = 4

// The columns of a panel, a group (one vector) at a time: group g is `first` + g `apart` and the
// next of n[g] <= W; the rest is zero.
struct Panel {
  int64_t first, apart;
  int64_t n[4];

  static Panel gates(int64_t unit, int64_t H) {
    const int64_t n = std::min<int64_t>(W, H - unit);
    return {unit, H, {n, n, n, n}};
  }
  static Panel side_by_side(int64_t column, int64_t N) {
    Panel p{column, W, {}};
    for (int g = 0; g < 4; ++g) p.n[g] = std::clamp<int64_t>(N - column - g * W, 0, W);
    return p;
  }
};

#if FASTATTN_LEVEL >= 2
inline constexpr int rows_at_once(int V) { return V == 4 ? 6 : V == 3 ? 8 : 12; }
#else
inline constexpr int rows_at_once(int V) { return V == 4 ? 3 : 4; }
#endif

// MR rows by one panel; C has V W floats a row.
template <int MR, int V>
FASTATTN_NOINLINE void rows_by_panel(bool accumulate, int64_t K, const float* A, int64_t lda,
                                     const float* B, float* C) {
  vf c[MR][V];
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[r][v] = vf{};
  for (int64_t k = 0; k < K; ++k, B += V * W) {
    vf b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(B + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const vf a = set1(A[r * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = fma(a, b[v], c[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = C + (r * V + v) * W;
      store(to, accumulate ? c[r][v] + load(to) : c[r][v]);
    }
}

template <int MR, int V>
FASTATTN_INLINE void some_rows(int64_t rows, bool accumulate, int64_t K, const float* A,
                               int64_t lda, const float* B, float* C) {
  if (rows == MR) return rows_by_panel<MR, V>(accumulate, K, A, lda, B, C);
  if constexpr (MR > 1) some_rows<MR - 1, V>(rows, accumulate, K, A, lda, B, C);
}

// In fp32, whatever the storage.
struct FloatProducts {
  using Item = float;  // of both operands, as packed

  static constexpr int64_t rows(int64_t n) { return n; }
  static constexpr int64_t columns(int64_t k) { return k; }
  static int64_t panel_size(int64_t K, int V) { return K * V * W; }

  struct Scope {};  // what a thread needs while it multiplies

  // Rows of w (row stride K) as columns.
  template <int V, class T>
  static void pack_rows_as_columns(const T* w, int64_t K, const Panel& panel, float* dst) {
    for (int g = 0; g < V; ++g) {
      const int64_t n = panel.n[g];
      const T* src = w + (panel.first + g * panel.apart) * K;
      float* to = dst + g * W;
      for (int64_t k = 0; k < K; k += W) {
        const int64_t here = std::min<int64_t>(W, K - k);
#if FASTATTN_LEVEL >= 2
        vf t[16] = {};
        for (int64_t u = 0; u < n; ++u) t[u] = load_lanes(src + u * K + k, here);
        transpose16(t);
        for (int64_t x = 0; x < here; ++x) store(to + (k + x) * V * W, t[x]);
#else
        for (int64_t x = 0; x < here; ++x)
          for (int64_t u = 0; u < W; ++u)
            to[(k + x) * V * W + u] = u < n ? to_float(src[u * K + k + x]) : 0.f;
#endif
      }
    }
  }

  // Columns of w, (K, N), as they lie.
  template <int V, class T>
  static void pack_columns(const T* w, int64_t K, int64_t N, const Panel& panel, float* dst) {
    for (int64_t k = 0; k < K; ++k)
      for (int g = 0; g < V; ++g, dst += W) {
        const int64_t n = panel.n[g];
        store(dst, n > 0 ? load_lanes(w + k * N + panel.first + g * W, n) : vf{});
      }
  }

  template <int V>
  static void multiply(int64_t n, int64_t K, const float* A, int64_t lda, const float* B,
                       float* C) {
    constexpr int kMost = rows_at_once(V);
    const int64_t tiles = div_up(n, kMost), at_once = div_up(n, tiles);
    // Pieces of the panel that stay in L1 while tiles of rows read them, and are summed each by
    // itself (see micro_kernel of gemm.h), so they are the same whatever the rows.
    constexpr int64_t piece = 24576 / (V * W * 4);
    for (int64_t k0 = 0; k0 < K; k0 += piece)
      for (int64_t r = 0; r < n; r += at_once)
        some_rows<kMost, V>(std::min(at_once, n - r), k0 > 0, std::min(piece, K - k0),
                            A + r * lda + k0, lda, B + k0 * V * W, C + r * V * W);
  }
};

#if FASTATTN_LEVEL >= 3
// In bf16 on tiles: rows of h as they lie are the left operand, the weights the packed right one.
struct TileRecurrentProducts {
  using Item = bf16;

  static int64_t rows(int64_t n) { return round_up(n, 16); }
  static int64_t columns(int64_t k) { return round_up(k, 32); }
  static int64_t panel_size(int64_t K, int V) { return columns(K) * V * W; }

  using Scope = TileScope;

  template <int V>
  static void pack_rows_as_columns(const bf16* w, int64_t K, const Panel& panel, bf16* dst) {
    for (int g = 0; g < V; ++g) {
      const int64_t n = panel.n[g];
      const bf16* src = w + (panel.first + g * panel.apart) * K;
      for (int64_t k = 0; k < K; k += 32, dst += 512) {
        vf t[16] = {};
        for (int64_t u = 0; u < n; ++u)
          t[u] = _mm512_castsi512_ps(load_row32(src + u * K + k, 1, K - k, 0));
        transpose16(t);
        for (int x = 0; x < 16; ++x) _mm512_store_ps(reinterpret_cast<float*>(dst) + 16 * x, t[x]);
      }
    }
  }

  template <int V>
  static void pack_columns(const bf16* w, int64_t K, int64_t N, const Panel& panel, bf16* dst) {
    static_assert(V % 2 == 0);
    for (int half = 0; half < V / 2; ++half) {
      const int64_t n0 = panel.first + half * 32, n = std::min<int64_t>(32, N - n0);
      for (int64_t k = 0; k < columns(K); k += 2) {
        const __m512i zero = _mm512_setzero_si512();
        const bf16* s = w + k * N + n0;
        const __m512i r0 = n > 0 && k < K ? load_row32(s, 1, n, 0) : zero;
        const __m512i r1 = n > 0 && k + 1 < K ? load_row32(s + N, 1, n, 0) : zero;
        __m512i lo, hi;
        interleave(r0, r1, &lo, &hi);
        bf16* tile = dst + 2 * half * columns(K) * 16 + k * 16;  // tiles of k follow each other
        _mm512_store_si512(tile, lo);
        _mm512_store_si512(tile + columns(K) * 16, hi);
      }
    }
  }

  template <int V>
  static void multiply(int64_t n, int64_t K, const bf16* A, int64_t lda, const bf16* B, float* C) {
    const int64_t k_tiles = columns(K) / 32;
    tile_gemm(false, div_up(n, 16), V, k_tiles, {A, lda * 32, 64, lda * 2},
              {B, k_tiles * kTileBytes, kTileBytes}, C, V * W);
  }
};
#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
