// Threads, without torch: the binding passes at::parallel_for in, so torch.set_num_threads rules.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastattn {

// run(n, fn, ctx) calls fn(ctx, worker) once for each worker in [0, n), possibly all on one thread.
struct Parallel {
  int threads = 1;
  void (*run)(int n, void (*fn)(void* ctx, int worker), void* ctx) = nullptr;

  template <class F>
  void workers(int n, F&& f) const {
    if (n <= 1 || run == nullptr) {
      for (int w = 0; w < (n < 1 ? 1 : n); ++w) f(w);
      return;
    }
    run(n, [](void* ctx, int worker) { (*static_cast<F*>(ctx))(worker); }, &f);
  }
};

// Hands out items 0..n-1 one at a time: the order of the work is fixed, who does it is not, so a
// result may depend on an item but never on a worker.
class Queue {
 public:
  explicit Queue(int64_t n) : n_(n) {}
  bool next(int64_t* item) {
    *item = next_.fetch_add(1, std::memory_order_relaxed);
    return *item < n_;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t n_;
};

}  // namespace fastattn
