// What atomics and fences order, as ThreadSanitizer is to know it: PTX's release and acquire
// patterns, at block or device scope. The accesses themselves are relaxed atomics of the kernel.
//
// A relaxed atomic write after a fence releases what came before the *fence*, not what came
// between; a fence acquires what earlier atomic reads saw. ThreadSanitizer has no fences, so clocks
// of their own carry these states from one to the other.
#include "runtime.h"

namespace fastattn::emu {

namespace {

constexpr int kScopes[] = {static_cast<int>(Scope::kBlock), static_cast<int>(Scope::kDevice)};

// The edge of an atomic object, as its device-wide observers or those of one block see it. A plain
// store ends the release sequences of earlier writers: it starts a new edge.
char* edge_of(const void* p, int scope, bool fresh) {
  const Block* block = scope == static_cast<int>(Scope::kBlock) ? self->owner : nullptr;
  const Unseen unseen;
  char*& edge = grid->edges[{reinterpret_cast<uintptr_t>(p), block}];
  if (!edge || fresh) {
    grid->edge_bytes.emplace_back();
    edge = &grid->edge_bytes.back();
  }
  return edge;
}

template <class F>
void by(Clock clock, F f) {
  clock_switch(clock);
  f();
  clock_switch(self->fiber.clock);
}

Clock made(Clock& c, const char* name) {
  if (!c) c = clock_create(name);
  return c;
}

void take(const void* p, bool acquires) {
  FenceClocks& f = self->fences;
  for (int scope : kScopes) {
    char* edge = edge_of(p, scope, false);
    if (acquires) acquire(edge);
    by(made(f.seen[scope], "seen by atomics"), [&] { acquire(edge); });
  }
}

void give(const void* p, bool releases, bool fresh) {
  FenceClocks& f = self->fences;
  for (int scope : kScopes) {
    char* edge = edge_of(p, scope, fresh);
    if (releases) release(edge);
    if (f.released[scope]) by(f.released[scope], [&] { release(edge); });
  }
}

}  // namespace

void atomic_begin(const void* p, unsigned bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    fault("misaligned", site, "an atomic of %u bytes at %p", bytes, p);
  }
  yield("an atomic", site);
}

void atomic_end(const void* p, Access access, Order order, bool changed) {
  if (changed) progressed();
  if (!kTsan) return;
  if (access != Access::kStore) take(p, order.acquire);
  if (access != Access::kLoad) give(p, order.release, access == Access::kStore);
}

void fence(Scope scope) {
  progressed();
  if (!kTsan) return;
  FenceClocks& f = self->fences;
  // A fence of the device is one of the block too.
  for (int s = 0; s <= static_cast<int>(scope); ++s) {
    if (f.seen[s]) {
      by(f.seen[s], [&] { release(&f.edge[s]); });
      acquire(&f.edge[s]);
    }
  }
  for (int s = 0; s <= static_cast<int>(scope); ++s) {
    release(&f.edge[2 + s]);
    by(made(f.released[s], "released by a fence"), [&] { acquire(&f.edge[2 + s]); });
  }
}

void order_exit(Thread& t) {
  for (Clock* c :
       {&t.fences.released[0], &t.fences.released[1], &t.fences.seen[0], &t.fences.seen[1]}) {
    if (*c) clock_destroy(*c);
    *c = nullptr;
  }
}

void load_read_only(const void* p, unsigned bytes) {
  check_access(__builtin_return_address(0), p, bytes, false);
  if (!kTsan) return;
  void* pc = __builtin_return_address(0);
  by(grid->read_only, [&] { note_access(pc, p, bytes, false); });
}

void nap(Site site) { yield("__nanosleep", site); }

}  // namespace fastattn::emu
