// Attention over cached keys (Dao et al., "Flash-Decoding", 2023; pages: Kwon et al., 2309.06180).
//
//   append the new rows (rotated), rotate q
//   for (sequence, kv head, rows of all its query heads, part of the keys): online softmax
//   merge the parts in their order
//
// FLOPs 2 rows Sk (D + Dv) a kv head; bytes Sk (D + Dv) a kv head, read once: up to about 10 rows
// bound by memory, beyond by products. A few rows take the keys where they lie (CacheEngine); more
// pack them, a chunk that stays in L2 for all rows of an item.
// How rows and keys are cut depends on the shapes alone, never on the threads, so the bits are the
// same for every number of them.

namespace fastattn {
namespace FASTATTN_ISA {

struct CacheItem {
  int64_t b, hk, first, last;  // rows of the kv head's group * Sq
  int64_t lo, hi;              // keys
  int64_t state;               // of a part: where its state lies, one a block of rows; else -1
};

// Parts of the keys of the same rows: items [item, item + parts).
struct CacheMerge {
  int64_t item, parts;
};

template <class E>
class CacheWorker : public ForwardWorker<E> {
  using Base = ForwardWorker<E>;
  using Base::acc_, Base::engine_, Base::rows_, Base::prob_, Base::p_;

 public:
  static constexpr int64_t kChunk = 4 * E::kBN;  // packed keys: 0.8 MB of fp32 at head_dim 128

  CacheWorker(const AttentionKVCacheParams& cache, const Problem& problem)
      : Base(problem), cache_(cache) {}

  static Sequence sequence(const Problem& problem, int64_t b) {
    Sequence s = problem.sequence(b);
    s.shift = s.Sk - s.Sq;  // rows are the last ones, causal or not
    return s;
  }

  // states: of all parts. A chunk of keys serves all rows before the next is packed; between
  // chunks the rows' states wait.
  void run(const CacheItem& item, float* states) {
    const Slots slots(cache_, item.b, item.hk);
    engine_.look_at(&slots);
    const Sequence s = sequence(prob_, item.b);
    const int64_t step = E::kPacks ? kChunk : std::max<int64_t>(1, item.hi - item.lo);
    const int64_t size = Base::partial_size(p_), blocks = div_up(item.last - item.first, E::kBM);
    if (item.state >= 0)
      states += item.state * size;
    else if (item.hi - item.lo > step)
      states = waiting_.reserve(blocks * size);
    int64_t lo = item.lo, hi;
    do {
      hi = std::min(item.hi, lo + step);
      if constexpr (E::kPacks)
        if (lo < hi) engine_.load_chunk(lo, hi);
      for (int64_t i = 0; i < blocks; ++i) {
        fill(s, item, i);
        chunk(s, {lo, hi}, lo > item.lo, states + i * size);
        if (hi >= item.hi && item.state < 0)
          this->finish(s);
        else
          this->save(states + i * size);
      }
      lo = hi;
    } while (lo < item.hi);
  }

  // One set of rows from its parts.
  void merge(const CacheItem& item, int64_t parts, const float* states) {
    const Sequence s = sequence(prob_, item.b);
    const int64_t size = Base::partial_size(p_), blocks = div_up(item.last - item.first, E::kBM);
    for (int64_t i = 0; i < blocks; ++i) {
      fill(s, item, i);
      this->add_up(states + (item.state + i) * size, blocks * size, parts);
      this->finish(s);
    }
  }

 private:
  void fill(const Sequence& s, const CacheItem& item, int64_t block) {
    const int64_t first = item.first + block * E::kBM;
    prob_.fill(rows_, s, item.hk, first, int(std::min<int64_t>(E::kBM, item.last - first)));
  }

  // state: what earlier chunks made of these rows.
  void chunk(const Sequence& s, const Interval& keys, bool later, const float* state) {
    if (later)
      this->add_up(state, 0, 1);
    else
      this->reset();
    if (!this->advance(s, keys, later)) std::fill_n(acc_.data(), rows_.n * engine_.Dvp, 0.f);
  }

