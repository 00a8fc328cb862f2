// The matrix products of attention on one thread, for operands in fp32 (any ISA) or bf16 (AMX).
//
// An engine owns the packed keys and values of one kv head and the packed rows of one block of
// queries; the passes (attention_fwd.h, attention_bwd.h, attention_weights.h) own the algorithm.
// Tiles: S is kBM x kBN, row stride kBN.

namespace fastattn {
namespace FASTATTN_ISA {

// So few query rows a kv head that packing K would cost as much as using it: the forward takes it
// as it lies, and so does whoever needs the forward's logits again, for they are to be the same
// bits.
inline bool few_rows(const AttentionParams& p) {
  return p.Sq * (p.H / std::max<int64_t>(p.Hk, 1)) <= kMR;
}

// ---- bf16 rows against keys where they lie, widened in pairs ------------------------------------
#if FASTATTN_LEVEL < 3
// Of every 2 W of D elements, a multiple of that, the even ones first: as load_pairs has them.
inline void part_pairs(float* q, int64_t D) {
  float odd[W];
  for (int64_t d = 0; d < D; d += 2 * W) {
    for (int i = 0; i < W; ++i) odd[i] = q[d + 2 * i + 1];
    for (int i = 0; i < W; ++i) q[d + i] = q[d + 2 * i];
    std::copy(odd, odd + W, q + d + W);
  }
}

// c[i] += row i of q, rows of such pairs and zeros, times key i, lane by lane. One key for all
// rows: k_step 0; one row for all keys: q_step 0.
template <int N>
FASTATTN_INLINE void multiply_pairs(const float* q, int64_t q_step, const bf16* const* k,
                                    int k_step, int64_t D, vf (&c)[N]) {
  for (int64_t d = 0; d < D; d += 2 * W) {
    vf even, odd;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      if (i == 0 || k_step) {
        if (d + 2 * W <= D)
          load_pairs(k[i * k_step] + d, &even, &odd);
        else
          load_pairs_part(k[i * k_step] + d, D - d, &even, &odd);
      }
      const float* row = q + i * q_step + d;
      c[i] = fma(load(row + W), odd, fma(load(row), even, c[i]));
    }
  }
}
#endif

// ---- fp32 products, for tensors of any dtype ----------------------------------------------------
class FmaEngine {
 public:
  using Prob = float;
  static constexpr int kBM = 48, kBN = 192;  // 36 KB of S: L2, one panel of it in L1
  static constexpr int kNarrowBM = 24;       // under a window: fewer keys that only some rows see
  static constexpr int kAlign = kPanel;      // granularity of packed keys
  static constexpr int kPad = 2 * W;         // granularity of a tile's width
  static constexpr int kStart = kPad;        // and of its first key
  static constexpr int kExpDegree = 6;

  explicit FmaEngine(const AttentionParams& params)
      : p(params), D(p.D), Dv(p.Dv), Dp(round_up(D, 2 * W)), Dvp(round_up(Dv, W)) {}

  const AttentionParams& p;
  const int64_t D, Dv, Dp, Dvp;

  // Keys [lo, hi) of (b, hk); lo % kAlign == 0. Kept while the same or a smaller range is asked
  // for. direct: do not pack K (few query rows, each key is used once); needs unit stride in d.
  void load_keys(const Sequence& s, int64_t hk, int64_t lo, int64_t hi, bool direct) {
    direct_ = direct && p.k.d == 1;
    if (s.b == b_ && hk == hk_ && lo >= lo_ && hi <= hi_) return;
    b_ = s.b, hk_ = hk;
    pack(row_at(p.k, p.dtype, s.b, hk, s.k_start + lo), p.k.s, p.k.d,
         row_at(p.v, p.dtype, s.b, hk, s.k_start + lo), p.v.s, p.v.d, lo, hi);
  }

