// Loops that a CPU kernel's compiler turns into whole vectors, for any instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

namespace skinfast {

// Neighbouring elements that are computed together. A fixed number also fixes the order of sums.
constexpr int kLaneBlock = 16;

// An integer as wide as A: where both meet in a loop, one comparison's mask serves both.
template <typename A>
using integer_for = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

}  // namespace skinfast

// A loop over lanes. Left alone, GCC takes its sixteen turns apart before it looks for vectors.
#define SKINFAST_FOR_LANES(i, count) _Pragma("GCC unroll 1") for (int i = 0; i < (count); ++i)
