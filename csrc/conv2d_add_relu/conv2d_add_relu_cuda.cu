#include "conv2d_add_relu/conv2d_add_relu.h"

#include "conv2d/conv2d_cuda.h"
#include "core/cuda.h"

namespace skinfast {
namespace {

Tensor conv2d_add_relu_cuda(const Tensor& x, const Tensor& weight,
                            const std::optional<Tensor>& bias, const Tensor& residual,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape =
      check_conv2d_add_relu("conv2d_add_relu", x, weight, bias, "residual", residual, arguments);
  return general_conv2d_cuda(x, weight, bias, residual, /*with_relu=*/true, shape, arguments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_add_relu_backward_cuda(
    const Tensor& grad_output, const Tensor& output, const Tensor& x, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool want_input, bool want_weight,
    bool want_bias) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  check_conv2d_add_relu("conv2d_add_relu_backward", x, weight, std::nullopt, "output", output,
                        arguments);
  const Tensor masked = relu_masked(grad_output, output);
  const auto [grad_x, grad_weight, grad_bias] = general_conv2d_backward_cuda(
      masked, x, weight, arguments, {want_input, want_weight, want_bias});
  return {grad_x, grad_weight, grad_bias, masked};
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("conv2d_add_relu", TORCH_BOX(&conv2d_add_relu_cuda));
  m.impl("conv2d_add_relu_backward", TORCH_BOX(&conv2d_add_relu_backward_cuda));
}

}  // namespace skinfast
