// Square blocks of vectors turned over. Included inside CPU kernel files only, like vector.h.
#pragma once

#include "core/vector.h"

namespace skinfast::SKINFAST_ISA {

// Integer lanes as wide as A's.
template <typename A>
using lane_integers = decltype(vector_t<A>{} < vector_t<A>{});

// Exchange the off-diagonal quarters of every 2 kStep x 2 kStep block, then go on inside them.
template <typename A, int kStep>
SKINFAST_HOST_DEVICE void exchange_quarters(vector_t<A>* rows) {
  constexpr int L = kLanes<A>;
#if defined(__clang__)  // has no shuffle by a computed constant
  for (int i = 0; i < L; ++i) {
    for (int l = 0; l < i; ++l) {
      const A value = rows[i][l];
      rows[i][l] = rows[l][i];
      rows[l][i] = value;
    }
  }
#else
  lane_integers<A> upper{}, lower{};
  for (int l = 0; l < L; ++l) {
    upper[l] = l & kStep ? L + l - kStep : l;
    lower[l] = l & kStep ? L + l : l + kStep;
  }
  for (int i = 0; i < L; ++i) {
    if (i & kStep) continue;
    const vector_t<A> a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kStep] = __builtin_shuffle(a, b, lower);
  }
  if constexpr (kStep > 1) exchange_quarters<A, kStep / 2>(rows);
#endif
}

// Lane j of row i becomes lane i of row j, for as many rows as a vector has lanes.
template <typename A>
SKINFAST_HOST_DEVICE void transpose(vector_t<A>* rows) {
  exchange_quarters<A, kLanes<A> / 2>(rows);
}

}  // namespace skinfast::SKINFAST_ISA
