// output [N, C] = the mean of each map of x [N, C, H, W]: what ends a ResNet's convolutions.
// The gradient of a mean spreads evenly over its pixels.
#pragma once

#include "core/isa.h"
#include "core/scalar.h"

namespace skinfast {

// x is [N, pixels, C] in channels_last, else [N * C, pixels]; maps of one pixel count as the first.
struct GlobalAveragePool2dParams {
  int64_t batch, channels, pixels;
  bool channels_last;
};

// A pixel's part of a sum: the mean itself, and its gradient. `V` is a number or a vector of them.
template <typename V, typename A>
SKINFAST_HOST_DEVICE V share_of(V sum, A pixels) {
  return sum / pixels;
}

// CPU kernels, on the means [begin, end) of all N * C.
SKINFAST_DECLARE_KERNEL(void global_average_pool2d(DType dtype, const void* x, void* output,
                                                   const GlobalAveragePool2dParams& params,
                                                   int64_t begin, int64_t end))
SKINFAST_DECLARE_KERNEL(void global_average_pool2d_backward(DType dtype, const void* grad_output,
                                                            void* grad,
                                                            const GlobalAveragePool2dParams& params,
                                                            int64_t begin, int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "core/tensor.h"

namespace skinfast {

inline GlobalAveragePool2dParams global_average_pool2d_params(const char* op,
                                                              const std::vector<int64_t>& size,
                                                              bool channels_last) {
  SKINFAST_CHECK(size[2] >= 1 && size[3] >= 1, op, ": x has ", size[2], " rows and ", size[3],
                 " columns; it needs at least one pixel");
  const int64_t pixels = size[2] * size[3];
  return {size[0], size[1], pixels, channels_last || pixels == 1};
}

// `launch(x, output, params)` sees dense tensors that are not empty.
template <typename Launch>
Tensor global_average_pool2d_host(const Tensor& x, const Launch& launch) {
  constexpr const char* op = "global_average_pool2d";
  check_floating(op, "x", x);
  check_dim(op, "x", x, 4, "[N, C, H, W]");
  const MemoryFormat layout = layout_of(x);
  const GlobalAveragePool2dParams params =
      global_average_pool2d_params(op, shape_of(x), layout == MemoryFormat::ChannelsLast);
  Tensor output = empty_in(x, {params.batch, params.channels}, MemoryFormat::Contiguous);
  if (output.numel() > 0) launch(dense(x, layout), output, params);
  return output;
}

// `launch(grad_output, grad, params)` as above.
template <typename Launch>
Tensor global_average_pool2d_backward_host(const Tensor& grad_output,
                                           const std::vector<int64_t>& input_size,
                                           bool channels_last, const Launch& launch) {
  constexpr const char* op = "global_average_pool2d_backward";
  check_floating(op, "grad_output", grad_output);
  SKINFAST_CHECK(input_size.size() == 4, op, ": input_size has ", input_size.size(),
                 " values; it needs 4 [N, C, H, W]");
  for (size_t i = 0; i < 2; ++i) {
    SKINFAST_CHECK(input_size[i] >= 0, op, ": input_size has ", input_size[i], " in dimension ", i,
                   "; it needs at least 0");
  }
  const GlobalAveragePool2dParams params =
      global_average_pool2d_params(op, input_size, channels_last);
  check_shape(op, "grad_output", grad_output, {params.batch, params.channels});
  const MemoryFormat layout = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor grad = empty_in(grad_output, input_size, layout);
  if (grad.numel() > 0) launch(dense(grad_output, MemoryFormat::Contiguous), grad, params);
  return grad;
}

}  // namespace skinfast
#endif
