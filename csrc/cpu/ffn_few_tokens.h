// The FFN of a few tokens in fp32, tokens as lanes (few_tokens.h): both weights are read once,
// straight from where they lie, and u^T, once activated, is the packed operand of the second
// product.
//
// FLOPs 4 M D F (gated 6); bytes: the weights, 8 D F, once up to 48 tokens.

namespace fastattn {
namespace FASTATTN_ISA {

template <int V>
class FfnFewTokens {
 public:
  using Few = FewTokens<V>;
  static constexpr int64_t T = Few::T;

  explicit FfnFewTokens(const FfnParams& params)
      : p(params),
        blocks_(Few::blocks(p.M)),
        Dp_(round_up(p.D, kPad)),
        Op_(round_up(p.Dout, kPad)),
        drop_(p.dropout.p, p.dropout.seed) {
    x_.reserve(p.M * Dp_), y_.reserve(p.M * Op_);
    xt_.reserve(blocks_ * p.D * T), at_.reserve(blocks_ * p.F * T);
    b1_ = read_vec(p.b1, p.F, b1_buf_), b_gate_ = read_vec(p.b_gate, p.F, b_gate_buf_);
  }

  void run(const Parallel& parallel) {
    NormParams before = p.before, after = p.after;
    before.y = {x_.data(), DType::kF32, Dp_};
    NormForward prologue(before);
    for (int64_t m = 0; m < p.M; ++m) prologue.row(m);
    Few::pack(before.y, p.M, p.D, xt_.data());
    with_act(p.act, [&](auto act) FASTATTN_LAMBDA {
      Few::over(p.M, p.F, p.D, parallel,
                [&](int64_t b, int64_t n0, int64_t n1, float* part)
                    FASTATTN_LAMBDA { hidden<decltype(act)::value>(b, n0, n1, part); });
    });
    after.x = {y_.data(), DType::kF32, Op_};
    Few::product({p.w2, p.Dout, after.x}, p.M, p.F, at_.data(), parallel);
    NormForward epilogue(after);
    for (int64_t m = 0; m < p.M; ++m) epilogue.row(m);
  }

 private:
  // Hidden units [n0, n1) of the tokens of block b. part: room for as many rows of the gate.
  template <Act kAct>
  void hidden(int64_t b, int64_t n0, int64_t n1, float* part) {
    const float* x = xt_.data() + b * p.D * T;
    float* a = at_.data() + (b * p.F + n0) * T;
    few_rows_of<V>(p.w1, p.D, n0, n1, x, a);
    if (p.w_gate.ptr) few_rows_of<V>(p.w_gate, p.D, n0, n1, x, part);
    if (p.u.ptr) Few::unpack(a, b * T, p.M, n0, n1 - n0, p.u);
    if (p.g.ptr) Few::unpack(part, b * T, p.M, n0, n1 - n0, p.g);
    for (int64_t n = 0; n < n1 - n0; ++n) {
      const vf shift = set1(b1_ ? b1_[n0 + n] : 0.f);
      const vf gate_shift = set1(b_gate_ ? b_gate_[n0 + n] : 0.f);
      for (int64_t t = n * T; t < (n + 1) * T; t += W) {
        const vf up = load(a + t) + shift;
        store(a + t,
              p.w_gate.ptr ? activate<kAct>(load(part + t) + gate_shift) * up : activate<kAct>(up));
      }
    }
    if (drop_.on) drop(b, n0, n1, a);
    if (p.a.ptr) Few::unpack(a, b * T, p.M, n0, n1 - n0, p.a);
  }

  void drop(int64_t b, int64_t n0, int64_t n1, float* a) {
    float keep[kRowsOfItem];
    for (int64_t m = 0; m < std::min(T, p.M - b * T); ++m) {
      const int64_t i = p.dropout.first_row + b * T + m;
      drop_.row(i >> 32, i, n0, n1 - n0, keep, p.dropout.site);
      for (int64_t n = 0; n < n1 - n0; ++n) {
        float& x = a[n * T + m];
        x = keep[n] == 0.f ? 0.f : x * keep[n];
      }
    }
  }

  const FfnParams& p;
  const int64_t blocks_, Dp_, Op_;
  const Dropout drop_;
  const float *b1_, *b_gate_;
  Buffer<float> b1_buf_, b_gate_buf_, x_, y_, xt_, at_;
};

// A vector of tokens costs the same however many of its lanes are used: up to 8 the dot products of
// FewRows are faster (at D = 384 and 2 tokens twice).
inline bool ffn_few_tokens_serve(const FfnParams& p) {
  return p.w1.dtype == DType::kF32 && p.M > 8 && few_tokens_serve(p.M);
}

inline void ffn_few_tokens(const FfnParams& p, const Parallel& parallel) {
  with_vectors(p.M, [&](auto few) FASTATTN_LAMBDA {
    FfnFewTokens<int(decltype(few)::T / W)>(p).run(parallel);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
