// The host functions of batch_norm_relu and batch_norm_add_relu: checks and allocations that both
// backends share. For host code only.
#pragma once

#include "batch_norm_relu/batch_norm_relu.h"
#include "core/tensor.h"

namespace skinfast {

using OptionalTensor = std::optional<Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct BatchNormInputs {
  const char* op;
  const Tensor& x;
  const OptionalTensor& residual;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  bool training;
  double eps;
  bool relu;
  OptionalTensor statistics = std::nullopt;  // [2, C]: the batch's, if known already
};

struct BatchNormBackwardInputs {
  const char* op;
  const Tensor& grad_output;
  const Tensor& x;
  const Tensor& mask;
  const Tensor& mean;
  const Tensor& variance;
  const OptionalTensor& weight;
  bool training;
  double eps;
  bool needs_grad_x;
  bool needs_grad_residual;
  OptionalTensor other_grad_output = std::nullopt;  // with a residual, on the CPU alone
};

// Defined in batch_norm_relu_cpu.cpp and batch_norm_relu_cuda.cu, for both ops.
FourTensors batch_norm_forward_cpu(const BatchNormInputs& inputs);   // output, mask, mean, variance
FourTensors batch_norm_forward_cuda(const BatchNormInputs& inputs);  // likewise
FourTensors batch_norm_backward_cpu(
    const BatchNormBackwardInputs&);  // of x, residual, weight, bias
FourTensors batch_norm_backward_cuda(const BatchNormBackwardInputs&);  // likewise

// The dtype of statistics and coefficients: what x is computed in.
inline ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_channels(const char* op, const Tensor& x) {
  SKINFAST_CHECK(x.dim() >= 2, op, ": x has shape ", shape_string(x),
                 "; it needs at least 2 dimensions [N, C, ...]");
}

inline void check_eps(const char* op, double eps) {
  SKINFAST_CHECK(eps >= 0, op, ": eps is ", eps, "; it needs to be 0 or more");
}

// A vector of one value a channel, in x's dtype or in that of its statistics.
inline void check_vector(const char* op, const char* name, const OptionalTensor& vector,
                         const Tensor& x) {
  if (!vector.has_value()) return;
  check_same_device(op, name, *vector, "x", x);
  if (vector->scalar_type() != x.scalar_type()) {
    check_dtype(op, name, *vector, statistics_dtype(x));
  }
  check_shape(op, name, *vector, {x.size(1)});
}

// The vector as the kernels read it.
inline OptionalTensor in_statistics_dtype(const OptionalTensor& vector, const Tensor& x) {
  if (!vector.has_value()) return vector;
  const bool converted = vector->scalar_type() == statistics_dtype(x);
  return dense(converted ? *vector : torch::stable::to(*vector, statistics_dtype(x)),
               MemoryFormat::Contiguous);
}

// x is not empty.
inline BatchNormShape shape_in_memory(const Tensor& x, MemoryFormat layout) {
  const int64_t channels = x.size(1);
  const int64_t group =
      layout == MemoryFormat::ChannelsLast ? 1 : x.numel() / (x.size(0) * channels);
  return {x.numel() / (channels * group), channels * group, channels, group};
}

inline int64_t mask_bytes(const Tensor& x) { return ceil_divide(x.numel(), 8); }

inline Tensor new_vector(const Tensor& x, int64_t planes) {
  return torch::stable::new_empty(x, {planes * x.size(1)}, statistics_dtype(x));
}

inline void check_forward(const BatchNormInputs& in) {
  check_floating(in.op, "x", in.x);
  check_channels(in.op, in.x);
  if (in.residual.has_value()) {
    check_same_device(in.op, "residual", *in.residual, "x", in.x);
    check_same_dtype(in.op, "residual", *in.residual, "x", in.x);
    check_shape(in.op, "residual", *in.residual, shape_of(in.x));
  }
  check_vector(in.op, "weight", in.weight, in.x);
  check_vector(in.op, "bias", in.bias, in.x);
  check_vector(in.op, "running_mean", in.running_mean, in.x);
  check_vector(in.op, "running_var", in.running_var, in.x);
  SKINFAST_CHECK(in.running_mean.has_value() == in.running_var.has_value(), in.op,
                 ": one of running_mean and running_var is None; give both or neither");
  if (in.statistics.has_value()) {
    SKINFAST_CHECK(in.training, in.op,
                   ": statistics are given; evaluation takes running_mean and running_var alone");
    check_same_device(in.op, "statistics", *in.statistics, "x", in.x);
    check_dtype(in.op, "statistics", *in.statistics, statistics_dtype(in.x));
    check_shape(in.op, "statistics", *in.statistics, {2, in.x.size(1)});
  }
  SKINFAST_CHECK(in.training || in.running_mean.has_value(), in.op,
                 ": running_mean is None; evaluation needs running_mean and running_var");
  check_eps(in.op, in.eps);
}

// Call `launch(forward, x)` with all that the checked inputs, which are not empty, say of it. It
// fills what BatchNormForward does not mark as read, and sets `partials` to memory of its own.
template <typename Launch>
void with_forward_call(const BatchNormInputs& in, const Tensor& output, uint8_t* mask,
                       const Tensor& mean, const Tensor& variance, const Launch& launch) {
  const MemoryFormat layout = layout_of(in.x);
  const Tensor x = dense(in.x, layout);
  OptionalTensor residual;
  if (in.residual.has_value()) residual = dense(*in.residual, layout);
  const OptionalTensor weight = in_statistics_dtype(in.weight, x);
  const OptionalTensor bias = in_statistics_dtype(in.bias, x);
  // Statistics that are known are normalised by as in evaluation.
  OptionalTensor mean_given, variance_given;
  if (in.statistics.has_value()) {
    mean_given = dense(torch::stable::select(*in.statistics, 0, 0), MemoryFormat::Contiguous);
    variance_given = dense(torch::stable::select(*in.statistics, 0, 1), MemoryFormat::Contiguous);
  } else {
    mean_given = in_statistics_dtype(in.running_mean, x);
    variance_given = in_statistics_dtype(in.running_var, x);
  }
  const Tensor coefficients = new_vector(x, 2);
  BatchNormForward forward{
      .shape = shape_in_memory(x, layout),
      .x = x.const_data_ptr(),
      .residual = data_or_null(residual),
      .weight = data_or_null(weight),
      .bias = data_or_null(bias),
      .running_mean = data_or_null(mean_given),
      .running_var = data_or_null(variance_given),
      .eps = in.eps,
      .training = in.training && !in.statistics.has_value(),
      .output = output.mutable_data_ptr(),
      .mask = mask,
      .mean = mean.mutable_data_ptr(),
      .variance = variance.mutable_data_ptr(),
      .coefficients = coefficients.mutable_data_ptr(),
      .partials = nullptr,
  };
  launch(forward, x);
}

template <typename Launch>
FourTensors batch_norm_forward_host(const BatchNormInputs& in, const Launch& launch) {
  check_forward(in);
  Tensor output = empty_in(in.x, shape_of(in.x), layout_of(in.x));
  Tensor mask = torch::stable::new_empty(in.x, {in.relu ? mask_bytes(in.x) : 0}, ScalarType::Byte);
  Tensor mean = new_vector(in.x, 1), variance = new_vector(in.x, 1);
  if (in.x.numel() == 0) {
    return {output, mask, torch::stable::zero_(mean), torch::stable::zero_(variance)};
  }
  uint8_t* bits = in.relu ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  with_forward_call(in, output, bits, mean, variance, launch);
  return {output, mask, mean, variance};
}

// grad_output and mask are the caller's to check.
inline void check_backward(const BatchNormBackwardInputs& in) {
  check_floating(in.op, "x", in.x);
  check_channels(in.op, in.x);
  check_same_device(in.op, "grad_output", in.grad_output, "x", in.x);
  check_same_dtype(in.op, "grad_output", in.grad_output, "x", in.x);
  if (in.other_grad_output.has_value()) {
    check_same_device(in.op, "other_grad_output", *in.other_grad_output, "x", in.x);
    check_same_dtype(in.op, "other_grad_output", *in.other_grad_output, "x", in.x);
    check_shape(in.op, "other_grad_output", *in.other_grad_output, shape_of(in.x));
  }
  for (const auto& [name, vector] : {std::pair{"mean", &in.mean}, {"variance", &in.variance}}) {
    check_same_device(in.op, name, *vector, "x", in.x);
    check_dtype(in.op, name, *vector, statistics_dtype(in.x));
    check_shape(in.op, name, *vector, {in.x.size(1)});
  }
  check_vector(in.op, "weight", in.weight, in.x);
  check_eps(in.op, in.eps);
}

// The gradients of x, residual, weight and bias; what is not needed is empty. `launch(backward, x,
// mask)` sees dense tensors.
template <typename Launch>
FourTensors with_backward_call(const BatchNormBackwardInputs& in, const Launch& launch) {
  const MemoryFormat layout = layout_of(in.x);
  const auto gradient = [&](bool needed) {
    return needed ? empty_in(in.x, shape_of(in.x), layout) : no_tensor(in.x);
  };
  Tensor grad_x = gradient(in.needs_grad_x), grad_residual = gradient(in.needs_grad_residual);
  Tensor grad_weight = new_vector(in.x, 1), grad_bias = new_vector(in.x, 1);
  if (in.x.numel() == 0) {
    return {grad_x, grad_residual, torch::stable::zero_(grad_weight),
            torch::stable::zero_(grad_bias)};
  }
  const Tensor x = dense(in.x, layout);
  const Tensor grad_output = dense(in.grad_output, layout);
  OptionalTensor other_grad_output;
  if (in.other_grad_output.has_value()) other_grad_output = dense(*in.other_grad_output, layout);
  const Tensor mask = dense(in.mask, in.mask.dim() == 4 ? layout : MemoryFormat::Contiguous);
  const Tensor mean = dense(in.mean, MemoryFormat::Contiguous);
  const Tensor variance = dense(in.variance, MemoryFormat::Contiguous);
  const OptionalTensor weight = in_statistics_dtype(in.weight, x);
  const Tensor coefficients = new_vector(x, 3);
  BatchNormBackward backward{
      .shape = shape_in_memory(x, layout),
      .grad_output = grad_output.const_data_ptr(),
      .other_grad_output = data_or_null(other_grad_output),
      .x = x.const_data_ptr(),
      .mask = nullptr,
      .mean = mean.const_data_ptr(),
      .variance = variance.const_data_ptr(),
      .weight = data_or_null(weight),
      .eps = in.eps,
      .training = in.training,
      .grad_x = in.needs_grad_x ? grad_x.mutable_data_ptr() : nullptr,
      .grad_residual = in.needs_grad_residual ? grad_residual.mutable_data_ptr() : nullptr,
      .grad_weight = grad_weight.mutable_data_ptr(),
      .grad_bias = grad_bias.mutable_data_ptr(),
      .coefficients = coefficients.mutable_data_ptr(),
      .partials = nullptr,
  };
  launch(backward, x, static_cast<const uint8_t*>(mask.const_data_ptr()));
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

// As above. An empty mask says that there was no ReLU.
template <typename Launch>
FourTensors batch_norm_backward_host(const BatchNormBackwardInputs& in, const Launch& launch) {
  check_backward(in);
  check_shape(in.op, "grad_output", in.grad_output, shape_of(in.x));
  check_same_device(in.op, "mask", in.mask, "x", in.x);
  check_dtype(in.op, "mask", in.mask, ScalarType::Byte);
  const bool relu = in.mask.numel() > 0;
  SKINFAST_CHECK(relu || !in.needs_grad_residual || in.x.numel() == 0, in.op,
                 ": mask is empty; behind a residual it has a bit for each element of x");
  if (relu) check_shape(in.op, "mask", in.mask, {mask_bytes(in.x)});
  return with_backward_call(in, [&](BatchNormBackward& call, const Tensor& x, const uint8_t* mask) {
    call.mask = relu ? mask : nullptr;
    launch(call, x);
  });
}

// running_mean, running_var, mean, variance [C]; `launch(mean, variance, unbiased)` moves the
// running statistics towards mean and unbiased * variance.
template <typename Launch>
void batch_norm_update_host(const Tensor& running_mean, const Tensor& running_var,
                            const Tensor& mean, const Tensor& variance, int64_t count,
                            const Launch& launch) {
  const char* op = "batch_norm_update_";
  check_dim(op, "mean", mean, 1, "[C]");
  check_floating(op, "running_mean", running_mean);
  check_same_dtype(op, "running_var", running_var, "running_mean", running_mean);
  for (const auto& [name, tensor] : {std::pair{"running_mean", &running_mean},
                                     {"running_var", &running_var},
                                     {"variance", &variance}}) {
    check_same_device(op, name, *tensor, "mean", mean);
    check_shape(op, name, *tensor, shape_of(mean));
  }
  check_dtype(op, "mean", mean, statistics_dtype(running_mean));
  check_same_dtype(op, "variance", variance, "mean", mean);
  SKINFAST_CHECK(count > 1, op, ": count is ", count, "; an unbiased variance needs 2 or more");
  if (mean.numel() == 0) return;
  // torch.var's correction: running_var is an estimate of the population's variance.
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  launch(dense(mean, MemoryFormat::Contiguous), dense(variance, MemoryFormat::Contiguous),
         unbiased);
}

}  // namespace skinfast
