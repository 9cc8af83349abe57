// What the forward and the backward kernel for the CPU share; for kernel code only.
#pragma once

#include "batch_norm_linear/batch_norm_linear.h"
#include "core/vector.h"

namespace skinfast::SKINFAST_ISA {

// Rows forward, and vectors of features backward, that are multiplied together: with kOutputGroup
// sums each, as many as there are registers for.
constexpr int kTogether = SKINFAST_VECTOR_BYTES == 64 ? 2 : 1;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The lanes of a whole vector, or the first of them that exist.
template <bool kWhole, typename T>
inline vector_t<accumulate_t<T>> load_lanes(const T* from, int64_t count) {
  return kWhole ? load_vector(from) : load_partial(from, static_cast<int>(count));
}

namespace {

// Calls `body(scale, shift, begin, end)` with the features [begin, end) of each channel, of the
// `count` from `first` on.
template <typename Body>
void for_each_channel(const PixelScale& pixels, int64_t first, int64_t count, const Body& body) {
  for (int64_t begin = 0; begin < count;) {
    const int64_t channel = (first + begin) / pixels.channel_features;
    const int64_t end = smaller(count, (channel + 1) * pixels.channel_features - first);
    body(pixels.scale[channel], pixels.shift[channel], begin, end);
    begin = end;
  }
}

// Means and factors of a block of features, as convert_to_bytes() says.
void convert_block_to_bytes(const PixelScale& pixels, int64_t first, int64_t count,
                            float* __restrict means, float* __restrict factors) {
  for_each_channel(pixels, first, count, [&](float scale, float shift, int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f) {
      convert_to_bytes(scale, shift, means[f], factors[f]);
    }
  });
}

}  // namespace

}  // namespace skinfast::SKINFAST_ISA
