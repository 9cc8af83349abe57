// The gradient of the weights on tensor cores: slices of the sum, and the kernel that adds them.
#pragma once

#include "conv2d/conv2d_tensor_core_host.h"

namespace skinfast {

// result[i] = the slices' partial sums, added in order; `size` is divisible by 8.
template <typename T>
__global__ void sum_slices_kernel(const float* partial, int64_t slices, int64_t size, T* result) {
  constexpr int kWidth = 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size / kWidth;
       i += stride) {
    Vector<float, kWidth> sum{};
    for (int64_t slice = 0; slice < slices; ++slice) {
      const auto part = reinterpret_cast<const Vector<float, kWidth>*>(partial + slice * size)[i];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum.values[k] += part.values[k];
    }
    Vector<T, kWidth> rounded;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) rounded.values[k] = store<T>(sum.values[k]);
    reinterpret_cast<Vector<T, kWidth>*>(result)[i] = rounded;
  }
}

inline std::optional<Tensor> tensor_core_weight_gradient(const Tensor& grad_output, const Tensor& x,
                                                         const Tensor& weight,
                                                         const Conv2dArguments& arguments) {
  TensorCoreConv2d conv = tensor_core_conv2d_of(x, weight, shape_of(grad_output), arguments);
  const auto kernel = tensor_core_kernel(Conv2dOperation::kWeightGradient, x, conv, arguments);
  // ATen computes in the layout of x and weight; ours is channels_last alone.
  if (!kernel || !is_channels_last(dense(x, conv2d_layout(x, weight)))) return std::nullopt;

  const DeviceGuard guard(x.get_device_index());
  const Tensor padded_x = with_padded_channels(x),
               dense_grad = dense(grad_output, MemoryFormat::ChannelsLast);
  if (!is_aligned(padded_x.const_data_ptr(), dense_grad.const_data_ptr())) return std::nullopt;
  conv.C = padded_x.size(1);
  const int64_t slices = weight_gradient_slices(*kernel, conv), size = conv.weight_size();
  Tensor partial = torch::stable::new_empty(x, {slices, size}, ScalarType::Float);
  Tensor sum = empty_in(x, {conv.K, conv.C, conv.R, conv.S}, MemoryFormat::ChannelsLast);
  float* sums = static_cast<float*>(partial.mutable_data_ptr());
  cutlass_conv2d_weight_gradient(*kernel, dtype_of(x), conv, dense_grad.const_data_ptr(),
                                 padded_x.const_data_ptr(), sums, slices, current_stream(x));
  SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
    launch(&sum_slices_kernel<T>, grid_for(size / 4), kThreads, 0, current_stream(x), sums, slices,
           size, static_cast<T*>(sum.mutable_data_ptr()));
  });
  return dense(torch::stable::narrow(sum, 1, 0, weight.size(1)), layout_of(weight));
}

}  // namespace skinfast
