// The five products of the backward on one thread.
//
//   S = q k^T,  dP = do v^T,  dv += P^T do,  dk += dS^T q,  dq += dS k
//
// S and dP are kBM x kBN tiles, row stride kBN; the pass turns them in place into dropout(P) and
// dS. Accumulators are fp32: dq (rows x Dp), dk and dv in an order of the engine's own, kBN keys a
// block.

namespace fastattn {
namespace FASTATTN_ISA {

class FmaGradEngine {
 public:
  static constexpr int kBM = 48, kBN = 192;
  static constexpr int kPad = 2 * W;  // granularity of a tile's width
  static constexpr int kAlign = kPanel;
  static constexpr int kExpDegree = 6;

  explicit FmaGradEngine(const AttentionParams& params)
      : p(params),
        D(p.D),
        Dv(p.Dv),
        Dp(round_up(D, W)),
        Dvp(round_up(Dv, W)),
        few_(few_rows(p)),
        of_k_(dots_with(p, p.k, D)),
        of_v_(dots_with(p, p.v, Dv)),
        q_by_k_(of_k_),
        do_by_v_(of_v_) {}

  const AttentionParams& p;
  const int64_t D, Dv, Dp, Dvp;

  void load_keys(const Sequence& s, int64_t hk, int64_t lo, int64_t hi) {
    lo_ = lo;
    const int64_t n = hi - lo;
    const char* k = row_at(p.k, p.dtype, s.b, hk, s.k_start + lo);
    k_ = natural(k, p.k, n, D, Dp, k_buf_);
    if (few_) {
      q_by_k_.load_keys(s, hk, lo, hi, true);
      return do_by_v_.load_keys(s, hk, lo, hi, true);
    }
    const char* v = row_at(p.v, p.dtype, s.b, hk, s.k_start + lo);
    pack_transposed<kPanel>(p.dtype, k, p.k.s, p.k.d, n, D,
                            kt_.reserve(transposed_size<kPanel>(n, D)));
    pack_transposed<kPanel>(p.dtype, v, p.v.s, p.v.d, n, Dv,
                            vt_.reserve(transposed_size<kPanel>(n, Dv)));
  }

  // Rows [first, last) of head h; d_o null = no gradient of o.
  void load_rows(const Sequence& s, const Operand& d_o, int64_t h, int64_t first, int64_t last) {
    const int64_t n = last - first;
    const char* q = row_at(p.q, p.dtype, s.b, h, s.q_start + first);
    q_ = natural(q, p.q, n, D, Dp, q_buf_);
    if (!few_)
      pack_transposed<kMR>(p.dtype, q, p.q.s, p.q.d, n, D, qt_.reserve(transposed_size<kMR>(n, D)));
    if (!d_o.ptr) return;
    const char* g = row_at(d_o, p.dtype, s.b, h, s.q_start + first);
    do_ = natural(g, d_o, n, Dv, Dvp, do_buf_);
    of_v_.q = d_o;
    if (!few_)
      pack_transposed<kMR>(p.dtype, g, d_o.s, d_o.d, n, Dv,
                           dot_.reserve(transposed_size<kMR>(n, Dv)));
  }

  // r0: first row of the block, counted from load_rows' first; a multiple of kBM. S is the
  // forward's to the last bit: P = exp(S - lse) would be off by as much as S.
  void scores(const RowBlock& rb, const Sequence& s, int64_t r0, int64_t j0, int64_t n,
              int64_t n_padded, float* S) {
    if (few_) return few_dots(q_by_k_, rb, s, j0, n, n_padded, S);
    gemm<1>(false, rb.n, n_padded, D, qt_.data() + r0 * D, {kMR * D, kMR},
            kt_.data() + (j0 - lo_) * D, {kPanel * D, kPanel}, S, kBN);
  }
  void dprobs(const RowBlock& rb, const Sequence& s, int64_t r0, int64_t j0, int64_t n,
              int64_t n_padded, float* dP) {
    if (few_) return few_dots(do_by_v_, rb, s, j0, n, n_padded, dP);
    gemm<1>(false, rb.n, n_padded, Dv, dot_.data() + r0 * Dv, {kMR * Dv, kMR},
            vt_.data() + (j0 - lo_) * Dv, {kPanel * Dv, kPanel}, dP, kBN);
  }
  void finish_tile(int, int64_t, const float*, const float*) {}

