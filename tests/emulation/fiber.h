// A second stack for code that is suspended in its middle: ucontext, told to AddressSanitizer.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

// Default-made, it stands for the code that is running; with `main`, for a new stack on which the
// first switch to it calls `main`, which must not return and calls `entered` first.
class Fiber {
 public:
  Fiber() = default;

  explicit Fiber(void (*main)()) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for a stack");
    mapping_ = static_cast<unsigned char*>(memory);
    mprotect(mapping_, kGuardBytes, PROT_NONE);
    stack_ = mapping_ + kGuardBytes;
    stack_bytes_ = kStackBytes;
    getcontext(&context_);
    context_.uc_stack.ss_sp = mapping_ + kGuardBytes;
    context_.uc_stack.ss_size = kStackBytes;
    makecontext(&context_, main, 0);
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  ~Fiber() {
    if (mapping_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, stack_bytes_);
#endif
    munmap(mapping_, kGuardBytes + kStackBytes);
  }

  // Suspend `from`, which is running, and go on with `to`, until `to` switches back.
  static void switch_to(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
    swapcontext(&from.context_, &to.context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack_, &to.stack_, &to.stack_bytes_);
#endif
  }

  // The first thing that runs on a new stack; `from` is who switched to it.
  static void entered([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &from.stack_, &from.stack_bytes_);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 256 * 1024;
  static constexpr size_t kGuardBytes = 4096;  // below the stack: its overflow is a fault

  ucontext_t context_;
  unsigned char* mapping_ = nullptr;
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace emulation
