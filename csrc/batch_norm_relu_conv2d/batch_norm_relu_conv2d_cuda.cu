#include "batch_norm_relu_conv2d/batch_norm_relu_conv2d.h"

#include "core/cuda.h"

#ifdef SKINFAST_CUTLASS_SM90
#include "batch_norm_relu/batch_norm_cuda_launch.h"
#include "conv2d/conv2d_tensor_core_host.h"
#include "conv2d_statistics/conv2d_statistics_cuda.h"
#endif

namespace skinfast {
namespace {

#ifdef SKINFAST_CUTLASS_SM90
struct SetBackwardChannel {
  BatchNormBackward a;

  __device__ void operator()(int64_t channel, ChannelSums sums) const {
    set_backward_channel<float>(a, channel, sums);
  }
};

// Nothing where the gradient of the convolution's input is not one of the persistent kernels'.
std::optional<FourTensors> tensor_core_backward(const BatchNormReLUConv2dBackward& in) {
  const TensorCoreConv2d conv =
      tensor_core_conv2d_of(in.x, in.weight, shape_of(in.grad_output), in.arguments);
  const auto operation = Conv2dOperation::kInputGradientStatistics;
  if (!tensor_core_kernel(operation, in.x, conv, in.arguments)) return std::nullopt;
  // Of the batch norm's output, behind the ReLU; the mask's bits lie as the values of x do.
  Tensor grad = empty_in(in.x, shape_of(in.x), layout_of(in.x));
  const Tensor x = dense(in.x, layout_of(in.x));
  if (!is_channels_last(grad)) return std::nullopt;

  const DeviceGuard guard(in.x.get_device_index());
  const Tensor grad_output = dense(in.grad_output, MemoryFormat::ChannelsLast),
               weight = dense(in.weight, MemoryFormat::ChannelsLast);
  MaskedInputGradient tensors{.grad_output = grad_output.const_data_ptr(),
                              .weight = weight.const_data_ptr(),
                              .x = x.const_data_ptr(),
                              .mask = nullptr,
                              .grad_x = grad.mutable_data_ptr(),
                              .sums = nullptr,
                              .products = nullptr};
  if (!is_aligned(tensors.grad_output, tensors.weight, tensors.x, tensors.grad_x)) {
    return std::nullopt;
  }
  const BatchNormBackwardInputs norm{"batch_norm_relu_conv2d_backward",
                                     grad,
                                     x,
                                     in.mask,
                                     in.mean,
                                     in.variance,
                                     in.norm_weight,
                                     in.training,
                                     in.eps,
                                     in.want_input,
                                     /*needs_grad_residual=*/false};
  check_backward(norm);
  check_elements(norm.op, x);
  const auto [grad_x, grad_residual, grad_norm_weight, grad_norm_bias] =
      with_backward_call(norm, [&](BatchNormBackward& call, const Tensor& x, const uint8_t* mask) {
        tensors.mask = mask;
        const auto compute = [&](float* sums, float* products) {
          tensors.sums = sums;
          tensors.products = products;
          persistent_conv2d_input_gradient_statistics(conv, tensors, current_stream(x));
        };
        with_statistics(x, input_gradient_product(conv), compute, SetBackwardChannel{call});
        if (call.grad_x == nullptr) return;
        using Gradient = StoredGradient<BFloat16>;
        const Gradient masked{static_cast<const BFloat16*>(call.grad_output), nullptr};
        apply(BackwardPass<BFloat16, Gradient>{call, masked}, x, call.grad_output, call.x,
              call.grad_x);
      });
  const auto [none, grad_weight] = conv2d_gradients(in, /*want_input=*/false);
  return FourTensors{grad_x, grad_weight, grad_norm_weight, grad_norm_bias};
}
#endif

FourTensors batch_norm_relu_conv2d_backward_cuda(
    const Tensor& grad_output, const Tensor& normalized, const Tensor& weight, const Tensor& x,
    const Tensor& mask, const Tensor& mean, const Tensor& variance,
    const OptionalTensor& norm_weight, bool training, double eps,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool want_input, bool want_weight) {
  const BatchNormReLUConv2dBackward in{grad_output,
                                       normalized,
                                       weight,
                                       x,
                                       mask,
                                       mean,
                                       variance,
                                       norm_weight,
                                       training,
                                       eps,
                                       {stride, padding, dilation, groups},
                                       want_input,
                                       want_weight};
  check_backward(in);
#ifdef SKINFAST_CUTLASS_SM90
  if (const auto result = tensor_core_backward(in)) return *result;
#endif
  return composed_backward(in);
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_norm_relu_conv2d", TORCH_BOX(&batch_norm_relu_conv2d));
  m.impl("batch_norm_relu_conv2d_backward", TORCH_BOX(&batch_norm_relu_conv2d_backward_cuda));
}

}  // namespace skinfast
