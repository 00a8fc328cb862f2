// Attention backward: P is recomputed a tile at a time from q, k and lse (Dao et al. 2022).
//
//   delta = rowsum(do * o) - dlse + rowsum(dweights * weights)
//   P = exp(logits - lse);  dv += dropout(P)^T do
//   dP = dropout(do v^T + dweights);  dS = P * (dP - delta)
//   dbias += dS;  dq += scale dS k;  dk += scale dS^T q;  dsinks -= sum exp(sink - lse) delta
//
// Every sum has one owner and a fixed order: the result is bitwise repeatable, without atomics (how
// the work is cut: attention_grad_plan.h).

namespace fastattn {
namespace FASTATTN_ISA {

// ---- delta ------------------------------------------------------------------------------------

// delta (B, H, Sq), laid out as lse; rows beyond a length are not written.
template <class E>
void compute_delta(const Problem& prob, const AttentionGrads& g, const Parallel& parallel,
                   float* delta) {
  const AttentionParams& p = prob.p;
  constexpr int64_t kChunk = 256;
  const int64_t chunks = div_up(p.Sq, kChunk);
  Queue queue(p.B * p.Hk * chunks);
  const bool small = p.B * p.H * p.Sq * p.Dv < kSerialWork && !g.dweights.ptr;
  parallel.workers(small ? 1 : parallel.threads, [&](int) {
    std::unique_ptr<ProbWorker<E>> worker;
    Buffer<float> dw;
    dw.reserve(E::kBN);
    if (g.dweights.ptr) worker = std::make_unique<ProbWorker<E>>(prob);
    for (int64_t item; queue.next(&item);) {
      const int64_t b = item / (p.Hk * chunks), hk = item / chunks % p.Hk;
      const Sequence s = prob.sequence(b);
      const int64_t i0 = item % chunks * kChunk, i1 = std::min(i0 + kChunk, s.Sq);
      if (i0 >= i1) continue;
      const auto at = [&](int64_t h, int64_t i) {
        return b * p.lse_b + h * p.lse_h + (s.q_start + i) * p.lse_s;
      };
      for (int64_t h = hk * prob.group; h < (hk + 1) * prob.group; ++h) {
        for (int64_t i = i0; i < i1; ++i) {
          float sum = 0.f;
          // A row with no key has o = 0 and passes no gradient.
          if (g.d_o.ptr && p.o.ptr && p.lse[at(h, i)] != kNegInf) {
            sum = dot(p.dtype, row_at(g.d_o, p.dtype, b, h, s.q_start + i), g.d_o.d,
                      row_at(p.o, p.dtype, b, h, s.q_start + i), p.Dv);
          }
          const bool none = p.lse[at(h, i)] == kNegInf;
          delta[at(h, i)] = none ? 0.f : sum - (g.dlse ? g.dlse[at(h, i)] : 0.f);
        }
        if (!worker) continue;
        const Broadcast& w = g.dweights;
        const int64_t first = (h - hk * prob.group) * s.Sq;
        worker->visit(b, hk, first + i0, first + i1,
                      [&](int64_t, int64_t i, int64_t j0, int64_t n, const float* weights)
                          FASTATTN_LAMBDA {
                            std::fill_n(dw.data(), n, 0.f);
                            const int64_t from = b * w.b + h * w.h + i * w.i + j0 * w.j;
                            add_row(p.dtype, w.ptr, from, w.j, n, g.dweights_scale, dw.data());
                            float sum = 0.f;
                            for (int64_t t = 0; t < n; ++t) sum += weights[t] * dw.data()[t];
                            delta[at(h, i)] += sum;
                          });
      }
    }
  });
}

inline void compute_dsinks(const Problem& prob, const float* delta, float* dsinks,
                           const Parallel& parallel) {
  const AttentionParams& p = prob.p;
  Queue queue(p.H);
  parallel.workers(p.B * p.H * p.Sq < 1 << 16 ? 1 : parallel.threads, [&](int) {
    for (int64_t h; queue.next(&h);) {
      double sum = 0.;
      for (int64_t b = 0; b < p.B; ++b) {
        const Sequence s = prob.sequence(b);
        for (int64_t i = 0; i < s.Sq; ++i) {
          const int64_t at = b * p.lse_b + h * p.lse_h + (s.q_start + i) * p.lse_s;
          if (p.lse[at] == kNegInf) continue;
          // In units of the tiles, as RowProb: 0 where the sink is all there is.
          const double x = double(p.sinks[h]) / prob.unit() - prob.in_units(p.lse[at]);
          sum -= std::exp2(x * prob.multiplier() - p.lse_lo[at]) * delta[at];
        }
      }
      dsinks[h] = float(sum);
    }
  });
}

// ---- the passes ---------------------------------------------------------------------------------

template <class E>
class BackwardWorker {
 public:
  // parts: the further sums of dbias, part_size floats each.
  BackwardWorker(const Problem& problem, const AttentionGrads& grads, const float* delta,
                 float* parts, int64_t part_size)
      : prob_(problem),
        p_(problem.p),
        g_(grads),
        delta_(delta),
        parts_(parts),
        part_size_(part_size),
        engine_(problem.p) {
    s_.reserve(E::kBM * E::kBN), dp_.reserve(E::kBM * E::kBN);
    drop_.reserve(E::kBN), dcap_.reserve(E::kBN);
  }

