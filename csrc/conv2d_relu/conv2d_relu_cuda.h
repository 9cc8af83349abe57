// What csrc/conv2d_relu offers to other rooms on CUDA.
#pragma once

#include "conv2d_relu/conv2d_relu.h"

namespace skinfast {

// The gradients of input, weight and bias that are wanted, from `masked`, the gradient of a small
// convolution's output before its ReLU.
std::tuple<Tensor, Tensor, Tensor> small_conv2d_gradients_cuda(const SmallConv2d& conv,
                                                               const Tensor& masked,
                                                               const Tensor& x,
                                                               const Tensor& weight,
                                                               const std::array<bool, 3>& wanted);

}  // namespace skinfast
