#include "max_pool2d/max_pool2d_cuda.h"
#include "max_pool2d/max_pool2d_cuda_columns.h"

namespace skinfast {
namespace {

std::tuple<Tensor, Tensor> max_pool2d_cuda(const Tensor& x, const IntPair& kernel_size,
                                           const IntPair& stride, const IntPair& padding,
                                           const IntPair& dilation, bool ceil_mode) {
  return max_pool2d_host(
      x, kernel_size, stride, padding, dilation, ceil_mode,
      [](const Tensor& x, const Tensor& output, const Tensor& argmax,
         const MaxPool2dParams& params) {
        const DeviceGuard guard(x.get_device_index());
        SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
          const T* in = static_cast<const T*>(x.const_data_ptr());
          T* out = static_cast<T*>(output.mutable_data_ptr());
          uint8_t* positions = static_cast<uint8_t*>(argmax.mutable_data_ptr());
          const bool aligned = is_aligned(in, out, positions);
          const auto by_columns = [&](auto window, int runs, int64_t count) {
            launch(&max_pool2d_columns_kernel<T, decltype(window)>, grid_for(count), kThreads, 0,
                   current_stream(x), in, out, positions, params, runs, count);
          };
          if (choose_window<T>(params, false, aligned, by_columns)) return;
          choose_variant<T>(
              params, output.numel(), aligned,
              [&](auto width, auto channels_last, auto index, int64_t count) {
                launch(&max_pool2d_kernel<StoredTaps<T>, decltype(width)::value,
                                          decltype(channels_last)::value, decltype(index)>,
                       grid_for(count), kThreads, 0, current_stream(x), StoredTaps<T>{}, in, out,
                       positions, params, count);
              });
        });
      });
}

Tensor max_pool2d_backward_cuda(const Tensor& grad_output, const Tensor& argmax,
                                const std::vector<int64_t>& input_size, const IntPair& kernel_size,
                                const IntPair& stride, const IntPair& padding,
                                const IntPair& dilation, bool ceil_mode, bool channels_last) {
  return max_pool2d_backward_host(
      grad_output, argmax, input_size, kernel_size, stride, padding, dilation, ceil_mode,
      channels_last,
      [](const Tensor& grad_output, const Tensor& argmax, const Tensor& grad,
         const MaxPool2dParams& params) {
        const DeviceGuard guard(grad.get_device_index());
        SKINFAST_CUDA_DISPATCH(dtype_of(grad), T, {
          const T* g = static_cast<const T*>(grad_output.const_data_ptr());
          const uint8_t* positions = static_cast<const uint8_t*>(argmax.const_data_ptr());
          T* out = static_cast<T*>(grad.mutable_data_ptr());
          const bool aligned = is_aligned(g, positions, out);
          const auto by_columns = [&](auto window, int runs, int64_t count) {
            launch(&max_pool2d_columns_backward_kernel<T, decltype(window)>, grid_for(count),
                   kThreads, 0, current_stream(grad), g, positions, out, params, runs, count);
          };
          if (choose_window<T>(params, true, aligned, by_columns)) return;
          choose_variant<T>(
              params, grad.numel(), aligned,
              [&](auto width, auto channels_last, auto index, int64_t count) {
                launch(&max_pool2d_backward_kernel<T, decltype(width)::value,
                                                   decltype(channels_last)::value, decltype(index)>,
                       grid_for(count), kThreads, 0, current_stream(grad), g, positions, out,
                       params, count);
              });
        });
      });
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d_cuda));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward_cuda));
}

}  // namespace skinfast
