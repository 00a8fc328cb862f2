// The norm pass and its backward, a row at a time (Ba et al., 1607.06450; Zhang & Sennrich,
// 1910.07467).
//
//   mean = sum s / N,  var = sum (s - mean)^2 / N  (rms: mean = 0),  rstd = 1 / sqrt(var + eps)
//   y = (s - mean) rstd weight + shift
//   h = dy weight, ds = rstd (h - sum h / N - y_hat sum(h y_hat) / N) + dsum, y_hat = (s - mean)
//   rstd
//
// FLOPs: about 8 an element forward, 12 backward; every operand is read once from memory, the row
// stays in L1 between the sums: bound by memory beyond L2. The statistics take two passes over it,
// the first about its first element, the second corrected by the sum of its deviations, so a mean
// of 1000 costs no digits. A row whose squares overflow is done again in fp64.

namespace fastattn {
namespace FASTATTN_ISA {

struct Sums {
  float a, b;
};

// Sums of two functions of the offset over [0, N).
template <class F>
FASTATTN_INLINE Sums sum2(int64_t N, F&& f) {
  vf a0{}, b0{}, a1{}, b1{};
  int64_t t = 0;
  for (; t + 2 * W <= N; t += 2 * W) {
    f(t, &a0, &b0);
    f(t + W, &a1, &b1);
  }
  for (; t < N; t += W) {
    vf a{}, b{};
    f(t, &a, &b);
    a0 += first_lanes(a, N - t), b0 += first_lanes(b, N - t);
  }
  return {reduce_add(a0 + a1), reduce_add(b0 + b1)};
}

struct Moments {
  float mean, rstd;  // rms: no mean
};

// The same in fp64, of a row that fp32 cannot square.
FASTATTN_NOINLINE inline Moments moments_wide(const float* s, int64_t N, bool rms, float eps) {
  double sum = 0., squares = 0.;
  for (int64_t t = 0; t < N && !rms; ++t) sum += s[t];
  const double mean = sum / double(N);
  for (int64_t t = 0; t < N; ++t) squares += (s[t] - mean) * (s[t] - mean);
  return {float(mean), float(1. / std::sqrt(squares / double(N) + eps))};
}

FASTATTN_INLINE Moments moments(const float* s, int64_t N, bool rms, float eps) {
  float mean = 0.f;
  const float n = 1.f / float(N);
  if (!rms) {
    const vf first = set1(s[0]);
    mean = s[0] +
           n * sum2(N, [&](int64_t t, vf* a, vf*) FASTATTN_LAMBDA { *a += load(s + t) - first; }).a;
  }
  const vf m = set1(mean);
  const Sums d = sum2(N, [&](int64_t t, vf* a, vf* b) FASTATTN_LAMBDA {
    const vf x = load(s + t) - m;
    *a += x, *b = fma(x, x, *b);
  });
  const float off = rms ? 0.f : d.a * n;
  const float var = d.b * n - off * off;
  if (!(var <= std::numeric_limits<float>::max())) return moments_wide(s, N, rms, eps);
  return {mean + off, 1.f / std::sqrt(std::max(0.f, var) + eps)};
}

// Asks for the row after one, as far as it is done.
class NextRow {
 public:
  NextRow(const Rows& x, int64_t m, int64_t N)
      : from_(x.ptr ? row_of(x, m + 1) : reinterpret_cast<const char*>(this)),
        item_(x.ptr ? item_size(x.dtype) : 0) {}
  FASTATTN_INLINE void ask(int64_t t) const { prefetch(from_ + t * item_); }

 private:
  const char* const from_;
  const int64_t item_;
};

class NormForward {
 public:
  explicit NormForward(const NormParams& params)
      : p(params), N(p.N), drop_(p.dropout.p, p.dropout.seed) {
    const int64_t n = round_up(N, kPad);
    bias_ = read_vec(p.bias, N, bias_buf_);
    weight_ = read_vec(p.weight, N, weight_buf_);
    shift_ = read_vec(p.shift, N, shift_buf_);
    s_.reserve(n), y_.reserve(n), r_.reserve(n);
    if (drop_.on) mask_.reserve(n);
  }

