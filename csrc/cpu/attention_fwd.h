// Attention forward: tiled online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
//
//   for a block of query rows:  m = -inf, l = 0, acc = 0
//     for a tile of keys that some row may see:
//       S = q k^T;  m' = max(m, rowmax S);  P = exp(S - m');  a = exp(m - m')
//       l = a l + rowsum P;  acc = a acc + dropout(P) v
//   the sink joins l;  o = acc / l;  lse = m + log l
//
// FLOPs 2 Sq Sk (D + Dv); moved q, k, v, o once and k, v once more a chunk of rows (packed).
// Work item: (batch entry, kv head, chunk of rows), longest first; keys are split over items only
// where there are fewer items than threads. What is summed in which order depends on the shapes and
// the thread count alone, never on timing.

namespace fastattn {
namespace FASTATTN_ISA {

struct WorkItem {
  int64_t b, hk, first, last;  // rows of the kv head's group * Sq
  int64_t split, splits;       // which part of the keys
  int64_t cost;
  float* partial;  // where the state of a split goes
};

// The running softmax of a block of rows.
struct alignas(64) RowState {
  float m[kMaxRows];
  float base[kMaxRows];   // m, or 0 where no key was seen yet: exp(-inf - 0) = 0
  float alpha[kMaxRows];  // what the new maximum makes of earlier sums
  vf l[kMaxRows];         // W partial sums: reduced once, at the end
};

template <class E>
class ForwardWorker {
 public:
  explicit ForwardWorker(const Problem& problem)
      : prob_(problem), p_(problem.p), engine_(problem.p) {
    s_.reserve(E::kBM * E::kBN);
    acc_.reserve(E::kBM * engine_.Dvp);
    drop_.reserve(E::kBN);
  }

  static int64_t partial_size(const AttentionParams& p) {
    return E::kBM * (round_up(p.Dv, 32) + 2);
  }

  void run(const WorkItem& item, bool direct) {
    const Sequence s = prob_.sequence(item.b);
    Interval range = prob_.range(s, item.first, item.last);
    range.lo = range.lo / E::kAlign * E::kAlign;
    if (item.splits > 1) {
      const int64_t step = round_up(div_up(range.hi - range.lo, item.splits), E::kAlign);
      range.lo += item.split * step;
      range.hi = std::min(range.hi, range.lo + step);
    }
    if (range.hi > range.lo) engine_.load_keys(s, item.hk, range.lo, range.hi, direct);
    const bool narrow = item.splits == 1 && prob_.narrow(4 * E::kBM);
    const int step = narrow ? E::kNarrowBM : E::kBM;
    for (int64_t first = item.first; first < item.last; first += step) {
      prob_.fill(rows_, s, item.hk, first, int(std::min<int64_t>(step, item.last - first)));
      block(s, range);
      if (item.splits > 1)
        save(item.partial);
      else
        finish(s);
    }
  }

  // The splits of one block of rows, merged in order.
  void merge(const WorkItem& item, const float* partials) {
    const Sequence s = prob_.sequence(item.b);
    const int n = int(item.last - item.first);
    prob_.fill(rows_, s, item.hk, item.first, n);
    add_up(partials, partial_size(p_), item.splits);
    finish(s);
  }

 protected:
  // The state of rows_ from those of parts of their keys, `size` floats apart.
  void add_up(const float* partials, int64_t size, int64_t splits) {
    reset();
    const int64_t width = engine_.Dvp;
    const float c = prob_.multiplier();
    for (int r = 0; r < rows_.n; ++r) {
      float m = kNegInf, l = 0.f;
      for (int64_t i = 0; i < splits; ++i) m = std::max(m, partials[i * size + 2 * r]);
      float* acc = acc_.data() + r * width;
      std::fill_n(acc, width, 0.f);
      for (int64_t i = 0; i < splits && m > kNegInf; ++i) {
        const float* part = partials + i * size;
        const float a = std::exp2((part[2 * r] - m) * c);
        if (a == 0.f) continue;
        l += a * part[2 * r + 1];
        const float* from = part + 2 * E::kBM + r * width;
        for (int64_t d = 0; d < width; ++d) acc[d] += a * from[d];
      }
      state_.m[r] = m;
      state_.l[r] = vf{l};
    }
  }

