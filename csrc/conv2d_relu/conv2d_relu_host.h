// Checks, layouts and the general path of conv2d_relu, shared by both backends.
#pragma once

#include <array>

#include "core/tensor.h"

namespace skinfast {

struct Conv2dArguments {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

// The layout that ATen's convolution computes in: channels_last as soon as either operand is.
inline MemoryFormat conv2d_layout(const Tensor& x, const Tensor& weight) {
  return layout_of(x) == MemoryFormat::ChannelsLast ? MemoryFormat::ChannelsLast
                                                    : layout_of(weight);
}

// Check all arguments; return the shape [N, K, P, Q] of the output.
inline std::vector<int64_t> check_conv2d(const char* op, const Tensor& x, const Tensor& weight,
                                         const std::optional<Tensor>& bias,
                                         const Conv2dArguments& arguments) {
  check_floating(op, "input", x);
  check_dim(op, "input", x, 4, "[N, C, H, W]");
  check_dim(op, "weight", weight, 4, "[K, C / groups, R, S]");
  check_same_device(op, "weight", weight, "input", x);
  check_same_dtype(op, "weight", weight, "input", x);
  SKINFAST_CHECK(arguments.groups > 0, op, ": groups is ", arguments.groups,
                 "; it needs to be positive");
  SKINFAST_CHECK(weight.size(1) * arguments.groups == x.size(1), op, ": weight has shape ",
                 shape_string(weight), " and groups is ", arguments.groups, "; input has ",
                 x.size(1), " channels and needs weight.size(1) * groups to equal that");
  SKINFAST_CHECK(weight.size(0) > 0 && weight.size(0) % arguments.groups == 0, op, ": weight has ",
                 weight.size(0), " filters; they need to divide into ", arguments.groups,
                 " groups");
  if (bias) {
    check_same_device(op, "bias", *bias, "input", x);
    check_same_dtype(op, "bias", *bias, "input", x);
    check_shape(op, "bias", *bias, {weight.size(0)});
  }
  std::vector<int64_t> shape{x.size(0), weight.size(0), 0, 0};
  for (int i = 0; i < 2; ++i) {
    const int64_t stride = arguments.stride[i], padding = arguments.padding[i],
                  dilation = arguments.dilation[i], kernel = weight.size(2 + i);
    SKINFAST_CHECK(stride > 0 && dilation > 0 && padding >= 0 && kernel > 0, op, ": stride ",
                   stride, ", padding ", padding, ", dilation ", dilation, ", kernel ", kernel,
                   "; stride, dilation and kernel need to be positive, padding at least 0");
    const int64_t extent = x.size(2 + i) + 2 * padding - dilation * (kernel - 1) - 1;
    SKINFAST_CHECK(extent >= 0, op, ": input has shape ", shape_string(x), "; with padding ",
                   padding, " it is smaller than the kernel (", dilation * (kernel - 1) + 1, ")");
    shape[2 + i] = extent / stride + 1;
  }
  return shape;
}

inline void check_conv2d_gradient(const char* op, const Tensor& grad_output, const Tensor& output,
                                  const Tensor& x, const std::vector<int64_t>& shape) {
  check_shape(op, "grad_output", grad_output, shape);
  check_shape(op, "output", output, shape);
  check_same_dtype(op, "grad_output", grad_output, "input", x);
  check_same_dtype(op, "output", output, "input", x);
  check_same_device(op, "grad_output", grad_output, "input", x);
  check_same_device(op, "output", output, "input", x);
}

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
      torch_call_dispatcher("skinfast::add_relu_backward", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// --- the general path: ATen's convolution
// ---------------------------------------------------------

inline Tensor general_conv2d_relu(const Tensor& x, const Tensor& weight,
                                  const std::optional<Tensor>& bias,
                                  const Conv2dArguments& arguments) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const MemoryFormat layout = conv2d_layout(x, weight);
  const std::vector<int64_t> no_output_padding{0, 0};
  std::array<StableIValue, 9> stack{from(dense(x, layout)),
                                    from(weight),
                                    from(bias),
                                    from(arguments.stride),
                                    from(arguments.padding),
                                    from(arguments.dilation),
                                    from(false),
                                    from(no_output_padding),
                                    from(arguments.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  std::array<StableIValue, 1> relu_stack{from(to<Tensor>(stack[0]))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::relu_", "", relu_stack.data(), TORCH_ABI_VERSION));
  return dense(to<Tensor>(relu_stack[0]), layout);
}

inline std::tuple<Tensor, Tensor, Tensor> general_conv2d_relu_backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& x, const Tensor& weight,
    const Conv2dArguments& arguments, const std::array<bool, 3>& wanted) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const MemoryFormat layout = conv2d_layout(x, weight);
  const std::vector<int64_t> no_output_padding{0, 0};
  const std::optional<std::vector<int64_t>> bias_shape{{weight.size(0)}};
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted.data(), wanted.size());
  std::array<StableIValue, 11> stack{from(relu_masked(dense(grad_output, layout), output)),
                                     from(dense(x, layout)),
                                     from(weight),
                                     from(bias_shape),
                                     from(arguments.stride),
                                     from(arguments.padding),
                                     from(arguments.dilation),
                                     from(false),
                                     from(no_output_padding),
                                     from(arguments.groups),
                                     from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor grad_x = to<Tensor>(stack[0]), grad_weight = to<Tensor>(stack[1]),
               grad_bias = to<Tensor>(stack[2]);
  return {wanted[0] ? dense(grad_x, layout) : no_tensor(x),
          wanted[1] ? dense(grad_weight, layout_of(weight)) : no_tensor(x),
          wanted[2] ? grad_bias : no_tensor(x)};
}

}  // namespace skinfast