  void run(const GradItem& item) {
    const Sequence s = prob_.sequence(item.b);
    dq_ = item.dq && g_.dq.ptr, dk_ = item.dkv && g_.dk.ptr;
    dv_ = item.dkv && g_.dv.ptr && g_.d_o.ptr;
    dbias_ = !item.dbias ? nullptr : item.part ? parts_ + (item.part - 1) * part_size_ : g_.dbias;
    const int64_t keys = item.key1 - item.key0, padded = round_up(keys, E::kBN);
    const bool many = item.h1 - item.h0 > 1;  // dk, dv of all keys live through all heads
    const int64_t acc_keys = many ? padded : std::min<int64_t>(padded, E::kBN);
    if (item.dkv) {
      dk_acc_.reserve(acc_keys * engine_.Dp);
      dv_acc_.reserve(acc_keys * engine_.Dvp);
    }
    if (keys > 0) engine_.load_keys(s, item.hk, item.key0, item.key1);
    for (int64_t h = item.h0; h < item.h1; ++h) {
      find_rows(s, item, h);
      const int64_t rows = row1_ - row0_;
      if (rows > 0) engine_.load_rows(s, g_.d_o, h, row0_, row1_);
      if (dq_)
        std::fill_n(dq_acc_.reserve(rows * engine_.Dp + 16 * engine_.Dp),
                    round_up(rows, 16) * engine_.Dp, 0.f);
      for (int64_t j0 = item.key0; j0 < item.key1; j0 += E::kBN) {
        const int64_t n = std::min<int64_t>(E::kBN, item.key1 - j0);
        const int64_t at = many ? j0 - item.key0 : 0;
        float* dk = dk_acc_.data() + at * engine_.Dp;
        float* dv = dv_acc_.data() + at * engine_.Dvp;
        if (item.dkv && h == item.h0) {
          engine_.clear_keys(dk, n, engine_.Dp);
          engine_.clear_keys(dv, n, engine_.Dvp);
        }
        for (RowBlock& rb : blocks_) tile(s, rb, h, j0, n, dk, dv);
        if (item.dkv && h + 1 == item.h1) write_keys(s, item.hk, j0, n, dk, dv);
      }
      if (dq_) write_rows(s, item, h);
    }
  }

 private:
  // The row blocks that see a key of the item; load_rows packs from the first to the last of them.
  void find_rows(const Sequence& s, const GradItem& item, int64_t h) {
    blocks_.clear();
    row0_ = row1_ = item.row0;
    for (int64_t r = item.row0; r < item.row1; r += E::kBM) {
      RowBlock rb;
      prob_.fill(rb, s, item.hk, (h - item.hk * prob_.group) * s.Sq + r,
                 int(std::min<int64_t>(E::kBM, item.row1 - r)));
      if (rb.hi <= item.key0 || rb.lo >= item.key1 || rb.hi <= rb.lo) continue;
      if (blocks_.empty()) row0_ = r;
      row1_ = r + rb.n;
      blocks_.push_back(rb);
    }
  }

