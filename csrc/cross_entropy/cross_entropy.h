// The cross-entropy of logits [N, C] with classes [N], and its gradient (paper, equation 6, with
// the minus sign that it lacks there).
//
// With p = softmax(x), class weights w, smoothing e and target t, a row's loss is
//   (1 - e) w_t (-log p_t) + (e / C) sum_c w_c (-log p_c)
// and the mean divides the sum of the losses by the sum of w_t. Rows whose target is ignore_index
// count in neither.
#pragma once

#include <math.h>

#include "core/isa.h"
#include "core/scalar.h"

namespace skinfast {

enum Reduction : int64_t { kNone, kMean, kSum };  // ATen's numbers

struct CrossEntropyParams {
  int64_t rows, classes;
  int64_t ignore_index;
  int64_t reduction;
  double label_smoothing;
};

// The sum of losses and of their weights over some rows; in double, which makes the order of
// summation all but invisible.
struct LossSum {
  double loss, weight;
};

// log p = (x - maximum) - log_sum: two numbers a row, since their sum would lose log_sum's digits
// beside a large maximum.
template <typename A>
struct Normalizer {
  A maximum, log_sum;
};

template <typename A>
SKINFAST_HOST_DEVICE A log_probability(A logit, const Normalizer<A>& normalizer) {
  return (logit - normalizer.maximum) - normalizer.log_sum;
}

// `smooth` is sum_c w_c (-log p_c). It may be infinite, so it is not multiplied by 0.
template <typename A>
SKINFAST_HOST_DEVICE A row_loss(A target_log_probability, A target_weight, A smooth,
                                const CrossEntropyParams& p) {
  const A smoothing = static_cast<A>(p.label_smoothing);
  const A loss = -target_weight * target_log_probability;
  if (smoothing == A(0)) return loss;
  return (A(1) - smoothing) * loss + smoothing / static_cast<A>(p.classes) * smooth;
}

// d loss / d x_c = p_c * of_probability - w_c * of_weight - [c = t] * of_target
template <typename A>
struct RowGradient {
  A of_probability, of_weight, of_target;
};

// `scale` is the gradient of the row's loss, `weight_sum` sum_c w_c.
template <typename A>
SKINFAST_HOST_DEVICE RowGradient<A> row_gradient(A scale, A target_weight, A weight_sum,
                                                 const CrossEntropyParams& p) {
  const A smoothing = static_cast<A>(p.label_smoothing);
  const A of_weight = scale * smoothing / static_cast<A>(p.classes);
  const A of_target = scale * (A(1) - smoothing) * target_weight;
  return {of_target + of_weight * weight_sum, of_weight, of_target};
}

// The gradient of one row's loss: of the whole loss's where that is one number.
template <typename A>
SKINFAST_HOST_DEVICE A row_scale(A grad_loss, A total_weight, const CrossEntropyParams& p) {
  return p.reduction == kMean ? grad_loss / total_weight : grad_loss;
}

// CPU kernels. Forward, on blocks [begin, end) of kBlockRows rows, a LossSum each; `weight` and
// `losses` [N] may be null. Backward, on rows.
constexpr int64_t kBlockRows = 64;
SKINFAST_DECLARE_KERNEL(void cross_entropy(DType dtype, const void* input, const int64_t* target,
                                           const void* weight, void* losses, void* normalizers,
                                           LossSum* sums, const CrossEntropyParams& params,
                                           int64_t begin, int64_t end))
SKINFAST_DECLARE_KERNEL(void cross_entropy_backward(
    DType dtype, const void* grad_loss, const void* input, const int64_t* target,
    const void* weight, const void* normalizers, const void* total_weight, void* grad,
    const CrossEntropyParams& params, int64_t begin, int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "core/tensor.h"

namespace skinfast {

inline const void* weight_data(const std::optional<Tensor>& weight) {
  return weight.has_value() ? weight->const_data_ptr() : nullptr;
}

inline CrossEntropyParams cross_entropy_params(const char* op, const Tensor& input,
                                               const Tensor& target,
                                               const std::optional<Tensor>& weight,
                                               int64_t ignore_index, int64_t reduction,
                                               double label_smoothing) {
  check_floating(op, "input", input);
  check_dim(op, "input", input, 2, "[N, C]");
  SKINFAST_CHECK(input.size(1) >= 1, op, ": input has shape ", shape_string(input),
                 "; it needs at least one class");
  check_same_device(op, "target", target, "input", input);
  SKINFAST_CHECK(target.scalar_type() == ScalarType::Long, op, ": target has dtype ",
                 dtype_name(target.scalar_type()), "; it needs int64 class indices");
  check_shape(op, "target", target, {input.size(0)});
  if (weight.has_value()) {
    check_same_device(op, "weight", *weight, "input", input);
    check_same_dtype(op, "weight", *weight, "input", input);
    check_shape(op, "weight", *weight, {input.size(1)});
  }
  SKINFAST_CHECK(reduction == kNone || reduction == kMean || reduction == kSum, op,
                 ": reduction has ", reduction, "; it needs 0 (none), 1 (mean) or 2 (sum)");
  SKINFAST_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing has ",
                 label_smoothing, "; it needs a value from 0 to 1");
  return {input.size(0), input.size(1), ignore_index, reduction, label_smoothing};
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return dense(*tensor, MemoryFormat::Contiguous);
}

// loss [] or [N], normalizers [N, 2], total_weight []: what the gradient needs. Unlike most ops
// this one also launches on an empty batch, whose mean is NaN.
// `launch(input, target, weight, loss, normalizers, total_weight, params)` sees dense tensors.
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> cross_entropy_host(const Tensor& input, const Tensor& target,
                                                      const std::optional<Tensor>& weight,
                                                      int64_t ignore_index, int64_t reduction,
                                                      double label_smoothing,
                                                      const Launch& launch) {
  constexpr MemoryFormat layout = MemoryFormat::Contiguous;
  const CrossEntropyParams params = cross_entropy_params("cross_entropy", input, target, weight,
                                                         ignore_index, reduction, label_smoothing);
  std::vector<int64_t> loss_shape;
  if (reduction == kNone) loss_shape.push_back(params.rows);
  Tensor loss = empty_in(input, loss_shape, layout);
  Tensor normalizers = empty_in(input, {params.rows, 2}, layout, accumulate_dtype(input));
  Tensor total_weight = empty_in(input, {}, layout, accumulate_dtype(input));
  launch(dense(input, layout), dense(target, layout), dense(weight), loss, normalizers,
         total_weight, params);
  return {loss, normalizers, total_weight};
}

// `launch(grad_loss, input, target, weight, normalizers, total_weight, grad, params)` sees dense
// tensors that are not empty.
template <typename Launch>
Tensor cross_entropy_backward_host(const Tensor& grad_loss, const Tensor& input,
                                   const Tensor& target, const std::optional<Tensor>& weight,
                                   const Tensor& normalizers, const Tensor& total_weight,
                                   int64_t ignore_index, int64_t reduction, double label_smoothing,
                                   const Launch& launch) {
  constexpr const char* op = "cross_entropy_backward";
  constexpr MemoryFormat layout = MemoryFormat::Contiguous;
  const CrossEntropyParams params =
      cross_entropy_params(op, input, target, weight, ignore_index, reduction, label_smoothing);
  std::vector<int64_t> loss_shape;
  if (reduction == kNone) loss_shape.push_back(params.rows);
  check_same_device(op, "grad_loss", grad_loss, "input", input);
  check_same_dtype(op, "grad_loss", grad_loss, "input", input);
  check_shape(op, "grad_loss", grad_loss, loss_shape);
  check_same_device(op, "normalizers", normalizers, "input", input);
  check_dtype(op, "normalizers", normalizers, accumulate_dtype(input));
  check_shape(op, "normalizers", normalizers, {params.rows, 2});
  check_same_device(op, "total_weight", total_weight, "input", input);
  check_dtype(op, "total_weight", total_weight, accumulate_dtype(input));
  check_shape(op, "total_weight", total_weight, {});

  Tensor grad = empty_in(input, {params.rows, params.classes}, layout);
  if (params.rows > 0) {
    launch(dense(grad_loss, layout), dense(input, layout), dense(target, layout), dense(weight),
           dense(normalizers, layout), total_weight, grad, params);
  }
  return grad;
}

}  // namespace skinfast
#endif
