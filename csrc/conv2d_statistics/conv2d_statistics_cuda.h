// Adds up what the tiles of a tensor-core kernel leave beside its output: two sums a column.
#pragma once

#include "conv2d/conv2d_tensor_core.h"
#include "conv2d_statistics/conv2d_statistics.h"
#include "core/cuda.h"

namespace skinfast {

// Few channels a block, since what takes long is to read the tiles of one.
constexpr int kStatisticsChannels = 8;
constexpr int kStatisticsRows = kThreads / kStatisticsChannels;

// finish(channel, sums) for every channel; sums and products [tiles, columns] are added in a fixed
// order.
template <typename Finish>
__global__ void __launch_bounds__(kThreads)
    combine_statistics_kernel(const float* sums, const float* products, StatisticsPartials partials,
                              int64_t channels, Finish finish) {
  __shared__ ChannelSums shared[kStatisticsRows][kStatisticsChannels];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kStatisticsChannels + threadIdx.x;
  ChannelSums total{0.0, 0.0};
  for (int64_t tile = threadIdx.y; channel < channels && tile < partials.tiles;
       tile += kStatisticsRows) {
    const int64_t i = tile * partials.columns + channel;
    total = add(total, {sums[i], products[i]});
  }
  shared[threadIdx.y][threadIdx.x] = total;
  for (int rows = kStatisticsRows / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (threadIdx.y < static_cast<unsigned>(rows)) {
      ChannelSums& own = shared[threadIdx.y][threadIdx.x];
      own = add(own, shared[threadIdx.y + rows][threadIdx.x]);
    }
  }
  if (threadIdx.y == 0 && channel < channels) finish(channel, shared[0][threadIdx.x]);
}

// Call `compute(sums, products)`, which leaves the partial sums there, then `finish` as above.
template <typename Compute, typename Finish>
void with_statistics(const Tensor& x, const PointwiseProduct& product, const Compute& compute,
                     const Finish& finish) {
  const StatisticsPartials partials = statistics_partials(product);
  const int64_t size = partials.tiles * partials.columns;
  Tensor workspace = torch::stable::new_empty(x, {2, size}, ScalarType::Float);
  float* sums = static_cast<float*>(workspace.mutable_data_ptr());
  compute(sums, sums + size);
  const int64_t blocks = (product.columns + kStatisticsChannels - 1) / kStatisticsChannels;
  launch(&combine_statistics_kernel<Finish>, dim3(static_cast<unsigned>(blocks)),
         dim3(kStatisticsChannels, kStatisticsRows), 0, current_stream(x), sums, sums + size,
         partials, product.columns, finish);
}

}  // namespace skinfast