  void row(int64_t m) {
    const float* s = sum(m);
    if (!p.y.ptr && !p.rstd) return;
    if (p.norm == Norm::kNone) return write_row(p.y, m, N, s);
    const bool rms = p.norm == Norm::kRms;
    const Moments at = moments(s, N, rms, p.eps);
    if (p.mean) p.mean[m] = at.mean;
    if (p.rstd) p.rstd[m] = at.rstd;
    if (!p.y.ptr) return;
    float* y = begin_row(p.y, m, N, y_.data());
    normalise(m, s, at.mean, at.rstd, y);
    write_row(p.y, m, N, y);
  }

 private:
  // s of row m, as it is stored.
  const float* sum(int64_t m) {
    const float* x = read_row(p.x, m, N, s_.data());
    if (!p.bias.ptr && !p.residual.ptr && !drop_.on) {
      if (p.s.ptr) x = stored(m, x);
      return x;
    }
    float* s = p.s.ptr ? begin_row(p.s, m, N, s_.data()) : s_.data();
    const float* res = p.residual.ptr ? read_row(p.residual, m, N, r_.data()) : nullptr;
    if (drop_.on) drop_row(drop_, p.dropout, m, N, mask_.data());
    for (int64_t t = 0; t < N; t += W) {
      vf v = load(x + t);
      if (bias_) v += load(bias_ + t);
      if (drop_.on) {
        const vf keep = load(mask_.data() + t);
        v = keep == vf{} ? vf{} : v * keep;  // an infinity that is dropped is gone
      }
      if (res) v += load(res + t);
      store(s + t, v);
    }
    return p.s.ptr ? stored(m, s) : s;
  }

  const float* stored(int64_t m, const float* s) {
    write_row(p.s, m, N, s);
    if (p.s.dtype == DType::kF32) return s;
    widen(p.s.dtype, row_of(p.s, m), N, s_.data());
    return s_.data();
  }

  void normalise(int64_t row, const float* s, float mean, float rstd, float* y) const {
    const vf m = set1(mean), r = set1(rstd);
    const NextRow x(p.x, row, N), residual(p.residual, row, N);
    for (int64_t t = 0; t < N; t += W) {
      x.ask(t), residual.ask(t);
      vf v = (load(s + t) - m) * r;
      if (weight_) v *= load(weight_ + t);
      if (shift_) v += load(shift_ + t);
      store(y + t, v);
    }
  }

  const NormParams& p;
  const int64_t N;
  const Dropout drop_;
  const float *bias_, *weight_, *shift_;
  Buffer<float> bias_buf_, weight_buf_, shift_buf_, s_, y_, r_, mask_;
};

class NormBackward {
 public:
  enum { kDweight, kDshift, kDbias, kSums };

  explicit NormBackward(const NormGrads& grads)
      : g(grads), N(g.N), drop_(g.dropout.p, g.dropout.seed) {
    const int64_t n = round_up(N, kPad);
    weight_ = read_vec(g.weight, N, weight_buf_);
    for (Buffer<float>* b : {&dy_, &dsum_, &s_, &ds_, &y_}) b->reserve(n);
    if (drop_.on) mask_.reserve(n);
  }

  // Adds to the sums of the row's block.
  void row(int64_t m, float* dweight, float* dshift, float* dbias) {
    const bool norm = g.norm != Norm::kNone;
    const float* dsum = g.dsum.ptr ? read_row(g.dsum, m, N, dsum_.data()) : nullptr;
    const float* ds = dsum;
    if (g.dy.ptr) {
      const float* dy = read_row(g.dy, m, N, dy_.data());
      if (norm)
        ds = through_norm(m, dy, dsum, dweight, dshift);
      else
        ds = add(dy, dsum);
    } else if (!ds) {
      std::fill_n(ds_.data(), round_up(N, kPad), 0.f);
      ds = ds_.data();
    }
    if (g.ds.ptr) write_row(g.ds, m, N, ds);
    if (!g.dx.ptr && !g.dbias) return;
    if (drop_.on) {
      drop_row(drop_, g.dropout, m, N, mask_.data());
      for (int64_t t = 0; t < N; t += W) {
        const vf keep = load(mask_.data() + t);
        store(ds_.data() + t, keep == vf{} ? vf{} : load(ds + t) * keep);
      }
      ds = ds_.data();
    }
    if (g.dx.ptr) write_row(g.dx, m, N, ds);
    if (g.dbias)
      for (int64_t t = 0; t < N; t += W) store(dbias + t, load(dbias + t) + load(ds + t));
  }

