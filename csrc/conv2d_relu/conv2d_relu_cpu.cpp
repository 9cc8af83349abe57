#include "conv2d_relu/conv2d_relu.h"

#ifdef SKINFAST_HOST_CODE
#include "conv2d_relu/conv2d_relu_small_cpu.h"

namespace skinfast {
namespace {

Tensor conv2d_relu_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d_relu", x, weight, bias, arguments);
  if (!is_small_conv2d(x, weight, arguments)) {
    return general_conv2d_relu(x, weight, bias, arguments);
  }
  const PooledConv2d conv{small_conv2d_of(x, weight, shape, arguments), {}};
  return std::get<0>(small_conv2d_cpu(conv, x, weight, bias, /*with_argmax=*/false));
}

std::tuple<Tensor, Tensor, Tensor> conv2d_relu_backward_cpu(
    const Tensor& grad_output, const Tensor& output, const Tensor& x, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool want_input, bool want_weight,
    bool want_bias) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d_relu_backward", x, weight, std::nullopt, arguments);
  check_conv2d_gradient("conv2d_relu_backward", "grad_output", grad_output, x, shape);
  check_conv2d_gradient("conv2d_relu_backward", "output", output, x, shape);
  if (!is_small_conv2d(x, weight, arguments) || x.size(0) == 0) {
    return general_conv2d_relu_backward(grad_output, output, x, weight, arguments,
                                        {want_input, want_weight, want_bias});
  }
  const PooledConv2d conv{small_conv2d_of(x, weight, shape, arguments), {}};
  return small_conv2d_gradients_cpu(conv, grad_output, output, /*argmax=*/nullptr, x, weight,
                                    {want_input, want_weight, want_bias});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("conv2d_relu", TORCH_BOX(&conv2d_relu_cpu));
  m.impl("conv2d_relu_backward", TORCH_BOX(&conv2d_relu_backward_cpu));
}

}  // namespace skinfast
#endif
