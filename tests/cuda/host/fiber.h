// A fiber: a stack and the registers that a C++ call preserves. Switching costs about 7 ns, where ucontext (which saves
// the signal mask with a system call) takes 220: a kernel switches at every barrier and warp instruction of every
// thread, millions of times a launch.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "sanitizers.h"

#ifndef __x86_64__
#error "the context switch is written for x86-64"
#endif

namespace qkernels::host {

// Saves the stack pointer to *save and continues where `load` was saved. Six registers survive a call in the System V
// ABI; they travel on the stack.
extern "C" void qk_switch_stack(void** save, void* load);
asm(R"(.text
.p2align 4
.weak qk_switch_stack
.type qk_switch_stack,@function
qk_switch_stack:
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
.size qk_switch_stack, .-qk_switch_stack
)");

constexpr int kSavedRegisters = 6;

// Room for the accumulators of an unoptimised kernel; the sanitizers put red zones between variables.
constexpr size_t kStackBytes = kThreadSanitizer || kAddressSanitizer ? 256 * 1024 : 64 * 1024;
constexpr size_t kGuardBytes = 4096;

// Stacks for the threads of a block, each above a page that may not be touched: running out of stack is a crash and not
// a wrong number. Pages are backed only once they are used.
class Stacks {
 public:
  explicit Stacks(unsigned count) : count_(count) {
    void* memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (unsigned i = 0; i < count; ++i) mprotect(memory_ + i * kEach, kGuardBytes, PROT_NONE);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { munmap(memory_, bytes()); }

  unsigned count() const { return count_; }
  char* bottom(unsigned i) const { return memory_ + i * kEach + kGuardBytes; }

 private:
  static constexpr size_t kEach = kStackBytes + kGuardBytes;
  size_t bytes() const { return count_ * kEach; }
  unsigned count_;
  char* memory_;
};

// A stack that qk_switch_stack enters at `entry`, as if that had been called: rsp = 8 mod 16 behind a return address.
inline void* fresh_stack(char* bottom, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(bottom + kStackBytes);
  *--top = 0;  // where `entry` would return to; it never does
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = 0;
  return top;
}

}  // namespace qkernels::host
