// linear and its gradients on the CPU, by the small product's kernels where it is one.
#pragma once

#include "core/parallel.h"
#include "core/scratch.h"
#include "linear/linear.h"

namespace skinfast {

// Multiplications up to which ATen's call costs more than its kernels gain.
constexpr double kSmallProductSize = 1 << 21;
// Multiplications below which a second thread costs more than it saves.
constexpr int64_t kProductGrain = 1 << 18;

inline bool is_small_linear(const Tensor& rows, const Tensor& weight) {
  const double size = static_cast<double>(rows.numel()) * static_cast<double>(weight.size(0));
  return size > 0 && size <= kSmallProductSize;
}

inline void small_product_cpu(const SmallProduct& product, const Tensor& a, const Tensor& b,
                              bool transposed, const std::optional<Tensor>& bias, const Tensor& c) {
  const DType dtype = dtype_of(c);
  const auto size = static_cast<std::size_t>(product.depth * product.packed_columns());
  void* packed = thread_scratch(size * (dtype == DType::kDouble ? sizeof(double) : sizeof(float)));
  SKINFAST_KERNEL(pack_product)(dtype, product, b.const_data_ptr(), transposed, packed);
  const auto kernel = SKINFAST_KERNEL(small_product);
  const int64_t grain = kProductGrain / (product.depth * product.columns) + 1;
  const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
  parallel_for(product.rows, grain, [&](int64_t begin, int64_t end) {
    kernel(dtype, product, a.const_data_ptr(), packed, bias_data, c.mutable_data_ptr(), begin, end);
  });
}

inline Tensor linear_cpu(const char* op, const Tensor& x, const Tensor& weight,
                         const std::optional<Tensor>& bias, bool relu) {
  const auto shape = check_linear(op, x, weight, bias);
  const Tensor rows = rows_of(x);
  if (!is_small_linear(rows, weight)) {
    Tensor output = aten_linear(x, weight, bias);
    if (!relu) return output;
    std::array<StableIValue, 1> stack{torch::stable::detail::from(output)};
    return call_aten("aten::relu_", "", stack.data());
  }
  const SmallProduct product{rows.size(0),   weight.size(0), weight.size(1),
                             rows.stride(0), rows.stride(1), relu};
  const Tensor output = torch::stable::new_empty(x, shape);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = torch::stable::contiguous(*bias);
  small_product_cpu(product, rows, torch::stable::contiguous(weight), /*transposed=*/true,
                    dense_bias, output);
  return output;
}

// The gradients of input and weight where grad_output is a contiguous [M, N].
inline std::tuple<Tensor, Tensor> linear_gradients_cpu(const Tensor& grad_output, const Tensor& x,
                                                       const Tensor& weight, bool want_input,
                                                       bool want_weight) {
  const Tensor rows = rows_of(x);
  if (!is_small_linear(rows, weight)) {
    return aten_linear_gradients(grad_output, x, weight, want_input, want_weight);
  }
  const int64_t M = rows.size(0), N = weight.size(0), K = weight.size(1);
  Tensor grad_x = no_tensor(x), grad_weight = no_tensor(x);
  if (want_input) {
    grad_x = torch::stable::new_empty(x, shape_of(x));
    small_product_cpu({M, K, N, N, 1, false}, grad_output, torch::stable::contiguous(weight),
                      /*transposed=*/false, std::nullopt, grad_x);
  }
  if (want_weight) {
    grad_weight = torch::stable::new_empty(x, {N, K});
    small_product_cpu({N, K, M, 1, N, false}, grad_output, torch::stable::contiguous(rows),
                      /*transposed=*/false, std::nullopt, grad_weight);
  }
  return {grad_x, grad_weight};
}

// The bias gradient; where output is given, grad_output passes its ReLU into masked. All are
// contiguous [M, N].
inline Tensor sum_columns_cpu(const Tensor& grad_output, const Tensor* output,
                              const Tensor* masked) {
  const int64_t M = grad_output.size(0), N = grad_output.size(1);
  if (M == 0) return torch::stable::new_zeros(grad_output, {N});
  const Tensor grad_bias = torch::stable::new_empty(grad_output, {N});
  const auto kernel = SKINFAST_KERNEL(sum_columns);
  const int64_t grain = kElementGrain / (M * kColumnBlock) + 1;
  parallel_for((N + kColumnBlock - 1) / kColumnBlock, grain, [&](int64_t begin, int64_t end) {
    kernel(dtype_of(grad_output), M, N, grad_output.const_data_ptr(),
           output ? output->const_data_ptr() : nullptr,
           masked ? masked->mutable_data_ptr() : nullptr, grad_bias.mutable_data_ptr(), begin, end);
  });
  return grad_bias;
}

}  // namespace skinfast
