// See recurrent_step.h.

namespace fastattn {
namespace FASTATTN_ISA {

// ---- forward: sums over k by lanes
// ---------------------------------------------------------------

// A product W x^T: rows of W and of x are K apart.
struct StepProduct {
  const float *w, *x;
  int64_t K;
};

// With W / kStepTokens rows of W: W sums.
inline constexpr int kStepTokens = FASTATTN_LEVEL >= 2 ? 8 : 4;

// Products that take as long as waking a thread are not shared.
inline int step_workers(int64_t products, int64_t items, const Parallel& parallel) {
  constexpr int64_t kWake = 256 << 10;
  return products <= kWake ? 1 : workers_for(products, items, parallel);
}

// Lane r kTokens + t: the sum of all products of row n + r of W and token t. W / kTokens rows.
template <int kTokens>
FASTATTN_NOINLINE vf dots_of_rows(const StepProduct* products, int count, int64_t n) {
  constexpr int kRows = W / kTokens;
  vf sum[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) sum[i] = vf{};
  for (int i = 0; i < count; ++i) {
    const int64_t K = products[i].K;
    const float *w = products[i].w + n * K, *x = products[i].x;
    for (int64_t k = 0; k < K; k += W) {
      vf rows[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        rows[r] = load(w + r * K + k);
        prefetch(w + (kRows + r) * K + k);  // by the next call it has come from memory
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const vf a = load(x + t * K + k);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          sum[r * kTokens + t] = fma(rows[r], a, sum[r * kTokens + t]);
      }
    }
  }
  return reduce_add_rows(sum);
}

// Tokens [0, B) of W rows from n on, as out[token][row].
template <int kTokens>
FASTATTN_INLINE void dots_of_tokens(const StepProduct* products, int count, int64_t n, int64_t B,
                                    float* out) {
  StepProduct here[2] = {products[0], products[count - 1]};
  int64_t b = 0;
  for (; b + kTokens <= B; b += kTokens) {
    for (int r = 0; r < W; r += W / kTokens) {
      float sums[W];
      store(sums, dots_of_rows<kTokens>(here, count, n + r));
      for (int i = 0; i < W; ++i) out[(b + i % kTokens) * W + r + i / kTokens] = sums[i];
    }
    for (int i = 0; i < count; ++i) here[i].x += kTokens * here[i].K;
  }
  if constexpr (kTokens > 1)
    if (b < B) dots_of_tokens<kTokens / 2>(here, count, n, B - b, out + b * W);
}

template <class C>
class StepForward {
  static constexpr int kGates = C::kGates;

 public:
  explicit StepForward(const StepParams& p) : p_(p) {}

  void run(const Parallel& parallel) const {
    const int64_t blocks = p_.H / W;
    const int workers = step_workers(p_.B * kGates * p_.H * (p_.I + p_.H), blocks, parallel);
    // A worker has the same rows of W in every call: they may still be in its L2.
    parallel.workers(workers, [&](int worker) FASTATTN_LAMBDA {
      Buffer<float> sums;
      sums.reserve(5 * p_.B * W);
      const Share mine(blocks, worker, workers);
      for (int64_t i = mine.begin; i < mine.end; ++i) units(i * W, sums.data());
    });
  }

 private:
  // Units [u, u + W): sums of a gate (B, W), W_hn h of the GRU behind them.
  void units(int64_t u, float* sums) const {
    const StepProduct products[2] = {{p_.w_ih, p_.x, p_.I}, {p_.w_hh, p_.h, p_.H}};
    const int64_t part = p_.B * W;
    for (int gate = 0; gate < kGates; ++gate) {
      const bool apart = C::kKeepsH && gate == kGates - 1;
      const int64_t n = gate * p_.H + u;
      dots_of_tokens<kStepTokens>(products, apart ? 1 : 2, n, p_.B, sums + gate * part);
      if (apart) dots_of_tokens<kStepTokens>(products + 1, 1, n, p_.B, sums + kGates * part);
    }
    for (int64_t b = 0; b < p_.B; ++b) cell(b, u, sums + b * W, part);
  }

