// output = relu(conv2d(x, weight) + bias + residual): the end of a residual block whose batch
// normalisation is folded into its convolution; and its gradients.
//
// Composed of conv2d and add_relu, except where tensor cores do it in one pass (CUDA, as the table
// of choices says): there the sum is rounded once, elsewhere the convolution's result as well.
#pragma once

#include "conv2d_relu/conv2d_relu.h"

#ifdef SKINFAST_HOST_CODE
namespace skinfast {

// Check all arguments; return the shape [N, K, P, Q] of the output. `like_output` is a tensor of
// that shape.
inline std::vector<int64_t> check_conv2d_add_relu(const char* op, const Tensor& x,
                                                  const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const char* name, const Tensor& like_output,
                                                  const Conv2dArguments& arguments) {
  const auto shape = check_conv2d(op, x, weight, bias, arguments);
  check_conv2d_gradient(op, name, like_output, x, shape);
  return shape;
}

inline Tensor composed_conv2d_add_relu(const Tensor& x, const Tensor& weight,
                                       const std::optional<Tensor>& bias, const Tensor& residual,
                                       const Conv2dArguments& arguments) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(x),
                                    from(weight),
                                    from(bias),
                                    from(arguments.stride),
                                    from(arguments.padding),
                                    from(arguments.dilation),
                                    from(arguments.groups)};
  const Tensor sum = call_aten(SKINFAST_OP("conv2d"), "", stack.data());
  std::array<StableIValue, 2> terms{from(sum), from(residual)};
  return call_aten(SKINFAST_OP("add_relu"), "", terms.data());
}

// The gradients of input, weight and bias that are wanted, and that of the residual.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> composed_conv2d_add_relu_backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& x, const Tensor& weight,
    const Conv2dArguments& arguments, const std::array<bool, 3>& wanted) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const Tensor masked = relu_masked(grad_output, output);
  std::array<StableIValue, 10> stack{from(masked),
                                     from(x),
                                     from(weight),
                                     from(arguments.stride),
                                     from(arguments.padding),
                                     from(arguments.dilation),
                                     from(arguments.groups),
                                     from(wanted[0]),
                                     from(wanted[1]),
                                     from(wanted[2])};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(SKINFAST_OP("conv2d_backward"), "", stack.data(), TORCH_ABI_VERSION));
  const Tensor grad_x = to<Tensor>(stack[0]), grad_weight = to<Tensor>(stack[1]),
               grad_bias = to<Tensor>(stack[2]);
  return {grad_x, grad_weight, grad_bias, masked};
}

}  // namespace skinfast
#endif
