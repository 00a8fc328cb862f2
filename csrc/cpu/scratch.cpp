#include "scratch.h"

#include <cstdlib>
#include <new>

namespace fastattn {

#ifdef __SANITIZE_ADDRESS__

// A block of exactly what was asked, never used again: AddressSanitizer sees its end and its death.
void* scratch_take(std::size_t bytes, std::size_t* got) {
  *got = bytes;
  void* ptr = nullptr;
  if (posix_memalign(&ptr, 64, bytes)) throw std::bad_alloc();
  return ptr;
}

void scratch_give(void* ptr, std::size_t) { std::free(ptr); }

#else

namespace {

struct Block {
  void* ptr = nullptr;
  std::size_t bytes = 0;
};

// A worker holds about a dozen buffers at once.
constexpr int kBlocks = 24;

struct Cache {
  Block blocks[kBlocks];
  std::size_t kept = 0;

  ~Cache() {
    for (Block& b : blocks) std::free(b.ptr);
  }
};

Cache& cache() {
  static thread_local Cache c;
  return c;
}

}  // namespace

void* scratch_take(std::size_t bytes, std::size_t* got) {
  Cache& c = cache();
  Block* best = nullptr;  // the smallest that fits, but not one four times too large
  for (Block& b : c.blocks)
    if (b.ptr && b.bytes >= bytes && b.bytes / 4 <= bytes && (!best || b.bytes < best->bytes))
      best = &b;
  if (best) {
    void* ptr = best->ptr;
    *got = best->bytes;
    c.kept -= best->bytes;
    *best = Block{};
    return ptr;
  }
  *got = (bytes + 63) / 64 * 64;
  void* ptr = std::aligned_alloc(64, *got);
  if (!ptr) throw std::bad_alloc();
  return ptr;
}

void scratch_give(void* ptr, std::size_t bytes) {
  Cache& c = cache();
  if (c.kept + bytes <= kScratchKept) {
    for (Block& b : c.blocks) {
      if (b.ptr) continue;
      b = {ptr, bytes};
      c.kept += bytes;
      return;
    }
  }
  std::free(ptr);
}

#endif

}  // namespace fastattn
