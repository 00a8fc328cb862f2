// The matrix products of a few query rows with keys straight from the cache, on one thread.
//
// Every key is used once a tile by all rows of its kv head, so packing it would cost as much as
// using it. A tile's keys are reached through a table of pointers: pages of any size cost a tile
// one look-up a key, and give the bits that a contiguous cache gives. Tiles: S is kBM x kBN.

namespace fastattn {
namespace FASTATTN_ISA {

// The pointers to the rows of up to kBN keys of one kv head.
template <int kBN>
class KeyTable {
 public:
  // Keys [j0, j0 + n); rows up to n_padded repeat the last one.
  void fill(const Slots& slots, const AttentionParams& p, int64_t j0, int64_t n, int64_t n_padded) {
    const int64_t size = size_of(p.dtype), k_step = p.k.s * size, v_step = p.v.s * size;
    for (int64_t t = 0; t < n;) {
      const int64_t run = std::min(slots.together(j0 + t), n - t);
      const char *k_row = slots.k(j0 + t), *v_row = slots.v(j0 + t);
      for (int64_t x = 0; x < run; ++x, ++t, k_row += k_step, v_row += v_step)
        k[t] = k_row, v[t] = v_row;
    }
    for (int64_t t = n; t < n_padded; ++t) k[t] = k[n - 1], v[t] = v[n - 1];
  }

  const char *k[kBN], *v[kBN];
};

class CacheEngine {
 public:
  using Prob = float;
  static constexpr bool kPacks = false;
  static constexpr int kBM = 16, kBN = 256, kNarrowBM = 16;
  static constexpr int kAlign = 1;  // of a range's first key
  static constexpr int kStart = 1;  // of a tile's first key: none outside a window is read
  static constexpr int kPad = 2 * W;
  static constexpr int kExpDegree = 6;

  explicit CacheEngine(const AttentionParams& params)
      : p(params), D(p.D), Dv(p.Dv), Dp(round_up(D, 32)), Dvp(round_up(Dv, W)) {}

  const AttentionParams& p;
  const int64_t D, Dv, Dp, Dvp;

  void look_at(const Slots* slots) { slots_ = slots; }

  void load_queries(const RowBlock& rb, const Sequence& s) {
#if FASTATTN_LEVEL >= 3
    if (p.dtype == DType::kBf16) {  // stays bf16: see multiply
      bf16* q = q16_.reserve(kBM * Dp);
      for (int r = 0; r < rb.n; ++r)
        for (int64_t d = 0; d < D; d += 32)
          _mm512_store_si512(q + r * Dp + d,
                             load_row32(reinterpret_cast<const bf16*>(row(rb, s, r)) + d * p.q.d,
                                        p.q.d, D - d, 0));
      return;
    }
#endif
    float* q = q_.reserve(kBM * Dp);
    for (int r = 0; r < rb.n; ++r) {
      pack_rows(p.dtype, row(rb, s, r), 0, p.q.d, 1, D, Dp, q + r * Dp);
#if FASTATTN_LEVEL < 3
      if (p.dtype == DType::kBf16) part_pairs(q + r * Dp, Dp);
#endif
    }
  }

  // S[r][t] = q_r . k_(j0 + t), t < n_padded.
  void scores(const RowBlock& rb, int64_t j0, int64_t n, int64_t n_padded, float* S) {
    keys_.fill(*slots_, p, j0, n, n_padded);
    switch (p.dtype) {
      case DType::kBf16:
        return scores_of<bf16>(rb.n, n, n_padded, S);
      case DType::kF16:
        return scores_of<f16>(rb.n, n, n_padded, S);
      default:
        return scores_of<float>(rb.n, n, n_padded, S);
    }
  }

  Prob* prob_row(float* S, int r) const { return S + r * kBN; }
  static FASTATTN_INLINE void put(Prob* row, vf a, vf b) { store(row, a), store(row + W, b); }

  // acc (rows x Dvp) (+)= P v, of the keys that scores() saw last.
  void apply(bool accumulate, const RowBlock& rb, int64_t, int64_t n, int64_t, const float* S,
             float* acc) const {
    switch (p.dtype) {
      case DType::kBf16:
        return apply_of<bf16>(accumulate, rb.n, n, S, acc);
      case DType::kF16:
        return apply_of<f16>(accumulate, rb.n, n, S, acc);
      default:
        return apply_of<float>(accumulate, rb.n, n, S, acc);
    }
  }

 private:
  const char* row(const RowBlock& rb, const Sequence& s, int r) const {
    return row_at(p.q, p.dtype, s.b, rb.h[r], s.q_start + rb.i[r]);
  }

  static constexpr int64_t kAhead = 4;  // rows

  template <class T>
  static FASTATTN_INLINE void ask(const char* row, int64_t n) {
    for (int64_t x = 0; x < n * int64_t(sizeof(T)); x += 64) prefetch(row + x);
  }

  // ---- q k^T: a dot product a row and key, the sums over lanes taken for W keys at once.

