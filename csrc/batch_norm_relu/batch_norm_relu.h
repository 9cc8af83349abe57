// output = relu(batch_norm(x)), and what batch_norm_add_relu shares with it: the same kernels with
// a residual added before the ReLU (paper, equation 8).
//
// Forward: moments of each channel, merged in a fixed order; one pass that normalises, adds,
// applies the ReLU and keeps one bit an element of where the gradient passes. Backward: one pass
// for both sums of each channel, which on the CPU also writes the gradient of the residual, and one
// that writes the others.
#pragma once

#include <cmath>

#include "core/isa.h"
#include "core/relu.h"
#include "core/scalar.h"

namespace skinfast {

// x as it lies in memory: a matrix [rows, columns] whose column k belongs to channel k / group.
// channels_last [N, C, H, W]: rows = N * H * W, columns = C, group = 1.
// contiguous [N, C, *]: rows = N, columns = C * group, group = the product of *.
struct BatchNormShape {
  int64_t rows, columns, channels, group;
};

// T is x's storage type, A what it is computed in. Vectors are [C]; null where marked optional.
struct BatchNormForward {
  BatchNormShape shape;
  const void* x;             // T [rows, columns]
  const void* residual;      // T [rows, columns], optional
  const void* weight;        // A, optional
  const void* bias;          // A, optional
  const void* running_mean;  // A, where not training: what normalises
  const void* running_var;   // A, where not training
  double eps;
  bool training;       // whether the batch's statistics are to be computed
  void* output;        // T [rows, columns]
  uint8_t* mask;       // bit i % 8 of byte i / 8: element i passes the gradient; null without ReLU
  void* mean;          // A
  void* variance;      // A, divided by the count: what normalises
  void* coefficients;  // A [2, C], workspace
  void* partials;      // A, workspace: the moments of parts of each channel
};

struct BatchNormBackward {
  BatchNormShape shape;
  const void* grad_output;        // T [rows, columns]
  const void* other_grad_output;  // likewise, optional: added to it, rounded to T; on the CPU
  const void* x;                  // T [rows, columns]
  const uint8_t* mask;            // null without ReLU
  const void* mean;               // A
  const void* variance;           // A
  const void* weight;             // A, optional
  double eps;
  bool training;
  void* grad_x;         // T [rows, columns], optional
  void* grad_residual;  // T [rows, columns], optional
  void* grad_weight;    // A
  void* grad_bias;      // A
  void* coefficients;   // A [3, C], workspace
  void* partials;       // A, workspace: the sums over parts of each channel
};

// --- moments -----------------------------------------------------------------------------------

// A set's mean, pivot + offset, and its sum of squared deviations from it. Two numbers for the
// mean, since one would lose against a pivot of 1e4 what a variance of 1 is made of.
template <typename A>
struct Moments {
  A count, pivot, offset, m2;
};

// From sums of x - pivot and its square, where pivot is the mean of some of the set's elements:
// unlike sums of x and x * x they cancel little even where the mean dwarfs the deviation.
template <typename A>
SKINFAST_HOST_DEVICE Moments<A> shifted_moments(A count, A pivot, A sum, A squares) {
  const A m2 = squares - sum * (sum / count);
  return {count, pivot, sum / count, m2 < A(0) ? A(0) : m2};
}

// The moments of two disjoint sets together (Chan, Golub and LeVeque).
template <typename A>
SKINFAST_HOST_DEVICE Moments<A> merge_moments(Moments<A> a, Moments<A> b) {
  if (a.count == A(0)) return b;
  const A count = a.count + b.count;
  const A share = b.count / count;
  const A delta = (b.pivot - a.pivot) + (b.offset - a.offset);
  return {count, a.pivot, a.offset + delta * share,
          a.m2 + b.m2 + delta * delta * (a.count * share)};
}

// running = (1 - momentum) * running + momentum * batch
template <typename T, typename A>
SKINFAST_HOST_DEVICE T updated_statistic(T running, A batch, A momentum) {
  return store<T>((A(1) - momentum) * load(running) + momentum * batch);
}

// --- one channel: in double, since there are few ------------------------------------------------

SKINFAST_HOST_DEVICE double inverse_deviation(double variance, double eps) {
  return 1.0 / sqrt(variance + eps);
}

template <typename A>
SKINFAST_HOST_DEVICE double value_or(const A* values, int64_t channel, double otherwise) {
  return values == nullptr ? otherwise : static_cast<double>(values[channel]);
}

template <typename A>
SKINFAST_HOST_DEVICE void set_forward_channel(const BatchNormForward& a, int64_t channel,
                                              double mean, double variance) {
  const double weight = value_or(static_cast<const A*>(a.weight), channel, 1.0);
  static_cast<A*>(a.mean)[channel] = static_cast<A>(mean);
  static_cast<A*>(a.variance)[channel] = static_cast<A>(variance);
  A* coefficients = static_cast<A*>(a.coefficients) + channel;
  coefficients[0] = static_cast<A>(weight * inverse_deviation(variance, a.eps));
  coefficients[a.shape.channels] =
      static_cast<A>(value_or(static_cast<const A*>(a.bias), channel, 0.0));
}

// sum and dot: of grad and of grad * (x - mean) over the channel, grad taken behind the ReLU.
template <typename A>
SKINFAST_HOST_DEVICE void set_backward_channel(const BatchNormBackward& a, int64_t channel,
                                               double sum, double dot) {
  const double inverse = inverse_deviation(static_cast<const A*>(a.variance)[channel], a.eps);
  const double scale = value_or(static_cast<const A*>(a.weight), channel, 1.0) * inverse;
  const double count = static_cast<double>(a.shape.rows) * static_cast<double>(a.shape.group);
  A* coefficients = static_cast<A*>(a.coefficients) + channel;
  coefficients[0] = static_cast<A>(scale);
  coefficients[a.shape.channels] = static_cast<A>(-scale * inverse * inverse * dot / count);
  coefficients[2 * a.shape.channels] = static_cast<A>(-scale * sum / count);
  static_cast<A*>(a.grad_weight)[channel] = static_cast<A>(dot * inverse);
  static_cast<A*>(a.grad_bias)[channel] = static_cast<A>(sum);
}

// --- one element -------------------------------------------------------------------------------

template <typename A>
SKINFAST_HOST_DEVICE A normalized(A x, A mean, A scale, A shift) {
  return (x - mean) * scale + shift;
}

// With batch statistics mean and variance depend on x, too: grad and x pull them along.
template <typename A>
SKINFAST_HOST_DEVICE A training_gradient(A grad, A x, A mean, A scale, A slope, A offset) {
  return grad * scale + ((x - mean) * slope + offset);
}

// --- CPU kernels -------------------------------------------------------------------------------

// A reduction is cut into tiles of at most kTileRows x kTileColumns whatever the number of threads.
// A tile covers whole channels, or, where a channel is wider than a tile, one slice of a channel.
constexpr int64_t kTileRows = 128;
constexpr int64_t kTileColumns = 512;
constexpr int64_t kPivotRows = 16;
// The passes that write cut memory into chunks: a multiple of 8 elements, so of whole mask bytes.
constexpr int64_t kChunk = 1024;

struct BatchNormTiling {
  int64_t channels_per_tile, slices, column_tiles, row_tiles;
};

SKINFAST_HOST_DEVICE int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

SKINFAST_HOST_DEVICE BatchNormTiling tiling_of(const BatchNormShape& shape) {
  const int64_t fit = shape.group < kTileColumns ? kTileColumns / shape.group : 1;
  const int64_t slices = ceil_divide(shape.group, kTileColumns);
  return {fit, slices, ceil_divide(shape.channels, fit) * slices,
          ceil_divide(shape.rows, kTileRows)};
}

// The partial results of tiles: planes [row_tiles * slices, C], of pivot, offset and m2 forward and
// of sum and dot backward.
SKINFAST_DECLARE_KERNEL(void batch_norm_reduce(DType dtype, const BatchNormForward& a,
                                               int64_t begin_tile, int64_t end_tile))
SKINFAST_DECLARE_KERNEL(void batch_norm_reduce_backward(DType dtype, const BatchNormBackward& a,
                                                        int64_t begin_tile, int64_t end_tile))
SKINFAST_DECLARE_KERNEL(void batch_norm_combine(DType dtype, const BatchNormForward& a,
                                                int64_t begin_channel, int64_t end_channel))
SKINFAST_DECLARE_KERNEL(void batch_norm_combine_backward(DType dtype, const BatchNormBackward& a,
                                                         int64_t begin_channel,
                                                         int64_t end_channel))
SKINFAST_DECLARE_KERNEL(void batch_norm_apply(DType dtype, const BatchNormForward& a, int64_t begin,
                                              int64_t end))
SKINFAST_DECLARE_KERNEL(void batch_norm_apply_backward(DType dtype, const BatchNormBackward& a,
                                                       int64_t begin, int64_t end))

SKINFAST_DECLARE_KERNEL(void batch_norm_spread(DType dtype, const BatchNormShape& shape,
                                               const void* values, int64_t planes, void* columns))

}  // namespace skinfast
