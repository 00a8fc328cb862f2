// Threads, without torch: the binding passes at::parallel_for in, so torch.set_num_threads rules.
#pragma once

#include <algorithm>
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

// The same, to each worker first the items of its own share: they are the same in every call with
// as many workers, so that what a core has in its caches it finds there, and neighbouring pages are
// first touched by one core. Who is done takes what others have left.
class Shares {
 public:
  Shares(int64_t n, int workers) : n_(n), shares_(std::clamp(workers, 1, kMost)) {
    for (int i = 0; i < shares_; ++i) next_[i].item = begin(i);
  }
  bool next(int worker, int64_t* item) {
    for (int i = 0; i < shares_; ++i) {
      const int share = (worker + i) % shares_;
      std::atomic<int64_t>& from = next_[share].item;
      if (from.load(std::memory_order_relaxed) >= begin(share + 1)) continue;
      *item = from.fetch_add(1, std::memory_order_relaxed);
      if (*item < begin(share + 1)) return true;
    }
    return false;
  }

 private:
  static constexpr int kMost = 32;
  struct alignas(64) Next {
    std::atomic<int64_t> item;
  };
  int64_t begin(int share) const { return n_ * share / shares_; }

  const int64_t n_;
  const int shares_;
  Next next_[kMost];
};

}  // namespace fastattn