  void tile(const Sequence& s, RowBlock& rb, int64_t h, int64_t j0, int64_t keys, float* dk,
            float* dv) {
    if (rb.hi <= j0 || rb.lo >= j0 + keys) return;
    const auto state = prob_.mask_tile(rb, s, j0, keys);
    if (state == Problem::Tile::kSkip) return;
    const int64_t n = std::min(keys, rb.hi - j0), n_padded = round_up(n, E::kPad);
    const int64_t r0 = rb.i[0] - row0_;
    float *S = s_.data(), *dP = dp_.data();
    engine_.scores(rb, s, r0, j0, n, n_padded, S);
    const bool dS_wanted = dq_ || dk_ || dbias_;
    if (g_.d_o.ptr && dS_wanted)
      engine_.dprobs(rb, s, r0, j0, n, n_padded, dP);
    else
      std::fill_n(dP, rb.n * E::kBN, 0.f);
    const bool whole = prob_.plain && state == Problem::Tile::kFull && j0 >= rb.full_lo &&
                       j0 + n_padded <= rb.full_hi;
    for (int r = 0; r < rb.n; ++r) {
      float* x = S + r * E::kBN;
      const bool cap = p_.softcap != 0.f;
      if (!whole) prob_.logits(rb, r, s, j0, n_padded, state, x, cap ? dcap_.data() : nullptr);
      row(s, h, rb.i[r], j0, n, n_padded, x, dP + r * E::kBN);
    }
    engine_.finish_tile(rb.n, n_padded, S, dP);
    if (dv_) engine_.add_dv(r0, rb.n, n, S, dv);
    if (dk_) engine_.add_dk(r0, rb.n, n, dP, dk);
    if (dq_) engine_.add_dq(rb.n, j0, n, n_padded, dP, dq_acc_.data() + r0 * engine_.Dp);
  }

  // x: logits -> dropout(P); y: do v^T -> dS.
  void row(const Sequence& s, int64_t h, int64_t i, int64_t j0, int64_t n, int64_t n_padded,
           float* x, float* y) {
    const RowProb prob = row_prob(prob_, s, h, i);
    const vf delta = set1(delta_[s.b * p_.lse_b + h * p_.lse_h + (s.q_start + i) * p_.lse_s]);
    if (g_.dweights.ptr) {
      const Broadcast& w = g_.dweights;
      const int64_t from = s.b * w.b + h * w.h + i * w.i + j0 * w.j;
      add_row(p_.dtype, w.ptr, from, w.j, n, g_.dweights_scale, y);
    }
    if (prob_.dropout.on) {
      prob_.dropout.row(s.b * p_.H + h, i, j0, n_padded, drop_.data());
      for (int64_t t = 0; t < n_padded; t += W) {
        const vf keep = load(drop_.data() + t);
        const vf w = prob.template at<E::kExpDegree>(load(x + t));
        store(y + t, w * (load(y + t) * keep - delta));
        store(x + t, w * keep);
      }
    } else {
      for (int64_t t = 0; t < n_padded; t += W) {
        const vf w = prob.template at<E::kExpDegree>(load(x + t));
        store(y + t, w * (load(y + t) - delta));
        store(x + t, w);
      }
    }
    if (dbias_) add_bias_grad(s, h, i, j0, n, y);
    if (p_.softcap != 0.f)
      for (int64_t t = 0; t < n_padded; t += W) store(y + t, load(y + t) * load(dcap_.data() + t));
  }

  void add_bias_grad(const Sequence& s, int64_t h, int64_t i, int64_t j0, int64_t n,
                     const float* ds) {
    float* to = dbias_ + s.b * g_.dbias_b + h * g_.dbias_h + i * g_.dbias_i + j0 * g_.dbias_j;
    if (g_.dbias_once) {
      std::memcpy(to, ds, size_t(n) * sizeof(float));
    } else if (g_.dbias_j) {
      int64_t t = 0;
      for (; t + W <= n; t += W) store(to + t, load(to + t) + load(ds + t));
      for (; t < n; ++t) to[t] += ds[t];
    } else {
      float sum = 0.f;
      for (int64_t t = 0; t < n; ++t) sum += ds[t];
      *to += sum;
    }
  }

  void write_keys(const Sequence& s, int64_t hk, int64_t j0, int64_t n, const float* dk,
                  const float* dv) {
    const int64_t at = s.k_start + j0;
    if (g_.dk.ptr) engine_.write_keys(dk, n, p_.D, engine_.Dp, p_.scale, g_.dk, s.b, hk, at);
    if (g_.dv.ptr) engine_.write_keys(dv, n, p_.Dv, engine_.Dvp, 1.f, g_.dv, s.b, hk, at);
  }

