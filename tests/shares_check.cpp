// Hands out N items to WORKERS in THREADS threads (0: one after the other, as a thread pool of one
// does it), argv[1..3], slowly where argv[4] says so: to worker 0 alone. Prints who had each item.
#include "../csrc/cpu/parallel.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

int main(int, char** argv) {
  const int64_t n = std::atoll(argv[1]);
  const int workers = std::atoi(argv[2]), threads = std::atoi(argv[3]), slow = std::atoi(argv[4]);
  fastattn::Shares shares(n, workers);
  std::vector<std::vector<int64_t>> had(size_t(workers < 1 ? 1 : workers));
  const auto work = [&](int worker) {
    for (int64_t item; shares.next(worker, &item);) {
      had[size_t(worker)].push_back(item);
      if (slow && worker == 0) std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
  };
  if (threads) {
    std::vector<std::thread> pool;
    for (int w = 0; w < workers; ++w) pool.emplace_back(work, w);
    for (std::thread& t : pool) t.join();
  } else {
    for (int w = 0; w < workers; ++w) work(w);
  }
  for (const auto& items : had) {
    for (int64_t item : items) std::printf("%lld ", static_cast<long long>(item));
    std::puts("");
  }
}