  void cell(int64_t b, int64_t u, const float* sums, int64_t part) const {
    const int64_t H = p_.H, at = b * H + u;
    CellIn in;
#pragma GCC unroll 4
    for (int gate = 0; gate < kGates; ++gate) {
      const bool apart = C::kKeepsH && gate == kGates - 1;
      in.x[gate] = load(sums + gate * part) + bias(p_.b_ih, gate * H + u);
      if (!apart) in.x[gate] += bias(p_.b_hh, gate * H + u);
      in.a[gate] = apart ? load(sums + kGates * part) : vf{};
      if (apart) in.b_hn = bias(p_.b_hh, gate * H + u);
    }
    in.h = load(p_.h + at);
    if (C::kHasC) in.c = load(p_.c + at);
    const CellOut out = C::forward(in, p_.cell == Cell::kRelu);
    store(p_.h_new + at, out.h);
    if (C::kHasC) store(p_.c_new + at, out.c);
    if (C::kSaved && p_.gates)
#pragma GCC unroll 4
      for (int i = 0; i < C::kSaved; ++i)
        store(p_.gates + (b * C::kSaved + i) * H + u, out.saved[i]);
  }
  static FASTATTN_INLINE vf bias(const float* b, int64_t at) { return b ? load(b + at) : vf{}; }

  const StepParams& p_;
};

// ---- backward: the gates' gradients, then tiles of all products
// ----------------------------------

template <class C>
class StepBackward {
  static constexpr int kGates = C::kGates;
  static constexpr int64_t kColumns = 64;  // of a tile of dx or dh

 public:
  StepBackward(const StepParams& p, const StepGrads& g) : p_(p), g_(g), N_(kGates * p.H) {}

  void run(const Parallel& parallel) {
    // dg of both sides, and their transposes for the left operand of dx and dh.
    const int64_t each = p_.B * N_, turned = transposed_size<kMR>(p_.B, N_) + kMR * N_;
    Buffer<float> memory;
    float* const base = memory.reserve(2 * each + 2 * turned + p_.B * p_.H);
    dgx_ = base, dgh_ = C::kKeepsH ? base + each : dgx_;
    past_ = C::kKeepsH ? base + 2 * each + 2 * turned : nullptr;
    gates();
    if (g_.db_ih) add_rows(dgx_, g_.db_ih);
    if (g_.db_hh) add_rows(dgh_, g_.db_hh);
    tgx_ = base + 2 * each, tgh_ = C::kKeepsH ? tgx_ + turned : tgx_;
    pack_transposed<kMR>(dgx_, N_, 1, p_.B, N_, tgx_);
    if (C::kKeepsH) pack_transposed<kMR>(dgh_, N_, 1, p_.B, N_, tgh_);
    tiles(parallel);
  }

 private:
  void gates() const {
    const int64_t H = p_.H;
    for (int64_t b = 0; b < p_.B; ++b)
      for (int64_t u = 0; u < H; u += W) {
        const int64_t at = b * H + u;
        CellGradIn in;
        in.dh = or_zero(g_.dh_new, at), in.dc = or_zero(g_.dc_new, at);
#pragma GCC unroll 4
        for (int i = 0; i < C::kSaved; ++i)
          in.saved[i] = load(p_.gates + (b * C::kSaved + i) * H + u);
        in.h = load(p_.h_new + at), in.h_old = load(p_.h + at);
        if (C::kHasC) in.c = load(p_.c_new + at), in.c_old = load(p_.c + at);
        const CellGradOut out = C::backward(in, p_.cell == Cell::kRelu);
#pragma GCC unroll 4
        for (int i = 0; i < kGates; ++i) {
          const int64_t to = b * N_ + i * H + u;
          store(dgx_ + to, out.d[i]);
          if (C::kKeepsH) store(dgh_ + to, i == kGates - 1 ? out.dhn : out.d[i]);
        }
        if (C::kHasC && g_.dc) store(g_.dc + at, out.dc);
        if (C::kKeepsH) store(past_ + at, out.dh);
      }
  }
  static FASTATTN_INLINE vf or_zero(const float* from, int64_t at) {
    return from ? load(from + at) : vf{};
  }

