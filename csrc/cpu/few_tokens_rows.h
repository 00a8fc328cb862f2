// See few_tokens.h. Tokens go in blocks of T, V vectors; a piece of W that the first block has read
// is warm for the others.

namespace fastattn {
namespace FASTATTN_ISA {

#if FASTATTN_LEVEL >= 2
inline constexpr int kMaxVectors = 3;  // with 8 rows of W: 24 sums, 3 of x, 1 of W
inline constexpr int kAtOnce = 8;
inline constexpr int64_t kMostTokens = 144;  // at 256 the library was faster
#else
inline constexpr int kMaxVectors = 2;  // of 16 registers: 8 sums, 2 of x, 1 of W
inline constexpr int kAtOnce = 4;
inline constexpr int64_t kMostTokens = 16;
#endif
inline constexpr int64_t kRowsOfItem = 32;
// Terms that are added in one chain: what a chain rounds off grows with its length. (Chains of all
// of K = 3072 were 3 to 5 times as far off as the library's sums.)
inline constexpr int64_t kChain = 64;

// Sums over [k, end) of kRows rows of W, (row, token): stored to out, T floats a row, or beyond the
// first chain added to it.
template <int V, int kRows>
FASTATTN_NOINLINE void few_dots(const float* w, int64_t stride, int64_t k, int64_t end,
                                const float* xt, float* out) {
  const bool first = k == 0;
  vf sum[kRows][V];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = vf{};
  const auto step = [&](int64_t k) FASTATTN_LAMBDA {
    vf x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(xt + (k * V + v) * W);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vf a = set1(w[r * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = fma(a, x[v], sum[r][v]);
    }
  };
  for (; k + 16 <= end; k += 16) {
    // The same columns of the next rows: by then they have come from memory.
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) prefetch(w + (kRows + r) * stride + k);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) step(k + j);
  }
  for (; k < end; ++k) step(k);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = out + (r * V + v) * W;
      store(to, first ? sum[r][v] : load(to) + sum[r][v]);
    }
}

// Rows [n0, n1) of W x^T into out, a row T floats.
template <int V>
void few_rows_of(const Rows& w, int64_t K, int64_t n0, int64_t n1, const float* xt, float* out) {
  const float* first = static_cast<const float*>(w.ptr);
  int64_t n = n0;
  const auto rows = [&](auto count) FASTATTN_LAMBDA {
    constexpr int kRows = decltype(count)::value;
    int64_t k = 0;
    do
      few_dots<V, kRows>(first + n * w.stride, w.stride, k, std::min(K, k + kChain), xt,
                         out + (n - n0) * V * W);
    while ((k += kChain) < K);
    n += kRows;
  };
  while (n + kAtOnce <= n1) rows(std::integral_constant<int, kAtOnce>{});
  while (n < n1) rows(std::integral_constant<int, 1>{});
}

template <int V>
class FewTokens {
 public:
  static constexpr int64_t T = V * W;

  static int64_t blocks(int64_t M) { return div_up(M, T); }

  // x^T of each block, zeros beyond M.
  static void pack(const Rows& x, int64_t M, int64_t K, float* xt) {
    std::fill_n(xt + (blocks(M) - 1) * K * T, K * T, 0.f);
    for (int64_t m0 = 0; m0 < M; m0 += T, xt += K * T)
      for (int64_t k0 = 0; k0 < K; k0 += 16)
        for (int64_t m = m0; m < std::min(M, m0 + T); ++m) {
          const float* row = reinterpret_cast<const float*>(row_of(x, m));
          for (int64_t k = k0; k < std::min(K, k0 + 16); ++k) xt[k * T + m - m0] = row[k];
        }
  }

  // Tokens [m0, ...) of a block.
  static void unpack(const float* part, int64_t m0, int64_t M, int64_t n0, int64_t n,
                     const Rows& y) {
    for (int64_t m = 0; m < std::min(T, M - m0); ++m) {
      float* row = reinterpret_cast<float*>(row_of(y, m0 + m)) + n0;
      for (int64_t i = 0; i < n; ++i) row[i] = part[i * T + m];
    }
  }

  // f(block, n0, n1, worker's scratch of kRowsOfItem rows) for all pieces of [0, N).
  template <class F>
  static void over(int64_t M, int64_t N, int64_t K, const Parallel& parallel, F&& f) {
    Queue queue(div_up(N, kRowsOfItem));
    const int workers = workers_for(N * K, div_up(N, kRowsOfItem), parallel);
    parallel.workers(workers, [&](int) FASTATTN_LAMBDA {
      Buffer<float> scratch;
      scratch.reserve(kRowsOfItem * T);
      for (int64_t i; queue.next(&i);)
        for (int64_t b = 0; b < blocks(M); ++b)
          f(b, i * kRowsOfItem, std::min(N, (i + 1) * kRowsOfItem), scratch.data());
    });
  }

  static void product(const Product& p, int64_t M, int64_t K, const float* xt,
                      const Parallel& parallel) {
    over(M, p.N, K, parallel, [&](int64_t b, int64_t n0, int64_t n1, float* part) FASTATTN_LAMBDA {
      few_rows_of<V>(p.w, K, n0, n1, xt + b * K * T, part);
      unpack(part, b * T, M, n0, n1 - n0, p.y);
    });
  }

  static void products(const FewTokensParams& p, const Parallel& parallel) {
    Buffer<float> xt;
    pack(p.x, p.M, p.K, xt.reserve(blocks(p.M) * p.K * T));
    for (int i = 0; i < p.count; ++i) product(p.products[i], p.M, p.K, xt.data(), parallel);
  }
};

// Blocks of as few vectors as make no more blocks. (Two where that fills blocks better than three
// was slower: 1.1 against 1.3 times the library at 128 tokens.)
template <class F>
FASTATTN_INLINE void with_vectors(int64_t M, F&& f) {
  const int64_t vectors = div_up(M, W), blocks = div_up(vectors, kMaxVectors);
  const int64_t V = div_up(vectors, blocks);
  if (V <= 1) return f(FewTokens<1>{});
  if (V <= 2) return f(FewTokens<2>{});
  if constexpr (kMaxVectors > 2) f(FewTokens<3>{});
}

bool few_tokens_serve(int64_t M) { return FASTATTN_LEVEL > 0 && M <= kMostTokens; }

void few_tokens_products(const FewTokensParams& p, const Parallel& parallel) {
  with_vectors(p.M, [&](auto few) FASTATTN_LAMBDA { few.products(p, parallel); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
