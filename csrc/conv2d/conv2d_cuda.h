// What csrc/conv2d offers to other rooms on CUDA: the general convolution, on tensor cores through
// CUTLASS where the table of choices says so, else ATen's, which is cuDNN's.
#pragma once

#include "conv2d/conv2d.h"

namespace skinfast {

// output [N, K, P, Q] of `shape` = conv2d(x, weight) + bias, through a ReLU if wanted; with a
// residual [N, K, P, Q], that is added before the ReLU, which is then always wanted. The arguments
// are checked.
Tensor general_conv2d_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual, bool with_relu,
                           const std::vector<int64_t>& shape, const Conv2dArguments& arguments);

// The gradients of input, weight and bias that are wanted.
std::tuple<Tensor, Tensor, Tensor> general_conv2d_backward_cuda(const Tensor& grad_output,
                                                                const Tensor& x,
                                                                const Tensor& weight,
                                                                const Conv2dArguments& arguments,
                                                                const std::array<bool, 3>& wanted);

}  // namespace skinfast
