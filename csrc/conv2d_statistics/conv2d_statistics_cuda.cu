#include "conv2d_statistics/conv2d_statistics_cuda.h"

#ifdef SKINFAST_CUTLASS_SM90
#include "conv2d/conv2d_tensor_core_host.h"
#endif

namespace skinfast {
namespace {

#ifdef SKINFAST_CUTLASS_SM90
struct WriteStatistics {
  double count;
  float *mean, *variance;

  __device__ void operator()(int64_t channel, ChannelSums sums) const {
    const ChannelStatistics result = channel_statistics(sums, count);
    mean[channel] = result.mean;
    variance[channel] = result.variance;
  }
};

// Nothing where the convolution is not one of the persistent kernels'.
std::optional<OutputAndStatistics> tensor_core_conv2d_statistics(const Tensor& x,
                                                                 const Tensor& weight,
                                                                 const std::vector<int64_t>& shape,
                                                                 const Conv2dArguments& arguments) {
  const TensorCoreConv2d conv = tensor_core_conv2d_of(x, weight, shape, arguments);
  if (!tensor_core_kernel(Conv2dOperation::kForwardStatistics, x, conv, arguments)) {
    return std::nullopt;
  }
  Tensor output = empty_in(x, shape, conv2d_layout(x, weight));
  if (!is_channels_last(output)) return std::nullopt;

  const DeviceGuard guard(x.get_device_index());
  const Tensor dense_x = dense(x, MemoryFormat::ChannelsLast),
               dense_weight = dense(weight, MemoryFormat::ChannelsLast);
  const void *input = dense_x.const_data_ptr(), *weights = dense_weight.const_data_ptr();
  if (!is_aligned(input, weights, output.const_data_ptr())) return std::nullopt;
  Tensor statistics = torch::stable::new_empty(x, {2, conv.K}, ScalarType::Float);
  float* mean = static_cast<float*>(statistics.mutable_data_ptr());
  const auto compute = [&](float* sums, float* squares) {
    persistent_conv2d_statistics(conv, input, weights, output.mutable_data_ptr(), sums, squares,
                                 current_stream(x));
  };
  with_statistics(
      x, forward_product(conv), compute,
      WriteStatistics{static_cast<double>(conv.N * conv.P * conv.Q), mean, mean + conv.K});
  return OutputAndStatistics{output, statistics};
}
#endif

OutputAndStatistics conv2d_statistics_cuda(const Tensor& x, const Tensor& weight,
                                           const std::vector<int64_t>& stride,
                                           const std::vector<int64_t>& padding,
                                           const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  [[maybe_unused]] const auto shape =
      check_conv2d("conv2d_statistics", x, weight, std::nullopt, arguments);
#ifdef SKINFAST_CUTLASS_SM90
  if (const auto result = tensor_core_conv2d_statistics(x, weight, shape, arguments)) {
    return *result;
  }
#endif
  return composed_conv2d_statistics(x, weight, arguments);
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) { m.impl("conv2d_statistics", TORCH_BOX(&conv2d_statistics_cuda)); }

}  // namespace skinfast
