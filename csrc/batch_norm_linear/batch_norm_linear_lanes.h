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

}  // namespace skinfast::SKINFAST_ISA