  void reset() {
    std::fill_n(state_.m, kMaxRows, kNegInf);
    for (int r = 0; r < rows_.n; ++r) state_.l[r] = vf{};
  }

  void block(const Sequence& s, const Interval& range) {
    reset();
    if (!advance(s, range, false)) std::fill_n(acc_.data(), rows_.n * engine_.Dvp, 0.f);
  }

  // The keys of a range join the state of rows_. started: whether acc holds anything, before and
  // after.
  bool advance(const Sequence& s, const Interval& range, bool started) {
    const int64_t inside = std::max<int64_t>(0, rows_.lo - range.lo);
    const int64_t lo = range.lo + inside / E::kStart * E::kStart;
    const int64_t hi = std::min(range.hi, rows_.hi);
    bool loaded = false;
    float *S = s_.data(), *acc = acc_.data();
    for (int64_t j0 = lo; j0 < hi; j0 += E::kBN) {
      const int64_t n = std::min<int64_t>(E::kBN, hi - j0);
      const auto tile = prob_.mask_tile(rows_, s, j0, n);
      if (tile == Problem::Tile::kSkip) continue;
      if (!loaded) {
        engine_.load_queries(rows_, s);
        for (int r = 0; r < rows_.n; ++r)
          prefetch_to_write(row_at(p_.o, p_.dtype, s.b, rows_.h[r], s.q_start + rows_.i[r]));
      }
      const int64_t n_padded = round_up(n, E::kPad);
      engine_.scores(rows_, j0, n, n_padded, S);
      const bool whole = prob_.plain && tile == Problem::Tile::kFull && j0 >= rows_.full_lo &&
                         j0 + n_padded <= rows_.full_hi;
      if (!whole)
        for (int r = 0; r < rows_.n; ++r)
          prob_.logits(rows_, r, s, j0, n_padded, tile, S + r * E::kBN, nullptr);
      softmax(s, j0, n_padded, started);
      engine_.apply(started, rows_, j0, n, n_padded, S, acc);
      started = loaded = true;
    }
    return started;
  }

  FASTATTN_NOINLINE void softmax(const Sequence& s, int64_t j0, int64_t n, bool started) {
    const float c = prob_.multiplier();
    float* S = s_.data();
    update_max(S, n, c);
    if (started) rescale();
    for (int r = 0; r < rows_.n; ++r) {
      const float* x = S + r * E::kBN;
      typename E::Prob* out = engine_.prob_row(S, r);
      if (prob_.dropout.on) {
        prob_.dropout.row(s.b * p_.H + rows_.h[r], rows_.i[r], j0, n, drop_.data());
        exp_row<true>(x, n, state_.base[r], c, state_.l[r], out);
      } else {
        exp_row<false>(x, n, state_.base[r], c, state_.l[r], out);
      }
    }
  }

  // New maxima of all rows before any exponential: W rows are reduced at once, and the reductions
  // of one group hide behind the loads of the next (row by row they cost as much as the
  // exponentials).
  FASTATTN_NOINLINE void update_max(const float* S, int64_t n, float c) {
    for (int r0 = 0; r0 < rows_.n; r0 += W) {
      vf top[W];
      for (int r = 0; r < W; ++r) {
        const float* x = S + std::min(r0 + r, rows_.n - 1) * E::kBN;
        vf a = load(x), b = load(x + W);
        for (int64_t t = 2 * W; t < n; t += 2 * W)
          a = vmax(a, load(x + t)), b = vmax(b, load(x + t + W));
        top[r] = vmax(a, b);
      }
      const vf before = load(state_.m + r0), m = vmax(before, reduce_max_rows(top));
      const vf base = m == set1(kNegInf) ? vf{} : m;
      store(state_.m + r0, m);
      store(state_.base + r0, base);
      store(state_.alpha + r0, exp2v<6>((before - base) * c));
    }
  }

  void rescale() {
    for (int r = 0; r < rows_.n; ++r) {
      if (state_.alpha[r] == 1.f) continue;
      const vf a = set1(state_.alpha[r]);
      state_.l[r] *= a;
      float* acc = acc_.data() + r * engine_.Dvp;
      for (int64_t d = 0; d < engine_.Dvp; d += W) store(acc + d, load(acc + d) * a);
    }
  }

