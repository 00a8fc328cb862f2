// __syncthreads() and its voting forms, and the memory of a block.
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace fastattn::emu {

namespace {

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

void complete(Block& b) {
  const unsigned parity = b.phase & 1;
  b.result[parity][static_cast<int>(Vote::kNone)] = 0;
  b.result[parity][static_cast<int>(Vote::kAnd)] = b.ands;
  b.result[parity][static_cast<int>(Vote::kOr)] = b.ors;
  b.result[parity][static_cast<int>(Vote::kCount)] = b.count;
  b.ands = 1;
  b.ors = b.count = 0;
  b.waiting = 0;
  ++b.phase;
  progressed();
  for (Thread& t : b.threads) {
    if (t.state == State::kBlock) wake(t);
  }
}

}  // namespace

int block_barrier(Vote vote, int predicate, Site site) {
  Thread& t = *self;
  Block& b = *t.owner;
  const unsigned parity = b.phase & 1;
  if (b.waiting == 0) {
    b.barrier_site = site;
  } else if (!same(b.barrier_site, site)) {
    fault("barrier", site, "others of its block wait at the barrier of %s:%u",
          b.barrier_site.file_name(), b.barrier_site.line());
  }
  ++b.waiting;
  b.ands &= predicate != 0;
  b.ors |= predicate != 0;
  b.count += predicate != 0;
  release(&b.edge[parity]);
  if (b.waiting == b.live) {
    complete(b);
    reschedule();
  } else {
    wait(State::kBlock, "__syncthreads", site);
  }
  acquire(&b.edge[parity]);
  return b.result[parity][static_cast<int>(vote)];
}

// The hardware's barrier counts threads that have not exited.
void barrier_thread_exits(Block& b) {
  if (b.waiting != 0 && b.waiting == b.live - 1) complete(b);
}

unsigned char* dynamic_shared() { return self->owner->shared; }

void* static_shared(size_t bytes, size_t alignment, Site site) {
  Block& b = *self->owner;
  for (const StaticObject& o : b.statics) {
    if (same(o.site, site) && o.bytes == bytes) return o.base;
  }
  const Unseen unseen;  // as if the object had been there from the start
  void* p = nullptr;
  if (posix_memalign(&p, alignment < 16 ? 16 : alignment, bytes)) {
    fault("launch", site, "no memory");
  }
  poison(static_cast<unsigned char*>(p), bytes);
  b.statics.push_back({static_cast<unsigned char*>(p), bytes, site});
  register_region(p, bytes, "static shared memory of block " + std::to_string(b.linear));
  return p;
}

void poison(unsigned char* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    p[i] = static_cast<unsigned char>(options.poison >> (8 * (i % 4)));
  }
}

}  // namespace fastattn::emu
