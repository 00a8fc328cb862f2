// The FFN of a block of rows, from norm to residual without leaving L2.
//
// Transposed: u^T = W1 x^T and y^T = W2 a^T. A row of a weight has its k side by side, as the left
// operand of a product is read, so the weights are read where they lie and nothing of them is
// packed, cached or goes stale; packed is the block of activations, which is small. The bias is
// then one number a row of u^T, and u^T, once activated, is the right operand of the second
// product.
//
// FLOPs 4 M D F (gated 6). Bytes: the weights once a block, x and y once. How the products are done
// is Kernel's: ffn_tiles.h (bf16, AMX), ffn_panels.h (fp32).
#if FASTATTN_LEVEL >= 2

namespace fastattn {
namespace FASTATTN_ISA {

// Where element (f, m) of a transposed matrix of `rows` rows lies: panels of P columns of m side by
// side, the last of which may be narrower.
struct Panels {
  int64_t P = 0, columns = 0;
  int64_t width(int64_t m) const { return std::min(P, columns - m / P * P); }
  int64_t at(int64_t rows, int64_t f, int64_t m) const {
    return m / P * P * rows + f * width(m) + m % P;
  }
};

// Kernel: Item and kDtype of its operands; kRows, rows a block; kChunk, hidden units between the
// two products, a multiple of 4; kGrade of the activation; panels(columns); pack(from, stride,
// rows, K, panels, to), the right operand x^T; product(w, r0, k0, n, k, b, b_rows, panels,
// accumulate, c, c_rows): C^T (+)= (rows r0.., columns k0.. of w) B; hidden(...): four rows of a^T
// into B.
template <class Kernel>
class FfnBlocks {
 public:
  using Item = typename Kernel::Item;
  static constexpr int64_t kChunk = Kernel::kChunk;

  FfnBlocks(const FfnParams& params, int64_t rows)
      : p(params),
        before_(params.before),
        after_(params.after),
        drop_(p.dropout.p, p.dropout.seed) {
    const int64_t R = round_up(rows, 32);
    x_.reserve(R * p.D), xt_.reserve(Kernel::packed_size(R, p.D));
    at_.reserve(Kernel::kInPlace ? 0 : R * kChunk);
    u_.reserve(R * kChunk), y_.reserve(R * p.Dout), rows_.reserve(R * p.Dout);
    if (p.w_gate.ptr) g_.reserve(R * kChunk);
    b1_ = read_vec(p.b1, p.F, b1_buf_), b_gate_ = read_vec(p.b_gate, p.F, b_gate_buf_);
    before_.y = {x_.data(), Kernel::kDtype, p.D};
    after_.x = {rows_.data(), DType::kF32, p.Dout};
  }

  template <Act kAct>
  void block(int64_t m0, int64_t rows, NormForward& prologue, NormForward& epilogue) {
    m0_ = m0, rows_here_ = rows, panels_ = Kernel::panels(round_up(rows, 32));
    normalise(prologue);
    for (int64_t f0 = 0; f0 < p.F; f0 += kChunk) {
      const int64_t n = std::min(kChunk, p.F - f0);
      const auto first = [&](const Rows& w, float* c) FASTATTN_LAMBDA {
        Kernel::product(w, f0, 0, n, p.D, xt_.data(), p.D, panels_, false, c, kChunk);
      };
      first(p.w1, u_.data());
      if (p.w_gate.ptr) first(p.w_gate, g_.data());
      if (p.u.ptr) save(u_.data(), kChunk, p.u, m0_, f0, n);
      if (p.g.ptr) save(g_.data(), kChunk, p.g, m0_, f0, n);
      for (int64_t m = 0; m < panels_.columns; m += 16)  // f inside: B is written in order
        for (int64_t f = 0; f < n; f += 4) act4<kAct>(f0, f, m, n);
      if (p.a.ptr) save(u_.data(), kChunk, p.a, m0_, f0, n);
      const Item* b = at_.data();
      if constexpr (Kernel::kInPlace) b = u_.data();
      Kernel::product(p.w2, 0, f0, p.Dout, n, b, kChunk, panels_, f0 > 0, y_.data(), p.Dout);
    }
    save(y_.data(), p.Dout, {rows_.data(), DType::kF32, p.Dout}, 0, 0, p.Dout);
    after_.x.ptr = rows_.data() - m0 * p.Dout;  // its row m0 is the first of the block
    for (int64_t m = m0; m < m0 + rows; ++m) epilogue.row(m);
  }

  const NormParams& before() const { return before_; }
  const NormParams& after() const { return after_; }

