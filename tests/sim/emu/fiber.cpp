// Stacks that are switched by hand: swapcontext's system call would cost more than a kernel's step.
#include <cstdlib>

#include "runtime.h"
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace fastattn::emu {

Fiber host;

#ifdef __x86_64__
// Saves the callee-saved registers on the stack that is left and takes up those of the other.
extern "C" void fastattn_emu_switch(void** save, void* load);
asm(R"(
.text
.globl fastattn_emu_switch
.type fastattn_emu_switch, @function
fastattn_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastattn_emu_switch, .-fastattn_emu_switch
)");

void fiber_prepare(Fiber& f, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(f.stack + f.stack_bytes);
  *--top = nullptr;  // ends a backtrace, and leaves the alignment that a call would
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.sp = top;
}
static void swap_stacks(Fiber& from, Fiber& to) { fastattn_emu_switch(&from.sp, to.sp); }
#else
static ucontext_t& context(Fiber& f) {
  if (!f.sp) f.sp = std::calloc(1, sizeof(ucontext_t));
  return *static_cast<ucontext_t*>(f.sp);
}
void fiber_prepare(Fiber& f, void (*entry)()) {
  ucontext_t& c = context(f);
  getcontext(&c);
  c.uc_stack.ss_sp = f.stack;
  c.uc_stack.ss_size = f.stack_bytes;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}
static void swap_stacks(Fiber& from, Fiber& to) { swapcontext(&context(from), &context(to)); }
#endif

void fiber_switch(Fiber& from, Fiber& to, bool from_ends) {
  stack_leave(from_ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  clock_switch(to.clock);
  swap_stacks(from, to);
  stack_enter(from.fake_stack, nullptr, nullptr);
}

void fiber_entered() {
  const void* bottom = nullptr;
  size_t bytes = 0;
  stack_enter(nullptr, &bottom, &bytes);
  // Whoever ran first came from the host: that is how its stack's extent becomes known.
  if (!host.stack) {
    host.stack = const_cast<unsigned char*>(static_cast<const unsigned char*>(bottom));
    host.stack_bytes = bytes;
  }
}

}  // namespace fastattn::emu
