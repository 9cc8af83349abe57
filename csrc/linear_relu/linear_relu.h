// output = relu(x weight^T + bias). The products are ATen's; ours is the gradient's first half: the
// ReLU mask and the bias gradient in one pass.
#pragma once

#include "core/isa.h"
#include "core/relu.h"
#include "core/scalar.h"

namespace skinfast {

// Columns that one task covers.
constexpr int64_t kColumnBlock = 64;

// For the column blocks [begin, end): masked = grad_output where output > 0, grad_bias = the sums
// of its columns; grad_output, output, masked [M, N], grad_bias [N].
SKINFAST_DECLARE_KERNEL(void mask_and_sum_columns(DType dtype, int64_t M, int64_t N,
                                                  const void* grad_output, const void* output,
                                                  void* masked, void* grad_bias, int64_t begin,
                                                  int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include <array>

#include "core/tensor.h"

namespace skinfast {

inline std::vector<int64_t> check_linear(const char* op, const Tensor& x, const Tensor& weight,
                                         const std::optional<Tensor>& bias) {
  check_floating(op, "input", x);
  check_dim(op, "weight", weight, 2, "[out_features, in_features]");
  check_same_device(op, "weight", weight, "input", x);
  check_same_dtype(op, "weight", weight, "input", x);
  SKINFAST_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), op, ": input has shape ",
                 shape_string(x), "; it needs [*, ", weight.size(1), "] for weight ",
                 shape_string(weight));
  if (bias) {
    check_same_device(op, "bias", *bias, "input", x);
    check_same_dtype(op, "bias", *bias, "input", x);
    check_shape(op, "bias", *bias, {weight.size(0)});
  }
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = weight.size(0);
  return shape;
}

// Both backends' forward: the ReLU in place on ATen's linear.
inline Tensor linear_relu(const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  check_linear("linear_relu", x, weight, bias);
  std::array<StableIValue, 3> linear{from(x), from(weight), from(bias)};
  std::array<StableIValue, 1> relu{from(call_aten("aten::linear", "", linear.data()))};
  return torch::stable::contiguous(call_aten("aten::relu_", "", relu.data()));
}

// Both backends' gradients; `mask_and_sum(grad_output, output, masked, grad_bias)` sees contiguous
// [M, N] tensors that are not empty.
template <typename MaskAndSum>
std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(const Tensor& grad_output,
                                                        const Tensor& output, const Tensor& x,
                                                        const Tensor& weight, bool want_input,
                                                        bool want_weight, bool want_bias,
                                                        const MaskAndSum& mask_and_sum) {
  const char* op = "linear_relu_backward";
  const auto shape = check_linear(op, x, weight, std::nullopt);
  check_shape(op, "grad_output", grad_output, shape);
  check_shape(op, "output", output, shape);
  check_same_dtype(op, "grad_output", grad_output, "input", x);
  check_same_dtype(op, "output", output, "input", x);
  check_same_device(op, "grad_output", grad_output, "input", x);
  check_same_device(op, "output", output, "input", x);

  const int64_t N = weight.size(0), K = weight.size(1);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
  const Tensor rows = torch::stable::reshape(x, {M, K});
  Tensor masked = torch::stable::new_empty(output, {M, N});
  Tensor grad_bias = torch::stable::new_zeros(output, {N});
  if (masked.numel() > 0) {
    mask_and_sum(torch::stable::contiguous(grad_output), torch::stable::contiguous(output), masked,
                 grad_bias);
  }
  return {want_input ? torch::stable::reshape(torch::stable::matmul(masked, weight), shape_of(x))
                     : no_tensor(x),
          want_weight ? torch::stable::contiguous(
                            torch::stable::matmul(torch::stable::transpose(masked, 0, 1), rows))
                      : no_tensor(x),
          want_bias ? grad_bias : no_tensor(x)};
}

}  // namespace skinfast
#endif
