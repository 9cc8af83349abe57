#include "batch_norm_relu_conv2d/batch_norm_relu_conv2d.h"

#ifdef SKINFAST_HOST_CODE
namespace skinfast {
namespace {

FourTensors batch_norm_relu_conv2d_backward_cpu(
    const Tensor& grad_output, const Tensor& normalized, const Tensor& weight, const Tensor& x,
    const Tensor& mask, const Tensor& mean, const Tensor& variance,
    const OptionalTensor& norm_weight, bool training, double eps,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool want_input, bool want_weight) {
  const BatchNormReLUConv2dBackward in{grad_output,
                                       normalized,
                                       weight,
                                       x,
                                       mask,
                                       mean,
                                       variance,
                                       norm_weight,
                                       training,
                                       eps,
                                       {stride, padding, dilation, groups},
                                       want_input,
                                       want_weight};
  check_backward(in);
  return composed_backward(in);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("batch_norm_relu_conv2d", TORCH_BOX(&batch_norm_relu_conv2d));
  m.impl("batch_norm_relu_conv2d_backward", TORCH_BOX(&batch_norm_relu_conv2d_backward_cpu));
}

}  // namespace skinfast
#endif
