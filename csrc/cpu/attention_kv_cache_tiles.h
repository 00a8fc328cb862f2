// The products of attention_kv_cache_engine.h on AMX: bf16, 3 to 16 query rows a kv head.
//
// S^T = K q^T has the keys as rows of A, which a tile takes from where they lie; q^T is packed once
// a block. V is the B of P v, which wants pairs of keys interleaved: 32 keys x 64 columns at a
// time, in L1.
#if FASTATTN_LEVEL >= 3

namespace fastattn {
namespace FASTATTN_ISA {

class TileCacheEngine {
 public:
  using Prob = bf16;
  static constexpr bool kPacks = false;
  static constexpr int kBM = 16, kBN = 256, kNarrowBM = 16;
  static constexpr int kAlign = 1, kStart = 1, kPad = 32;
  static constexpr int kExpDegree = 4;

  explicit TileCacheEngine(const AttentionParams& params)
      : p(params), D(p.D), Dv(p.Dv), Dp(round_up(D, 32)), Dvp(round_up(Dv, 32)) {
    rows_.reserve(64 * Dp);
    std::fill_n(rows_.data(), 64 * Dp, bf16{0});
  }

  const AttentionParams& p;
  const int64_t D, Dv, Dp, Dvp;

  void look_at(const Slots* slots) { slots_ = slots; }

  void load_queries(const RowBlock& rb, const Sequence& s) {
    bf16* q = q_.reserve(kBM * Dp);
    for (int64_t d = 0; d < D; d += 32, q += kTileBytes / 2) {
      vf t[16];
      for (int r = 0; r < 16; ++r) {
        const bf16* row = r < rb.n ? bf16_row(p.q, s.b, rb.h[r], s.q_start + rb.i[r]) : nullptr;
        t[r] = row ? _mm512_castsi512_ps(load_row32(row + d * p.q.d, p.q.d, D - d, 0)) : vf{};
      }
      transpose16(t);
      for (int r = 0; r < 16; ++r) _mm512_store_ps(reinterpret_cast<float*>(q) + 16 * r, t[r]);
    }
  }

  // S[r][t] = q_r . k_(j0 + t), t < n_padded.
  void scores(const RowBlock& rb, int64_t j0, int64_t n, int64_t n_padded, float* S) {
    keys_.fill(*slots_, p, j0, n, n_padded);
    for (int64_t t = 0; t < n_padded; t += 64) {
      const int groups = int(std::min<int64_t>(4, (n_padded - t) / 16));
      ATile a[4];
      for (int g = 0; g < 4; ++g) a[g] = tile_of(j0, t + 16 * std::min(g, groups - 1), n, g);
      for (int64_t x = t; x < std::min(t + 64, n); ++x) {
        ask(keys_.v[x], Dv);
        ask(keys_.k[std::min<int64_t>(x + 64, n - 1)], D);
      }
      alignas(64) float c[4][256];
      products(a, c);
      for (int g = 0; g < groups; ++g) {
        vf rows[16];
        for (int x = 0; x < 16; ++x) rows[x] = load(c[g] + 16 * x);
        transpose16(rows);
        for (int r = 0; r < rb.n; ++r) store(S + r * kBN + t + 16 * g, rows[r]);
      }
    }
  }

  Prob* prob_row(float* S, int r) const { return reinterpret_cast<Prob*>(S + r * kBN); }
  static FASTATTN_INLINE void put(Prob* row, vf a, vf b) {
    _mm512_storeu_si512(row, __m512i(_mm512_cvtne2ps_pbh(b, a)));
  }

  // acc (16 x Dvp) (+)= P v, of the keys that scores() saw last; rows beyond the block's are
  // nobody's.
  void apply(bool accumulate, const RowBlock&, int64_t, int64_t, int64_t n_padded, const float* S,
             float* acc) const {
    for (int64_t c = 0; c < Dvp; c += 64) {
      if (c + 64 <= Dvp)
        columns<4>(accumulate, c, n_padded, S, acc + c);
      else
        columns<2>(accumulate, c, n_padded, S, acc + c);
    }
  }

 private:
  struct ATile {
    const bf16* ptr;
    int64_t stride;  // bytes
  };

