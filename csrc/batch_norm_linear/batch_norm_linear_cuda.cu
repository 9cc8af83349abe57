#include "batch_norm_linear/batch_norm_linear.h"
#include "batch_norm_relu/batch_norm_cuda_reduce.h"

namespace skinfast {
namespace {

// A block covers kFeatures features: its threads are [kGroups, kFeatures], and a group takes every
// kGroups-th row.
constexpr int kFeatures = 64;
constexpr int kGroups = kThreads / kFeatures;
// Rows of centred x that are in shared memory at once. The padding puts the rows of a column on
// different banks.
constexpr int kStagedRows = 32;
constexpr int kPitch = kFeatures + 1;
static_assert(kStagedRows >= kMaxOutputs);

// The moments of this thread's rows of its feature.
template <typename T>
__device__ Moments<accumulate_t<T>> moments_of_rows(const BatchNormLinearForward& a,
                                                    int64_t feature) {
  using A = accumulate_t<T>;
  if (feature >= a.shape.features || threadIdx.y >= a.shape.rows) return {0, 0, 0, 0};
  const T* x = static_cast<const T*>(a.x) + feature;
  const A pivot = load(x[threadIdx.y * a.shape.features]);
  A count = 0, sum = 0, squares = 0;
  for (int64_t n = threadIdx.y; n < a.shape.rows; n += kGroups) {
    const A deviation = load(x[n * a.shape.features]) - pivot;
    count += A(1);
    sum += deviation;
    squares += deviation * deviation;
  }
  return shifted_moments(count, pivot, sum, squares);
}

// The sums of bytes and of their squares: exact, so in any order.
struct ByteSums {
  int64_t sum, squares;
};

__device__ __forceinline__ ByteSums merge(ByteSums a, ByteSums b) {
  return {a.sum + b.sum, a.squares + b.squares};
}

__device__ __forceinline__ ByteSums sums_of_rows(const BatchNormLinearForward& a, int64_t feature) {
  ByteSums sums{};
  if (feature >= a.shape.features) return sums;
  const uint8_t* x = static_cast<const uint8_t*>(a.x) + feature;
  for (int64_t n = threadIdx.y; n < a.shape.rows; n += kGroups) {
    const int32_t byte = x[n * a.shape.features];
    sums = merge(sums, {byte, byte * byte});
  }
  return sums;
}

// The batch's statistics of the thread's feature.
template <typename T, typename A = accumulate_t<T>>
__device__ __forceinline__ void batch_statistics(const BatchNormLinearForward& a, int64_t feature,
                                                 A& mean, A& variance) {
  if constexpr (kIsByte<T>) {
    __shared__ ByteSums sums[kThreads];
    sums[thread_in_block()] = sums_of_rows(a, feature);
    merge_block<1>(sums);
    __syncthreads();
    if (feature >= a.shape.features) return;
    const ByteSums total = sums[threadIdx.x];
    const int64_t channel = feature / a.pixels.channel_features;
    byte_statistics(total.sum, total.squares, a.shape.rows, a.pixels.scale[channel],
                    a.pixels.shift[channel], mean, variance);
  } else {
    __shared__ Moments<A> moments[kThreads];
    moments[thread_in_block()] = moments_of_rows<T>(a, feature);
    merge_block<1>(moments);
    __syncthreads();
    const Moments<A> total = moments[threadIdx.x];
    mean = total.pivot + total.offset;
    variance = total.m2 / static_cast<A>(a.shape.rows);
  }
}

// As convert_to_bytes() says, where x is bytes.
template <typename T, typename A = accumulate_t<T>>
__device__ __forceinline__ void convert_feature(const PixelScale& pixels, int64_t feature, A& mean,
                                                A& factor) {
  if constexpr (kIsByte<T>) {
    const int64_t channel = feature / pixels.channel_features;
    convert_to_bytes(pixels.scale[channel], pixels.shift[channel], mean, factor);
  }
}

// A block's statistics and its partial result.
template <typename T>
__global__ void __launch_bounds__(kThreads) blocks_kernel(BatchNormLinearForward a) {
  using A = accumulate_t<T>;
  __shared__ A weight[kMaxOutputs][kPitch];  // scaled by s
  __shared__ A constants[kMaxOutputs];       // sum_f norm_bias[f] weight[k,f]
  __shared__ A staged[kStagedRows][kPitch];
  const int64_t N = a.shape.rows, F = a.shape.features;
  const int K = static_cast<int>(a.shape.outputs);
  const int column = threadIdx.x, group = threadIdx.y;
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * kFeatures + column;
  const bool inside = feature < F;

  A mean = 0, variance = 0;
  if (a.training) {
    batch_statistics<T>(a, feature, mean, variance);
  } else if (inside) {
    mean = static_cast<const A*>(a.running_mean)[feature];
    variance = static_cast<const A*>(a.running_var)[feature];
  }
  if (group == 0 && inside) {
    static_cast<A*>(a.mean)[feature] = mean;
    static_cast<A*>(a.variance)[feature] = variance;
  }

  A scale = 0, shift = 0;
  if (inside) {
    scale = reciprocal_deviation(variance, static_cast<A>(a.eps));
    if (a.norm_weight != nullptr) scale *= static_cast<const A*>(a.norm_weight)[feature];
    if (a.norm_bias != nullptr) shift = static_cast<const A*>(a.norm_bias)[feature];
    convert_feature<T>(a.pixels, feature, mean, scale);
  }
  for (int k = group; k < K; k += kGroups) {
    const A value = inside ? static_cast<const A*>(a.weight)[k * F + feature] : A(0);
    weight[k][column] = value * scale;
    staged[k][column] = value * shift;
  }
  __syncthreads();
  if (thread_in_block() < K) {
    A sum = 0;
    for (int f = 0; f < kFeatures; ++f) sum += staged[thread_in_block()][f];
    constants[thread_in_block()] = sum;
  }

  for (int64_t first = 0; first < N; first += kStagedRows) {
    const int rows = static_cast<int>(N - first < kStagedRows ? N - first : kStagedRows);
    __syncthreads();
    for (int r = group; r < rows; r += kGroups) {
      const T* x = static_cast<const T*>(a.x) + (first + r) * F;
      staged[r][column] = inside ? load(x[feature]) - mean : A(0);
    }
    __syncthreads();
    A* share = static_cast<A*>(a.partials) + (blockIdx.x * N + first) * K;
    for (int i = thread_in_block(); i < rows * K; i += kThreads) {
      const A* centred = staged[i / K];
      const A* scaled = weight[i % K];
      A sum = constants[i % K];
#pragma unroll 8
      for (int f = 0; f < kFeatures; ++f) sum += centred[f] * scaled[f];
      share[i] = sum;
    }
  }
}

// Threads [kCombined, kWarpSize]: a warp takes 32 outputs and every kCombined-th block's share.
constexpr int kCombined = kThreads / kWarpSize;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_outputs_kernel(BatchNormLinearForward a, int64_t blocks) {
  using A = accumulate_t<T>;
  __shared__ double sums[kCombined][kWarpSize];
  const int64_t K = a.shape.outputs, outputs = a.shape.rows * K;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  double sum = 0;
  for (int64_t block = threadIdx.y; i < outputs && block < blocks; block += kCombined) {
    sum += static_cast<const A*>(a.partials)[block * outputs + i];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= outputs) return;
  double total = value_or(static_cast<const A*>(a.bias), i % K, 0.0);
  for (int y = 0; y < kCombined; ++y) total += sums[y][threadIdx.x];
  static_cast<T*>(a.output)[i] = store<T>(static_cast<A>(total));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) blocks_backward_kernel(BatchNormLinearBackward a) {
  using A = accumulate_t<T>;
  using Output = std::conditional_t<kIsByte<T>, float, T>;
  __shared__ A dots[kGroups][kMaxOutputs][kFeatures];
  __shared__ A sums[kGroups][kMaxOutputs];
  const int64_t N = a.shape.rows, F = a.shape.features;
  const int K = static_cast<int>(a.shape.outputs);
  const int column = threadIdx.x, group = threadIdx.y;
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * kFeatures + column;
  const bool inside = feature < F;

  A mean = 0, reciprocal = 0;
  if (inside) {
    mean = static_cast<const A*>(a.mean)[feature];
    reciprocal =
        reciprocal_deviation(static_cast<const A*>(a.variance)[feature], static_cast<A>(a.eps));
    convert_feature<T>(a.pixels, feature, mean, reciprocal);
  }
  // G and D of the group's rows. Every thread of a group has the same D: cheaper than a launch.
  A dot[kMaxOutputs] = {}, sum[kMaxOutputs] = {};
  for (int64_t n = group; n < N; n += kGroups) {
    const A centred = inside ? load(static_cast<const T*>(a.x)[n * F + feature]) - mean : A(0);
    const Output* grad = static_cast<const Output*>(a.grad_output) + n * K;
#pragma unroll
    for (int k = 0; k < kMaxOutputs; ++k) {
      if (k < K) {
        const A value = load(grad[k]);
        dot[k] += value * centred;
        sum[k] += value;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kMaxOutputs; ++k) {
    if (k < K) {
      dots[group][k][column] = dot[k];
      if (column == 0) sums[group][k] = sum[k];
    }
  }
  __syncthreads();

  const auto total_of = [&](int k) {
    A total = 0;
    for (int g = 0; g < kGroups; ++g) total += sums[g][k];
    return total;
  };
  A norm_weight = 1, norm_bias = 0;
  if (inside) {
    if (a.norm_weight != nullptr) norm_weight = static_cast<const A*>(a.norm_weight)[feature];
    if (a.norm_bias != nullptr) norm_bias = static_cast<const A*>(a.norm_bias)[feature];
  }
  for (int k = group; k < K; k += kGroups) {
    A total = 0;
    for (int g = 0; g < kGroups; ++g) total += dots[g][k][column];
    dots[0][k][column] = total;  // no other thread reads it before the barrier
    if (inside) {
      static_cast<A*>(a.grad_weight)[k * F + feature] =
          weight_gradient(total, total_of(k), norm_weight, reciprocal, norm_bias);
    }
    if (feature == 0) static_cast<A*>(a.grad_bias)[k] = total_of(k);
  }
  __syncthreads();
  if (group != 0 || !inside) return;
  A of_weight = 0, of_bias = 0;
  for (int k = 0; k < K; ++k) {
    const A value = static_cast<const A*>(a.weight)[k * F + feature];
    of_weight += value * dots[0][k][column];
    of_bias += value * total_of(k);
  }
  static_cast<A*>(a.grad_norm_weight)[feature] = of_weight * reciprocal;
  static_cast<A*>(a.grad_norm_bias)[feature] = of_bias;
}

const dim3 kBlock(kFeatures, kGroups);

std::tuple<Tensor, Tensor, Tensor> batch_norm_linear_cuda(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
    double eps, const OptionalTensor& scale, const OptionalTensor& shift) {
  return batch_norm_linear_host(
      x, weight, bias, norm_weight, norm_bias, running_mean, running_var, training, eps, scale,
      shift, kFeatures, [](const BatchNormLinearForward& call, const Tensor& x) {
        const DeviceGuard guard(x.get_device_index());
        const int64_t blocks = ceil_divide(call.shape.features, kFeatures);
        const int64_t outputs = call.shape.rows * call.shape.outputs;
        SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
          launch(call.pixels.scale != nullptr ? &blocks_kernel<uint8_t> : &blocks_kernel<T>,
                 dim3(static_cast<unsigned>(blocks)), kBlock, 0, current_stream(x), call);
          launch(&combine_outputs_kernel<T>,
                 dim3(static_cast<unsigned>(ceil_divide(outputs, kWarpSize))),
                 dim3(kWarpSize, kCombined), 0, current_stream(x), call, blocks);
        });
      });
}

FourTensors batch_norm_linear_backward_cuda(const Tensor& grad_output, const Tensor& x,
                                            const Tensor& mean, const Tensor& variance,
                                            const Tensor& weight, const OptionalTensor& norm_weight,
                                            const OptionalTensor& norm_bias, double eps,
                                            const OptionalTensor& scale,
                                            const OptionalTensor& shift) {
  return batch_norm_linear_backward_host(
      grad_output, x, mean, variance, weight, norm_weight, norm_bias, eps, scale, shift,
      [](const BatchNormLinearBackward& call, const Tensor& x) {
        const DeviceGuard guard(x.get_device_index());
        const int64_t blocks = ceil_divide(call.shape.features, kFeatures);
        SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
          launch(call.pixels.scale != nullptr ? &blocks_backward_kernel<uint8_t>
                                              : &blocks_backward_kernel<T>,
                 dim3(static_cast<unsigned>(blocks)), kBlock, 0, current_stream(x), call);
        });
      });
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_norm_linear", TORCH_BOX(&batch_norm_linear_cuda));
  m.impl("batch_norm_linear_backward", TORCH_BOX(&batch_norm_linear_backward_cuda));
}

}  // namespace skinfast
