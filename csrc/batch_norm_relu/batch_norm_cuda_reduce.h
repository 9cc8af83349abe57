// The CUDA reductions of batch_norm_relu and batch_norm_add_relu, in two stages: blocks leave
// partial results [parts, C], and combine_kernel merges those of a channel in a fixed order.
#pragma once

#include "batch_norm_relu/batch_norm_cuda_gradient.h"
#include "batch_norm_relu/batch_norm_relu.h"
#include "core/cuda.h"

namespace skinfast {

// A reduction says how many of its blocks a multiprocessor is to hold at once (kResidents), which
// bounds a thread's registers, and how many reads a thread begins before it adds (kInFlight).

// Threads of a block as [y, x]: x runs along columns or channels, y along what is reduced.
__device__ __forceinline__ int thread_in_block() { return threadIdx.y * blockDim.x + threadIdx.x; }

// Merge the values of the threads of equal threadIdx.x into those of threadIdx.y 0; each thread
// owns kWidth of `shared`. blockDim.y is a power of two.
template <int kWidth, typename Value>
__device__ __forceinline__ void merge_block(Value* shared) {
  Value* own = shared + thread_in_block() * kWidth;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.y) < half) {
      const Value* other = own + half * blockDim.x * kWidth;
      for (int k = 0; k < kWidth; ++k) own[k] = merge(own[k], other[k]);
    }
  }
}

// --- what the reductions accumulate ------------------------------------------------------------

template <typename A>
__device__ __forceinline__ Moments<A> merge(Moments<A> a, Moments<A> b) {
  return merge_moments(a, b);
}

template <typename T>
struct ForwardReduction {
  using A = accumulate_t<T>;
  using Partial = Moments<A>;
  using Total = Moments<double>;
  static constexpr int kResidents = 4, kInFlight = 2;
  template <int kWidth>
  struct Elements {
    Vector<T, kWidth> x;
  };
  struct State {
    A count, pivot, sum, squares;
  };

  BatchNormForward a;

  __device__ State start(int64_t) const { return {0, 0, 0, 0}; }

  template <int kWidth>
  __device__ Elements<kWidth> read(int64_t index) const {
    return {*reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(a.x) + index)};
  }

  template <int kWidth>
  __device__ void add(State& state, const Elements<kWidth>& elements, int k) const {
    const A x = load(elements.x.values[k]);
    if (state.count == A(0)) state.pivot = x;
    const A deviation = x - state.pivot;
    state.count += A(1);
    state.sum += deviation;
    state.squares += deviation * deviation;
  }

  __device__ static Partial finish(const State& state) {
    if (state.count == A(0)) return {0, 0, 0, 0};
    return shifted_moments(state.count, state.pivot, state.sum, state.squares);
  }

  __device__ static Total widen(const Partial& p) { return {p.count, p.pivot, p.offset, p.m2}; }

  __device__ void set_channel(int64_t channel, const Total& total) const {
    set_forward_channel<A>(a, channel, total.pivot + total.offset, total.m2 / total.count);
  }
};

template <typename A>
struct GradientSums {
  A sum, dot;
};

template <typename A>
__device__ __forceinline__ GradientSums<A> merge(GradientSums<A> a, GradientSums<A> b) {
  return {a.sum + b.sum, a.dot + b.dot};
}

template <typename T, typename Gradient>
struct BackwardReduction {
  using A = accumulate_t<T>;
  using Partial = GradientSums<A>;
  using Total = GradientSums<double>;
  static constexpr int kResidents = Gradient::kResidents, kInFlight = Gradient::kInFlight;
  template <int kWidth>
  struct Elements {
    Vector<T, kWidth> grad, x;
  };
  struct State {
    A mean, sum, dot;
  };

  BatchNormBackward a;
  Gradient gradient;

  __device__ State start(int64_t channel) const {
    return {static_cast<const A*>(a.mean)[channel], 0, 0};
  }

  template <int kWidth>
  __device__ Elements<kWidth> read(int64_t index) const {
    return {gradient.template at<kWidth>(index),
            *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(a.x) + index)};
  }

  template <int kWidth>
  __device__ void add(State& state, const Elements<kWidth>& elements, int k) const {
    const A grad = load(elements.grad.values[k]);
    state.sum += grad;
    state.dot += grad * (load(elements.x.values[k]) - state.mean);
  }

  __device__ static Partial finish(const State& state) { return {state.sum, state.dot}; }

  __device__ static Total widen(const Partial& p) { return {p.sum, p.dot}; }

  __device__ void set_channel(int64_t channel, const Total& total) const {
    set_backward_channel<A>(a, channel, total.sum, total.dot);
  }
};

