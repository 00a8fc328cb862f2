// The FFN of a few rows (decoding): dot products with the rows of the weights, which are read once,
// straight from where they lie.
//
// FLOPs 4 M D F; bytes: the weights, 2 D F items. Bound by reading them up to about 8 rows, then by
// the FMA rate. Beyond 8 rows in fp32 tokens as lanes do better (ffn_few_tokens.h), in bf16 the
// tile unit beyond 4, in fp16 the library's GEMM beyond 16 (measured with D = 384 and 768).

namespace fastattn {
namespace FASTATTN_ISA {

inline int64_t few_rows(bool tiles) { return tiles ? 4 : 16; }

class FewRows {
 public:
  // Columns a work item: what one Philox call and one cache line of 16-bit results want.
  static constexpr int64_t kStep = kPad;
  static constexpr int kAtOnce = 4;        // rows of a weight: streams that memory serves at once
  static constexpr int64_t kAhead = 4096;  // bytes: the same row of the next four, roughly

  explicit FewRows(const FfnParams& params)
      : p(params),
        Dp_(round_up(p.D, kPad)),
        Fp_(round_up(p.F, kPad)),
        Op_(round_up(p.Dout, kPad)),
        drop_(p.dropout.p, p.dropout.seed) {
    x_.reserve(p.M * Dp_), a_.reserve(p.M * Fp_), y_.reserve(p.M * Op_);
    std::fill_n(x_.data(), p.M * Dp_, 0.f), std::fill_n(a_.data(), p.M * Fp_, 0.f);
  }

  void run(const Parallel& parallel) {
    NormParams before = p.before, after = p.after;
    before.y = {x_.data(), DType::kF32, Dp_};
    NormForward prologue(before);
    for (int64_t m = 0; m < p.M; ++m) prologue.row(m);
    const int workers = workers_for(p.D * p.F * p.M, div_up(p.F, kStep), parallel);
    over(p.F, workers, parallel, [&](int64_t n0) FASTATTN_LAMBDA { hidden(n0); });
    over(p.Dout, workers, parallel, [&](int64_t n0) FASTATTN_LAMBDA {
      for (int64_t n = n0; n < std::min(p.Dout, n0 + kStep); n += W)
        products(p.w2, p.F, p.Dout, n, a_.data(), Fp_, y_.data() + n, Op_);
    });
    after.x = {y_.data(), DType::kF32, Op_};
    NormForward epilogue(after);
    for (int64_t m = 0; m < p.M; ++m) epilogue.row(m);
  }

 private:
  // A worker's share is one stretch and the same in every call: it is read in order, and what of it
  // fits the core's L2 is still there.
  template <class F>
  static void over(int64_t columns, int workers, const Parallel& parallel, F&& f) {
    const int64_t items = div_up(columns, kStep);
    parallel.workers(workers, [&](int w) FASTATTN_LAMBDA {
      for (int64_t i = items * w / workers; i < items * (w + 1) / workers; ++i) f(i * kStep);
    });
  }

  // Hidden units [n0, n0 + kStep) of every row.
  void hidden(int64_t n0) {
    const int64_t n = std::min(kStep, p.F - n0);
    Buffer<float> u_buf, g_buf;
    float *u = u_buf.reserve(p.M * kStep), *g = g_buf.reserve(p.M * kStep);
    for (int64_t t = 0; t < n; t += W) {
      products(p.w1, p.D, p.F, n0 + t, x_.data(), Dp_, u + t, kStep);
      if (p.w_gate.ptr) products(p.w_gate, p.D, p.F, n0 + t, x_.data(), Dp_, g + t, kStep);
    }
    for (int64_t m = 0; m < p.M; ++m) {
      if (p.u.ptr) write_part(p.u, m, n0, n, u + m * kStep);
      if (p.g.ptr) write_part(p.g, m, n0, n, g + m * kStep);
    }
    const Vec b1 = from(p.b1, n0), b_gate = from(p.b_gate, n0);
    ActParams act;
    act.M = p.M, act.N = n;
    act.u = {u, DType::kF32, kStep};
    if (p.w_gate.ptr) act.g = {g, DType::kF32, kStep};
    act.bias = b1, act.gate_bias = b_gate, act.act = p.act;
    act.a = {a_.data() + n0, DType::kF32, Fp_};
    ActForward pass(act);
    with_act(p.act, [&](auto kind) FASTATTN_LAMBDA {
      for (int64_t m = 0; m < p.M; ++m) pass.template row<decltype(kind)::value, float>(m);
    });
    if (drop_.on) drop_hidden(n0, n);
    if (p.a.ptr)
      for (int64_t m = 0; m < p.M; ++m) write_part(p.a, m, n0, n, a_.data() + m * Fp_ + n0);
  }