  void add_dv(int64_t r0, int rows, int64_t n, const float* P, float* acc) const {
    gemm<1>(true, n, Dvp, rows, P, {kMR, kBN}, do_.ptr + r0 * do_.stride, {kPanel, do_.stride}, acc,
            Dvp);
  }
  void add_dk(int64_t r0, int rows, int64_t n, const float* dS, float* acc) const {
    gemm<1>(true, n, Dp, rows, dS, {kMR, kBN}, q_.ptr + r0 * q_.stride, {kPanel, q_.stride}, acc,
            Dp);
  }
  void add_dq(int rows, int64_t j0, int64_t n, int64_t, const float* dS, float* acc) const {
    const float* k = k_.ptr + (j0 - lo_) * k_.stride;
    gemm<kBN>(true, rows, Dp, n, dS, {kMR * kBN, 1}, k, {kPanel, k_.stride}, acc, Dp);
  }

  // The first n keys of a block of an accumulator.
  void clear_keys(float* acc, int64_t n, int64_t padded) const {
    std::fill_n(acc, n * padded, 0.f);
  }

  // One block of kBN keys of an accumulator of padded width, to rows of out.
  void write_keys(const float* acc, int64_t n, int64_t width, int64_t padded, float factor,
                  const Operand& out, int64_t b, int64_t hk, int64_t at) const {
    for (int64_t t = 0; t < n; ++t)
      store_row(p.dtype, acc + t * padded, width, factor, row_at(out, p.dtype, b, hk, at + t));
  }

 private:
  struct Rows {
    const float* ptr = nullptr;
    int64_t stride = 0;
  };
  // Rows as fp32 with unit stride and padded width: the tensor's own memory where it is that.
  Rows natural(const char* src, const Operand& x, int64_t n, int64_t cols, int64_t padded,
               Buffer<float>& buf) const {
    if (p.dtype == DType::kF32 && x.d == 1 && cols == padded)
      return {reinterpret_cast<const float*>(src), x.s};
    pack_rows(p.dtype, src, x.s, x.d, n, cols, padded, buf.reserve(n * padded));
    return {buf.data(), padded};
  }

  // The forward's engine, where rows are few: nothing is packed, each key is read where it lies.
  static void few_dots(FmaEngine& engine, const RowBlock& rb, const Sequence& s, int64_t j0,
                       int64_t n, int64_t n_padded, float* out) {
    engine.load_queries(rb, s);
    engine.scores(rb, j0, n, n_padded, out);
  }
  // The call for that engine's products with the rows of x, width long. It has no values to add up.
  static AttentionParams dots_with(const AttentionParams& p, const Operand& x, int64_t width) {
    AttentionParams of = p;
    of.k = x, of.D = width, of.Dv = 0;
    return of;
  }

  int64_t lo_ = 0;
  const bool few_;
  AttentionParams of_k_, of_v_;
  FmaEngine q_by_k_, do_by_v_;
  Rows k_, q_, do_;
  Buffer<float> kt_, vt_, k_buf_, qt_, dot_, q_buf_, do_buf_;
};

#if FASTATTN_LEVEL >= 3
class AmxGradEngine {
 public:
  static constexpr int kBM = 64, kBN = 128;
  static constexpr int kAlign = 32, kPad = 32;
  static constexpr int kExpDegree = 4;