  // Keys [lo, hi), whose first rows are k and v; rows and elements lie strides apart.
  void pack(const char* k, int64_t k_s, int64_t k_d, const char* v, int64_t v_s, int64_t v_d,
            int64_t lo, int64_t hi) {
    lo_ = lo, hi_ = hi, k_ = k, v_ = v;
    const int64_t n = round_up(hi - lo, kAlign);
    if (!direct_)
      pack_transposed<kPanel>(p.dtype, k, k_s, k_d, hi - lo, D,
                              kt_.reserve(transposed_size<kPanel>(n, D)));
    v_direct_ = direct_ && v_d == 1 && Dv % W == 0;
    if (v_direct_) return;
    if (p.dtype == DType::kF32 && v_d == 1 && Dv % W == 0) {
      v_rows_ = reinterpret_cast<const float*>(v), v_stride_ = v_s;
      return;
    }
    pack_rows(p.dtype, v, v_s, v_d, hi - lo, Dv, Dvp, v_buf_.reserve(n * Dvp));
    v_rows_ = v_buf_.data(), v_stride_ = Dvp;
  }

  void load_queries(const RowBlock& rb, const Sequence& s) {
#if FASTATTN_LEVEL >= 3
    if (direct_ && p.dtype == DType::kBf16) {  // stays bf16: see multiply
      bf16* q = q16_.reserve(kBM * round_up(D, 32));
      for (int r = 0; r < rb.n; ++r)
        for (int64_t d = 0; d < D; d += 32, q += 32)
          _mm512_store_si512(q, load_row32(reinterpret_cast<const bf16*>(row(rb, s, r)) + d * p.q.d,
                                           p.q.d, D - d, 0));
      return;
    }
#endif
    if (direct_) {
      float* q = q_.reserve(kBM * Dp);
      for (int r = 0; r < rb.n; ++r) {
        pack_rows(p.dtype, row(rb, s, r), 0, p.q.d, 1, D, Dp, q + r * Dp);
#if FASTATTN_LEVEL < 3
        if (p.dtype == DType::kBf16) part_pairs(q + r * Dp, Dp);
#endif
      }
      return;
    }
    // Rows of one head lie a stride apart; where heads share keys, their blocks may span two heads.
    float* q = q_.reserve(transposed_size<kMR>(kBM, D));
    for (int r = 0; r < rb.n; r += kMR, q += kMR * D) {
      const int n = std::min(kMR, rb.n - r);
      if (rb.h[r] == rb.h[r + n - 1]) {
        pack_transposed<kMR>(p.dtype, row(rb, s, r), p.q.s, p.q.d, n, D, q);
        continue;
      }
      float* rows = row_.reserve(kMR * Dp);
      for (int x = 0; x < n; ++x)
        pack_rows(p.dtype, row(rb, s, r + x), 0, p.q.d, 1, D, Dp, rows + x * Dp);
      pack_transposed<kMR>(rows, Dp, 1, n, D, q);
    }
  }

  // S[r][t] = q_r . k_(j0 + t), t < n_padded.
  void scores(const RowBlock& rb, int64_t j0, int64_t n, int64_t n_padded, float* S) const {
    if (direct_) {
      switch (p.dtype) {
        case DType::kBf16:
          return scores_direct<bf16>(rb.n, j0, n, n_padded, S);
        case DType::kF16:
          return scores_direct<f16>(rb.n, j0, n, n_padded, S);
        default:
          return scores_direct<float>(rb.n, j0, n, n_padded, S);
      }
    }
    // The first panel may begin inside: a window starts anywhere.
    const int64_t inside = (j0 - lo_) % kPanel,
                  head = std::min(n_padded, (kPanel - inside) % kPanel);
    const float* kt = kt_.data() + (j0 - lo_ - inside) * D;
    if (head > 0)
      gemm<1>(false, rb.n, head, D, q_.data(), {kMR * D, kMR}, kt + inside, {kPanel * D, kPanel}, S,
              kBN);
    if (inside > 0) kt += kPanel * D;
    if (n_padded > head)
      gemm<1>(false, rb.n, n_padded - head, D, q_.data(), {kMR * D, kMR}, kt, {kPanel * D, kPanel},
              S + head, kBN);
  }

  Prob* prob_row(float* S, int r) const { return S + r * kBN; }
  static FASTATTN_INLINE void put(Prob* row, vf a, vf b) { store(row, a), store(row + W, b); }

  // acc (rows x Dvp) (+)= P v.
  void apply(bool accumulate, const RowBlock& rb, int64_t j0, int64_t n, int64_t, const float* S,
             float* acc) const {
    if (v_direct_) {
      switch (p.dtype) {
        case DType::kBf16:
          return apply_direct<bf16>(accumulate, rb.n, j0, n, S, acc);
        case DType::kF16:
          return apply_direct<f16>(accumulate, rb.n, j0, n, S, acc);
        default:
          return apply_direct<float>(accumulate, rb.n, j0, n, S, acc);
      }
    }
    const float* v = v_rows_ + (j0 - lo_) * v_stride_;
    gemm<kBN>(accumulate, rb.n, Dvp, n, S, {kMR * kBN, 1}, v, {kPanel, v_stride_}, acc, Dvp);
  }

