// The FFN in bf16 on AMX tiles, a block of rows from norm to residual without leaving L2.
//
// Transposed: u^T = W1 x^T and y^T = W2 a^T. A row of a weight has its k side by side, as the tile
// unit wants its left operand, so the weights are read where they lie and nothing of them is
// packed, cached or goes stale; packed is the block of activations, which is small. The bias is
// then one number a row of u^T, and two rows of a^T side by side are the pairs that the second
// product reads.
//
// FLOPs 4 M D F (gated 6). Bytes: the weights once a block of up to 256 rows, x and y once. At 256
// rows a block needs 256 FLOPs for each byte of weights: bound by the tiles, not by L3.
// Scratch a worker, D = 768, 256 rows: x^T 384 KB, u^T chunk 256 KB, a^T chunk 128 KB, y^T 768 KB.
#if FASTATTN_LEVEL >= 3

namespace fastattn {
namespace FASTATTN_ISA {

inline bool ffn_tiles_serve(const FfnParams& p) {
  return p.w1.dtype == DType::kBf16 && p.D % 32 == 0 && p.F % 32 == 0 && p.Dout % 32 == 0;
}

class FfnTiles {
 public:
  static constexpr int64_t kChunk = 256;  // hidden units between the two products
  static constexpr int64_t kDepth = 384;  // of the sum a pass

  FfnTiles(const FfnParams& params, int64_t rows)
      : p(params),
        R_(round_up(rows, 32)),
        before_(params.before),
        after_(params.after),
        drop_(p.dropout.p, p.dropout.seed) {
    x_.reserve(R_ * p.D), xt_.reserve(R_ * p.D), at_.reserve(R_ * kChunk);
    u_.reserve(R_ * kChunk), y_.reserve(R_ * p.Dout), rows_.reserve(R_ * p.Dout);
    if (p.w_gate.ptr) g_.reserve(R_ * kChunk);
    b1_ = read_vec(p.b1, p.F, b1_buf_), b_gate_ = read_vec(p.b_gate, p.F, b_gate_buf_);
    before_.y = {x_.data(), DType::kBf16, p.D};
    after_.x = {rows_.data(), DType::kF32, p.Dout};
  }

  template <Act kAct>
  void block(int64_t m0, int64_t rows, NormForward& prologue, NormForward& epilogue) {
    m0_ = m0, rows_here_ = rows, Rb_ = round_up(rows, 32);
    normalise(prologue);
    for (int64_t f0 = 0; f0 < p.F; f0 += kChunk) {
      const int64_t n = std::min(kChunk, p.F - f0);
      product(p.w1, f0, 0, n, p.D, xt_.data(), false, u_.data());
      if (p.w_gate.ptr) product(p.w_gate, f0, 0, n, p.D, xt_.data(), false, g_.data());
      if (p.u.ptr) save(u_.data(), p.u, f0, n);
      if (p.g.ptr) save(g_.data(), p.g, f0, n);
      for (int64_t m = 0; m < Rb_; m += 16)  // f inside: tiles are written in order
        for (int64_t f = 0; f < n; f += 4) act4<kAct>(f0, f, m, n);
      if (p.a.ptr) save(u_.data(), p.a, f0, n);
      product(p.w2, 0, f0, p.Dout, n, at_.data(), f0 > 0, y_.data());
    }
    const Rows all{rows_.data(), DType::kF32, p.Dout};
    m0_ = 0;
    save(y_.data(), all, 0, p.Dout);
    after_.x.ptr = rows_.data() - m0 * p.Dout;  // its row m0 is the first of the block
    for (int64_t m = m0; m < m0 + rows; ++m) epilogue.row(m);
  }

  const NormParams& before() const { return before_; }
  const NormParams& after() const { return after_; }

 private:
  // x^T of the block as tiles, rows up to the next multiple of 32 zero.
  void normalise(NormForward& prologue) {
    const Rows& x = before_.x;
    const bf16* from = x_.data();
    int64_t stride = p.D;
    if (before_.norm == Norm::kNone && x.dtype == DType::kBf16) {
      from = reinterpret_cast<const bf16*>(row_of(x, m0_)), stride = x.stride;
    } else {
      before_.y.ptr = x_.data() - m0_ * p.D;
      for (int64_t m = m0_; m < m0_ + rows_here_; ++m) prologue.row(m);
    }
    pack_tiles_transposed(from, stride, 1, rows_here_, p.D, xt_.data());
  }

