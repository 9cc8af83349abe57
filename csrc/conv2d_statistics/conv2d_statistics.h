// output = conv2d(x, weight), and of each channel of it the mean and the biased variance: what the
// batch normalisation behind a convolution needs before it can begin.
//
// Composed of conv2d and ATen's var_mean, except where tensor cores do it in one pass (CUDA, as the
// table of choices says): there the statistics are of the sums before they are rounded.
#pragma once

#include "conv2d/conv2d.h"

namespace skinfast {

// Sums over a channel, of values and of products (here, squares); in double, for a difference of
// two numbers that may be close.
struct ChannelSums {
  double sum, products;
};
SKINFAST_HOST_DEVICE ChannelSums add(ChannelSums a, ChannelSums b) {
  return {a.sum + b.sum, a.products + b.products};
}
struct ChannelStatistics {
  float mean, variance;
};
SKINFAST_HOST_DEVICE ChannelStatistics channel_statistics(ChannelSums sums, double count) {
  const double mean = sums.sum / count, variance = sums.products / count - mean * mean;
  // Rounding must not make it negative; a NaN is to be seen.
  return {static_cast<float>(mean), static_cast<float>(variance < 0.0 ? 0.0 : variance)};
}

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
namespace skinfast {

// output [N, K, P, Q]; statistics [2, K] in the dtype that sums over output are computed in.
using OutputAndStatistics = std::tuple<Tensor, Tensor>;

inline OutputAndStatistics composed_conv2d_statistics(const Tensor& x, const Tensor& weight,
                                                      const Conv2dArguments& arguments) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::optional<Tensor> no_bias;
  std::array<StableIValue, 7> stack{from(x),
                                    from(weight),
                                    from(no_bias),
                                    from(arguments.stride),
                                    from(arguments.padding),
                                    from(arguments.dilation),
                                    from(arguments.groups)};
  const Tensor output = call_aten(SKINFAST_OP("conv2d"), "", stack.data());
  const std::optional<std::vector<int64_t>> pixels{{0, 2, 3}};
  const Tensor wide = torch::stable::to(output, accumulate_dtype(output));
  // The correction is a Scalar, which the stable ABI cannot pass: `unbiased` is its older name.
  std::array<StableIValue, 4> moments{from(wide), from(pixels), from(false), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::var_mean", "dim", moments.data(), TORCH_ABI_VERSION));
  const Tensor variance = to<Tensor>(moments[0]), mean = to<Tensor>(moments[1]);
  Tensor statistics = torch::stable::new_empty(wide, {2, output.size(1)});
  Tensor first = torch::stable::select(statistics, 0, 0),
         second = torch::stable::select(statistics, 0, 1);
  torch::stable::copy_(first, mean);
  torch::stable::copy_(second, variance);
  return {output, statistics};
}

}  // namespace skinfast
#endif
