// The probabilities again, from the saved lse: for the weights that a user asked for and for the
// gradient that comes back through them.

namespace fastattn {
namespace FASTATTN_ISA {

// exp(x - lse) of one row, the forward's own value to the last bits. fp32 lse alone would not do:
// its rounding scales the whole row by up to 2^-24 |lse|, and beside a bias of finfo.min it loses
// log l altogether. lse_lo holds the rest, in log2.
struct RowProb {
  vf c, lse, lo;

  RowProb(const Problem& prob, float lse_, float lse_lo)
      : c(set1(prob.multiplier())), lo(set1(-lse_lo)) {
    // A row with no key: -inf - inf, every probability 0.
    lse = set1(lse_ == kNegInf ? -kNegInf : prob.in_units(lse_));
  }
  template <int kDegree>
  FASTATTN_INLINE vf at(vf x) const {
    return exp2v<kDegree>(fma(x - lse, c, lo));
  }
};

FASTATTN_INLINE RowProb row_prob(const Problem& prob, const Sequence& s, int64_t h, int64_t i) {
  const AttentionParams& p = prob.p;
  const int64_t at = s.b * p.lse_b + h * p.lse_h + (s.q_start + i) * p.lse_s;
  return RowProb(prob, p.lse[at], p.lse_lo[at]);
}

template <class E>
class ProbWorker {
 public:
  explicit ProbWorker(const Problem& problem) : prob_(problem), engine_(problem.p) {
    s_.reserve(E::kBM * E::kBN);
    drop_.reserve(E::kBN);
  }

  // Calls row(h, i, j0, n, w) for every row of [first, last) of a kv head and tile of keys that it
  // may see; w[0, n) are its weights after dropout. Rows head by head, keys in order.
  template <class F>
  void visit(int64_t b, int64_t hk, int64_t first, int64_t last, F&& row) {
    const Sequence s = prob_.sequence(b);
    Interval range = prob_.range(s, first, last);
    range.lo = range.lo / E::kAlign * E::kAlign;
    if (range.hi <= range.lo) return;
    engine_.load_keys(s, hk, range.lo, range.hi, few_rows(prob_.p));
    for (int64_t r0 = first; r0 < last; r0 += E::kBM) {
      prob_.fill(rows_, s, hk, r0, int(std::min<int64_t>(E::kBM, last - r0)));
      engine_.load_queries(rows_, s);
      for (int64_t j0 = rows_.lo / E::kAlign * E::kAlign; j0 < rows_.hi; j0 += E::kBN) {
        const int64_t n = std::min<int64_t>(E::kBN, rows_.hi - j0);
        const auto tile = prob_.mask_tile(rows_, s, j0, n);
        if (tile == Problem::Tile::kSkip) continue;
        const int64_t n_padded = round_up(n, E::kPad);
        engine_.scores(rows_, j0, n, n_padded, s_.data());
        for (int r = 0; r < rows_.n; ++r) {
          float* x = s_.data() + r * E::kBN;
          prob_.logits(rows_, r, s, j0, n_padded, tile, x, nullptr);
          weights(s, rows_.h[r], rows_.i[r], j0, n_padded, x);
          row(rows_.h[r], rows_.i[r], j0, n, x);
        }
      }
    }
  }

 private:
  void weights(const Sequence& s, int64_t h, int64_t i, int64_t j0, int64_t n, float* x) {
    const RowProb prob = row_prob(prob_, s, h, i);
    for (int64_t t = 0; t < n; t += W) store(x + t, prob.at<6>(load(x + t)));
    if (!prob_.dropout.on) return;
    prob_.dropout.row(s.b * prob_.p.H + h, i, j0, n, drop_.data());
    for (int64_t t = 0; t < n; t += W) store(x + t, load(x + t) * load(drop_.data() + t));
  }

  const Problem& prob_;
  E engine_;
  RowBlock rows_;
  Buffer<float> s_, drop_;
};

// weights (B, H, Sq, Sk), or their mean over heads (B, Sq, Sk); every element is written.
template <class E>
void write_weights(const AttentionParams& p, const Parallel& parallel) {
  const Problem prob(p);
  const bool mean = p.weights_mode == Weights::kMean;
  // A chunk of query rows i of all heads (mean: they are summed in order) or of one kv head.
  const int64_t chunk = E::kBM, chunks = div_up(p.Sq, chunk), heads = mean ? 1 : p.Hk;
  Queue queue(p.B * heads * chunks);
  parallel.workers(parallel.threads, [&](int) {
    ProbWorker<E> worker(prob);
    Buffer<float> sums;
    for (int64_t item; queue.next(&item);) {
      const int64_t b = item / (heads * chunks), hk0 = item / chunks % heads;
      const int64_t i0 = item % chunks * chunk, i1 = std::min(i0 + chunk, p.Sq);
      const Sequence s = prob.sequence(b);
      const auto out = [&](int64_t h, int64_t i) { return row_at(p.weights, p.dtype, b, h, i); };
      if (mean) std::fill_n(sums.reserve(chunk * p.Sk), chunk * p.Sk, 0.f);
      for (int64_t hk = hk0; hk < (mean ? p.Hk : hk0 + 1); ++hk) {
        for (int64_t g = 0; g < prob.group; ++g) {
          if (!mean)
            for (int64_t i = i0; i < i1; ++i) zero_row(p.dtype, p.Sk, out(hk * prob.group + g, i));
          const int64_t last = std::min(i1, s.Sq);
          if (i0 >= last) continue;
          worker.visit(
              b, hk, g * s.Sq + i0, g * s.Sq + last,
              [&](int64_t h, int64_t i, int64_t j0, int64_t n, const float* w) FASTATTN_LAMBDA {
                if (!mean) return store_row(p.dtype, w, n, 1.f, out(h, i) + j0 * size_of(p.dtype));
                float* sum = sums.data() + (i - i0) * p.Sk + j0;
                for (int64_t t = 0; t < n; ++t) sum[t] += w[t];
              });
        }
      }
      if (mean)
        for (int64_t i = i0; i < i1; ++i)
          store_row(p.dtype, sums.data() + (i - i0) * p.Sk, p.Sk, 1.f / float(p.H), out(0, i));
    }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