  template <class T>
  void scores_of(int rows, int64_t n, int64_t n_padded, float* S) const {
    for (int64_t t = 0; t < n_padded; t += W) {
      // V of these keys is wanted next, and the hardware's prefetchers stop at every page and gap.
      // Measured on 16384 keys (bf16, fp32, pages of 16, (B, S, Hk, D)): -12 to -37 % time against
      // asking for V alone; asking for neither, +6 to +28 %.
      for (int64_t x = t; x < std::min(t + W, n); ++x) {
        ask<T>(keys_.v[x], Dv);
        ask<T>(keys_.k[std::min(x + kAhead, n - 1)], D);
      }
      int r = 0;
      for (; r + 4 <= rows; r += 4) dots<T, 4>(t, r, S);
      if (rows & 2) dots<T, 2>(t, r, S), r += 2;
      if (rows & 1) dots_of_one<T>(t, r, S);
    }
  }

  // One row: keys go in fours instead, so that a vector of q is read once for them and their sums
  // do not wait for each other.
  template <class T>
  FASTATTN_NOINLINE void dots_of_one(int64_t t, int r0, float* S) const {
    constexpr int kKeys = 4;
    vf part[W];
    for (int x = 0; x < W; x += kKeys) {
      const T* k[kKeys];
      vf c[kKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i)
        k[i] = reinterpret_cast<const T*>(keys_.k[t + x + i]), c[i] = vf{};
      multiply_one(k, r0, c);
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) part[x + i] = c[i];
    }
    store(S + r0 * kBN + t, reduce_add_rows(part));
  }
  template <class T, int K>
  FASTATTN_INLINE void multiply_one(const T* const (&k)[K], int r0, vf (&c)[K]) const {
    const float* q = q_.data() + r0 * Dp;
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      const vf qv = load(q + d);
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i) c[i] = fma(qv, load(k[i] + d), c[i]);
    }
    if (d == D) return;
    const vf qv = load(q + d);
#pragma GCC unroll 4
    for (int i = 0; i < K; ++i) c[i] = fma(qv, load_part(k[i] + d, D - d), c[i]);
  }
#if FASTATTN_LEVEL < 3
  template <int K>
  FASTATTN_INLINE void multiply_one(const bf16* const (&k)[K], int r0, vf (&c)[K]) const {
    multiply_pairs(q_.data() + r0 * Dp, 0, k, 1, D, c);
  }
#else
  template <int K>
  FASTATTN_INLINE void multiply_one(const bf16* const (&k)[K], int r0, vf (&c)[K]) const {
    const bf16* q = q16_.data() + r0 * Dp;
    for (int64_t d = 0; d < D; d += 32) {
      const __m512bh qv = __m512bh(_mm512_load_si512(q + d));
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i)
        c[i] = _mm512_dpbf16_ps(c[i], qv, __m512bh(load_row32(k[i] + d, 1, D - d, 0)));
    }
  }
#endif

  // Rows [r0, r0 + R) against keys [t, t + W).
  template <class T, int R>
  FASTATTN_NOINLINE void dots(int64_t t, int r0, float* S) const {
    vf part[R][W];
    for (int x = 0; x < W; ++x) {
      vf c[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) c[r] = vf{};
      multiply(reinterpret_cast<const T*>(keys_.k[t + x]), r0, c);
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
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      const vf kv = load(k + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) c[r] = fma(load(q + r * Dp + d), kv, c[r]);
    }
    if (d == D) return;
    const vf kv = load_part(k + d, D - d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) c[r] = fma(load(q + r * Dp + d), kv, c[r]);
  }
#if FASTATTN_LEVEL < 3
  template <int R>
  FASTATTN_INLINE void multiply(const bf16* k, int r0, vf (&c)[R]) const {
    multiply_pairs(q_.data() + r0 * Dp, Dp, &k, 0, D, c);
  }
#else
  template <int R>
  FASTATTN_INLINE void multiply(const bf16* k, int r0, vf (&c)[R]) const {
    const bf16* q = q16_.data() + r0 * Dp;
    for (int64_t d = 0; d < D; d += 32) {
      const __m512bh kv = __m512bh(load_row32(k + d, 1, D - d, 0));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        c[r] = _mm512_dpbf16_ps(c[r], __m512bh(_mm512_load_si512(q + r * Dp + d)), kv);
    }
  }
