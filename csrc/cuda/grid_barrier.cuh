// A barrier of several blocks of one launch, by a counter in global memory.
//
// cooperative_groups' grid.sync() needs a workspace of the driver's and takes the whole grid; here
// a grid is made of groups that never wait for each other. The counter only grows: round r is over
// when it holds r times the number of blocks, so nothing is reset between rounds. It is 0 before
// the launch (the launcher's memset, which a graph captures with the kernel). The launch must be
// cooperative: a block that waits for one that is not resident waits for ever.
#pragma once

#include "ptx.cuh"

namespace fastattn::cuda {

// Bytes between counters: two groups poll different lines.
constexpr int kBarrierStride = 128;

class GridBarrier {
 public:
  __device__ GridBarrier(void* counters, int group, int blocks)
      : arrived_(reinterpret_cast<unsigned*>(static_cast<unsigned char*>(counters) +
                                             int64_t(group) * kBarrierStride)),
        blocks_(unsigned(blocks)) {}

  // What the group's blocks wrote before is seen by all of them after. By all threads of a block.
  __device__ __forceinline__ void meet() {
    __syncthreads();  // the block's writes come before its arrival
    target_ += blocks_;
    if (thread_id() == 0) {
      ptx::red_release_add(arrived_, 1u);
      // A difference: the counter wraps round after 2^32 arrivals.
      while (int(ptx::ld_acquire(arrived_) - target_) < 0) {
      }
    }
    __syncthreads();  // all others go on once the first thread has seen the other blocks
  }

 private:
  unsigned* arrived_;
  unsigned blocks_, target_ = 0;
};

}  // namespace fastattn::cuda
