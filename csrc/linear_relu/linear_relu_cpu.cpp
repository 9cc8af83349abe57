#include "linear_relu/linear_relu.h"

#ifdef SKINFAST_HOST_CODE
#include "linear/linear_small_cpu.h"

namespace skinfast {
namespace {

Tensor linear_relu_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return linear_cpu("linear_relu", x, weight, bias, /*relu=*/true);
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward_cpu(const Tensor& grad_output,
                                                            const Tensor& output, const Tensor& x,
                                                            const Tensor& weight, bool want_input,
                                                            bool want_weight, bool want_bias) {
  check_linear_relu_backward(grad_output, output, x, weight);
  const Tensor grad = torch::stable::contiguous(rows_of(grad_output));
  const Tensor stored = torch::stable::contiguous(rows_of(output));
  const Tensor masked = torch::stable::new_empty(grad, shape_of(grad));
  const Tensor grad_bias = sum_columns_cpu(grad, &stored, &masked);
  const auto [grad_x, grad_weight] =
      linear_gradients_cpu(masked, x, weight, want_input, want_weight);
  return {grad_x, grad_weight, want_bias ? grad_bias : no_tensor(x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("linear_relu", TORCH_BOX(&linear_relu_cpu));
  m.impl("linear_relu_backward", TORCH_BOX(&linear_relu_backward_cpu));
}

}  // namespace skinfast
#endif