  explicit AmxGradEngine(const AttentionParams& params)
      : p(params), D(p.D), Dv(p.Dv), Dp(round_up(D, 32)), Dvp(round_up(Dv, 32)) {
    p_.reserve(kBM * kBN), ds_.reserve(kBM * kBN), ds_rows_.reserve(kBM * kBN);
  }

  const AttentionParams& p;
  const int64_t D, Dv, Dp, Dvp;

  void load_keys(const Sequence& s, int64_t hk, int64_t lo, int64_t hi) {
    lo_ = lo;
    const int64_t n = hi - lo, rows = round_up(n, kAlign);
    const bf16* k = bf16_row(p.k, s.b, hk, s.k_start + lo);
    const bf16* v = bf16_row(p.v, s.b, hk, s.k_start + lo);
    pack_tiles_transposed(k, p.k.s, p.k.d, n, D, kt_.reserve(rows * Dp));
    pack_tiles_transposed(v, p.v.s, p.v.d, n, Dv, vt_.reserve(rows * Dvp));
    pack_tiles(k, p.k.s, p.k.d, n, D, k_.reserve(rows * Dp));
  }

  void load_rows(const Sequence& s, const Operand& d_o, int64_t h, int64_t first, int64_t last) {
    load_operand(bf16_row(p.q, s.b, h, s.q_start + first), p.q, last - first, D, q_, qt_);
    if (d_o.ptr)
      load_operand(bf16_row(d_o, s.b, h, s.q_start + first), d_o, last - first, Dv, do_, dot_);
  }

  void scores(const RowBlock& rb, const Sequence&, int64_t r0, int64_t j0, int64_t,
              int64_t n_padded, float* S) const {
    product(q_, kt_, Dp, r0, rb.n, j0, n_padded, S);
  }
  void dprobs(const RowBlock& rb, const Sequence&, int64_t r0, int64_t j0, int64_t,
              int64_t n_padded, float* dP) const {
    product(do_, vt_, Dvp, r0, rb.n, j0, n_padded, dP);
  }

  // P and dS in bf16: as B tiles with rows as k (both), and row by row (dS).
  void finish_tile(int rows, int64_t n_padded, const float* P, const float* dS) {
    const int padded = int(round_up(rows, 32));
    for (int r = 0; r < padded; r += 2) {
      bf16* p_to = p_.data() + (r / 32) * (32 * kBN) + (r % 32) * 16;
      bf16* ds_to = ds_.data() + (r / 32) * (32 * kBN) + (r % 32) * 16;
      for (int64_t t = 0; t < n_padded; t += 32, p_to += 1024, ds_to += 1024) {
        const __m512i p0 = halves(P, r, rows, t), p1 = halves(P, r + 1, rows, t);
        const __m512i d0 = halves(dS, r, rows, t), d1 = halves(dS, r + 1, rows, t);
        __m512i lo, hi;
        interleave(p0, p1, &lo, &hi);
        _mm512_store_si512(p_to, lo), _mm512_store_si512(p_to + 512, hi);
        interleave(d0, d1, &lo, &hi);
        _mm512_store_si512(ds_to, lo), _mm512_store_si512(ds_to + 512, hi);
        _mm512_store_si512(ds_rows_.data() + r * kBN + t, d0);
        _mm512_store_si512(ds_rows_.data() + (r + 1) * kBN + t, d1);
      }
    }
  }

  void add_dv(int64_t r0, int rows, int64_t n, const float*, float* acc) const {
    transposed_product(dot_, p_, Dvp, r0, rows, n, acc);
  }
  void add_dk(int64_t r0, int rows, int64_t n, const float*, float* acc) const {
    transposed_product(qt_, ds_, Dp, r0, rows, n, acc);
  }
  void add_dq(int rows, int64_t j0, int64_t, int64_t n_padded, const float*, float* acc) const {
    const int64_t n_tiles = Dp / 16;
    tile_gemm(true, div_up(rows, 16), n_tiles, n_padded / 32,
              {ds_rows_.data(), 32 * kBN, 64, 2 * kBN},
              {k_.data() + (j0 - lo_) * Dp, kTileBytes, n_tiles * kTileBytes}, acc, Dp);
  }

