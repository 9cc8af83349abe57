#include "conv2d_statistics/conv2d_statistics.h"

#include "core/cuda.h"

#ifdef SKINFAST_CUTLASS_SM90
#include "conv2d/conv2d_tensor_core_host.h"
#endif

namespace skinfast {
namespace {

#ifdef SKINFAST_CUTLASS_SM90
// Few channels a block, since what takes long is to read the tiles of one.
constexpr int kStatisticsChannels = 8;
constexpr int kStatisticsRows = kThreads / kStatisticsChannels;

// statistics [2, channels] of sums and squares [tiles, columns], added in a fixed order.
__global__ void __launch_bounds__(kThreads)
    combine_statistics_kernel(const float* sums, const float* squares, int64_t tiles,
                              int64_t columns, int64_t channels, double count, float* statistics) {
  __shared__ ChannelSums shared[kStatisticsRows][kStatisticsChannels];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kStatisticsChannels + threadIdx.x;
  ChannelSums total{0.0, 0.0};
  for (int64_t tile = threadIdx.y; channel < channels && tile < tiles; tile += kStatisticsRows) {
    const int64_t i = tile * columns + channel;
    total = add(total, {sums[i], squares[i]});
  }
  shared[threadIdx.y][threadIdx.x] = total;
  for (int rows = kStatisticsRows / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (threadIdx.y < static_cast<unsigned>(rows)) {
      ChannelSums& own = shared[threadIdx.y][threadIdx.x];
      own = add(own, shared[threadIdx.y + rows][threadIdx.x]);
    }
  }
  if (threadIdx.y != 0 || channel >= channels) return;
  const ChannelStatistics result = channel_statistics(shared[0][threadIdx.x], count);
  statistics[channel] = result.mean;
  statistics[channels + channel] = result.variance;
}

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
  const StatisticsPartials partials = statistics_partials(conv);
  const int64_t size = partials.tiles * partials.columns;
  Tensor workspace = torch::stable::new_empty(x, {2, size}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(x, {2, conv.K}, ScalarType::Float);
  float* sums = static_cast<float*>(workspace.mutable_data_ptr());
  const cudaStream_t stream = current_stream(x);
  persistent_conv2d_statistics(conv, input, weights, output.mutable_data_ptr(), sums, sums + size,
                               stream);
  const int64_t blocks = (conv.K + kStatisticsChannels - 1) / kStatisticsChannels;
  launch(&combine_statistics_kernel, dim3(static_cast<unsigned>(blocks)),
         dim3(kStatisticsChannels, kStatisticsRows), 0, stream, sums, sums + size, partials.tiles,
         partials.columns, conv.K, static_cast<double>(conv.N * conv.P * conv.Q),
         static_cast<float*>(statistics.mutable_data_ptr()));
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