  void drop_hidden(int64_t n0, int64_t n) {
    float keep[kStep];
    for (int64_t m = 0; m < p.M; ++m) {
      const int64_t i = p.dropout.first_row + m;
      drop_.row(i >> 32, i, n0, n, keep, p.dropout.site);
      float* a = a_.data() + m * Fp_ + n0;
      for (int64_t t = 0; t < n; ++t) a[t] = keep[t] == 0.f ? 0.f : a[t] * keep[t];
    }
  }

  static Vec from(const Vec& x, int64_t n0) {
    if (!x.ptr) return {};
    return {static_cast<const char*>(x.ptr) + n0 * item_size(x.dtype), x.dtype};
  }
  static void write_part(const Rows& to, int64_t m, int64_t n0, int64_t n, const float* src) {
    Rows part = to;
    part.ptr = static_cast<char*>(to.ptr) + n0 * item_size(to.dtype);
    write_row(part, m, n, src);
  }

  // out[m][0..W) = x_m . (rows n.. of w), of which there are N; K columns.
  void products(const Rows& w, int64_t K, int64_t N, int64_t n, const float* x, int64_t ldx,
                float* out, int64_t ldo) const {
    switch (w.dtype) {
      case DType::kBf16:
        return products<bf16>(w, K, N, n, x, ldx, out, ldo);
      case DType::kF16:
        return products<f16>(w, K, N, n, x, ldx, out, ldo);
      default:
        return products<float>(w, K, N, n, x, ldx, out, ldo);
    }
  }
  template <class T>
  void products(const Rows& w, int64_t K, int64_t N, int64_t n, const float* x, int64_t ldx,
                float* out, int64_t ldo) const {
    int64_t m = 0;
    for (; m + 4 <= p.M; m += 4) dots<T, 4>(w, K, N, n, x + m * ldx, ldx, out + m * ldo, ldo);
    if (p.M & 2) dots<T, 2>(w, K, N, n, x + m * ldx, ldx, out + m * ldo, ldo), m += 2;
    if (p.M & 1) dots1<T>(w, K, N, n, x + m * ldx, out + m * ldo);
  }
  // One row: a weight's row at a time, so that memory is read in order.
  template <class T>
  FASTATTN_NOINLINE void dots1(const Rows& w, int64_t K, int64_t N, int64_t n, const float* x,
                               float* out) const {
    vf part[W];
    for (int j = 0; j < W; ++j) {
      const T* row = reinterpret_cast<const T*>(row_of(w, std::min(n + j, N - 1)));
      vf c[4] = {};
      int64_t k = 0;
      for (; k + 4 * W <= K; k += 4 * W) {
        for (int64_t line = 0; line < 4 * W; line += 64 / int64_t(sizeof(T)))
          prefetch(row + k + line + kAhead / int64_t(sizeof(T)));
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) c[q] = fma(load(x + k + q * W), load(row + k + q * W), c[q]);
      }
      for (; k + W <= K; k += W) c[0] = fma(load(x + k), load(row + k), c[0]);
      if (k < K) c[1] = fma(first_lanes(load(x + k), K - k), load_part(row + k, K - k), c[1]);
      part[j] = (c[0] + c[1]) + (c[2] + c[3]);
    }
    store(out, reduce_add_rows(part));
  }
  template <class T, int R>
  FASTATTN_NOINLINE void dots(const Rows& w, int64_t K, int64_t N, int64_t n, const float* x,
                              int64_t ldx, float* out, int64_t ldo) const {
    vf part[R][W];
    for (int j = 0; j < W; j += kAtOnce) {
      const T* row[kAtOnce];
      vf c[kAtOnce][R];
#pragma GCC unroll 4
      for (int q = 0; q < kAtOnce; ++q) {
        row[q] = reinterpret_cast<const T*>(row_of(w, std::min(n + j + q, N - 1)));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) c[q][r] = vf{};
      }
      int64_t k = 0;
      for (; k + W <= K; k += W) {
#pragma GCC unroll 4
        for (int q = 0; q < kAtOnce; ++q) {
          const vf b = load(row[q] + k);
          prefetch(row[q] + k + kAhead / int64_t(sizeof(T)));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) c[q][r] = fma(load(x + r * ldx + k), b, c[q][r]);
        }
      }
      if (k < K) {
#pragma GCC unroll 4
        for (int q = 0; q < kAtOnce; ++q) {
          const vf b = load_part(row[q] + k, K - k);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            c[q][r] = fma(first_lanes(load(x + r * ldx + k), K - k), b, c[q][r]);
        }
      }
#pragma GCC unroll 4
      for (int q = 0; q < kAtOnce; ++q)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) part[r][j + q] = c[q][r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(out + r * ldo, reduce_add_rows(part[r]));
  }

  const FfnParams& p;
  const int64_t Dp_, Fp_, Op_;
  const Dropout drop_;
  Buffer<float> x_, a_, y_;
};

inline void ffn_few_rows(const FfnParams& p, const Parallel& parallel) {
  if (p.M > 0) FewRows(p).run(parallel);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