  static FASTATTN_INLINE void ask(const char* row, int64_t n) {
    for (int64_t x = 0; x < 2 * n; x += 64) prefetch(row + x);
  }

  // 16 keys from t on: in the cache, or where a page or a head's end cuts them, in a copy.
  ATile tile_of(int64_t j0, int64_t t, int64_t n, int group) {
    const int64_t step = 2 * p.k.s;
    if (D % 32 == 0 && t + 16 <= n && slots_->together(j0 + t) >= 16)
      return {reinterpret_cast<const bf16*>(keys_.k[t]), step};
    bf16* copy = rows_.data() + group * 16 * Dp;
    for (int x = 0; x < 16; ++x) std::memcpy(copy + x * Dp, keys_.k[t + x], size_t(D) * 2);
    return {copy, 2 * Dp};
  }

  // c[g] = the keys of a[g] times q^T.
  FASTATTN_NOINLINE void products(const ATile (&a)[4], float (&c)[4][256]) const {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const bf16* q = q_.data();
    for (int64_t d = 0; d < D; d += 32, q += kTileBytes / 2) {
      _tile_loadd(4, q, 64);
      _tile_loadd(5, a[0].ptr + d, a[0].stride);
      _tile_dpbf16ps(0, 5, 4);
      _tile_loadd(6, a[1].ptr + d, a[1].stride);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(7, a[2].ptr + d, a[2].stride);
      _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(5, a[3].ptr + d, a[3].stride);
      _tile_dpbf16ps(3, 5, 4);
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
  }

  // 16 NT columns from c on.
  template <int NT>
  FASTATTN_NOINLINE void columns(bool accumulate, int64_t c, int64_t n, const float* S,
                                 float* acc) const {
    const int64_t row = 4 * Dvp;
    if (accumulate) {
      _tile_loadd(0, acc, row);
      _tile_loadd(1, acc + 16, row);
      if constexpr (NT == 4) _tile_loadd(2, acc + 32, row);
      if constexpr (NT == 4) _tile_loadd(3, acc + 48, row);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    alignas(64) bf16 v[NT * kTileBytes / 2];
    for (int64_t t = 0; t < n; t += 32) {
      interleave_keys<NT>(t, c, v);
      _tile_loadd(4, reinterpret_cast<const char*>(S) + 2 * t, 4 * kBN);
      _tile_loadd(5, v, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, v + 512, 64);
      _tile_dpbf16ps(1, 4, 6);
      if constexpr (NT == 4) {
        _tile_loadd(7, v + 1024, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, v + 1536, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, acc, row);
    _tile_stored(1, acc + 16, row);
    if constexpr (NT == 4) _tile_stored(2, acc + 32, row);
    if constexpr (NT == 4) _tile_stored(3, acc + 48, row);
  }

  // Keys [t, t + 32), columns [c, c + 16 NT) as NT tiles of B.
  template <int NT>
  FASTATTN_INLINE void interleave_keys(int64_t t, int64_t c, bf16* v) const {
    for (int x = 0; x < 16; ++x) {
      const bf16* r0 = reinterpret_cast<const bf16*>(keys_.v[t + 2 * x]) + c;
      const bf16* r1 = reinterpret_cast<const bf16*>(keys_.v[t + 2 * x + 1]) + c;
#pragma GCC unroll 2
      for (int half = 0; half < NT / 2; ++half) {
        const int64_t left = Dv - c - 32 * half;
        if (left <= 0) {
          _mm512_store_si512(v + (2 * half) * 512 + 32 * x, _mm512_setzero_si512());
          _mm512_store_si512(v + (2 * half + 1) * 512 + 32 * x, _mm512_setzero_si512());
          continue;
        }
        __m512i lo, hi;
        interleave(load_row32(r0 + 32 * half, 1, left, 0), load_row32(r1 + 32 * half, 1, left, 0),
                   &lo, &hi);
        _mm512_store_si512(v + (2 * half) * 512 + 32 * x, lo);
        _mm512_store_si512(v + (2 * half + 1) * 512 + 32 * x, hi);
      }
    }
  }

  TileScope tiles_;
  const Slots* slots_ = nullptr;
  KeyTable<kBN> keys_;
  Buffer<bf16> q_, rows_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
#endif
