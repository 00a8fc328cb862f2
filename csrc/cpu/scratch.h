// Scratch memory that outlives a call: fresh pages cost a fault each (256 a MB), which for a small
// call is more than its arithmetic. Every thread keeps what its last calls freed, up to
// kScratchKept, and returns it when it ends.
#pragma once

#include <cstddef>

namespace fastattn {

inline constexpr std::size_t kScratchKept = 8u << 20;  // bytes a thread

// 64-byte aligned, contents undefined. Throws std::bad_alloc.
void* scratch_take(std::size_t bytes, std::size_t* got);
void scratch_give(void* block, std::size_t bytes);

}  // namespace fastattn
