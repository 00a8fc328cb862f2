// Launches: which blocks are resident, which thread runs next, and what to say when none can.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "runtime.h"

namespace fastattn::emu {

Options options;
Thread* self = nullptr;
Grid* grid = nullptr;

const Coordinates& here() { return *self; }
void progressed() { ++grid->progress; }

// --- which is next -------------------------------------------------------------------------------
namespace {

// A thread that waits for another's store yields; a round in which all who can run do so and no
// memory changes is idle. Loops that end by themselves are shorter than this.
constexpr unsigned kIdleRounds = 20000;

Thread* lowest(const Warp& w, uint32_t mask) { return w.lanes[__builtin_ctz(mask)]; }
Thread* highest(const Warp& w, uint32_t mask) { return w.lanes[31 - __builtin_clz(mask)]; }

Thread* pick_random() {
  unsigned total = 0;
  for (const Warp* w : grid->warps) total += static_cast<unsigned>(__builtin_popcount(w->ready));
  if (total == 0) return nullptr;
  unsigned nth = grid->rng() % total;
  for (const Warp* w : grid->warps) {
    const auto n = static_cast<unsigned>(__builtin_popcount(w->ready));
    if (nth < n) {
      uint32_t mask = w->ready;
      while (nth--) mask &= mask - 1;
      return lowest(*w, mask);
    }
    nth -= n;
  }
  return nullptr;
}

Thread* pick_cyclic() {
  const size_t n = grid->warps.size();
  size_t start = 0;
  if (self) {
    start = static_cast<size_t>(std::find(grid->warps.begin(), grid->warps.end(), self->warp) -
                                grid->warps.begin());
    if (start == n) start = 0;
    if (n && self->lane < 31) {
      const uint32_t after = grid->warps[start]->ready & ~((2u << self->lane) - 1);
      if (grid->warps[start] == self->warp && after) return lowest(*self->warp, after);
    }
    ++start;
  }
  for (size_t i = 0; i < n; ++i) {
    const Warp& w = *grid->warps[(start + i) % n];
    if (w.ready) return lowest(w, w.ready);
  }
  return nullptr;
}

Thread* pick_ready() {
  switch (options.schedule) {
    case Schedule::kForward:
      for (const Warp* w : grid->warps) {
        if (w->ready) return lowest(*w, w->ready);
      }
      return nullptr;
    case Schedule::kReverse:
      for (auto w = grid->warps.rbegin(); w != grid->warps.rend(); ++w) {
        if ((*w)->ready) return highest(**w, (*w)->ready);
      }
      return nullptr;
    case Schedule::kCyclic:
      return pick_cyclic();
    case Schedule::kRandom:
      return pick_random();
  }
  return nullptr;
}

// Those who yielded come after all others; then they get their turn again.
Thread* pick() {
  if (Thread* t = pick_ready()) return t;
  bool any = false;
  for (Warp* w : grid->warps) {
    w->ready = w->yielded;
    any |= w->ready != 0;
    w->yielded = 0;
  }
  if (!any) return nullptr;
  grid->idle_rounds = grid->progress == grid->progress_at_flip ? grid->idle_rounds + 1 : 0;
  grid->progress_at_flip = grid->progress;
  if (grid->idle_rounds > kIdleRounds) fault_stuck(true);
  return pick_ready();
}

void run(Fiber& from, Thread* next, bool from_ends) {
  Fiber& to = next ? next->fiber : host;
  if (&to == &from) return;
  self = next;
  fiber_switch(from, to, from_ends);
}

void leave(Thread& t) { run(t.fiber, pick(), false); }

}  // namespace

void wait(State state, const char* why, Site site) {
  Thread& t = *self;
  t.state = state;
  t.waits_at = why;
  t.where = site;
  t.warp->ready &= ~(1u << t.lane);
  leave(t);
}

void wake(Thread& t) {
  t.state = State::kReady;
  t.warp->ready |= 1u << t.lane;
}

void reschedule() { leave(*self); }

void yield(const char* why, Site site) {
  Thread& t = *self;
  t.waits_at = why;
  t.where = site;
  t.warp->ready &= ~(1u << t.lane);
  t.warp->yielded |= 1u << t.lane;
  leave(t);
}

// --- blocks --------------------------------------------------------------------------------------
namespace {

[[noreturn]] void thread_main() {
  fiber_entered();
  Thread& t = *self;
  (*grid->body)();
  async_exit(t);
  order_exit(t);
  release(&grid->end_edge);
  t.state = State::kExited;
  t.waits_at = "exited";
  t.warp->live &= ~(1u << t.lane);
  t.warp->ready &= ~(1u << t.lane);
  progressed();
  warp_lane_exits(t);
  Block& b = *t.owner;
  barrier_thread_exits(b);
  if (--b.live == 0) {
    grid->finished = &b;
    run(t.fiber, nullptr, true);
  }
  run(t.fiber, pick(), true);
  __builtin_unreachable();
}

void make_threads(Block& b) {
  const dim3 d = grid->block;
  const unsigned n = d.x * d.y * d.z;
  b.live = n;
  b.threads.resize(n);
  b.warps.resize((n + kLanes - 1) / kLanes);
  b.stacks_bytes = n * options.stack;
  // One fresh mapping a block: its shadow starts clean, as that of a reused one would not.
  void* stacks = mmap(nullptr, b.stacks_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED)
    fault("launch", Site(), "no memory for %zu bytes of stacks", b.stacks_bytes);
  b.stacks = static_cast<unsigned char*>(stacks);
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = b.threads[i];
    Warp& w = b.warps[i / kLanes];
    t.thread = {i % d.x, i / d.x % d.y, i / (d.x * d.y)};
    t.block = b.index;
    t.block_dim = d;
    t.grid_dim = grid->grid;
    t.owner = &b;
    t.warp = &w;
    t.lane = i % kLanes;
    t.linear = i;
    w.owner = &b;
    w.index = i / kLanes;
    w.lanes[t.lane] = &t;
    w.live |= 1u << t.lane;
    w.ready = w.live;
    t.fiber.stack = b.stacks + i * options.stack;
    t.fiber.stack_bytes = options.stack;
    // The lowest page of every stack is a fence.
    mprotect(t.fiber.stack, 4096, PROT_NONE);
    t.fiber.clock = clock_create(t.name().c_str());
    fiber_prepare(t.fiber, thread_main);
  }
}

void start_block(unsigned linear) {
  auto b = std::make_unique<Block>();
  const dim3 g = grid->grid;
  b->linear = linear;
  b->index = {linear % g.x, linear / g.x % g.y, linear / (g.x * g.y)};
  b->shared_bytes = grid->shared;
  if (grid->shared) {
    void* p = nullptr;
    if (posix_memalign(&p, 128, grid->shared)) fault("launch", Site(), "no memory");
    b->shared = static_cast<unsigned char*>(p);
    poison(b->shared, grid->shared);
    register_region(p, grid->shared, "dynamic shared memory of block " + std::to_string(linear));
  }
  make_threads(*b);
  for (Warp& w : b->warps) grid->warps.push_back(&w);
  grid->resident.push_back(std::move(b));
}

// Nothing that ThreadSanitizer knows orders blocks that start later after this one.
void retire(Block& b) {
  const Unseen unseen;
  for (Thread& t : b.threads) {
    clock_destroy(t.fiber.clock);
#ifndef __x86_64__
    std::free(t.fiber.sp);
#endif
  }
  munmap(b.stacks, b.stacks_bytes);
  register_region(b.shared, 0, "");
  std::free(b.shared);
  for (const StaticObject& o : b.statics) {
    register_region(o.base, 0, "");
    std::free(o.base);
  }
  std::erase_if(grid->warps, [&](const Warp* w) { return w->owner == &b; });
  std::erase_if(grid->resident, [&](const auto& r) { return r.get() == &b; });
}

std::vector<unsigned> dispatch_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (options.schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (options.schedule == Schedule::kRandom) std::shuffle(order.begin(), order.end(), grid->rng);
  return order;
}

}  // namespace

