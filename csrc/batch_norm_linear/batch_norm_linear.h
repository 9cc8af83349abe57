// output = batch_norm(x) weight^T + bias for x that is data: no gradient of x.
//
// With s = norm_weight / sqrt(variance + eps), the normalisation moves into the weight:
//   output[n,k] = sum_f (x[n,f] - mean[f]) s[f] weight[k,f] + sum_f norm_bias[f] weight[k,f] +
//   bias[k]
// and every gradient follows from G[k,f] = sum_n g[n,k] (x[n,f] - mean[f]), D[k] = sum_n g[n,k],
// where g is that of output. Both passes go through x by blocks of features, and once: a block's
// statistics and its share of the output are computed while it is in cache.
//
// Pixels may come as bytes u that stand for x = scale u + shift, one of each a channel. Then
// x - mean = scale (u - (mean - shift) / scale), so both passes read u, a quarter of a float, and
// the scale joins s.
#pragma once

#include "batch_norm_relu/batch_norm_relu.h"

namespace skinfast {

// As many outputs as the kernels are made for; skinfast/ops/batch_norm_linear.py has its twin.
constexpr int64_t kMaxOutputs = 16;

struct BatchNormLinearShape {
  int64_t rows, features, outputs;  // N, F, K
};

// What bytes stand for; a channel is so many successive features.
struct PixelScale {
  const float* scale;  // [C], null where x is floating point and stands for itself
  const float* shift;  // [C]
  int64_t channel_features;
};

// T is x's storage type, A what it is computed in; of bytes everything else is float. Null where
// marked optional.
struct BatchNormLinearForward {
  BatchNormLinearShape shape;
  PixelScale pixels;
  const void* x;             // T [N, F]
  const void* weight;        // A [K, F]
  const void* bias;          // A [K], optional
  const void* norm_weight;   // A [F], optional
  const void* norm_bias;     // A [F], optional
  const void* running_mean;  // A [F], where not training
  const void* running_var;   // A [F], where not training
  double eps;
  bool training;
  void* output;    // T [N, K]
  void* mean;      // A [F], of what bytes stand for
  void* variance;  // A [F], divided by the count: what normalises
  void* partials;  // A [blocks, N, K], workspace: each block's share of the output
};

struct BatchNormLinearBackward {
  BatchNormLinearShape shape;
  PixelScale pixels;
  const void* grad_output;  // T [N, K]
  const void* x;            // T [N, F]
  const void* mean;         // A [F]
  const void* variance;     // A [F]
  const void* weight;       // A [K, F]
  const void* norm_weight;  // A [F], optional
  const void* norm_bias;    // A [F], optional
  double eps;
  void* grad_weight;       // A [K, F]
  void* grad_bias;         // A [K]: D
  void* grad_norm_weight;  // A [F]
  void* grad_norm_bias;    // A [F]
};

SKINFAST_HOST_DEVICE float reciprocal_deviation(float variance, float eps) {
  return 1.0f / sqrtf(variance + eps);
}
SKINFAST_HOST_DEVICE double reciprocal_deviation(double variance, double eps) {
  return 1.0 / sqrt(variance + eps);
}

template <typename T>
constexpr bool kIsByte = sizeof(T) == 1;

// --- one feature -------------------------------------------------------------------------------

// The mean and, divided by the count, the variance of what bytes of these sums stand for. The sums
// are exact and a double's rounding far below 1 / count, so no pivot is needed.
SKINFAST_HOST_DEVICE void byte_statistics(int64_t sum, int64_t squares, int64_t count, double scale,
                                          double shift, float& mean, float& variance) {
  const double centre = static_cast<double>(sum) / static_cast<double>(count);
  const double square = static_cast<double>(squares) / static_cast<double>(count);
  mean = static_cast<float>(scale * centre + shift);
  variance = static_cast<float>(scale * scale * (square - centre * centre));
}

// A mean and a factor for what bytes stand for become those for the bytes.
SKINFAST_HOST_DEVICE void convert_to_bytes(float scale, float shift, float& mean, float& factor) {
  mean = (mean - shift) / scale;
  factor *= scale;
}

// dot and sum are G[k,f] and D[k].
template <typename A>
SKINFAST_HOST_DEVICE A weight_gradient(A dot, A sum, A norm_weight, A reciprocal, A norm_bias) {
  return dot * (norm_weight * reciprocal) + sum * norm_bias;
}

// --- CPU kernels -------------------------------------------------------------------------------

// Features of a block, whatever the number of threads: 64 rows of them are 64 KiB, which stay in a
// level-2 cache between the reads for the statistics and for the products.
constexpr int64_t kFeatureBlock = 256;
SKINFAST_HOST_DEVICE int64_t feature_blocks(const BatchNormLinearShape& shape) {
  return ceil_divide(shape.features, kFeatureBlock);
}
// Outputs that are computed together; packed gradients are padded to a multiple of it.
constexpr int64_t kOutputGroup = 8;

// `dtype` is the output's; bytes, which are no dtype here, have pixels.scale.

// The statistics of the blocks [begin, end) and their partial results.
SKINFAST_DECLARE_KERNEL(void batch_norm_linear_blocks(DType dtype, const BatchNormLinearForward& a,
                                                      int64_t begin, int64_t end))
// The outputs [begin, end) of N * K.
SKINFAST_DECLARE_KERNEL(void batch_norm_linear_combine(DType dtype, const BatchNormLinearForward& a,
                                                       int64_t begin, int64_t end))
// packed A [ceil(K / kOutputGroup), N, kOutputGroup]: grad_output, zero beyond K; and grad_bias.
SKINFAST_DECLARE_KERNEL(void batch_norm_linear_pack(DType dtype, const BatchNormLinearBackward& a,
                                                    void* packed))
// The gradients of the blocks [begin, end).
SKINFAST_DECLARE_KERNEL(void batch_norm_linear_blocks_backward(
    DType dtype, const BatchNormLinearBackward& a, const void* packed, int64_t begin, int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "batch_norm_relu/batch_norm_host.h"

namespace skinfast {

// The dtype of the output and of its gradient.
inline ScalarType output_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Byte ? ScalarType::Float : x.scalar_type();
}

inline void check_pixel_scale(const char* op, const Tensor& x, const OptionalTensor& scale,
                              const OptionalTensor& shift) {
  if (x.scalar_type() != ScalarType::Byte) {
    check_floating(op, "x", x);
    SKINFAST_CHECK(!scale.has_value() && !shift.has_value(), op, ": scale or shift is given and x",
                   " has dtype ", dtype_name(x.scalar_type()), "; they need uint8");
    return;
  }
  SKINFAST_CHECK(scale.has_value() && shift.has_value(), op,
                 ": x has dtype uint8; it needs scale and shift");
  for (const auto& [name, vector] : {std::pair{"scale", &*scale}, {"shift", &*shift}}) {
    check_same_device(op, name, *vector, "x", x);
    check_dtype(op, name, *vector, ScalarType::Float);
    check_dim(op, name, *vector, 1, "[C]");
  }
  SKINFAST_CHECK(scale->size(0) > 0 && x.size(1) % scale->size(0) == 0, op, ": scale has shape ",
                 shape_string(*scale), "; its length needs to divide ", x.size(1),
                 ", the number of features");
  check_shape(op, "shift", *shift, {scale->size(0)});
}

// As check_vector(), which would take bytes for bytes.
inline void check_feature_vector(const char* op, const char* name, const OptionalTensor& vector,
                                 const Tensor& x) {
  check_vector(op, name, vector, x);
  if (vector.has_value() && x.scalar_type() == ScalarType::Byte) {
    check_dtype(op, name, *vector, ScalarType::Float);
  }
}

// x [N, F], of the shape returned.
inline BatchNormLinearShape check_batch_norm_linear(const char* op, const Tensor& x,
                                                    const Tensor& weight,
                                                    const OptionalTensor& scale,
                                                    const OptionalTensor& shift) {
  check_dim(op, "x", x, 2, "[N, F]");
  SKINFAST_CHECK(x.size(1) > 0, op, ": x has shape ", shape_string(x),
                 "; it needs at least 1 feature");
  check_pixel_scale(op, x, scale, shift);
  check_same_device(op, "weight", weight, "x", x);
  if (weight.scalar_type() != output_dtype(x))
    check_dtype(op, "weight", weight, statistics_dtype(x));
  check_dim(op, "weight", weight, 2, "[K, F]");
  const int64_t outputs = weight.size(0);
  SKINFAST_CHECK(outputs >= 1 && outputs <= kMaxOutputs, op, ": weight has shape ",
                 shape_string(weight), "; it needs 1 to ", kMaxOutputs, " rows");
  check_shape(op, "weight", weight, {outputs, x.size(1)});
  return {x.size(0), x.size(1), outputs};
}

inline OptionalTensor dense_or_none(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return tensor;
  return dense(*tensor, MemoryFormat::Contiguous);
}

// scale and shift are dense.
inline PixelScale pixel_scale(const BatchNormLinearShape& shape, const OptionalTensor& scale,
                              const OptionalTensor& shift) {
  if (!scale.has_value()) return {};
  return {static_cast<const float*>(scale->const_data_ptr()),
          static_cast<const float*>(shift->const_data_ptr()), shape.features / scale->size(0)};
}

// `launch(forward, x)` fills output, mean and variance; the partial results are of blocks of
// `block` features.
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> batch_norm_linear_host(
    const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_,
    const OptionalTensor& norm_weight_, const OptionalTensor& norm_bias_,
    const OptionalTensor& running_mean_, const OptionalTensor& running_var_, bool training,
    double eps, const OptionalTensor& scale_, const OptionalTensor& shift_, int64_t block,
    const Launch& launch) {
  const char* op = "batch_norm_linear";
  const BatchNormLinearShape shape = check_batch_norm_linear(op, x_, weight_, scale_, shift_);
  if (bias_.has_value()) {
    check_same_device(op, "bias", *bias_, "x", x_);
    check_same_dtype(op, "bias", *bias_, "weight", weight_);
    check_shape(op, "bias", *bias_, {shape.outputs});
  }
  check_feature_vector(op, "norm_weight", norm_weight_, x_);
  check_feature_vector(op, "norm_bias", norm_bias_, x_);
  check_feature_vector(op, "running_mean", running_mean_, x_);
  check_feature_vector(op, "running_var", running_var_, x_);
  SKINFAST_CHECK(running_mean_.has_value() == running_var_.has_value(), op,
                 ": one of running_mean and running_var is None; give both or neither");
  SKINFAST_CHECK(training || running_mean_.has_value(), op,
                 ": running_mean is None; evaluation needs running_mean and running_var");
  check_eps(op, eps);

  Tensor output = torch::stable::new_empty(x_, {shape.rows, shape.outputs}, output_dtype(x_));
  Tensor mean = new_vector(x_, 1), variance = new_vector(x_, 1);
  if (shape.rows == 0) {
    return {output, torch::stable::zero_(mean), torch::stable::zero_(variance)};
  }
  const Tensor x = dense(x_, MemoryFormat::Contiguous);
  const OptionalTensor weight = in_statistics_dtype(weight_, x);
  const OptionalTensor bias = in_statistics_dtype(bias_, x);
  const OptionalTensor norm_weight = in_statistics_dtype(norm_weight_, x);
  const OptionalTensor norm_bias = in_statistics_dtype(norm_bias_, x);
  const OptionalTensor running_mean = in_statistics_dtype(running_mean_, x);
  const OptionalTensor running_var = in_statistics_dtype(running_var_, x);
  const OptionalTensor scale = dense_or_none(scale_), shift = dense_or_none(shift_);
  const Tensor partials = torch::stable::new_empty(
      x, {ceil_divide(shape.features, block), shape.rows, shape.outputs}, statistics_dtype(x));
  launch(
      BatchNormLinearForward{
          .shape = shape,
          .pixels = pixel_scale(shape, scale, shift),
          .x = x.const_data_ptr(),
          .weight = weight->const_data_ptr(),
          .bias = data_or_null(bias),
          .norm_weight = data_or_null(norm_weight),
          .norm_bias = data_or_null(norm_bias),
          .running_mean = data_or_null(running_mean),
          .running_var = data_or_null(running_var),
          .eps = eps,
          .training = training,
          .output = output.mutable_data_ptr(),
          .mean = mean.mutable_data_ptr(),
          .variance = variance.mutable_data_ptr(),
          .partials = partials.mutable_data_ptr(),
      },
      x);
  return {output, mean, variance};
}

// `launch(backward, x)` fills the gradients of weight, bias, norm_weight and norm_bias.
template <typename Launch>
FourTensors batch_norm_linear_backward_host(
    const Tensor& grad_output_, const Tensor& x_, const Tensor& mean_, const Tensor& variance_,
    const Tensor& weight_, const OptionalTensor& norm_weight_, const OptionalTensor& norm_bias_,
    double eps, const OptionalTensor& scale_, const OptionalTensor& shift_, const Launch& launch) {
  const char* op = "batch_norm_linear_backward";
  const BatchNormLinearShape shape = check_batch_norm_linear(op, x_, weight_, scale_, shift_);
  check_same_device(op, "grad_output", grad_output_, "x", x_);
  if (scale_.has_value()) {
    check_dtype(op, "grad_output", grad_output_, output_dtype(x_));
  } else {
    check_same_dtype(op, "grad_output", grad_output_, "x", x_);
  }
  check_shape(op, "grad_output", grad_output_, {shape.rows, shape.outputs});
  for (const auto& [name, vector] : {std::pair{"mean", &mean_}, {"variance", &variance_}}) {
    check_same_device(op, name, *vector, "x", x_);
    check_dtype(op, name, *vector, statistics_dtype(x_));
    check_shape(op, name, *vector, {shape.features});
  }
  check_feature_vector(op, "norm_weight", norm_weight_, x_);
  check_feature_vector(op, "norm_bias", norm_bias_, x_);
  check_eps(op, eps);

  Tensor grad_weight =
      torch::stable::new_empty(x_, {shape.outputs, shape.features}, statistics_dtype(x_));
  Tensor grad_bias = torch::stable::new_empty(x_, {shape.outputs}, statistics_dtype(x_));
  Tensor grad_norm_weight = new_vector(x_, 1), grad_norm_bias = new_vector(x_, 1);
  if (shape.rows == 0) {
    for (Tensor* grad : {&grad_weight, &grad_bias, &grad_norm_weight, &grad_norm_bias}) {
      torch::stable::zero_(*grad);
    }
    return {grad_weight, grad_bias, grad_norm_weight, grad_norm_bias};
  }
  const Tensor x = dense(x_, MemoryFormat::Contiguous);
  const Tensor grad_output = dense(grad_output_, MemoryFormat::Contiguous);
  const Tensor mean = dense(mean_, MemoryFormat::Contiguous);
  const Tensor variance = dense(variance_, MemoryFormat::Contiguous);
  const OptionalTensor weight = in_statistics_dtype(weight_, x);
  const OptionalTensor norm_weight = in_statistics_dtype(norm_weight_, x);
  const OptionalTensor norm_bias = in_statistics_dtype(norm_bias_, x);
  const OptionalTensor scale = dense_or_none(scale_), shift = dense_or_none(shift_);
  launch(
      BatchNormLinearBackward{
          .shape = shape,
          .pixels = pixel_scale(shape, scale, shift),
          .grad_output = grad_output.const_data_ptr(),
          .x = x.const_data_ptr(),
          .mean = mean.const_data_ptr(),
          .variance = variance.const_data_ptr(),
          .weight = weight->const_data_ptr(),
          .norm_weight = data_or_null(norm_weight),
          .norm_bias = data_or_null(norm_bias),
          .eps = eps,
          .grad_weight = grad_weight.mutable_data_ptr(),
          .grad_bias = grad_bias.mutable_data_ptr(),
          .grad_norm_weight = grad_norm_weight.mutable_data_ptr(),
          .grad_norm_bias = grad_norm_bias.mutable_data_ptr(),
      },
      x);
  return {grad_weight, grad_bias, grad_norm_weight, grad_norm_bias};
}

}  // namespace skinfast
#endif
