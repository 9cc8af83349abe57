// Which kernel computes which convolution on which device, as measured there by
// bench/gpu/autotune.py, which wrote this; what is not listed is cuDNN's.
#pragma once

#include "conv2d/conv2d_tensor_core.h"

namespace skinfast {

// clang-format off
inline constexpr std::array<Conv2dChoice, 0> kConv2dChoices{{
}};
// clang-format on

}  // namespace skinfast