  void write_rows(const Sequence& s, const GradItem& item, int64_t h) {
    for (int64_t i = item.row0; i < item.row1; ++i) {
      char* to = row_at(g_.dq, p_.dtype, s.b, h, s.q_start + i);
      if (i < row0_ || i >= row1_)
        zero_row(p_.dtype, p_.D, to);
      else
        store_row(p_.dtype, dq_acc_.data() + (i - row0_) * engine_.Dp, p_.D, p_.scale, to);
    }
  }

  const Problem& prob_;
  const AttentionParams& p_;
  const AttentionGrads& g_;
  const float* delta_;
  float* const parts_;
  const int64_t part_size_;
  E engine_;
  bool dq_ = false, dk_ = false, dv_ = false;
  float* dbias_ = nullptr;  // the sum that the item adds to
  int64_t row0_ = 0, row1_ = 0;
  std::vector<RowBlock> blocks_;
  Buffer<float> s_, dp_, drop_, dcap_, dq_acc_, dk_acc_, dv_acc_;
};

// Rows and keys beyond a padded batch entry's lengths: gradients 0.
inline void fill_padding_grads(const Problem& prob, const AttentionGrads& g) {
  const AttentionParams& p = prob.p;
  if (p.q_start) return;
  const auto zero = [&](const Operand& x, int64_t b, int64_t heads, int64_t from, int64_t to,
                        int64_t width) {
    if (!x.ptr) return;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = from; i < to; ++i) zero_row(p.dtype, width, row_at(x, p.dtype, b, h, i));
  };
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence s = prob.sequence(b);
    zero(g.dq, b, p.H, s.Sq, p.Sq, p.D);
    zero(g.dk, b, p.Hk, s.Sk, p.Sk, p.D);
    zero(g.dv, b, p.Hk, s.Sk, p.Sk, p.Dv);
  }
}

// f(from, to) over [0, n), on the plan's workers.
template <class F>
void each_chunk(const Parallel& parallel, const GradPlan& plan, int64_t n, F&& f) {
  constexpr int64_t kChunk = 1 << 16;
  if (n == 0) return;
  Queue queue(div_up(n, kChunk));
  parallel.workers(plan.workers, [&](int) {
    for (int64_t i; queue.next(&i);) f(i * kChunk, std::min(n, (i + 1) * kChunk));
  });
}

// E: engine of the forward (for weights); G: engine of the gradients.
template <class E, class G>
void backward(const AttentionParams& p, const AttentionGrads& g, const Parallel& parallel) {
  const Problem prob(p);
  fill_padding_grads(prob, g);
  Buffer<float> delta_buf;
  const int64_t rows = p.q_start ? p.lse_h * p.H : p.B * p.lse_b;
  float* delta = delta_buf.reserve(std::max<int64_t>(rows, 1));
  compute_delta<E>(prob, g, parallel, delta);
  if (g.dsinks) compute_dsinks(prob, delta, g.dsinks, parallel);
  const GradPlan plan(prob, g, parallel.threads, G::kBM, G::kBN);
  Buffer<float> parts_buf;
  float* parts = parts_buf.reserve((plan.parts - 1) * plan.part_size);
  each_chunk(parallel, plan, (plan.parts - 1) * plan.part_size,
             [&](int64_t from, int64_t to) { std::fill(parts + from, parts + to, 0.f); });
  for (const auto* groups : {&plan.groups, &plan.bias}) {
    if (groups->empty()) continue;
    Queue queue{int64_t(groups->size())};
    parallel.workers(int(std::min<int64_t>(plan.workers, int64_t(groups->size()))), [&](int) {
      BackwardWorker<G> worker(prob, g, delta, parts, plan.part_size);
      for (int64_t i; queue.next(&i);)
        for (const GradItem& item : (*groups)[size_t(i)]) worker.run(item);
    });
  }
  if (plan.parts > 1)
    each_chunk(parallel, plan, plan.part_size, [&](int64_t from, int64_t to) {
      for (int64_t part = 0; part + 1 < plan.parts; ++part)
        for (int64_t x = from; x < to; ++x) g.dbias[x] += parts[part * plan.part_size + x];
    });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