 private:
  const float* add(const float* dy, const float* dsum) {
    if (!dsum) return dy;
    for (int64_t t = 0; t < N; t += W) store(ds_.data() + t, load(dy + t) + load(dsum + t));
    return ds_.data();
  }

  const float* through_norm(int64_t m, const float* dy, const float* dsum, float* dweight,
                            float* dshift) {
    const bool rms = g.norm == Norm::kRms;
    const float* s = read_row(g.s, m, N, s_.data());
    const vf mean = set1(rms ? 0.f : g.mean[m]), rstd = set1(g.rstd[m]);
    float *hat = y_.data(), *ds = ds_.data();
    const Sums sums = sum2(N, [&](int64_t t, vf* a, vf* b) FASTATTN_LAMBDA {
      const vf y = (load(s + t) - mean) * rstd;
      const vf d = load(dy + t), h = weight_ ? d * load(weight_ + t) : d;
      store(hat + t, y), store(ds + t, h);
      if (g.dweight) store(dweight + t, fma(d, y, load(dweight + t)));
      if (g.dshift) store(dshift + t, load(dshift + t) + d);
      *a += h, *b = fma(h, y, *b);
    });
    const float n = 1.f / float(N);
    const vf c1 = set1(rms ? 0.f : sums.a * n), c2 = set1(sums.b * n);
    if (g.ds.ptr || g.dx.ptr || g.dbias) {
      const NextRow next_dy(g.dy, m, N), next_s(g.s, m, N);
      const Rows& to = g.ds.ptr ? g.ds : g.dx;
      float* out = to.ptr && (g.ds.ptr || !drop_.on) ? begin_row(to, m, N, ds) : ds;
      for (int64_t t = 0; t < N; t += W) {
        next_dy.ask(t), next_s.ask(t);
        vf v = (load(ds + t) - c1 - load(hat + t) * c2) * rstd;
        if (dsum) v += load(dsum + t);
        store(out + t, v);
      }
      return out;
    }
    return ds;
  }

  const NormGrads& g;
  const int64_t N;
  const Dropout drop_;
  const float* weight_;
  Buffer<float> weight_buf_, dy_, dsum_, s_, ds_, y_, mask_;
};

void norm_forward(const NormParams& p, const Parallel& parallel) {
  if (p.M == 0 || p.N == 0) return;
  const int64_t step = 16;
  const int workers = workers_for(p.M * p.N, div_up(p.M, step), parallel);
  Shares shares(div_up(p.M, step), workers);
  parallel.workers(workers, [&](int worker) FASTATTN_LAMBDA {
    NormForward pass(p);
    for (int64_t item; shares.next(worker, &item);)
      for (int64_t m = item * step; m < std::min(p.M, (item + 1) * step); ++m) pass.row(m);
  });
}

void norm_backward(const NormGrads& g, const Parallel& parallel) {
  if (g.N == 0) return;
  const RowBlocks blocks(g.M);
  RowSums sums(blocks.count, g.N, NormBackward::kSums);
  const int workers = workers_for(g.M * g.N, blocks.count, parallel);
  Shares shares(blocks.count, workers);
  parallel.workers(workers, [&](int worker) FASTATTN_LAMBDA {
    NormBackward pass(g);
    for (int64_t b; shares.next(worker, &b);) {
      sums.clear(b);
      for (int64_t m = b * blocks.rows; m < std::min(g.M, (b + 1) * blocks.rows); ++m)
        pass.row(m, sums.part(b, NormBackward::kDweight), sums.part(b, NormBackward::kDshift),
                 sums.part(b, NormBackward::kDbias));
    }
  });
  sums.total(NormBackward::kDweight, g.N, g.dweight);
  sums.total(NormBackward::kDshift, g.N, g.dshift);
  sums.total(NormBackward::kDbias, g.N, g.dbias);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