  void add_rows(const float* dg, float* db) const {
    for (int64_t n = 0; n < N_; n += W) {
      vf sum = load(dg + n);
      for (int64_t b = 1; b < p_.B; ++b) sum += load(dg + b * N_ + n);
      store(db + n, sum);
    }
  }

  // A worker has the same part in every call: its columns of W may still be in its L2.
  void tiles(const Parallel& parallel) const {
    const int64_t of_dx = g_.dx ? div_up(p_.I, kColumns) : 0;
    const int64_t of_dh = g_.dh ? div_up(p_.H, kColumns) : 0;
    const int64_t rows = div_up(N_, kMR);
    const int workers = step_workers(2 * p_.B * N_ * (p_.I + p_.H), rows, parallel);
    parallel.workers(workers, [&](int worker) FASTATTN_LAMBDA {
      const Share columns(of_dx + of_dh, worker, workers), mine(rows, worker, workers);
      for (int64_t i = columns.begin; i < columns.end; ++i) {
        if (i < of_dx)
          through(tgx_, p_.w_ih, p_.I, i * kColumns, nullptr, g_.dx);
        else
          through(tgh_, p_.w_hh, p_.H, (i - of_dx) * kColumns, past_, g_.dh);
      }
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        if (g_.dw_ih) weights(dgx_, p_.x, p_.I, i * kMR, g_.dw_ih);
        if (g_.dw_hh) weights(dgh_, p_.h, p_.H, i * kMR, g_.dw_hh);
      }
    });
  }

  // Columns [j, j + kColumns) of dg w + past, w (N, columns). past comes last: it may be large.
  void through(const float* turned, const float* w, int64_t columns, int64_t j, const float* past,
               float* to) const {
    const int64_t n = std::min(kColumns, columns - j);
    gemm<1>(false, p_.B, n, N_, turned, ALayout{kMR * N_, kMR}, w + j, BLayout{kPanel, columns},
            to + j, columns);
    for (int64_t b = 0; past && b < p_.B; ++b)
      for (int64_t i = b * columns + j; i < b * columns + j + n; i += W)
        store(to + i, load(to + i) + load(past + i));
  }
  // kMR rows from n on of dg^T x, x (B, columns): whole rows, in order. (Past the caches, by
  // streaming stores, was no faster.)
  void weights(const float* dg, const float* x, int64_t columns, int64_t n, float* to) const {
    gemm<1>(false, std::min<int64_t>(kMR, N_ - n), columns, p_.B, dg + n, ALayout{kMR, N_}, x,
            BLayout{kPanel, columns}, to + n * columns, columns);
  }

  const StepParams& p_;
  const StepGrads& g_;
  const int64_t N_;
  float *dgx_ = nullptr, *dgh_ = nullptr, *tgx_ = nullptr, *tgh_ = nullptr;
  float* past_ = nullptr;  // what dh has beside the product: GRU's
};

// ---- entry points
// --------------------------------------------------------------------------------

template <class F>
FASTATTN_INLINE void with_step_cell(Cell cell, F&& f) {
  switch (cell) {
    case Cell::kLstm:
      return f(As<LstmCell<Grade::kExact>>{});
    case Cell::kGru:
      return f(As<GruCell<Grade::kExact>>{});
    default:
      return f(As<RnnCell>{});
  }
}

void recurrent_step_forward(const StepParams& p, const Parallel& parallel) {
  with_step_cell(p.cell, [&](auto cell) FASTATTN_LAMBDA {
    StepForward<typename decltype(cell)::type>(p).run(parallel);
  });
}
void recurrent_step_backward(const StepParams& p, const StepGrads& g, const Parallel& parallel) {
  with_step_cell(p.cell, [&](auto cell) FASTATTN_LAMBDA {
    StepBackward<typename decltype(cell)::type>(p, g).run(parallel);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
