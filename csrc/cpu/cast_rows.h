// See cast.h. Bytes: six an element; bound by memory beyond L2.

namespace fastattn {
namespace FASTATTN_ISA {

template <class From, class To>
void cast_row(const From* x, const float* bias, int64_t n, To* y) {
  const auto at = [&](int64_t t, vf v) FASTATTN_LAMBDA { return bias ? v + load(bias + t) : v; };
  int64_t t = 0;
  for (; t + W <= n; t += W) store(y + t, at(t, load(x + t)));
  if (t == n) return;
  To part[W];
  store(part, at(t, load_part(x + t, n - t)));
  std::memcpy(y + t, part, size_t(n - t) * sizeof(To));
}

void cast_rows(const CastParams& p, const Parallel& parallel) {
  constexpr int64_t kStep = 16;
  Buffer<float> bias_buffer;
  const float* bias = read_vec(p.bias, p.N, bias_buffer);
  const int workers = workers_for(p.M * p.N, div_up(p.M, kStep), parallel);
  Shares shares(div_up(p.M, kStep), workers);
  parallel.workers(workers, [&](int worker) FASTATTN_LAMBDA {
    for (int64_t item; shares.next(worker, &item);)
      for (int64_t m = item * kStep; m < std::min(p.M, (item + 1) * kStep); ++m) {
        char *x = row_of(p.x, m), *y = row_of(p.y, m);
        if (p.y.dtype == DType::kBf16)
          cast_row(reinterpret_cast<const float*>(x), bias, p.N, reinterpret_cast<bf16*>(y));
        else
          cast_row(reinterpret_cast<const bf16*>(x), bias, p.N, reinterpret_cast<float*>(y));
      }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