 private:
  // x^T of the block, columns up to the next multiple of 32 zero.
  void normalise(NormForward& prologue) {
    const Rows& x = before_.x;
    const Item* from = x_.data();
    int64_t stride = p.D;
    if (before_.norm == Norm::kNone && x.dtype == Kernel::kDtype) {
      from = reinterpret_cast<const Item*>(row_of(x, m0_)), stride = x.stride;
    } else {
      before_.y.ptr = x_.data() - m0_ * p.D;
      for (int64_t m = m0_; m < m0_ + rows_here_; ++m) prologue.row(m);
    }
    Kernel::pack(from, stride, rows_here_, p.D, panels_, xt_.data());
  }

  // Hidden units f0 + f .. + 3 of 16 rows: bias, activation, dropout, and into B. Beyond F and
  // beyond the block's rows the values are finite or not, and never counted.
  template <Act kAct>
  FASTATTN_INLINE void act4(int64_t f0, int64_t f, int64_t m, int64_t n) {
    float keep[4][16];
    if (drop_.on) {
      const int64_t i = p.dropout.first_row + m0_ + m;
      drop_.column4(i, (f0 + f) >> 2, p.dropout.site, keep);
    }
    const int64_t ld = panels_.width(m), first = panels_.at(kChunk, f, m);
    vf a[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      float* at = u_.data() + first + j * ld;
      vf up = load(at);
      if (b1_) up += b1_[f0 + f + j];
      if (p.w_gate.ptr) {
        vf v = load(g_.data() + first + j * ld);
        if (b_gate_) v += b_gate_[f0 + f + j];
        a[j] = activate<kAct, Kernel::kGrade>(v) * up;
      } else {
        a[j] = activate<kAct, Kernel::kGrade>(up);
      }
      if (drop_.on) {
        const vf k = load(keep[j]);
        a[j] = k == vf{} ? vf{} : a[j] * k;
      }
      if (Kernel::kInPlace || p.a.ptr) store(at, a[j]);
    }
    if constexpr (!Kernel::kInPlace) Kernel::hidden(a, f, m, n, at_.data());
  }

  // c^T into columns f0.. of the rows from m0, whole cache lines of bf16 at a time.
  void save(const float* c, int64_t c_rows, const Rows& to, int64_t m0, int64_t f0,
            int64_t n) const {
    for (int64_t m = 0; m < rows_here_; m += 16) {
      const int64_t here = std::min<int64_t>(16, rows_here_ - m), ld = panels_.width(m);
      for (int64_t f = 0; f < n; f += 32) {
        const float* from = c + panels_.at(c_rows, f, m);
        const int64_t last = n - f - 1;
        vf a[16], b[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) a[j] = load(from + std::min<int64_t>(j, last) * ld);
        transpose16(a);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) b[j] = load(from + std::min<int64_t>(j + 16, last) * ld);
        transpose16(b);
        for (int64_t j = 0; j < here; ++j) {
          char* dst = row_of(to, m0 + m + j) + (f0 + f) * item_size(to.dtype);
          if (last < 31) {
            alignas(64) float part[32];
            store(part, a[j]), store(part + 16, b[j]);
            narrow_to(to.dtype, part, last + 1, dst);
          } else if (to.dtype == DType::kF32) {
            store(reinterpret_cast<float*>(dst), a[j]);
            store(reinterpret_cast<float*>(dst) + 16, b[j]);
          } else {
            Kernel::store32(a[j], b[j], dst);
          }
        }
      }
    }
  }

  const FfnParams& p;
  NormParams before_, after_;
  const Dropout drop_;
  typename Kernel::Scope scope_;
  int64_t m0_ = 0, rows_here_ = 0;
  Panels panels_;
  const float *b1_, *b_gate_;
  Buffer<float> b1_buf_, b_gate_buf_, u_, g_, y_, rows_;
  Buffer<Item> x_, xt_, at_;
};

// Rows a block: as large as Kernel likes, and as many blocks as the threads share evenly.
template <class Kernel>
int64_t ffn_block_rows(int64_t M, int threads) {
  const int64_t blocks =
      round_up(div_up(M, Kernel::kRows), std::min<int64_t>(threads, div_up(M, 32)));
  return round_up(div_up(M, blocks), 32);
}

template <class Kernel>
void ffn_by_blocks(const FfnParams& p, const Parallel& parallel) {
  const int64_t step = ffn_block_rows<Kernel>(p.M, parallel.threads);
  Queue queue(div_up(p.M, step));
  parallel.workers(int(std::min<int64_t>(parallel.threads, div_up(p.M, step))),
                   [&](int) FASTATTN_LAMBDA {
                     FfnBlocks<Kernel> engine(p, step);
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