 private:
  const char* row(const RowBlock& rb, const Sequence& s, int r) const {
    return row_at(p.q, p.dtype, s.b, rb.h[r], s.q_start + rb.i[r]);
  }

  // A dot product a key and row, K straight from the tensor: bound by reading K. The sums over
  // lanes are taken for W keys at once.
  template <class T>
  void scores_direct(int rows, int64_t j0, int64_t n, int64_t n_padded, float* S) const {
    const T* k = reinterpret_cast<const T*>(k_) + (j0 - lo_) * p.k.s;
    const T* v = reinterpret_cast<const T*>(v_) + (j0 - lo_) * p.v.s;
    for (int64_t t = 0; t < n_padded; t += W) {
      for (int64_t x = t; x < std::min(t + W, n); ++x)  // V of these keys is wanted next
        for (int64_t d = 0; d < Dv; d += 64 / sizeof(T)) prefetch(v + x * p.v.s + d);
      int r = 0;
      if (rows & 4) dots<T, 4>(k, t, n, r, S), r += 4;
      if (rows & 2) dots<T, 2>(k, t, n, r, S), r += 2;
      if (rows & 1) dots<T, 1>(k, t, n, r, S);
    }
  }

  // Rows [r0, r0 + R) against keys [t, t + W); 0 beyond key n - 1 (masked later).
  template <class T, int R>
  FASTATTN_NOINLINE void dots(const T* k0, int64_t t, int64_t n, int r0, float* S) const {
    vf part[R][W];
    const int keys = int(std::clamp<int64_t>(n - t, 0, W));
    for (int x = 0; x < W; ++x) {
      vf c[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) c[r] = vf{};
      if (x < keys) multiply(k0 + (t + x) * p.k.s, r0, c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) part[r][x] = c[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(S + (r0 + r) * kBN + t, reduce_add_rows(part[r]));
  }

  // c[r] += q_(r0 + r) * k, lane by lane.
  template <class T, int R>
  FASTATTN_INLINE void multiply(const T* k, int r0, vf (&c)[R]) const {
    const float* q = q_.data() + r0 * Dp;
    for (int64_t d = 0; d < D; d += W) {
      const vf kv = load_part(k + d, D - d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) c[r] = fma(load(q + r * Dp + d), kv, c[r]);
    }
  }
#if FASTATTN_LEVEL < 3
  template <int R>
  FASTATTN_INLINE void multiply(const bf16* k, int r0, vf (&c)[R]) const {
    multiply_pairs(q_.data() + r0 * Dp, Dp, &k, 0, D, c);
  }
#else
  template <int R>
  FASTATTN_INLINE void multiply(const bf16* k, int r0, vf (&c)[R]) const {
    const bf16* q = q16_.data() + r0 * round_up(D, 32);
    for (int64_t d = 0; d < D; d += 32) {
      const __m512bh kv = __m512bh(load_row32(k + d, 1, D - d, 32 * p.k.s));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        c[r] = _mm512_dpbf16_ps(c[r], __m512bh(_mm512_load_si512(q + r * round_up(D, 32) + d)), kv);
    }
  }
#endif

  // V straight from the tensor, converted on its way into registers.
  template <class T>
  void apply_direct(bool accumulate, int rows, int64_t j0, int64_t n, const float* S,
                    float* acc) const {
    const T* v = reinterpret_cast<const T*>(v_) + (j0 - lo_) * p.v.s;
    gemm<kBN>(accumulate, rows, Dvp, n, S, {kMR * kBN, 1}, v, {kPanel, p.v.s}, acc, Dvp);
  }

  bool direct_ = false, v_direct_ = false;
  int64_t b_ = -1, hk_ = -1, lo_ = 0, hi_ = 0, v_stride_ = 0;
  const char *k_ = nullptr, *v_ = nullptr;  // of key lo_
  const float* v_rows_ = nullptr;
  Buffer<float> kt_, v_buf_, q_, row_;
#if FASTATTN_LEVEL >= 3
  Buffer<bf16> q16_;
#endif
};

// ---- bf16 products on tiles -----------------------------------------------------------------
#if FASTATTN_LEVEL >= 3
FASTATTN_INLINE const bf16* bf16_row(const Operand& x, int64_t b, int64_t h, int64_t s) {
  return reinterpret_cast<const bf16*>(row_at(x, DType::kBf16, b, h, s));
}

class AmxEngine {
 public:
  using Prob = bf16;
  // Measured on S = 512 and 2048, D = 64: 64 x 128 +3 %, 64 x 64 +15 %, 32 x 64 +20 % time;
  // prefetching the next tiles of K and V during the softmax changed nothing.
  static constexpr int kBM = 32, kBN = 256, kNarrowBM = 32;
  static constexpr int kAlign = 32, kPad = 32, kStart = 32;
  static constexpr int kExpDegree = 4;

  explicit AmxEngine(const AttentionParams& params)
      : p(params), D(p.D), Dv(p.Dv), Dp(round_up(D, 32)), Dvp(round_up(Dv, 32)) {
    q_.reserve(kBM * Dp);
    std::fill_n(q_.data(), kBM * Dp, bf16{0});
  }

  const AttentionParams& p;
  const int64_t D, Dv, Dp, Dvp;

  void load_keys(const Sequence& s, int64_t hk, int64_t lo, int64_t hi, bool) {
    if (s.b == b_ && hk == hk_ && lo >= lo_ && hi <= hi_) return;
    b_ = s.b, hk_ = hk;
    pack(row_at(p.k, p.dtype, s.b, hk, s.k_start + lo), p.k.s, p.k.d,
         row_at(p.v, p.dtype, s.b, hk, s.k_start + lo), p.v.s, p.v.d, lo, hi);
  }

  void pack(const char* k, int64_t k_s, int64_t k_d, const char* v, int64_t v_s, int64_t v_d,
            int64_t lo, int64_t hi) {
    lo_ = lo, hi_ = hi;
    const int64_t n = hi - lo, rows = round_up(n, kAlign);
    pack_tiles_transposed(reinterpret_cast<const bf16*>(k), k_s, k_d, n, D, k_.reserve(rows * Dp));
    pack_tiles(reinterpret_cast<const bf16*>(v), v_s, v_d, n, Dv, v_.reserve(rows * Dvp));
  }

  void load_queries(const RowBlock& rb, const Sequence& s) {
    for (int r = 0; r < rb.n; ++r) {
      const bf16* src = bf16_row(p.q, s.b, rb.h[r], s.q_start + rb.i[r]);
      for (int64_t d = 0; d < D; d += 32)
        _mm512_store_si512(q_.data() + r * Dp + d,
                           load_row32(src + d * p.q.d, p.q.d, D - d, kBM * p.q.s));
    }
  }

  void scores(const RowBlock& rb, int64_t j0, int64_t, int64_t n_padded, float* S) const {
    const int64_t steps = Dp / 32;
    tile_gemm(false, div_up(rb.n, 16), n_padded / 16, steps, {q_.data(), 32 * Dp, 64, 2 * Dp},
              {k_.data() + (j0 - lo_) * Dp, steps * kTileBytes, kTileBytes}, S, kBN);
  }

  // P takes the first half of its row of S: a row is read ahead of what is written, and the tile
  // stays in L1.
  Prob* prob_row(float* S, int r) const { return reinterpret_cast<Prob*>(S + r * kBN); }
  static FASTATTN_INLINE void put(Prob* row, vf a, vf b) {
    _mm512_storeu_si512(row, __m512i(_mm512_cvtne2ps_pbh(b, a)));
  }

  void apply(bool accumulate, const RowBlock& rb, int64_t j0, int64_t, int64_t n_padded,
             const float* S, float* acc) const {
    const int64_t n_tiles = Dvp / 16;
    tile_gemm(accumulate, div_up(rb.n, 16), n_tiles, n_padded / 32, {S, 64 * kBN, 64, 4 * kBN},
              {v_.data() + (j0 - lo_) * Dvp, kTileBytes, n_tiles * kTileBytes}, acc, Dvp);
  }

 private:
  TileScope tiles_;
  int64_t b_ = -1, hk_ = -1, lo_ = 0, hi_ = 0;
  Buffer<bf16> k_, v_, q_;
};
#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
