#include "core/cuda.h"
#include "cross_entropy/cross_entropy.h"

namespace skinfast {
namespace {

// A row is worked on by kLanes neighbouring threads of one warp: 8 for few classes, else 32. All
// lanes of a warp take equally many turns, so that its shuffles never lack one.
constexpr int kFewLanes = 8;
// Up to so many rows of so few classes are one block's, a thread a row: their time is that of a
// launch, and more blocks would need a second one to add their sums.
constexpr int64_t kOneBlockRows = 4 * kThreads, kOneBlockClasses = 2 * kFewLanes;

template <int kLanes, typename A, typename Combine>
__device__ __forceinline__ A across_lanes(A value, Combine combine) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

template <int kLanes, typename A>
__device__ __forceinline__ A sum_lanes(A value) {
  return across_lanes<kLanes>(value, [](A a, A b) { return a + b; });
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

template <typename T>
__device__ __forceinline__ accumulate_t<T> weight_at(const T* weight, int64_t c) {
  return weight == nullptr ? accumulate_t<T>(1) : load(weight[c]);
}

// A target that is no class: memory beside the row is not read, and the row's loss and gradient
// are NaN. An error would need the host to wait for the device.
__device__ __forceinline__ bool is_class(int64_t target, const CrossEntropyParams& p) {
  return target >= 0 && target < p.classes;
}

template <typename A>
__device__ __forceinline__ A not_a_number() {
  return static_cast<A>(__builtin_nanf(""));
}

// The sum over all threads of a block, in thread 0.
__device__ __forceinline__ LossSum sum_of_block(LossSum sum) {
  __shared__ LossSum shared[kThreads];
  shared[threadIdx.x] = sum;
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < distance) {
      shared[threadIdx.x].loss += shared[threadIdx.x + distance].loss;
      shared[threadIdx.x].weight += shared[threadIdx.x + distance].weight;
    }
  }
  return shared[threadIdx.x];
}

// `loss` is null where the rows' losses are the result.
template <typename T>
__device__ __forceinline__ void store_total(LossSum total, T* loss, accumulate_t<T>* total_weight,
                                            int64_t reduction) {
  using A = accumulate_t<T>;
  *total_weight = static_cast<A>(total.weight);
  if (loss != nullptr) {
    *loss = store<T>(static_cast<A>(reduction == kMean ? total.loss / total.weight : total.loss));
  }
}

// A block that is alone stores the total, others their sum.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 2)
    cross_entropy_kernel(const T* __restrict__ input, const int64_t* __restrict__ target,
                         const T* __restrict__ weight, T* __restrict__ losses,
                         Normalizer<accumulate_t<T>>* __restrict__ normalizers,
                         LossSum* __restrict__ sums, T* __restrict__ loss_of_all,
                         accumulate_t<T>* __restrict__ total_weight, CrossEntropyParams p) {
  using A = accumulate_t<T>;
  constexpr int kRows = kThreads / kLanes;  // in flight in a block
  const int lane = threadIdx.x % kLanes;
  const int group = threadIdx.x / kLanes;
  LossSum sum = {0, 0};
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < p.rows;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    const bool present = first + group < p.rows;
    const int64_t n = present ? first + group : p.rows - 1;
    const T* row = input + n * p.classes;
    A maximum = -static_cast<A>(__builtin_huge_val());
    for (int64_t c = lane; c < p.classes; c += kLanes) {
      const A x = load(row[c]);
      maximum = x > maximum ? x : maximum;
    }
    maximum = across_lanes<kLanes>(maximum, [](A a, A b) { return a > b ? a : b; });
    A exponentials = A(0);
    for (int64_t c = lane; c < p.classes; c += kLanes) {
      exponentials += exponential(load(row[c]) - maximum);
    }
    const Normalizer<A> normalizer = {maximum, logarithm(sum_lanes<kLanes>(exponentials))};
    A smooth = A(0);
    if (p.label_smoothing != 0) {
      for (int64_t c = lane; c < p.classes; c += kLanes) {
        smooth -= weight_at(weight, c) * log_probability(load(row[c]), normalizer);
      }
      smooth = sum_lanes<kLanes>(smooth);
    }
    if (!present || lane != 0) continue;
    normalizers[n] = normalizer;
    A loss = A(0);
    const int64_t t = target[n];
    if (t != p.ignore_index) {
      const A w = is_class(t, p) ? weight_at(weight, t) : not_a_number<A>();
      const A x = is_class(t, p) ? load(row[t]) : not_a_number<A>();
      loss = row_loss(log_probability(x, normalizer), w, smooth, p);
      sum.loss += loss;
      sum.weight += w;
    }
    if (losses != nullptr) losses[n] = store<T>(loss);
  }
  sum = sum_of_block(sum);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    store_total(sum, loss_of_all, total_weight, p.reduction);
  } else {
    sums[blockIdx.x] = sum;
  }
}

// One block adds the sums of all blocks, always in the same order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const LossSum* __restrict__ sums, int count, T* loss,
                  accumulate_t<T>* total_weight, int64_t reduction) {
  LossSum sum = {0, 0};
  for (int i = threadIdx.x; i < count; i += kThreads) {
    sum.loss += sums[i].loss;
    sum.weight += sums[i].weight;
  }
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) store_total(sum, loss, total_weight, reduction);
}

