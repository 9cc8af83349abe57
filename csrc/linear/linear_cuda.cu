// On CUDA all of it is ATen's.
#include "core/cuda.h"
#include "linear/linear.h"

namespace skinfast {
namespace {

Tensor linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_linear("linear", x, weight, bias);
  return aten_linear(x, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_cuda(const Tensor& grad_output, const Tensor& x,
                                                        const Tensor& weight, bool want_input,
                                                        bool want_weight, bool want_bias) {
  constexpr const char* op = "linear_backward";
  check_linear_gradient(op, "grad_output", grad_output, check_linear(op, x, weight, std::nullopt),
                        x);
  const Tensor rows = torch::stable::contiguous(rows_of(grad_output));
  const auto [grad_x, grad_weight] =
      aten_linear_gradients(rows, x, weight, want_input, want_weight);
  const std::array<int64_t, 1> dims{0};
  return {grad_x, grad_weight, want_bias ? torch::stable::sum(rows, dims) : no_tensor(x)};
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("linear", TORCH_BOX(&linear_cuda));
  m.impl("linear_backward", TORCH_BOX(&linear_backward_cuda));
}

}  // namespace skinfast
