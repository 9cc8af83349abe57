// output = relu(x weight^T + bias): linear with the ReLU behind it, and the gradient's first half,
// the ReLU mask and the bias gradient in one pass.
#pragma once

#include "linear/linear.h"

#ifdef SKINFAST_HOST_CODE
namespace skinfast {

inline void check_linear_relu_backward(const Tensor& grad_output, const Tensor& output,
                                       const Tensor& x, const Tensor& weight) {
  const char* op = "linear_relu_backward";
  const auto shape = check_linear(op, x, weight, std::nullopt);
  check_linear_gradient(op, "grad_output", grad_output, shape, x);
  check_linear_gradient(op, "output", output, shape, x);
}

}  // namespace skinfast
#endif
