// From tensors to the tensor-core kernels: which one is chosen, layouts, padding of channels,
// scratch. Each function returns nothing where the convolution is cuDNN's.
#pragma once

#include <cstdlib>
#include <string>

#include "conv2d/conv2d_choices.h"
#include "conv2d/conv2d_cutlass.h"
#include "conv2d/conv2d_host.h"

namespace skinfast {

inline TensorCoreConv2d tensor_core_conv2d_of(const Tensor& x, const Tensor& weight,
                                              const std::vector<int64_t>& shape,
                                              const Conv2dArguments& arguments) {
  return {x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          weight.size(0),
          weight.size(2),
          weight.size(3),
          shape[2],
          shape[3],
          arguments.stride[0],
          arguments.stride[1],
          arguments.padding[0],
          arguments.padding[1]};
}

// SKINFAST_CONV2D: a kernel's name, for all convolutions that it can compute; "" where it is unset.
// Read at every call, so that a test or a bench can compare kernels within one process.
inline std::string_view wished_kernel() {
  const char* value = std::getenv("SKINFAST_CONV2D");
  return value == nullptr ? "" : value;
}

// The kernel of ours for this operation, or nothing where it is cuDNN's.
inline std::optional<Conv2dKernel> tensor_core_kernel(Conv2dOperation operation, const Tensor& x,
                                                      const TensorCoreConv2d& conv,
                                                      const Conv2dArguments& arguments) {
  const std::string_view wish = wished_kernel();
  if (wish.empty() && kConv2dChoices.empty()) return std::nullopt;
  const bool is_known = std::any_of(kConv2dKernels.begin(), kConv2dKernels.end(),
                                    [&](const auto& each) { return each.name == wish; });
  if (!wish.empty() && !is_known) {
    std::string names;
    for (const auto& each : kConv2dKernels) names.append(" ").append(each.name);
    fail("conv2d: SKINFAST_CONV2D is ", wish, "; it needs to be one of:", names);
  }
  const bool is_plain =
      arguments.groups == 1 && arguments.dilation[0] == 1 && arguments.dilation[1] == 1;
  if (!is_plain) return std::nullopt;
  const CudaDevice& device = cuda_device(x.get_device_index());
  const Conv2dKernel kernel =
      usable_kernel(kConv2dChoices, wish, device.name, device.has_persistent_kernels, operation,
                    dtype_of(x), conv);
  if (kernel == Conv2dKernel::kCudnn) return std::nullopt;
  return kernel;
}

// [A, C, H, W], channels_last, with zeros behind the channels up to a multiple of 8.
inline Tensor with_padded_channels(const Tensor& tensor) {
  const int64_t channels = padded_channels(tensor.size(1));
  if (channels == tensor.size(1)) return dense(tensor, MemoryFormat::ChannelsLast);
  Tensor padded = empty_in(tensor, {tensor.size(0), channels, tensor.size(2), tensor.size(3)},
                           MemoryFormat::ChannelsLast);
  torch::stable::zero_(padded);
  Tensor view = torch::stable::narrow(padded, 1, 0, tensor.size(1));
  torch::stable::copy_(view, tensor);
  return padded;
}

inline std::optional<Tensor> tensor_core_conv2d(const Tensor& x, const Tensor& weight,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& residual,
                                                bool with_relu, const std::vector<int64_t>& shape,
                                                const Conv2dArguments& arguments) {
  const Conv2dOperation operation = residual    ? Conv2dOperation::kForwardAddReLU
                                    : with_relu ? Conv2dOperation::kForwardReLU
                                                : Conv2dOperation::kForward;
  TensorCoreConv2d conv = tensor_core_conv2d_of(x, weight, shape, arguments);
  const auto kernel = tensor_core_kernel(operation, x, conv, arguments);
  if (!kernel) return std::nullopt;
  const MemoryFormat layout = conv2d_layout(x, weight);
  Tensor output = empty_in(x, shape, layout);
  if (!is_channels_last(output)) return std::nullopt;

  const DeviceGuard guard(x.get_device_index());
  const Tensor padded_x = with_padded_channels(x), padded_weight = with_padded_channels(weight);
  std::optional<Tensor> dense_bias, dense_residual;
  if (bias) dense_bias = torch::stable::contiguous(*bias);
  if (residual) dense_residual = dense(*residual, MemoryFormat::ChannelsLast);
  const Conv2dForward tensors{padded_x.const_data_ptr(), padded_weight.const_data_ptr(),
                              data_or_null(dense_bias),  data_or_null(dense_residual),
                              output.mutable_data_ptr(), with_relu};
  if (!is_aligned(tensors.x, tensors.weight, tensors.bias, tensors.residual, tensors.output)) {
    return std::nullopt;
  }
  conv.C = padded_x.size(1);
  cutlass_conv2d(*kernel, dtype_of(x), conv, tensors, current_stream(x));
  return output;
}

inline std::optional<Tensor> tensor_core_input_gradient(const Tensor& grad_output, const Tensor& x,
                                                        const Tensor& weight,
                                                        const Conv2dArguments& arguments) {
  const TensorCoreConv2d conv = tensor_core_conv2d_of(x, weight, shape_of(grad_output), arguments);
  const auto kernel = tensor_core_kernel(Conv2dOperation::kInputGradient, x, conv, arguments);
  if (!kernel) return std::nullopt;
  Tensor grad_x = empty_in(x, shape_of(x), conv2d_layout(x, weight));
  if (!is_channels_last(grad_x)) return std::nullopt;

  const DeviceGuard guard(x.get_device_index());
  const Tensor dense_grad = dense(grad_output, MemoryFormat::ChannelsLast),
               dense_weight = dense(weight, MemoryFormat::ChannelsLast);
  const void *grad = dense_grad.const_data_ptr(), *weights = dense_weight.const_data_ptr();
  if (!is_aligned(grad, weights, grad_x.const_data_ptr())) return std::nullopt;
  cutlass_conv2d_input_gradient(*kernel, dtype_of(x), conv, grad, weights,
                                grad_x.mutable_data_ptr(), current_stream(x));
  return grad_x;
}

}  // namespace skinfast
