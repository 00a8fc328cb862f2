#include "embedding.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "scratch.h"

namespace fastattn {
namespace {

constexpr int64_t kRowsAtOnce = 16;        // of the forward: s stays in L1
constexpr int64_t kSerial = 16 << 10;      // elements: fewer are done before a thread has woken
constexpr int64_t kTokensOfLongRun = 128;  // beyond, a row's columns are shared out
constexpr int64_t kColumnsOfLongRun = 64;

void gather(const EmbeddingParams& p, int64_t m0, int64_t m1, const Rows& out) {
  FASTATTN_DISPATCH(embedding_gather(p, m0, m1, out));
}

void sum(const Rows& ds, int64_t c0, int64_t c1, const int64_t* order, const Run& run, float scale,
         const Rows& out) {
  FASTATTN_DISPATCH(embedding_sum(ds, c0, c1, order, run, scale, out));
}

class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : ptr_(static_cast<float*>(scratch_take(size_t(std::max<int64_t>(1, floats)) * 4, &bytes_))) {
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { scratch_give(ptr_, bytes_); }
  Rows rows(int64_t N) const { return {ptr_, DType::kF32, N}; }

 private:
  size_t bytes_ = 0;
  float* ptr_;
};

Rows from_row(Rows x, int64_t m) {
  if (x.ptr) x.ptr = static_cast<char*>(x.ptr) + m * x.stride * (x.dtype == DType::kF32 ? 4 : 2);
  return x;
}

// Zeros into rows [v0, v1), one after the other: most of the gradient of a large vocabulary.
void clear(const Rows& d, int64_t v0, int64_t v1) {
  const int64_t item = d.dtype == DType::kF32 ? 4 : 2;
  if (v0 < v1) std::memset(from_row(d, v0).ptr, 0, size_t((v1 - v0) * d.stride * item));
}

// Calls f(begin, end) for pieces of [0, n) on the workers that `elements` are worth.
template <class F>
void in_pieces(int64_t n, int64_t piece, int64_t elements, const Parallel& parallel, F&& f) {
  const int64_t pieces = (n + piece - 1) / piece;
  const int workers = elements <= kSerial
                          ? 1
                          : int(std::min<int64_t>(parallel.threads, std::max<int64_t>(1, pieces)));
  Shares shares(pieces, workers);
  parallel.workers(workers, [&](int worker) {
    for (int64_t i; shares.next(worker, &i);) f(i * piece, std::min(n, (i + 1) * piece));
  });
}

// norm and dropout of rows [m0, m1), from s (its rows 0..) into y.
void behind_gather(const EmbeddingParams& p, int64_t m0, int64_t m1, const Rows& s) {
  Rows from = s;
  if (p.norm != Norm::kNone) {
    NormParams norm;
    norm.M = m1 - m0, norm.N = p.N, norm.x = s, norm.norm = p.norm, norm.eps = p.eps;
    norm.weight = p.weight, norm.shift = p.shift;
    norm.y = p.dropout.p > 0. ? s : from_row(p.y, m0);
    norm.mean = p.mean ? p.mean + m0 : nullptr, norm.rstd = p.rstd ? p.rstd + m0 : nullptr;
    norm_forward(norm, Parallel{});
    from = norm.y;
  }
  if (p.dropout.p > 0.) {
    NormParams drop;  // without a norm
    drop.M = m1 - m0, drop.N = p.N, drop.x = from;
    drop.dropout = p.dropout, drop.dropout.first_row = m0;
    drop.y = from_row(p.y, m0);
    norm_forward(drop, Parallel{});
  }
}

// Tokens in order of their index, and the runs of one index, empty ones too: a counting sort.
struct Sorted {
  std::vector<int64_t> order, begin;  // begin[v]..begin[v + 1]: the tokens of row v

