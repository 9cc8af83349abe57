// What the CPU kernels that reduce and those that write share; for kernel code only.
#pragma once

#include "batch_norm_relu/batch_norm_relu.h"

namespace skinfast::SKINFAST_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The bits [begin, begin + count) as bytes that are 0 or not. Writes up to 7 bytes past the last.
inline void unpack_mask(const uint8_t* __restrict mask, int64_t begin, int64_t count,
                        uint8_t* __restrict flags) {
  const uint8_t* first = mask + begin / 8;
  const int offset = static_cast<int>(begin % 8);
  const int64_t bytes = ceil_divide(count, 8);
  const int64_t last = (begin + count - 1) / 8 - begin / 8;
  for (int64_t i = 0; i < bytes; ++i) {
    uint32_t bits = first[i];
    if (offset != 0) bits = (bits | (i < last ? first[i + 1] << 8 : 0)) >> offset & 0xff;
    const uint64_t eight = bits * 0x0101010101010101u & 0x8040201008040201u;
    memcpy(flags + 8 * i, &eight, 8);
  }
}

// The values of the channels of columns [column, column + count): where they are, or in `buffer`.
template <typename A>
const A* per_column(const A* values, int64_t group, int64_t column, int64_t count, A* buffer) {
  if (group == 1) return values + column;
  for (int64_t i = 0; i < count;) {
    const int64_t channel = (column + i) / group;
    const int64_t stop = smaller((channel + 1) * group - column, count);
    const A value = values[channel];
    for (; i < stop; ++i) buffer[i] = value;
  }
  return buffer;
}

}  // namespace skinfast::SKINFAST_ISA