  template <bool kDrop>
  FASTATTN_INLINE void exp_row(const float* x, int64_t n, float m, float c, vf& l_sum,
                               typename E::Prob* out) const {
    const vf vc = set1(c), vm = set1(m);
    const float* drop = drop_.data();
    const auto one = [&](int64_t t)
                         FASTATTN_LAMBDA { return exp2v<E::kExpDegree>((load(x + t) - vm) * vc); };
    vf l0 = l_sum, l1 = {};
    for (int64_t t = 0; t < n; t += 2 * W) {
      vf a = one(t), b = one(t + W);
      l0 += a, l1 += b;
      if constexpr (kDrop) a *= load(drop + t), b *= load(drop + t + W);
      E::put(out + t, a, b);
    }
    l_sum = l0 + l1;
  }

  void save(float* partial) const {
    for (int r = 0; r < rows_.n; ++r) {
      partial[2 * r] = state_.m[r];
      partial[2 * r + 1] = reduce_add(state_.l[r]);
    }
    std::memcpy(partial + 2 * E::kBM, acc_.data(), size_t(rows_.n * engine_.Dvp) * sizeof(float));
  }

  // W rows at a time; in double, since fp32 cannot hold both a row's maximum and its log of a sum.
  FASTATTN_NOINLINE void finish(const Sequence& s) {
    const vd unit = vd{} + double(prob_.unit()), c = vd{} + double(prob_.multiplier());
    for (int r0 = 0; r0 < rows_.n; r0 += W) {
      const int n = std::min(W, rows_.n - r0);
      vf sums[W];
      for (int r = 0; r < W; ++r) sums[r] = state_.l[std::min(r0 + r, rows_.n - 1)];
      const vf m = load(state_.m + r0);
      alignas(64) float l[W], inverse[W], lse[W], lse_lo[W];
      alignas(64) double top[W];
      store(l, reduce_add_rows(sums));
      for (int r = 0; r < W; ++r) top[r] = m[r], inverse[r] = 1.f;
      if (p_.sinks)
        for (int r = 0; r < n; ++r) join_sink(rows_.h[r0 + r], m[r], &l[r], &inverse[r], &top[r]);
      store(inverse, load(inverse) / load(l));
      const vd t = load(top), log_l = to_double(log2v(load(l)));
      const vf total = to_single(t * unit + log_l * kLn2Exact);
      store(lse, total);
      store(lse_lo, to_single(log_l + (t - to_double(prob_.in_units(total))) * c));
      for (int r = 0; r < n; ++r)
        finish_row(s, rows_.h[r0 + r], s.q_start + rows_.i[r0 + r],
                   acc_.data() + (r0 + r) * engine_.Dvp, m[r] == kNegInf, inverse[r], lse[r],
                   lse_lo[r]);
    }
  }

  // What the sum stands on, in units of the tile: the row's maximum, or a sink above it. Never
  // their difference: beside a row of finfo.min it would drown both.
  void join_sink(int64_t h, float m, float* l, float* factor, double* top) const {
    if (m == kNegInf) return;
    const double sink = double(p_.sinks[h]) / prob_.unit(), c = prob_.multiplier();
    const double lift = std::max(0., sink - m) * c;
    *factor = std::exp2(float(-lift));
    *l = *l * *factor + std::exp2(float((sink - m) * c - lift));
    *top = std::max(double(m), sink);
  }

  FASTATTN_INLINE void finish_row(const Sequence& s, int64_t h, int64_t i, const float* acc,
                                  bool none, float factor, float lse, float lse_lo) const {
    const int64_t at = s.b * p_.lse_b + h * p_.lse_h + i * p_.lse_s;
    char* o = row_at(p_.o, p_.dtype, s.b, h, i);
    if (none) {  // no key: output 0, whatever the sink
      p_.lse[at] = p_.sinks ? p_.sinks[h] : kNegInf, p_.lse_lo[at] = 0.f;
      return zero_row(p_.dtype, p_.Dv, o);
    }
    p_.lse[at] = lse, p_.lse_lo[at] = lse_lo;
    store_row(p_.dtype, acc, p_.Dv, factor, o);
  }