  const AttentionKVCacheParams& cache_;
  Buffer<float> waiting_;
};

struct CachePlan {
  std::vector<CacheItem> items;
  std::vector<CacheMerge> merges;
  int64_t states = 0;
  int64_t work = 0, elements = 0;  // multiply-adds; of K and V
};

// Enough items for every machine; each large enough to be worth its start.
template <class E>
CachePlan plan_cache(const Problem& prob) {
  constexpr int64_t kItems = 64, kRows = 512,
                    kKeys = E::kPacks ? CacheWorker<E>::kChunk : 2 * E::kBN;
  const AttentionParams& p = prob.p;
  CachePlan plan;
  const int64_t units = p.B * p.Hk, blocks = div_up(prob.group * p.Sq, E::kBM);
  if (units == 0 || blocks == 0) return plan;
  const int64_t most = std::max<int64_t>(1, kRows / E::kBM),
                step = std::clamp<int64_t>(blocks / div_up(kItems, units), 1, most) * E::kBM,
                others = units * div_up(prob.group * p.Sq, step);
  const int64_t part = round_up(std::max<int64_t>(div_up(p.Sk, div_up(kItems, others)), 1), kKeys);
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence s = CacheWorker<E>::sequence(prob, b);
    for (int64_t hk = 0; hk < p.Hk; ++hk) {
      for (int64_t first = 0; first < prob.group * s.Sq; first += step) {
        const int64_t last = std::min(prob.group * s.Sq, first + step);
        const Interval keys = prob.range(s, first, last);
        const int64_t n = int64_t(plan.items.size());
        const int64_t parts = keys.hi > keys.lo ? (keys.hi - 1) / part - keys.lo / part + 1 : 1;
        for (int64_t i = 0; i < parts; ++i) {
          const int64_t at = (keys.lo / part + i) * part;
          const int64_t lo = std::max(keys.lo, at), hi = std::min(keys.hi, at + part);
          plan.items.push_back({b, hk, first, last, lo, hi, parts > 1 ? plan.states : -1});
          if (parts > 1) plan.states += div_up(last - first, E::kBM);
        }
        if (parts > 1) plan.merges.push_back({n, parts});
        plan.work += (last - first) * (keys.hi - keys.lo) * (p.D + p.Dv);
        plan.elements += (keys.hi - keys.lo) * (p.D + p.Dv);
      }
    }
  }
  return plan;
}

// Rows that no sequence has: o = 0, lse = -inf.
inline void fill_absent(const Problem& prob, int64_t b) {
  const AttentionParams& p = prob.p;
  const Sequence s = prob.sequence(b);
  const int64_t before = std::clamp<int64_t>(s.Sq - s.Sk, 0, s.Sq);
  for (int64_t h = 0; h < p.H; ++h) {
    for (int64_t i = 0; i < p.Sq; ++i) {
      if (before <= i && i < s.Sq) continue;
      zero_row(p.dtype, p.Dv, row_at(p.o, p.dtype, b, h, i));
      p.lse[b * p.lse_b + h * p.lse_h + i * p.lse_s] = kNegInf;
    }
  }
}

template <class E>
void attend(const AttentionKVCacheParams& cache, const AttentionParams& p,
            const Parallel& parallel) {
  const Problem prob(p);
  const CachePlan plan = plan_cache<E>(prob);
  const int64_t n = int64_t(plan.items.size());
  Buffer<float> states;
  if (plan.states > 0) states.reserve(plan.states * CacheWorker<E>::partial_size(p));
  // About 10 us on one core, of products or of reading: what waking another one costs.
  constexpr int64_t kFewProducts = 1 << 19, kFewBytes = 128 << 10;
  const bool few = plan.work <= kFewProducts && plan.elements * size_of(p.dtype) <= kFewBytes;
  const int workers = few ? 1 : int(std::min<int64_t>(parallel.threads, n));
  Shares shares(n, workers);
  parallel.workers(workers, [&](int w) {
    CacheWorker<E> worker(cache, prob);
    for (int64_t i; shares.next(w, &i);) worker.run(plan.items[size_t(i)], states.data());
  });
  if (!plan.merges.empty()) {
    CacheWorker<E> worker(cache, prob);
    for (const CacheMerge& m : plan.merges)
      worker.merge(plan.items[size_t(m.item)], m.parts, states.data());
  }
  for (int64_t b = 0; b < p.B; ++b) fill_absent(prob, b);
}

// Rows a kv head that take its keys where they lie, and from how many on tiles pay.
inline constexpr int64_t kDirectRows = 16, kTileRows = 3;

inline void append_and_attend(const AttentionKVCacheParams& cache, const Parallel& parallel) {
  AttentionParams p = cache.attention;
  std::vector<int64_t> rows, total;
  for (int64_t b = 0; b < p.B; ++b) {
    rows.push_back(cache.ragged ? cache.new_len[b] : p.Sq);
    total.push_back(cache.cache_len[b] + cache.new_len[b]);
  }
  Buffer<char> turned;
  char* turned_q = nullptr;
  if (cache.cos) {
    turned_q = turned.reserve(std::max<int64_t>(1, p.B * p.H * p.Sq * p.D * size_of(p.dtype)));
  }
  switch (p.dtype) {
    case DType::kBf16:
      prepare(cache, reinterpret_cast<bf16*>(turned_q), parallel);
      break;
    case DType::kF16:
      prepare(cache, reinterpret_cast<f16*>(turned_q), parallel);
      break;
    default:
      prepare(cache, reinterpret_cast<float*>(turned_q), parallel);
  }
  if (turned_q) p.q = {turned_q, p.H * p.Sq * p.D, p.Sq * p.D, p.D, 1};
  p.q_len = rows.data(), p.k_len = total.data();
  Buffer<float> lse_lo;
  p.lse_lo = lse_lo.reserve(std::max<int64_t>(1, p.B * p.H * p.Sq));

  const int64_t head_rows = p.H / std::max<int64_t>(p.Hk, 1) * p.Sq;
#if FASTATTN_LEVEL >= 3
  if (p.dtype == DType::kBf16 && head_rows >= kTileRows && head_rows <= kDirectRows)
    return attend<TileCacheEngine>(cache, p, parallel);
#endif
  if (head_rows <= kDirectRows) return attend<CacheEngine>(cache, p, parallel);
#if FASTATTN_LEVEL >= 3
  if (p.dtype == DType::kBf16) return attend<ChunkEngine<AmxEngine>>(cache, p, parallel);
#endif
  attend<ChunkEngine<FmaEngine>>(cache, p, parallel);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
