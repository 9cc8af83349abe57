// The CUDA passes of batch_norm_relu and batch_norm_add_relu that write: 8 elements a thread, so
// one byte of the mask.
#pragma once

#include "batch_norm_relu/batch_norm_cuda_gradient.h"
#include "batch_norm_relu/batch_norm_relu.h"
#include "core/cuda.h"

namespace skinfast {

template <typename T_>
struct ForwardPass {
  using T = T_;
  using A = accumulate_t<T>;
  struct Coefficients {
    A mean, scale, shift;
  };
  // Rows that a thread reads before it writes one. Eight floats are two reads already.
  static constexpr int kInFlight = sizeof(T) == 2 ? 2 : 1;

  BatchNormForward a;

  __device__ Coefficients coefficients(int64_t channel) const {
    const A* values = static_cast<const A*>(a.coefficients) + channel;
    return {static_cast<const A*>(a.mean)[channel], values[0], values[a.shape.channels]};
  }

  // What is read of the elements 8 * vector and on.
  struct Elements {
    Eight<T> x, residual;
  };

  template <bool kVector>
  __device__ __forceinline__ Elements read(int64_t vector, int count) const {
    const int64_t first = vector * kEight;
    Elements elements{load_eight<kVector>(static_cast<const T*>(a.x) + first, count), {}};
    if (a.residual != nullptr) {
      elements.residual = load_eight<kVector>(static_cast<const T*>(a.residual) + first, count);
    }
    return elements;
  }

  // of(k) are the coefficients of the k-th.
  template <bool kVector, typename Of>
  __device__ __forceinline__ void write(int64_t vector, int count, const Elements& elements,
                                        const Of& of) const {
    const auto& [x, residual] = elements;
    const int64_t first = vector * kEight;
    Eight<T> output;
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      const Coefficients c = of(k);
      A value = normalized(load(x.values[k]), c.mean, c.scale, c.shift);
      if (a.residual != nullptr) value += load(residual.values[k]);
      if (a.mask != nullptr) value = relu(value);
      output.values[k] = store<T>(value);
      const bool passes = k < count && relu_passes(load(output.values[k]));
      bits |= static_cast<uint32_t>(passes) << k;
    }
    store_eight<kVector>(static_cast<T*>(a.output) + first, output, count);
    if (a.mask != nullptr) a.mask[vector] = static_cast<uint8_t>(bits);
  }
};

template <typename T_, typename Gradient>
struct BackwardPass {
  using T = T_;
  using A = accumulate_t<T>;
  struct Coefficients {
    A mean, scale, slope, offset;
  };
  static constexpr int kInFlight = sizeof(T) == 2 ? Gradient::kInFlight : 1;

  BatchNormBackward a;
  Gradient gradient;

  __device__ Coefficients coefficients(int64_t channel) const {
    const A* values = static_cast<const A*>(a.coefficients) + channel;
    return {static_cast<const A*>(a.mean)[channel], values[0], values[a.shape.channels],
            values[2 * a.shape.channels]};
  }

  struct Elements {
    Eight<T> grad, x;
  };

  template <bool kVector>
  __device__ __forceinline__ Elements read(int64_t vector, int count) const {
    const int64_t first = vector * kEight;
    return {gradient.template eight<kVector>(first, count),
            load_eight<kVector>(static_cast<const T*>(a.x) + first, count)};
  }

  template <bool kVector, typename Of>
  __device__ __forceinline__ void write(int64_t vector, int count, const Elements& elements,
                                        const Of& of) const {
    const auto& [grad, x] = elements;
    const int64_t first = vector * kEight;
    Eight<T> grad_x;
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      const Coefficients c = of(k);
      const A value = load(grad.values[k]);
      grad_x.values[k] = store<T>(a.training ? training_gradient(value, load(x.values[k]), c.mean,
                                                                 c.scale, c.slope, c.offset)
                                             : value * c.scale);
    }
    store_eight<kVector>(static_cast<T*>(a.grad_x) + first, grad_x, count);
    if (a.grad_residual != nullptr) {
      store_eight<kVector>(static_cast<T*>(a.grad_residual) + first, grad, count);
    }
  }
};

