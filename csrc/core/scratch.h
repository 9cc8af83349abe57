// Memory that a kernel's task needs for itself.
#pragma once

#include <cstddef>
#include <memory>

namespace skinfast {

// At least that many bytes, aligned to a cache line, of this thread alone until its next call. It
// stays with the thread, and so in its cache: allocated anew, every page would be mapped anew.
inline void* thread_scratch(std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  static thread_local std::unique_ptr<std::byte[]> memory;
  static thread_local std::size_t size = 0;
  if (size < bytes + kLine) {
    memory.reset();  // before the larger one is asked for
    size = 0;
    memory.reset(new std::byte[bytes + kLine]);
    size = bytes + kLine;
  }
  void* start = memory.get();
  std::size_t space = size;
  return std::align(kLine, bytes, start, space);
}

}  // namespace skinfast
