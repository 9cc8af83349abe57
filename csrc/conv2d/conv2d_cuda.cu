#include "conv2d/conv2d.h"
#include "core/cuda.h"

namespace skinfast {
namespace {

// No kernels of ours: ATen's convolution is cuDNN's.
Tensor conv2d_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  check_conv2d("conv2d", x, weight, bias, arguments);
  return aten_conv2d(x, weight, bias, arguments);
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward_cuda(const Tensor& grad_output, const Tensor& x,
                                                        const Tensor& weight,
                                                        const std::vector<int64_t>& stride,
                                                        const std::vector<int64_t>& padding,
                                                        const std::vector<int64_t>& dilation,
                                                        int64_t groups, bool want_input,
                                                        bool want_weight, bool want_bias) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d_backward", x, weight, std::nullopt, arguments);
  check_conv2d_gradient("conv2d_backward", "grad_output", grad_output, x, shape);
  return aten_conv2d_backward(grad_output, x, weight, arguments,
                              {want_input, want_weight, want_bias});
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("conv2d", TORCH_BOX(&conv2d_cuda));
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward_cuda));
}

}  // namespace skinfast
