// output = relu(conv2d(x, weight) + bias), and its gradients.
//
// Two ways: small-channel convolutions (the paper's CNN: 3 or 10 channels to 10, stride 1) run on
// kernels of ours; all others on ATen's convolution with the ReLU in place.
#pragma once

#include "core/isa.h"
#include "core/relu.h"
#include "core/scalar.h"

namespace skinfast {

// Channels up to which our kernels keep all of a pixel's sums in registers.
constexpr int64_t kSmallChannels = 16;
constexpr int64_t kSmallKernel = 7;
// Filters whose sums a kernel holds in registers at once.
constexpr int64_t kFilterBlock = 10;

SKINFAST_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A convolution of stride 1, dilation 1 and one group:
// x [N, C, H, W], weight [K, C, R, S], output [N, K, P, Q].
struct SmallConv2d {
  int64_t N, C, H, W;
  int64_t K, R, S;
  int64_t P, Q;
  int64_t pad_h, pad_w;

  // The gradient of x is itself such a convolution, of the gradient of the output, with the
  // weights turned by 180 degrees and their channels exchanged.
  SmallConv2d of_input_gradient() const {
    return {N, K, P, Q, C, R, S, H, W, R - 1 - pad_h, S - 1 - pad_w};
  }
};

// --- CPU kernels --------------------------------------------------------------------------------
// They work on tensors stored with the batch last, [C, H, W, N]: the lanes of a vector are images,
// so that none is wasted at any map size, weights are broadcast and padding is skipped.

// Images that one forward task covers, and output rows that one weight-gradient task covers. Both
// are fixed, so that no order of summation depends on the number of threads.
constexpr int64_t kImageBlock = 32;
constexpr int64_t kRowChunk = 16;

// One forward task: a row of all filters, for a block of images.
inline int64_t forward_tasks(const SmallConv2d& conv) {
  return conv.P * ceil_div(conv.N, kImageBlock);
}
// One weight-gradient task: a chunk of rows, a block of filters, an input channel. It fills
// R * S * kFilterBlock partial sums.
inline int64_t weight_tasks(const SmallConv2d& conv) {
  return ceil_div(conv.P, kRowChunk) * ceil_div(conv.K, kFilterBlock) * conv.C;
}
inline int64_t packed_size(const SmallConv2d& conv) {
  return ceil_div(conv.K, kFilterBlock) * kFilterBlock * conv.C * conv.R * conv.S;
}

// Arrange weight [K, C, R, S] as [K / 10, C, R, S, 10] in the accumulation type. With `turned`,
// `conv` is the convolution that gives the gradient of the input, and weight is that of the
// forward one.
SKINFAST_DECLARE_KERNEL(void pack_weight(DType dtype, const SmallConv2d& conv, const void* weight,
                                         bool turned, void* packed))
// The forward tasks [begin, end) of conv(x) (+ bias) (through ReLU); bias [K] or null.
SKINFAST_DECLARE_KERNEL(void small_conv2d(DType dtype, const SmallConv2d& conv, const void* x,
                                          const void* packed, const void* bias, bool with_relu,
                                          void* output, int64_t begin, int64_t end))
// For the filters [begin, end): masked = grad_output where output > 0, grad_bias = its sum;
// grad_output, output, masked [K, P * Q * N], grad_bias [K].
SKINFAST_DECLARE_KERNEL(void mask_and_sum(DType dtype, const SmallConv2d& conv,
                                          const void* grad_output, const void* output, void* masked,
                                          void* grad_bias, int64_t begin, int64_t end))
// The weight-gradient tasks [begin, end), from x and the masked gradient.
SKINFAST_DECLARE_KERNEL(void small_conv2d_weight_gradient(DType dtype, const SmallConv2d& conv,
                                                          const void* x, const void* masked,
                                                          void* partial, int64_t begin,
                                                          int64_t end))
// grad_weight [K, C, R, S] = the partial sums of all row chunks, added in order.
SKINFAST_DECLARE_KERNEL(void sum_weight_gradient(DType dtype, const SmallConv2d& conv,
                                                 const void* partial, void* grad_weight))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "conv2d_relu/conv2d_relu_host.h"
#endif