  Sorted(const Index& index, int64_t M, int64_t V) : order(size_t(M)), begin(size_t(V) + 1) {
    for (int64_t m = 0; m < M; ++m) ++begin[size_t(index[m]) + 1];
    for (size_t v = 0; v < size_t(V); ++v) begin[v + 1] += begin[v];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t m = 0; m < M; ++m) order[size_t(next[size_t(index[m])]++)] = m;
  }
  Run run(int64_t v) const { return {v, begin[size_t(v)], begin[size_t(v) + 1]}; }
};

void table_gradient(const Table& table, const TableGrad& grad, const Rows& ds, int64_t M, int64_t N,
                    const Parallel& parallel) {
  const Sorted sorted(table.index, M, table.V);
  const auto one = [&](Run run, int64_t c0, int64_t c1) {
    const int64_t count = run.end - run.begin;
    const float scale = grad.by_count ? table.scale / float(count) : table.scale;
    sum(ds, c0, c1, sorted.order.data(), run, scale, grad.d);
  };
  const auto is_empty = [&](int64_t v) {
    const Run r = sorted.run(v);
    return r.begin == r.end || v == grad.skip;
  };
  const auto is_long = [&](const Run& r) {
    return r.end - r.begin > kTokensOfLongRun && r.row != grad.skip;
  };
  in_pieces(table.V, 64, (table.V + M) * N, parallel, [&](int64_t v0, int64_t v1) {
    for (int64_t v = v0; v < v1;) {
      const int64_t first = v;
      while (v < v1 && is_empty(v)) ++v;
      clear(grad.d, first, v);
      if (v == v1) break;
      if (!is_long(sorted.run(v))) one(sorted.run(v), 0, N);
      ++v;
    }
  });
  for (int64_t v = 0; v < table.V; ++v) {
    const Run run = sorted.run(v);
    if (is_long(run))
      in_pieces(N, kColumnsOfLongRun, (run.end - run.begin) * N, parallel,
                [&](int64_t c0, int64_t c1) { one(run, c0, c1); });
  }
}

}  // namespace

OutOfRange embedding_check(const EmbeddingParams& p) {
  for (int i = 0; i < kTables; ++i) {
    const Table& t = p.table[i];
    if (!t.rows.ptr) continue;
    for (int64_t m = 0; m < std::min(p.M, t.index.period); ++m)
      if (t.index[m] < 0 || t.index[m] >= t.V) return {m, i, t.index[m]};
  }
  return {};
}

void embedding_forward(const EmbeddingParams& p, const Parallel& parallel) {
  const bool direct = p.norm == Norm::kNone && !(p.dropout.p > 0.);
  in_pieces(p.M, kRowsAtOnce, p.M * p.N, parallel, [&](int64_t m0, int64_t m1) {
    if (direct) return gather(p, m0, m1, from_row(p.y, m0));
    const Scratch s(kRowsAtOnce * p.N + 64);
    gather(p, m0, m1, s.rows(p.N));
    behind_gather(p, m0, m1, s.rows(p.N));
  });
}

void embedding_backward(const EmbeddingParams& p, const EmbeddingGrads& g,
                        const Parallel& parallel) {
  Rows ds = g.dy;
  const Scratch dropped(p.dropout.p > 0. ? p.M * p.N : 0);
  if (p.dropout.p > 0.) {
    NormGrads drop;  // without a norm
    drop.M = p.M, drop.N = p.N, drop.dy = g.dy;
    drop.dropout = p.dropout, drop.dx = dropped.rows(p.N);
    norm_backward(drop, parallel);
    ds = drop.dx;
  }
  const bool norm = p.norm != Norm::kNone;
  const Scratch s(norm ? p.M * p.N : 0), through(norm ? p.M * p.N : 0);
  if (norm) {
    const Rows sums = s.rows(p.N);
    in_pieces(p.M, kRowsAtOnce, p.M * p.N, parallel,
              [&](int64_t m0, int64_t m1) { gather(p, m0, m1, from_row(sums, m0)); });
    NormGrads n;
    n.M = p.M, n.N = p.N, n.dy = ds, n.s = sums, n.mean = g.mean, n.rstd = g.rstd;
    n.norm = p.norm, n.weight = p.weight, n.ds = through.rows(p.N);
    n.dweight = g.dweight, n.dshift = g.dshift;
    norm_backward(n, parallel);
    ds = n.ds;
  }
  for (int i = 0; i < kTables; ++i)
    if (g.table[i].d.ptr) table_gradient(p.table[i], g.table[i], ds, p.M, p.N, parallel);
}

}  // namespace fastattn
