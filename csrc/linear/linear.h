// output = x weight^T + bias, and its gradients. The products are ATen's, but for small ones on the
// CPU, where the call of a general library costs more than the arithmetic.
#pragma once

#include "core/isa.h"
#include "core/scalar.h"

namespace skinfast {

// c [rows, columns] = a b + bias, rectified or not. Of a [rows, depth] the strides are given; b
// [depth, columns] is packed: accumulators, its rows padded with zeros to packed_columns().
struct SmallProduct {
  int64_t rows, columns, depth;
  int64_t a_row, a_depth;
  bool relu;

  static constexpr int64_t kPadding = 16;  // a multiple of every instruction set's lanes

  int64_t packed_columns() const { return (columns + kPadding - 1) / kPadding * kPadding; }
};

// `transposed`: b is stored as [columns, depth].
SKINFAST_DECLARE_KERNEL(void pack_product(DType dtype, const SmallProduct& product, const void* b,
                                          bool transposed, void* packed))
// The rows [begin, end) of c; bias may be null.
SKINFAST_DECLARE_KERNEL(void small_product(DType dtype, const SmallProduct& product, const void* a,
                                           const void* packed, const void* bias, void* c,
                                           int64_t begin, int64_t end))

// Columns that one task covers.
constexpr int64_t kColumnBlock = 64;

// For the column blocks [begin, end): grad_bias [N] = the sums of the columns of grad_output
// [M, N], where output > 0 if there is one: that part of grad_output is stored as masked.
SKINFAST_DECLARE_KERNEL(void sum_columns(DType dtype, int64_t M, int64_t N, const void* grad_output,
                                         const void* output, void* masked, void* grad_bias,
                                         int64_t begin, int64_t end))

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

inline void check_linear_gradient(const char* op, const char* name, const Tensor& tensor,
                                  const std::vector<int64_t>& shape, const Tensor& x) {
  check_shape(op, name, tensor, shape);
  check_same_dtype(op, name, tensor, "input", x);
  check_same_device(op, name, tensor, "input", x);
}

// x [*, K] as [M, K].
inline Tensor rows_of(const Tensor& x) {
  const int64_t K = x.size(x.dim() - 1);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
  return x.dim() == 2 ? x : torch::stable::reshape(x, {M, K});
}

inline Tensor aten_linear(const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  return torch::stable::contiguous(call_aten("aten::linear", "", stack.data()));
}

// The gradients of input and weight where grad_output is [M, N].
inline std::tuple<Tensor, Tensor> aten_linear_gradients(const Tensor& grad_output, const Tensor& x,
                                                        const Tensor& weight, bool want_input,
                                                        bool want_weight) {
  using torch::stable::matmul;
  return {
      want_input ? torch::stable::reshape(matmul(grad_output, weight), shape_of(x)) : no_tensor(x),
      want_weight ? torch::stable::contiguous(
                        matmul(torch::stable::transpose(grad_output, 0, 1), rows_of(x)))
                  : no_tensor(x)};
}

}  // namespace skinfast
#endif