std::string Thread::name() const {
  char text[96];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", block.x, block.y, block.z,
                thread.x, thread.y, thread.z);
  return text;
}

void launch(const char* name, const void* kernel, dim3 g, dim3 block, size_t shared,
            bool cooperative, const std::function<void()>& body) {
  if (grid) fault("launch", Site(), "a kernel launches %s", name);
  if (set_error(launch_error(kernel, g, block, shared, cooperative)) != cudaSuccess) return;
  Grid state;
  grid = &state;
  state.name = name;
  state.body = &body;
  state.grid = g;
  state.block = block;
  state.shared = shared;
  state.rng.seed(options.seed);
  host.clock = clock_current();
  state.read_only = clock_create("ld.global.nc");
  const auto order = dispatch_order(g.x * g.y * g.z);
  const size_t limit = cooperative ? order.size() : options.resident;
  size_t next = 0;
  while (next < order.size() || !state.resident.empty()) {
    while (next < order.size() && state.resident.size() < limit) start_block(order[next++]);
    state.finished = nullptr;
    Thread* first = pick();
    if (!first) fault_stuck(false);
    run(host, first, false);
    if (!state.finished) fault_stuck(false);
    retire(*state.finished);
  }
  clock_switch(state.read_only);
  release(&state.end_edge);
  clock_switch(host.clock);
  acquire(&state.end_edge);
  clock_destroy(state.read_only);
  grid = nullptr;
}

}  // namespace fastattn::emu