// --- stage one ---------------------------------------------------------------------------------

// group is 1: a thread takes kWidth neighbouring channels and every blockDim.y-th row of its
// block's rows.
template <typename Reduction, int kWidth>
__global__ void __launch_bounds__(kThreads, Reduction::kResidents)
    reduce_rows_kernel(Reduction reduction, int64_t rows_per_block,
                       typename Reduction::Partial* partials) {
  __shared__ typename Reduction::Partial shared[kThreads * kWidth];
  const BatchNormShape& shape = reduction.a.shape;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
  const bool inside = column < shape.columns;
  const int64_t begin = blockIdx.y * rows_per_block;
  const int64_t end = begin + rows_per_block < shape.rows ? begin + rows_per_block : shape.rows;

  const int64_t last = inside ? end : begin;

  typename Reduction::State states[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) states[k] = reduction.start(inside ? column + k : 0);
#pragma unroll Reduction::kInFlight
  for (int64_t row = begin + threadIdx.y; row < last; row += blockDim.y) {
    const auto elements = reduction.template read<kWidth>(row * shape.columns + column);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) reduction.add(states[k], elements, k);
  }

  typename Reduction::Partial* own = shared + thread_in_block() * kWidth;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) own[k] = Reduction::finish(states[k]);
  merge_block<kWidth>(shared);
  if (threadIdx.y != 0 || !inside) return;
  for (int k = 0; k < kWidth; ++k) partials[blockIdx.y * shape.channels + column + k] = own[k];
}

// group is H * W: a block takes one channel (blockIdx.x) and a range of its vectors, counted
// through all images. The host has checked that 32 bits hold every count of elements.
template <typename Reduction, int kWidth>
__global__ void __launch_bounds__(kThreads, Reduction::kResidents)
    reduce_channel_kernel(Reduction reduction, int64_t vectors_per_block,
                          typename Reduction::Partial* partials) {
  __shared__ typename Reduction::Partial shared[kThreads];
  const BatchNormShape& shape = reduction.a.shape;
  const int64_t channel = blockIdx.x;
  const uint32_t group = static_cast<uint32_t>(shape.group / kWidth);
  const uint32_t vectors = static_cast<uint32_t>(shape.rows) * group;
  const uint32_t begin = static_cast<uint32_t>(blockIdx.y * vectors_per_block);
  const uint32_t end = begin + static_cast<uint32_t>(vectors_per_block) < vectors
                           ? begin + static_cast<uint32_t>(vectors_per_block)
                           : vectors;

  typename Reduction::State state = reduction.start(channel);
#pragma unroll Reduction::kInFlight
  for (uint32_t i = begin + threadIdx.y; i < end; i += blockDim.y) {
    const int64_t plane = (i / group) * shape.channels + channel;
    const auto elements =
        reduction.template read<kWidth>(plane * shape.group + (i % group) * kWidth);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) reduction.add(state, elements, k);
  }

  shared[threadIdx.y] = Reduction::finish(state);
  merge_block<1>(shared);
  if (threadIdx.y == 0) partials[blockIdx.y * shape.channels + channel] = shared[0];
}

// --- stage two ---------------------------------------------------------------------------------

// Few channels a block, since what takes long is to merge the parts of one.
constexpr int kCombineChannels = 8;

template <typename Reduction>
__global__ void combine_kernel(Reduction reduction, int64_t parts,
                               const typename Reduction::Partial* partials) {
  __shared__ typename Reduction::Total shared[kThreads];
  const int64_t channels = reduction.a.shape.channels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  typename Reduction::Total total{};
  for (int64_t part = threadIdx.y; channel < channels && part < parts; part += blockDim.y) {
    total = merge(total, Reduction::widen(partials[part * channels + channel]));
  }
  shared[thread_in_block()] = total;
  merge_block<1>(shared);
  if (threadIdx.y == 0 && channel < channels) {
    reduction.set_channel(channel, shared[thread_in_block()]);
  }
}

}  // namespace skinfast