  // acc is (padded x kBN): a column a key.
  void clear_keys(float* acc, int64_t n, int64_t padded) const {
    for (int64_t d = 0; d < padded; ++d) std::fill_n(acc + d * kBN, round_up(n, 32), 0.f);
  }
  void write_keys(const float* acc, int64_t n, int64_t width, int64_t, float factor,
                  const Operand& out, int64_t b, int64_t hk, int64_t at) const {
    alignas(64) float row[16];
    for (int64_t t = 0; t < n; t += 16) {
      for (int64_t d = 0; d < width; d += 16) {
        vf tile[16];
        for (int x = 0; x < 16; ++x) tile[x] = load(acc + (d + x) * kBN + t);
        transpose16(tile);
        for (int64_t x = 0; x < std::min<int64_t>(16, n - t); ++x) {
          store(row, tile[x]);
          store_row(DType::kBf16, row, std::min<int64_t>(16, width - d), factor,
                    row_at(out, DType::kBf16, b, hk, at + t + x) + 2 * d);
        }
      }
    }
  }

 private:
  // Rows padded to whole tiles (a), and transposed as A tiles with rows as k (at).
  void load_operand(const bf16* src, const Operand& x, int64_t n, int64_t cols, Buffer<bf16>& a,
                    Buffer<bf16>& at) {
    const int64_t rows = round_up(n, kBM), padded = round_up(cols, 32);
    bf16* to = a.reserve(rows * padded);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < padded; c += 32)
        _mm512_store_si512(to + r * padded + c,
                           r < n ? load_row32(src + r * x.s + c * x.d, x.d, cols - c, 16 * x.s)
                                 : _mm512_setzero_si512());
    bf16* tiles = at.reserve(rows * padded);
    pack_tiles(src, x.s, x.d, n, cols, tiles);
    for (int64_t tile = 0; tile < round_up(n, 32) * padded / 512; ++tile) {
      float* t = reinterpret_cast<float*>(tiles + tile * 512);
      vf r[16];
      for (int y = 0; y < 16; ++y) r[y] = load(t + 16 * y);
      transpose16(r);
      for (int y = 0; y < 16; ++y) store(t + 16 * y, r[y]);
    }
  }

  void product(const Buffer<bf16>& a, const Buffer<bf16>& b, int64_t width, int64_t r0, int n,
               int64_t j0, int64_t n_padded, float* C) const {
    tile_gemm(false, div_up(n, 16), n_padded / 16, width / 32,
              {a.data() + r0 * width, 32 * width, 64, 2 * width},
              {b.data() + (j0 - lo_) * width, width / 32 * kTileBytes, kTileBytes}, C, kBN);
  }

  void transposed_product(const Buffer<bf16>& at, const Buffer<bf16>& b, int64_t width, int64_t r0,
                          int rows, int64_t n, float* acc) const {
    const int64_t m_tiles = width / 16;
    tile_gemm(true, m_tiles, 2 * div_up(n, 32), div_up(rows, 32),
              {at.data() + r0 * width, kTileBytes, m_tiles * kTileBytes, 64},
              {b.data(), kTileBytes, 2 * kBN / 32 * kTileBytes}, acc, kBN);
  }

  FASTATTN_INLINE static __m512i halves(const float* x, int r, int rows, int64_t t) {
    if (r >= rows) return _mm512_setzero_si512();
    x += r * kBN + t;
    return __m512i(_mm512_cvtne2ps_pbh(_mm512_load_ps(x + 16), _mm512_load_ps(x)));
  }

  TileScope tiles_;
  int64_t lo_ = 0;
  Buffer<bf16> kt_, vt_, k_, q_, qt_, do_, dot_, p_, ds_, ds_rows_;
};
#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