  // C^T (n x Rb) (+)= (rows r0.., columns k0.. of w) B. Two row tiles of w stay in L1 (kDepth of
  // their columns: 24 KB) while B streams from L2, so memory is read once, in order.
  void product(const Rows& w, int64_t r0, int64_t k0, int64_t n, int64_t k, const bf16* b,
               bool accumulate, float* c) const {
    const int64_t row = w.stride * 2, steps = k / 32, parts = div_up(k, kDepth);
    const int64_t part = div_up(steps, parts);
    const char* bp = reinterpret_cast<const char*>(b);
    for (int64_t s0 = 0; s0 < steps; s0 += part, accumulate = true) {
      const int64_t s = std::min(part, steps - s0);
      for (int64_t i = 0; i < n; i += 32) {
        const char* a = row_of(w, r0 + i) + k0 * 2 + s0 * 64;
        const int64_t ahead = 32 * 32 / Rb_ + 1;  // rows of the next tiles a block
        for (int64_t m = 0, next = 32; m < Rb_; m += 32) {
          if (i + 32 < n)
            for (const int64_t end = std::min<int64_t>(next + ahead, 64); next < end; ++next)
              for (int64_t x = 0; x < s; ++x) __builtin_prefetch(a + next * row + x * 64, 0, 2);
          tile_block<2, 2>(accumulate, s, a, 16 * row, 64, row,
                           bp + (m / 16 * steps + s0) * kTileBytes, steps * kTileBytes, kTileBytes,
                           c + i * Rb_ + m, Rb_);
        }
      }
    }
  }

  // Hidden units f0 + f .. + 3 of 16 rows: bias, activation, dropout, and into the tiles.
  template <Act kAct>
  FASTATTN_INLINE void act4(int64_t f0, int64_t f, int64_t m, int64_t n) {
    float keep[4][16];
    if (drop_.on) {
      const int64_t i = p.dropout.first_row + m0_ + m;
      drop_.column4(i, (f0 + f) >> 2, p.dropout.site, keep);
    }
    vf a[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      float* at = u_.data() + (f + j) * Rb_ + m;
      vf up = load(at);
      if (b1_) up += b1_[f0 + f + j];
      if (p.w_gate.ptr) {
        vf v = load(g_.data() + (f + j) * Rb_ + m);
        if (b_gate_) v += b_gate_[f0 + f + j];
        a[j] = activate<kAct, Grade::kCoarse>(v) * up;
      } else {
        a[j] = activate<kAct, Grade::kCoarse>(up);
      }
      if (drop_.on) {
        const vf k = load(keep[j]);
        a[j] = k == vf{} ? vf{} : a[j] * k;
      }
      if (p.a.ptr) store(at, a[j]);
    }
    bf16* tile = at_.data() + (m / 16 * (n / 32) + f / 32) * 512 + f % 32 / 2 * 32;
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += 2)
      _mm512_store_si512(tile + j * 16, pairs(__m256i(_mm512_cvtneps_pbh(a[j])),
                                              __m256i(_mm512_cvtneps_pbh(a[j + 1]))));
  }

  // c^T (n x Rb) into columns f0.. of the block's rows, whole cache lines of bf16 at a time.
  void save(const float* c, const Rows& to, int64_t f0, int64_t n) const {
    for (int64_t m = 0; m < rows_here_; m += 16) {
      const int64_t here = std::min<int64_t>(16, rows_here_ - m);
      for (int64_t f = 0; f < n; f += 32) {
        vf a[16], b[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) a[j] = load(c + (f + j) * Rb_ + m);
        transpose16(a);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) b[j] = load(c + (f + 16 + j) * Rb_ + m);
        transpose16(b);
        for (int64_t j = 0; j < here; ++j) {
          char* dst = row_of(to, m0_ + m + j);
          if (to.dtype == DType::kBf16) {
            _mm512_storeu_si512(reinterpret_cast<bf16*>(dst) + f0 + f,
                                __m512i(_mm512_cvtne2ps_pbh(b[j], a[j])));
          } else {
            store(reinterpret_cast<float*>(dst) + f0 + f, a[j]);
            store(reinterpret_cast<float*>(dst) + f0 + f + 16, b[j]);
          }
        }
      }
    }
  }

  const FfnParams& p;
  const int64_t R_;
  NormParams before_, after_;
  const Dropout drop_;
  TileScope tiles_;
  int64_t m0_ = 0, rows_here_ = 0, Rb_ = 0;
  const float *b1_, *b_gate_;
  Buffer<float> b1_buf_, b_gate_buf_, u_, g_, y_, rows_;
  Buffer<bf16> x_, xt_, at_;
};

inline void ffn_tiles(const FfnParams& p, const Parallel& parallel) {
  // 128 rows at D = 768 fit L2 better, but the weights come twice as often: slower.
  const int64_t step = std::min<int64_t>(256, round_up(div_up(p.M, parallel.threads), 32));
  Queue queue(div_up(p.M, step));
  parallel.workers(int(std::min<int64_t>(parallel.threads, div_up(p.M, step))),
                   [&](int) FASTATTN_LAMBDA {
                     FfnTiles engine(p, step);
                     NormForward prologue(engine.before()), epilogue(engine.after());
                     with_act(p.act, [&](auto act) FASTATTN_LAMBDA {
                       for (int64_t item; queue.next(&item);)
                         engine.template block<decltype(act)::value>(
                             item * step, std::min(step, p.M - item * step), prologue, epilogue);
                     });
                   });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
#endif
