#include "batch_norm_relu_max_pool2d/batch_norm_relu_max_pool2d.h"

#include "batch_norm_relu/batch_norm_cuda_launch.h"
#include "max_pool2d/max_pool2d_cuda.h"

namespace skinfast {
namespace {

// What the pool makes of a tap: it normalises, rectifies and rounds as if that were stored. A
// thread reads an element for every window over it, from a cache but for the first time.
template <typename T_>
struct NormReluTaps {
  using T = T_;
  using A = accumulate_t<T>;
  template <int kWidth>
  struct Channels {
    A mean[kWidth], scale[kWidth], shift[kWidth];
  };

  BatchNormForward a;

  template <int kWidth>
  __device__ __forceinline__ Channels<kWidth> channels(int64_t channel) const {
    const A* coefficients = static_cast<const A*>(a.coefficients) + channel;
    Channels<kWidth> own;
    read(static_cast<const A*>(a.mean) + channel, own.mean);
    read(coefficients, own.scale);
    read(coefficients + a.shape.channels, own.shift);
    return own;
  }

  template <int kWidth>
  __device__ __forceinline__ A value(const Channels<kWidth>& own, int v, T tap) const {
    const A x = normalized(load(tap), own.mean[v], own.scale[v], own.shift[v]);
    return load(store<T>(relu(x)));
  }

  __device__ uint8_t position(A maximum, int position) const {
    return position_or_stopped(maximum, position);
  }

 private:
  // Vectors of our own are aligned, and `channel` is a multiple of kWidth, as is their length.
  template <int kWidth>
  __device__ static __forceinline__ void read(const A* from, A (&to)[kWidth]) {
    constexpr int kPart = kWidth < kVectorWidth<A> ? kWidth : kVectorWidth<A>;
#pragma unroll
    for (int i = 0; i < kWidth; i += kPart) {
      const auto part = *reinterpret_cast<const Vector<A, kPart>*>(from + i);
#pragma unroll
      for (int k = 0; k < kPart; ++k) to[i + k] = part.values[k];
    }
  }
};

// The gradient behind the ReLU, gathered from the windows wherever it is asked for, and rounded as
// if it were stored. The windows that the ReLU stops have no position.
template <typename T>
struct PooledGradient {
  // The windows over a pixel are several reads already.
  static constexpr int kResidents = 2, kInFlight = 1;

  const T* grad_output;   // of the windows
  const uint8_t* argmax;  // likewise
  MaxPool2dParams p;

  // kWidth elements from `index`, a multiple of kWidth: channels of one pixel in channels_last. In
  // contiguous they are neighbours in memory, and may be of two rows.
  template <int kWidth>
  __device__ __forceinline__ Vector<T, kWidth> at(int64_t index) const {
    if (p.channels_last) {
      const Place place = place_of<kWidth, true>(static_cast<uint32_t>(index) / kWidth, p.channels,
                                                 p.rows.input, p.columns.input);
      return gathered<T, kWidth, true>(grad_output, argmax, p, place);
    }
    Place place =
        place_of<1, false>(static_cast<uint32_t>(index), p.channels, p.rows.input, p.columns.input);
    Vector<T, kWidth> grad;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      grad.values[k] = gathered<T, 1, false>(grad_output, argmax, p, place).values[0];
      if (++place.column < p.columns.input) continue;
      place.column = 0;
      if (++place.row < p.rows.input) continue;
      place.row = 0;
      ++place.plane;
    }
    return grad;
  }

  template <bool kVector>
  __device__ __forceinline__ Eight<T> eight(int64_t first, int count) const {
    constexpr int kWidth = kVector ? kVectorWidth<T> : 1;
    Eight<T> grad{};
#pragma unroll
    for (int i = 0; i < kEight; i += kWidth) {
      if (!kVector && i >= count) continue;
      const auto part = at<kWidth>(first + i);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) grad.values[i + k] = part.values[k];
    }
    return grad;
  }
};

FourTensors batch_norm_relu_max_pool2d_cuda(const Tensor& x, const OptionalTensor& weight,
                                            const OptionalTensor& bias,
                                            const OptionalTensor& running_mean,
                                            const OptionalTensor& running_var, bool training,
                                            double eps, const IntPair& kernel_size,
                                            const IntPair& stride, const IntPair& padding,
                                            const IntPair& dilation, bool ceil_mode) {
  const char* op = "batch_norm_relu_max_pool2d";
  check_elements(op, x);
  return batch_norm_relu_max_pool2d_host(
      {op, x, std::nullopt, weight, bias, running_mean, running_var, training, eps, true},
      {kernel_size, stride, padding, dilation, ceil_mode},
      [](BatchNormForward& call, const Tensor& x, const MaxPool2dParams& params, uint8_t* argmax) {
        const DeviceGuard guard(x.get_device_index());
        SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
          set_forward_coefficients<T>(call, x);
          const T* in = static_cast<const T*>(call.x);
          T* out = static_cast<T*>(call.output);
          const int64_t windows =
              params.batch * params.channels * params.rows.output * params.columns.output;
          choose_variant<T>(
              params, windows, is_aligned(in, out, argmax),
              [&](auto width, auto channels_last, auto index, int64_t count) {
                launch(&max_pool2d_kernel<NormReluTaps<T>, decltype(width)::value,
                                          decltype(channels_last)::value, decltype(index)>,
                       grid_for(count), kThreads, 0, current_stream(x), NormReluTaps<T>{call}, in,
                       out, argmax, params, count);
              });
        });
      });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_max_pool2d_backward_cuda(
    const Tensor& grad_output, const Tensor& argmax, const Tensor& x, const Tensor& mean,
    const Tensor& variance, const OptionalTensor& weight, bool training, double eps,
    const IntPair& kernel_size, const IntPair& stride, const IntPair& padding,
    const IntPair& dilation, bool ceil_mode, bool needs_grad_x) {
  const char* op = "batch_norm_relu_max_pool2d_backward";
  check_elements(op, x);
  return batch_norm_relu_max_pool2d_backward_host(
      {op, grad_output, x, argmax, mean, variance, weight, training, eps, needs_grad_x, false},
      {kernel_size, stride, padding, dilation, ceil_mode},
      [](BatchNormBackward& call, const Tensor& x, const MaxPool2dParams& params,
         const uint8_t* argmax) {
        const DeviceGuard guard(x.get_device_index());
        SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
          const PooledGradient<T> gradient{static_cast<const T*>(call.grad_output), argmax, params};
          reduce<T>(BackwardReduction<T, PooledGradient<T>>{call, gradient}, x, call.grad_output,
                    argmax, call.x);
          if (call.grad_x == nullptr) return;
          apply(BackwardPass<T, PooledGradient<T>>{call, gradient}, x, call.grad_output, argmax,
                call.x, call.grad_x);
        });
      });
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_norm_relu_max_pool2d", TORCH_BOX(&batch_norm_relu_max_pool2d_cuda));
  m.impl("batch_norm_relu_max_pool2d_backward",
         TORCH_BOX(&batch_norm_relu_max_pool2d_backward_cuda));
}

}  // namespace skinfast
