// What the runtime tells the sanitizer that a program is linked with; nothing in a plain program.
//
// The runtime itself is compiled without instrumentation: what lanes hand to each other inside it
// leaves no trace, so that happens-before exists only where this file says so.
#pragma once

#include <cstddef>

#ifdef FASTATTN_EMU_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_func_entry(void* pc);
void __tsan_func_exit();
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}
#endif
#ifdef FASTATTN_EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastattn::emu {

#ifdef FASTATTN_EMU_TSAN
constexpr bool kTsan = true;
using Clock = void*;  // of a fiber as TSan knows it
inline Clock clock_create(const char* name) {
  Clock c = __tsan_create_fiber(0);
  __tsan_set_fiber_name(c, name);
  return c;
}
inline void clock_destroy(Clock c) { __tsan_destroy_fiber(c); }
inline Clock clock_current() { return __tsan_get_current_fiber(); }
// Becomes `c` without ordering anything.
inline void clock_switch(Clock c) { __tsan_switch_to_fiber(c, __tsan_switch_to_fiber_no_sync); }
inline void acquire(void* edge) { __tsan_acquire(edge); }
inline void release(void* edge) { __tsan_release(edge); }
// An access on behalf of the current clock, reported at `pc`.
inline void note_access(void* pc, const void* p, size_t bytes, bool write) {
  __tsan_func_entry(pc);
  if (write) {
    __tsan_write_range(const_cast<void*>(p), bytes);
  } else {
    __tsan_read_range(const_cast<void*>(p), bytes);
  }
  __tsan_func_exit();
}
// Heap work of the runtime itself, done while some thread's clock is current: not that thread's.
struct Unseen {
  Unseen() { __tsan_ignore_thread_begin(); }
  ~Unseen() { __tsan_ignore_thread_end(); }
  Unseen(const Unseen&) = delete;
};
#else
constexpr bool kTsan = false;
struct Unseen {
  Unseen() {}
};
using Clock = void*;
inline Clock clock_create(const char*) { return nullptr; }
inline void clock_destroy(Clock) {}
inline Clock clock_current() { return nullptr; }
inline void clock_switch(Clock) {}
inline void acquire(void*) {}
inline void release(void*) {}
inline void note_access(void*, const void*, size_t, bool) {}
#endif

#ifdef FASTATTN_EMU_ASAN
inline void check_access(void* pc, const void* p, size_t bytes, bool write) {
  if (void* bad = __asan_region_is_poisoned(const_cast<void*>(p), bytes)) {
    __asan_report_error(pc, __builtin_frame_address(0), __builtin_frame_address(0), bad, write,
                        bytes);
  }
}
inline void stack_leave(void** fake, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fake, bottom, bytes);
}
inline void stack_enter(void* fake, const void** bottom, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake, bottom, bytes);
}
#else
inline void check_access(void*, const void*, size_t, bool) {}
inline void stack_leave(void**, const void*, size_t) {}
inline void stack_enter(void*, const void**, size_t*) {}
#endif

}  // namespace fastattn::emu
