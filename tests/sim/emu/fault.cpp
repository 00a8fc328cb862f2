// Reports: what happened, by which thread, where the others are, and whose memory it was.
#include <signal.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

#ifdef FASTATTN_EMU_TSAN
extern "C" int __tsan_get_report_mop(void* report, unsigned long index, int* tid, void** address,
                                     int* size, int* write, int* atomic, void** trace,
                                     unsigned long trace_size);
#endif

namespace fastattn::emu {

namespace {

struct Region {
  const unsigned char* base;
  size_t bytes;
  std::string name;
};
std::deque<Region>& regions() {
  static std::deque<Region> all;
  return all;
}

const char* short_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

void print_warp(const Warp& w) {
  // Lanes that wait at the same place share a line.
  uint32_t done = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Thread* t = w.lanes[lane];
    if (!t || done >> lane & 1) continue;
    uint32_t alike = 0;
    for (unsigned other = lane; other < kLanes; ++other) {
      const Thread* u = w.lanes[other];
      if (u && u->waits_at == t->waits_at && u->where.line() == t->where.line())
        alike |= 1u << other;
    }
    done |= alike;
    std::fprintf(stderr, "  block (%u,%u,%u) warp %u lanes %08x: %s", t->block.x, t->block.y,
                 t->block.z, w.index, alike, t->waits_at);
    if (t->where.line()) {
      std::fprintf(stderr, " at %s:%u (%s)", short_name(t->where.file_name()), t->where.line(),
                   t->where.function_name());
    }
    std::fprintf(stderr, "\n");
  }
}

// All are stuck: the most telling name for it.
const char* kind_of_stuck() {
  for (const Warp* w : grid->warps) {
    for (const Meeting& m : w->meetings) {
      if (m.arrived && (m.kind == Meet::kLdmatrix || m.kind == Meet::kMma)) return "diverged";
    }
  }
  return "deadlock";
}

void on_alarm(int) {
  std::fprintf(stderr, "emulator: timeout: the program ran out of its time\n");
  print_threads();
  _exit(71);
}

[[maybe_unused]] const int kHandler = (signal(SIGALRM, on_alarm), 0);

}  // namespace

void print_threads() {
  if (!grid) return;
  std::fprintf(stderr, "emulator: kernel %s, grid (%u,%u,%u), block (%u,%u,%u); resident:\n",
               grid->name, grid->grid.x, grid->grid.y, grid->grid.z, grid->block.x, grid->block.y,
               grid->block.z);
  for (const Warp* w : grid->warps) print_warp(*w);
}

void fault(const char* kind, Site site, const char* format, ...) {
  std::fprintf(stderr, "emulator: %s: ", kind);
  std::va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  if (site.line()) {
    std::fprintf(stderr, "\n  at %s:%u (%s)", short_name(site.file_name()), site.line(),
                 site.function_name());
  }
  if (self) std::fprintf(stderr, "\n  by %s", self->name().c_str());
  std::fprintf(stderr, "\n");
  print_threads();
  std::fflush(stderr);
  _exit(70);
}

void fault_stuck(bool spinning) {
  fault(kind_of_stuck(), Site(),
        spinning ? "all that are not waiting spin on memory that nobody will change"
                 : "all threads wait");
}

void register_region(const void* p, size_t bytes, const std::string& name) {
  const Unseen unseen;
  const auto* base = static_cast<const unsigned char*>(p);
  std::erase_if(regions(), [&](const Region& r) { return r.base == base; });
  if (bytes) regions().push_back({base, bytes, name});
}

void describe_address(const void* p) {
  const auto* byte = static_cast<const unsigned char*>(p);
  const Region* best = nullptr;
  for (const Region& r : regions()) {
    if (byte + 64 >= r.base && byte < r.base + r.bytes + 64) {
      if (!best || (byte >= r.base && byte < r.base + r.bytes)) best = &r;
    }
  }
  if (best) {
    std::fprintf(stderr, "emulator: address %p is byte %td of the %zu of %s\n", p,
                 byte - best->base, best->bytes, best->name.c_str());
  }
}

#ifdef FASTATTN_EMU_ASAN
namespace {
void on_death() {
  if (__asan_report_present()) describe_address(__asan_get_report_address());
  if (self) std::fprintf(stderr, "emulator: by %s\n", self->name().c_str());
  std::fflush(stderr);
}
[[maybe_unused]] const int kDeath = (__sanitizer_set_death_callback(on_death), 0);
}  // namespace
#endif

}  // namespace fastattn::emu

#ifdef FASTATTN_EMU_TSAN
extern "C" void __tsan_on_report(void* report) {
  int tid = 0, size = 0, write = 0, atomic = 0;
  void* address = nullptr;
  void* trace[1];
  if (__tsan_get_report_mop(report, 0, &tid, &address, &size, &write, &atomic, trace, 1)) {
    fastattn::emu::describe_address(address);
  }
}
#endif