#endif

  // ---- P v: rows of V are converted on their way into registers.

  template <class T>
  void apply_of(bool accumulate, int rows, int64_t n, const float* S, float* acc) const {
    const int64_t whole = Dv / W * W;
    int r = 0;
    for (; r + 6 <= rows; r += 6) columns<T, 6>(accumulate, r, n, whole, S, acc);
    if (rows - r >= 4) columns<T, 4>(accumulate, r, n, whole, S, acc), r += 4;
    if (rows - r >= 2) columns<T, 2>(accumulate, r, n, whole, S, acc), r += 2;
    if (rows - r >= 1) columns<T, 1>(accumulate, r, n, whole, S, acc);
  }

  template <class T, int R>
  void columns(bool accumulate, int r0, int64_t n, int64_t whole, const float* S,
               float* acc) const {
    // As many columns a pass as the registers hold: every pass looks the pointers up again.
    constexpr int kWide = R <= 2 ? 2 * kNV : kNV;
    int64_t c = 0;
    for (; c + kWide * W <= whole; c += kWide * W)
      product<T, R, kWide>(accumulate, r0, n, c, S, acc);
    for (; c + kNV * W <= whole; c += kNV * W) product<T, R, kNV>(accumulate, r0, n, c, S, acc);
    for (; c + W <= whole; c += W) product<T, R, 1>(accumulate, r0, n, c, S, acc);
    if (c < Dv) product<T, R, 0>(accumulate, r0, n, c, S, acc);
  }

  // NV vectors of columns from c on; 0: the part of a vector that is left.
  template <class T, int R, int NV>
  FASTATTN_NOINLINE void product(bool accumulate, int r0, int64_t n, int64_t c, const float* S,
                                 float* acc) const {
    constexpr int N = NV == 0 ? 1 : NV;
    // Two sums of every second key where one sum's additions would wait for each other.
    constexpr int kSums = R * N <= 4 ? 2 : 1;
    vf sum[kSums][R][N] = {};
    const float* P = S + r0 * kBN;
    int64_t t = 0;
    for (; t + kSums <= n; t += kSums)
#pragma GCC unroll 2
      for (int i = 0; i < kSums; ++i) add_key<T, R, NV>(t + i, c, P, sum[i]);
    if (t < n) add_key<T, R, NV>(t, c, P, sum[0]);
    float* out = acc + r0 * Dvp + c;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf(&all)[N] = sum[0][r];
#pragma GCC unroll 8
      for (int x = 0; x < N; ++x)
        if (kSums > 1) all[x] += sum[kSums - 1][r][x];
      if constexpr (kInPairs<T, NV>)
#pragma GCC unroll 8
        for (int x = 0; x < N; x += 2) zip_pairs(all[x], all[x + 1], &all[x], &all[x + 1]);
#pragma GCC unroll 8
      for (int x = 0; x < N; ++x) {
        float* to = out + r * Dvp + x * W;
        store(to, accumulate ? load(to) + all[x] : all[x]);
      }
    }
  }

  // Whether sums of NV vectors are of columns at even and odd places in turn.
  template <class T, int NV>
  static constexpr bool kInPairs = std::is_same_v<T, bf16> && NV > 0 && NV % 2 == 0;

  template <class T, int R, int NV, int N>
  FASTATTN_INLINE void add_key(int64_t t, int64_t c, const float* P, vf (&sum)[R][N]) const {
    const T* v = reinterpret_cast<const T*>(keys_.v[t]) + c;
    vf b[N];
    if constexpr (kInPairs<T, NV>) {
#pragma GCC unroll 8
      for (int x = 0; x < N; x += 2) load_pairs(v + x * W, &b[x], &b[x + 1]);
    } else {
#pragma GCC unroll 8
      for (int x = 0; x < N; ++x) b[x] = NV == 0 ? load_part(v, Dv - c) : load(v + x * W);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf a = set1(P[r * kBN + t]);
#pragma GCC unroll 8
      for (int x = 0; x < N; ++x) sum[r][x] = fma(a, b[x], sum[r][x]);
    }
  }

  const Slots* slots_ = nullptr;
  KeyTable<kBN> keys_;
  Buffer<float> q_;
#if FASTATTN_LEVEL >= 3
  Buffer<bf16> q16_;
#endif
};

// An engine of attention_engine.h on keys of a cache, packed a chunk at a time.
template <class E>
class ChunkEngine : public E {
 public:
  static constexpr bool kPacks = true;
  using E::E;

  void look_at(const Slots* slots) { slots_ = slots; }

  // Keys [lo, hi) into tiles; where pages cut them, gathered first.
  void load_chunk(int64_t lo, int64_t hi) {
    const AttentionParams& p = this->p;
    if (slots_->together(lo) >= hi - lo)
      return this->pack(slots_->k(lo), p.k.s, 1, slots_->v(lo), p.v.s, 1, lo, hi);
    const int64_t k_bytes = p.D * size_of(p.dtype), v_bytes = p.Dv * size_of(p.dtype);
    char *k = k_rows_.reserve((hi - lo) * k_bytes), *v = v_rows_.reserve((hi - lo) * v_bytes);
    for (int64_t j = lo; j < hi; ++j, k += k_bytes, v += v_bytes) {
      std::memcpy(k, slots_->k(j), size_t(k_bytes));
      std::memcpy(v, slots_->v(j), size_t(v_bytes));
    }
    this->pack(k_rows_.data(), p.D, 1, v_rows_.data(), p.Dv, 1, lo, hi);
  }

 private:
  const Slots* slots_ = nullptr;
  Buffer<char> k_rows_, v_rows_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