template <typename T, int kLanes>
__global__ void cross_entropy_backward_kernel(
    const T* __restrict__ grad_loss, const T* __restrict__ input,
    const int64_t* __restrict__ target, const T* __restrict__ weight,
    const Normalizer<accumulate_t<T>>* __restrict__ normalizers,
    const accumulate_t<T>* __restrict__ total_weight, T* __restrict__ grad, CrossEntropyParams p) {
  using A = accumulate_t<T>;
  constexpr int kRows = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  A weight_sum = static_cast<A>(p.classes);
  if (weight != nullptr && p.label_smoothing != 0) {
    weight_sum = A(0);
    for (int64_t c = lane; c < p.classes; c += kLanes) weight_sum += load(weight[c]);
    weight_sum = sum_lanes<kLanes>(weight_sum);
  }
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kLanes; n < p.rows;
       n += static_cast<int64_t>(gridDim.x) * kRows) {
    const int64_t t = target[n];
    const bool ignored = t == p.ignore_index;
    const A w = ignored ? A(0) : is_class(t, p) ? weight_at(weight, t) : not_a_number<A>();
    const A scale = row_scale(load(grad_loss[p.reduction == kNone ? n : 0]), *total_weight, p);
    const RowGradient<A> factors = row_gradient(scale, w, weight_sum, p);
    const Normalizer<A> normalizer = normalizers[n];
    for (int64_t c = lane; c < p.classes; c += kLanes) {
      const int64_t i = n * p.classes + c;
      const A probability = exponential(log_probability(load(input[i]), normalizer));
      A value = probability * factors.of_probability - weight_at(weight, c) * factors.of_weight;
      if (c == t) value -= factors.of_target;
      grad[i] = store<T>(ignored ? A(0) : value);
    }
  }
}

int lanes_for(const CrossEntropyParams& p) {
  return p.classes <= kFewLanes * 4 ? kFewLanes : kWarpSize;
}

// It depends on the shape alone, and with it the order of the sums.
dim3 grid_of(const CrossEntropyParams& p) { return grid_for(p.rows * lanes_for(p)); }

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cuda(const Tensor& input, const Tensor& target,
                                                      const std::optional<Tensor>& weight,
                                                      int64_t ignore_index, int64_t reduction,
                                                      double label_smoothing) {
  const DeviceGuard guard(input.get_device_index());
  return cross_entropy_host(
      input, target, weight, ignore_index, reduction, label_smoothing,
      [](const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
         const Tensor& loss, const Tensor& normalizers, const Tensor& total_weight,
         const CrossEntropyParams& params) {
        const bool one_block = params.rows <= kOneBlockRows && params.classes <= kOneBlockClasses;
        const dim3 grid = one_block ? dim3(1) : grid_of(params);
        const Tensor block_sums = empty_in(input, {static_cast<int64_t>(grid.x), 2},
                                           MemoryFormat::Contiguous, ScalarType::Double);
        LossSum* sums = static_cast<LossSum*>(block_sums.mutable_data_ptr());
        const cudaStream_t stream = current_stream(input);
        SKINFAST_CUDA_DISPATCH(dtype_of(input), T, {
          using A = accumulate_t<T>;
          const auto kernel = one_block ? &cross_entropy_kernel<T, 1>
                              : lanes_for(params) == kFewLanes
                                  ? &cross_entropy_kernel<T, kFewLanes>
                                  : &cross_entropy_kernel<T, kWarpSize>;
          const bool none = params.reduction == kNone;
          T* losses = none ? static_cast<T*>(loss.mutable_data_ptr()) : nullptr;
          T* loss_of_all = none ? nullptr : static_cast<T*>(loss.mutable_data_ptr());
          A* weights = static_cast<A*>(total_weight.mutable_data_ptr());
          launch(kernel, grid, kThreads, 0, stream, static_cast<const T*>(input.const_data_ptr()),
                 static_cast<const int64_t*>(target.const_data_ptr()),
                 static_cast<const T*>(weight_data(weight)), losses,
                 static_cast<Normalizer<A>*>(normalizers.mutable_data_ptr()), sums, loss_of_all,
                 weights, params);
          if (grid.x == 1) return;
          launch(&reduce_kernel<T>, 1, kThreads, 0, stream, sums, grid.x, loss_of_all, weights,
                 params.reduction);
        });
      });
}

Tensor cross_entropy_backward_cuda(const Tensor& grad_loss, const Tensor& input,
                                   const Tensor& target, const std::optional<Tensor>& weight,
                                   const Tensor& normalizers, const Tensor& total_weight,
                                   int64_t ignore_index, int64_t reduction,
                                   double label_smoothing) {
  const DeviceGuard guard(input.get_device_index());
  return cross_entropy_backward_host(
      grad_loss, input, target, weight, normalizers, total_weight, ignore_index, reduction,
      label_smoothing,
      [](const Tensor& grad_loss, const Tensor& input, const Tensor& target,
         const std::optional<Tensor>& weight, const Tensor& normalizers, const Tensor& total_weight,
         const Tensor& grad, const CrossEntropyParams& params) {
        SKINFAST_CUDA_DISPATCH(dtype_of(input), T, {
          using A = accumulate_t<T>;
          const auto kernel = lanes_for(params) == kFewLanes
                                  ? &cross_entropy_backward_kernel<T, kFewLanes>
                                  : &cross_entropy_backward_kernel<T, kWarpSize>;
          launch(kernel, grid_of(params), kThreads, 0, current_stream(input),
                 static_cast<const T*>(grad_loss.const_data_ptr()),
                 static_cast<const T*>(input.const_data_ptr()),
                 static_cast<const int64_t*>(target.const_data_ptr()),
                 static_cast<const T*>(weight_data(weight)),
                 static_cast<const Normalizer<A>*>(normalizers.const_data_ptr()),
                 static_cast<const A*>(total_weight.const_data_ptr()),
                 static_cast<T*>(grad.mutable_data_ptr()), params);
        });
      });
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy_cuda));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward_cuda));
}

}  // namespace skinfast
