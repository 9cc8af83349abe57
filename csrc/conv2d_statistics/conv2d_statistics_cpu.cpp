#include "conv2d_statistics/conv2d_statistics.h"

#ifdef SKINFAST_HOST_CODE
namespace skinfast {
namespace {

OutputAndStatistics conv2d_statistics_cpu(const Tensor& x, const Tensor& weight,
                                          const std::vector<int64_t>& stride,
                                          const std::vector<int64_t>& padding,
                                          const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  check_conv2d("conv2d_statistics", x, weight, std::nullopt, arguments);
  return composed_conv2d_statistics(x, weight, arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("conv2d_statistics", TORCH_BOX(&conv2d_statistics_cpu));
}

}  // namespace skinfast
#endif
