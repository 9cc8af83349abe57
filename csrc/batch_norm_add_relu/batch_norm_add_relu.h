// output = relu(batch_norm(x) + residual): the tail of a residual block whose last layer is a batch
// norm (paper, equation 8). Its kernels are those of batch_norm_relu, which know a residual.
#pragma once

#ifdef SKINFAST_HOST_CODE
#include "batch_norm_relu/batch_norm_host.h"

namespace skinfast {

template <FourTensors (*kForward)(const BatchNormInputs&)>
FourTensors batch_norm_add_relu_host(const Tensor& x, const Tensor& residual,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const OptionalTensor& running_mean,
                                     const OptionalTensor& running_var, bool training, double eps,
                                     const OptionalTensor& statistics) {
  return kForward({"batch_norm_add_relu", x, residual, weight, bias, running_mean, running_var,
                   training, eps, true, statistics});
}

template <FourTensors (*kBackward)(const BatchNormBackwardInputs&)>
FourTensors batch_norm_add_relu_backward_host(const Tensor& grad_output, const Tensor& x,
                                              const Tensor& mask, const Tensor& mean,
                                              const Tensor& variance, const OptionalTensor& weight,
                                              bool training, double eps,
                                              const OptionalTensor& other_grad_output) {
  return kBackward({"batch_norm_add_relu_backward", grad_output, x, mask, mean, variance, weight,
                    training, eps, true, true, other_grad_output});
}

}  // namespace skinfast
#endif
