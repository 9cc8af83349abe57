// Which convolutions are small, and the general ones; shared by both backends.
#pragma once

#include "conv2d/conv2d_host.h"

namespace skinfast {

// Whether our kernels take this convolution; skinfast/ops/conv2d_relu.py has the twin of this rule.
inline bool is_small_conv2d(const Tensor& x, const Tensor& weight,
                            const Conv2dArguments& arguments) {
  const auto all_ones = [](const std::vector<int64_t>& pair) {
    return pair[0] == 1 && pair[1] == 1;
  };
  return arguments.groups == 1 && all_ones(arguments.stride) && all_ones(arguments.dilation) &&
         x.size(1) <= kSmallChannels && weight.size(0) <= kSmallChannels &&
         weight.size(2) <= kSmallKernel && weight.size(3) <= kSmallKernel &&
         arguments.padding[0] < weight.size(2) && arguments.padding[1] < weight.size(3);
}

inline SmallConv2d small_conv2d_of(const Tensor& x, const Tensor& weight,
                                   const std::vector<int64_t>& shape,
                                   const Conv2dArguments& arguments) {
  return {x.size(0),           x.size(1),      x.size(2), x.size(3), weight.size(0),
          weight.size(2),      weight.size(3), shape[2],  shape[3],  arguments.padding[0],
          arguments.padding[1]};
}

// grad_output where output > 0: the mask of a residual block's ReLU is that of any ReLU.
inline Tensor relu_masked(const Tensor& grad_output, const Tensor& output) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(grad_output),
                                    torch::stable::detail::from(output)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(SKINFAST_OP("add_relu_backward"), "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// --- the general path: ATen's convolution, the ReLU in place -----------------------------------

inline Tensor general_conv2d_relu(const Tensor& x, const Tensor& weight,
                                  const std::optional<Tensor>& bias,
                                  const Conv2dArguments& arguments) {
  std::array<StableIValue, 1> stack{
      torch::stable::detail::from(aten_conv2d(x, weight, bias, arguments))};
  return call_aten("aten::relu_", "", stack.data());
}

inline std::tuple<Tensor, Tensor, Tensor> general_conv2d_relu_backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& x, const Tensor& weight,
    const Conv2dArguments& arguments, const std::array<bool, 3>& wanted) {
  return aten_conv2d_backward(relu_masked(grad_output, output), x, weight, arguments, wanted);
}

}  // namespace skinfast
