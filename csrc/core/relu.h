// ReLU and the mask of its gradient, as PyTorch defines them for every float (paper, section 2.1).
#pragma once

#include "core/scalar.h"

namespace skinfast {

// max(x, 0); NaN passes through, as in torch.relu.
template <typename A>
SKINFAST_HOST_DEVICE A relu(A x) {
  return x < A(0) ? A(0) : x;
}

// The gradient is let through where the ReLU's output is positive or NaN: torch.relu stops it
// where `output <= 0`, which is false for NaN.
template <typename A>
SKINFAST_HOST_DEVICE bool relu_passes(A output) {
  return !(output <= A(0));
}

template <typename T>
SKINFAST_HOST_DEVICE T relu_gradient(T grad_output, T output) {
  return relu_passes(load(output)) ? grad_output : store<T>(accumulate_t<T>(0));
}

}  // namespace skinfast
