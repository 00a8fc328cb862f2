// Shared addresses and cp.async.
//
// A copy may land anywhere between its issue and the wait for its group. Its data lands at one end
// or the other (Options::lazy); ThreadSanitizer sees it done by a clock of its own that starts at
// the issue and joins its thread at the wait, so that whatever touches the memory in between races
// with it, in both modes.
#include <cstring>

#include "runtime.h"

namespace fastattn::emu {

namespace {

// A shared address is the object's number and the offset in it: an overrun meets no neighbour.
constexpr uint32_t kWindowBits = 22;
constexpr uint32_t kDynamic = 1;

void land(const Copy& c) {
  // Word by word: memcpy would be seen by the sanitizers as an access of the current thread.
  for (unsigned i = 0; i < c.bytes; i += 4) {
    uint32_t word = 0;
    if (c.src) __builtin_memcpy(&word, c.src + i, 4);
    __builtin_memcpy(c.dst + i, &word, 4);
  }
}

char* group_edge(AsyncCopies& a, uint64_t group) { return &a.group_edges[group % 64]; }

void note_copy(Thread& t, const Copy& c, void* pc) {
  if (!kTsan) return;
  AsyncCopies& a = t.copies;
  if (!a.engine) a.engine = clock_create(("cp.async of " + t.name()).c_str());
  release(&a.issue_edge);
  clock_switch(a.engine);
  acquire(&a.issue_edge);
  note_access(pc, c.dst, c.bytes, true);
  if (c.src) note_access(pc, c.src, c.bytes, false);
  clock_switch(t.fiber.clock);
}

void land_oldest(AsyncCopies& a) {
  if (options.lazy) {
    for (const Copy& c : a.groups.front()) land(c);
  }
  acquire(group_edge(a, a.committed - a.groups.size()));
  const Unseen unseen;
  a.groups.pop_front();
}

}  // namespace

uint32_t shared_address(const void* p, Site site) {
  const Block& b = *self->owner;
  const auto* byte = static_cast<const unsigned char*>(p);
  // One past the end is an address too: loops step beyond the last row before they stop.
  if (b.shared && byte >= b.shared && byte <= b.shared + b.shared_bytes) {
    return kDynamic << kWindowBits | static_cast<uint32_t>(byte - b.shared);
  }
  for (size_t i = 0; i < b.statics.size(); ++i) {
    const StaticObject& o = b.statics[i];
    if (byte >= o.base && byte <= o.base + o.bytes) {
      return static_cast<uint32_t>(kDynamic + 1 + i) << kWindowBits |
             static_cast<uint32_t>(byte - o.base);
    }
  }
  fault("out of bounds", site, "%p lies in no shared memory of the block", p);
}

unsigned char* shared_pointer(uint32_t address, unsigned bytes, const char* what, Site site) {
  const Block& b = *self->owner;
  const uint32_t object = address >> kWindowBits, offset = address & ((1u << kWindowBits) - 1);
  if (object < kDynamic || object > kDynamic + b.statics.size()) {
    fault("out of bounds", site, "%s of shared address 0x%x, outside all that the block has", what,
          address);
  }
  const bool dynamic = object == kDynamic;
  unsigned char* base = dynamic ? b.shared : b.statics[object - kDynamic - 1].base;
  const size_t size = dynamic ? b.shared_bytes : b.statics[object - kDynamic - 1].bytes;
  if (offset + bytes > size) {
    fault("out of bounds", site, "%s of %u bytes at offset %u of %zu bytes of shared memory", what,
          bytes, offset, size);
  }
  if (offset % bytes) {
    fault("misaligned", site, "%s at shared offset %u is not a multiple of %u", what, offset,
          bytes);
  }
  return base + offset;
}

void cp_async(uint32_t dst, const void* src, unsigned bytes, bool valid, Site site) {
  Thread& t = *self;
  void* pc = __builtin_return_address(0);
  unsigned char* to = shared_pointer(dst, bytes, "cp.async", site);
  if (reinterpret_cast<uintptr_t>(src) % bytes) {
    fault("misaligned", site, "cp.async reads %u bytes at %p", bytes, src);
  }
  check_access(pc, to, bytes, true);
  if (valid) check_access(pc, src, bytes, false);
  const Copy c{to, valid ? static_cast<const unsigned char*>(src) : nullptr, bytes};
  note_copy(t, c, pc);
  if (!options.lazy) land(c);
  const Unseen unseen;
  t.copies.open.push_back(c);
}

void cp_async_commit() {
  Thread& t = *self;
  AsyncCopies& a = t.copies;
  if (a.groups.size() >= 64) fault("launch", Site(), "64 cp.async groups in flight");
  if (a.engine) {
    clock_switch(a.engine);
    release(group_edge(a, a.committed));
    clock_switch(t.fiber.clock);
  }
  ++a.committed;
  const Unseen unseen;
  a.groups.push_back(std::move(a.open));
  a.open.clear();
}

void cp_async_wait(unsigned in_flight, Site) {
  AsyncCopies& a = self->copies;
  while (a.groups.size() > in_flight) land_oldest(a);
}

void async_exit(Thread& t) {
  if (!t.copies.open.empty()) cp_async_commit();
  while (!t.copies.groups.empty()) land_oldest(t.copies);
  if (t.copies.engine) clock_destroy(t.copies.engine);
  t.copies.engine = nullptr;
}

}  // namespace fastattn::emu
