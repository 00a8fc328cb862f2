// What embedding does a row at a time: gather rows of its tables, and sum rows by index.

namespace fastattn {
namespace FASTATTN_ISA {

inline constexpr int64_t kPart = 64;      // tokens of a partial sum: rounding grows with its root
inline constexpr int64_t kColumns = 256;  // of a sum at a time: they stay in L1

// Rows [m0, m1) of s into rows 0.. of out.
void embedding_gather(const EmbeddingParams& p, int64_t m0, int64_t m1, const Rows& out) {
  const int64_t n = round_up(p.N, kPad);
  Buffer<float> sum_buf, row_buf;
  float *sum = sum_buf.reserve(n), *scratch = row_buf.reserve(n);
  const bool alone = !p.table[1].rows.ptr && !p.table[2].rows.ptr && p.table[0].scale == 1.f;
  for (int64_t m = m0; m < m1; ++m) {
    const Table& words = p.table[0];
    const char* first = row_of(words.rows, words.index[m]);
    if (m + 1 < m1) prefetch(row_of(words.rows, words.index[m + 1]));
    if (alone && words.rows.dtype == out.dtype) {
      std::memcpy(row_of(out, m - m0), first, size_t(p.N * item_size(out.dtype)));
      continue;
    }
    float* s = begin_row(out, m - m0, p.N, sum);
    const float* x = read_row(words.rows, words.index[m], p.N, scratch);
    const vf by = set1(words.scale);
    for (int64_t t = 0; t < p.N; t += W) store(s + t, load(x + t) * by);
    for (int i = 1; i < kTables; ++i) {
      const Table& more = p.table[i];
      if (!more.rows.ptr) continue;
      x = read_row(more.rows, more.index[m], p.N, scratch);
      for (int64_t t = 0; t < p.N; t += W) store(s + t, load(s + t) + load(x + t));
    }
    write_row(out, m - m0, p.N, s);
  }
}

// Columns [c0, c1) of one row of a gradient: scale * the sum of its tokens' rows of ds, in order.
void embedding_sum(const Rows& ds, int64_t c0, int64_t c1, const int64_t* order, const Run& run,
                   float scale, const Rows& out) {
  float total[kColumns], part[kColumns], row[kColumns];
  for (int64_t c = c0; c < c1; c += kColumns) {
    const int64_t n = std::min(kColumns, c1 - c);
    const auto piece = [&](const Rows& of, int64_t m) {
      Rows at = of;
      at.ptr = row_of(of, m) + c * item_size(of.dtype);
      return at;
    };
    std::fill_n(total, round_up(n, W), 0.f);
    for (int64_t i = run.begin; i < run.end; i += kPart) {
      const int64_t end = std::min(run.end, i + kPart);
      std::fill_n(part, round_up(n, W), 0.f);
      for (int64_t k = i; k < end; ++k) {
        const Rows from = piece(ds, order[k]);
        const float* d = read_row(from, 0, n, row);
        for (int64_t t = 0; t < n; t += W) store(part + t, load(part + t) + load(d + t));
      }
      for (int64_t t = 0; t < n; t += W) store(total + t, load(total + t) + load(part + t));
    }
    const vf by = set1(scale);
    for (int64_t t = 0; t < n; t += W) store(total + t, load(total + t) * by);
    write_row(piece(out, run.row), 0, n, total);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