  const Problem& prob_;
  const AttentionParams& p_;
  E engine_;
  RowBlock rows_;
  RowState state_;
  Buffer<float> s_, acc_, drop_;
};

// Rows of a padded batch beyond its length: output 0, lse -inf.
inline void fill_padding(const Problem& prob, int64_t b) {
  const AttentionParams& p = prob.p;
  const Sequence s = prob.sequence(b);
  if (p.q_start) return;  // packed: no padding
  for (int64_t h = 0; h < p.H; ++h) {
    for (int64_t i = s.Sq; i < p.Sq; ++i) {
      zero_row(p.dtype, p.Dv, row_at(p.o, p.dtype, b, h, i));
      p.lse[b * p.lse_b + h * p.lse_h + i * p.lse_s] = kNegInf;
      p.lse_lo[b * p.lse_b + h * p.lse_h + i * p.lse_s] = 0.f;
    }
  }
}

// Below this many multiply-adds (about 20 us on one core) waking a thread costs more than it saves.
inline constexpr int64_t kSerialWork = 1 << 20;

// Every chunk packs its keys and values anew: 6 % of the work of 256 rows, 1.5 % of that of 1024.
inline constexpr int64_t kChunkRows = 512;

struct Plan {
  std::vector<WorkItem> items;
  int64_t work = 0;  // multiply-adds
  int64_t splits = 1;
};

// Chunks of a kv head's rows, so that every thread has several items and none is too small.
inline Plan plan_rows(const Problem& prob, int threads, int block_rows, bool may_split) {
  const AttentionParams& p = prob.p;
  Plan plan;
  const int64_t units = p.B * p.Hk, per_key = p.D + p.Dv;
  const int64_t chunks = threads == 1 ? 1 : div_up(8 * threads, std::max<int64_t>(units, 1));
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence s = prob.sequence(b);
    const int64_t rows = prob.group * s.Sq, blocks = div_up(rows, block_rows);
    int64_t step = div_up(blocks, std::min(chunks, std::max<int64_t>(blocks, 1)));
    if (units >= threads) step = std::max(step, div_up(kChunkRows, block_rows));
    for (int64_t hk = 0; hk < p.Hk; ++hk) {
      for (int64_t first = 0; first < rows; first += step * block_rows) {
        const int64_t last = std::min(rows, first + step * block_rows);
        int64_t keys = 0;
        if (last - first < s.Sq || prob.group == 1) {
          const Interval a = prob.keys(s, first % s.Sq), z = prob.keys(s, (last - 1) % s.Sq);
          keys = ((a.hi - a.lo) + (z.hi - z.lo)) / 2;
        } else {
          keys = s.Sk;
        }
        plan.items.push_back({b, hk, first, last, 0, 1, (last - first) * keys, nullptr});
        plan.work += (last - first) * keys * per_key;
      }
    }
  }
  const int64_t n = int64_t(plan.items.size());
  if (may_split && n > 0 && n < threads && p.Sq * prob.group <= block_rows &&
      plan.work > kSerialWork)
    plan.splits = std::max<int64_t>(1, std::min(div_up(2 * threads, n), p.Sk / 256));
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [](const WorkItem& a, const WorkItem& b) { return a.cost > b.cost; });
  return plan;
}

template <class E>
void forward(const AttentionParams& p, const Parallel& parallel, bool direct) {
  const Problem prob(p);
  for (int64_t b = 0; b < p.B; ++b) fill_padding(prob, b);
  Plan plan = plan_rows(prob, parallel.threads, E::kBM, true);
  if (plan.items.empty()) return;
  std::vector<WorkItem> work;
  Buffer<float> partials;
  const int64_t size = ForwardWorker<E>::partial_size(p), n = int64_t(plan.items.size());
  if (plan.splits > 1) partials.reserve(n * plan.splits * size);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t s = 0; s < plan.splits; ++s) {
      WorkItem item = plan.items[size_t(i)];
      item.split = s, item.splits = plan.splits;
      if (plan.splits > 1) item.partial = partials.data() + (i * plan.splits + s) * size;
      work.push_back(item);
    }
  }
  Queue queue(int64_t(work.size()));
  const int workers =
      plan.work <= kSerialWork ? 1 : int(std::min<int64_t>(parallel.threads, int64_t(work.size())));
  parallel.workers(workers, [&](int) {
    ForwardWorker<E> worker(prob);
    for (int64_t i; queue.next(&i);) worker.run(work[size_t(i)], direct);
  });
  if (plan.splits > 1) {
    ForwardWorker<E> worker(prob);
    for (int64_t i = 0; i < n; ++i)
      worker.merge(work[size_t(i * plan.splits)], partials.data() + i * plan.splits * size);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
