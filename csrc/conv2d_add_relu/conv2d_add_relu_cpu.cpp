#include "conv2d_add_relu/conv2d_add_relu.h"

#ifdef SKINFAST_HOST_CODE
namespace skinfast {
namespace {

Tensor conv2d_add_relu_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Tensor& residual, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  check_conv2d_add_relu("conv2d_add_relu", x, weight, bias, "residual", residual, arguments);
  return composed_conv2d_add_relu(x, weight, bias, residual, arguments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_add_relu_backward_cpu(
    const Tensor& grad_output, const Tensor& output, const Tensor& x, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool want_input, bool want_weight,
    bool want_bias) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  check_conv2d_add_relu("conv2d_add_relu_backward", x, weight, std::nullopt, "output", output,
                        arguments);
  return composed_conv2d_add_relu_backward(grad_output, output, x, weight, arguments,
                                           {want_input, want_weight, want_bias});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("conv2d_add_relu", TORCH_BOX(&conv2d_add_relu_cpu));
  m.impl("conv2d_add_relu_backward", TORCH_BOX(&conv2d_add_relu_backward_cpu));
}

}  // namespace skinfast
#endif