// With the registers that these kernels take, a multiprocessor holds three or two blocks: a grid
// that fills a GPU of 132 twice or three times, without a tail.
constexpr int64_t kApplyBlocks = 132 * 6;

// group is 1: a thread keeps the coefficients of its 8 channels in registers through its rows.
template <typename Pass>
__global__ void apply_rows_kernel(Pass pass, int64_t rows_per_block) {
  const BatchNormShape& shape = pass.a.shape;
  const int64_t vectors = shape.columns / kEight;  // in a row
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (vector >= vectors) return;
  const int64_t begin = blockIdx.y * rows_per_block;
  const int64_t end = begin + rows_per_block < shape.rows ? begin + rows_per_block : shape.rows;
  typename Pass::Coefficients own[kEight];
#pragma unroll
  for (int k = 0; k < kEight; ++k) own[k] = pass.coefficients(vector * kEight + k);
  const int64_t step = static_cast<int64_t>(blockDim.y) * Pass::kInFlight;
  for (int64_t row = begin + threadIdx.y; row < end; row += step) {
    typename Pass::Elements elements[Pass::kInFlight];
#pragma unroll
    for (int i = 0; i < Pass::kInFlight; ++i) {
      const int64_t own_row = row + i * blockDim.y;
      if (own_row < end) elements[i] = pass.template read<true>(own_row * vectors + vector, kEight);
    }
#pragma unroll
    for (int i = 0; i < Pass::kInFlight; ++i) {
      const int64_t own_row = row + i * blockDim.y;
      if (own_row >= end) break;
      pass.template write<true>(own_row * vectors + vector, kEight, elements[i],
                                [&](int k) { return own[k]; });
    }
  }
}

// kVector: group is a multiple of 8, so that the 8 elements are of one channel. Otherwise anything.
template <typename Pass, bool kVector>
__global__ void apply_kernel(Pass pass, int64_t elements) {
  const BatchNormShape& shape = pass.a.shape;
  const uint32_t columns = static_cast<uint32_t>(shape.columns);
  const uint32_t group = static_cast<uint32_t>(shape.group);
  const int64_t vectors = (elements + kEight - 1) / kEight;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t vector = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       vector < vectors; vector += stride) {
    const uint32_t column = static_cast<uint32_t>(vector * kEight) % columns;
    const int64_t left = elements - vector * kEight;
    if (kVector) {
      const typename Pass::Coefficients shared = pass.coefficients(column / group);
      pass.template write<true>(vector, kEight, pass.template read<true>(vector, kEight),
                                [&](int) { return shared; });
    } else {
      const int count = left < kEight ? static_cast<int>(left) : kEight;
      pass.template write<false>(
          vector, count, pass.template read<false>(vector, count),
          [&](uint32_t k) { return pass.coefficients((column + k) % columns / group); });
    }
  }
}

// In evaluation the running statistics stand in for those of the batch.
template <typename A>
__global__ void evaluation_kernel(BatchNormForward a) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= a.shape.channels) return;
  set_forward_channel<A>(a, channel, static_cast<const A*>(a.running_mean)[channel],
                         static_cast<const A*>(a.running_var)[channel]);
}

// One running statistic [C], whose elements are `stride` apart, and the batch's.
template <typename T>
struct RunningStatistic {
  T* running;
  int64_t stride;
  const accumulate_t<T>* batch;
  accumulate_t<T> factor;

  __device__ void update(int64_t channel, accumulate_t<T> momentum) const {
    T& own = running[channel * stride];
    own = updated_statistic(own, batch[channel] * factor, momentum);
  }
};

template <typename T>
__global__ void update_kernel(RunningStatistic<T> mean, RunningStatistic<T> variance,
                              accumulate_t<T> momentum, int64_t channels) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  mean.update(channel, momentum);
  variance.update(channel, momentum);
}

}  // namespace skinfast
