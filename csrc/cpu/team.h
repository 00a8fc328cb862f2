// Threads that work on one thing step by step and wait for each other between the steps.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "parallel.h"

namespace fastattn {

// Turns of waiting before a thread gives its core away: what it waits for may want that very core.
class Spin {
 public:
  void wait() {
    if (++turns_ < kTurns)
      pause();
    else
      std::this_thread::yield();
  }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  int turns() const { return turns_; }

 private:
  static constexpr int kTurns = 2000;
  int turns_ = 0;
};

// Members that have found each other: nothing promises that the workers of a Parallel run at the
// same time (nested in another parallel region all of them run on one thread, one after the other),
// and a barrier among threads that do not is a dead-lock. So the team is whoever has joined when
// the first one stops waiting; who comes later is sent home.
class Team {
 public:
  explicit Team(int wanted) : wanted_(wanted) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // The member's number, or -1: sent home. size() holds from then on.
  int join() {
    const int rank = state_.fetch_add(1, std::memory_order_acq_rel);
    if (rank >= kClosed) return -1;
    Spin spin;
    if (rank > 0) {
      while (size_.load(std::memory_order_acquire) == 0) spin.wait();
      return rank;
    }
    while (state_.load(std::memory_order_relaxed) < wanted_ && spin.turns() < kPatience)
      spin.wait();
    size_.store(state_.fetch_or(kClosed, std::memory_order_acq_rel), std::memory_order_release);
    return 0;
  }

  int size() const { return size_.load(std::memory_order_relaxed); }

  // Orders what every member wrote before it before what every member reads after it. Who has
  // waited for half a millisecond sleeps: the others' core is shared then, and an idle one takes
  // its part of that. (Yielding keeps the core: beside three busy processes an LSTM took three
  // times as long as torch's; asleep after a tenth of that, both wait for each other to wake on a
  // free machine.)
  void barrier() {
    const int n = size();
    if (n == 1) return;
    const uint32_t epoch = epoch_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n) {
      arrived_.store(0, std::memory_order_relaxed);
      epoch_.store(epoch + 1, std::memory_order_release);
      epoch_.notify_all();
      return;
    }
    for (int turn = 0; epoch_.load(std::memory_order_acquire) == epoch; ++turn) {
      if (turn < kTurns)
        Spin::pause();
      else
        epoch_.wait(epoch, std::memory_order_acquire);
    }
  }

 private:
  static constexpr int kClosed = 1 << 20;
  static constexpr int kTurns = 10000;
  static constexpr int kPatience = 6000;  // about 0.2 ms: a sleeping thread wakes in a tenth of it
  const int wanted_;
  std::atomic<int> state_{0}, size_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
};

}  // namespace fastattn
