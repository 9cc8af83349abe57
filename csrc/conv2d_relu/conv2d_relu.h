// output = max_pool(relu(conv2d(x, weight) + bias)), and its gradients; conv2d_relu is the case of
// windows of one pixel.
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
// x [N, C, H, W], weight [K, C, R, S], before pooling [N, K, P, Q].
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

// Windows of height x width pixels side by side; what they don't cover is left out.
struct PoolWindow {
  int64_t height = 1, width = 1;

  int64_t size() const { return height * width; }
};

// --- CPU kernels --------------------------------------------------------------------------------
// All tensors are dense [N, C, H, W]. Neither of the divisions into tasks depends on the number of
// threads, nor does any order of summation.

// Forward, the lanes of a vector are images: none is wasted at any map size, and a weight is
// broadcast. A task turns its images over into a scratch of its thread, and its results back.
constexpr int64_t kImageBlock = 16;
// Bands of rows that a map is cut into, so that a small batch also feeds several threads.
constexpr int64_t kBands = 4;

struct PooledConv2d : SmallConv2d {
  PoolWindow window;

  int64_t rows() const { return P / window.height; }  // of the output
  int64_t columns() const { return Q / window.width; }
  int64_t band_rows() const { return ceil_div(rows(), kBands); }
  int64_t bands() const { return ceil_div(rows(), band_rows()); }
  int64_t forward_tasks() const { return ceil_div(N, kImageBlock) * bands(); }
  int64_t padded_height() const { return H + 2 * pad_h; }
  int64_t padded_width() const { return W + 2 * pad_w; }
  // The rows of x, padding included, that a band sees.
  int64_t input_rows() const { return band_rows() * window.height + R - 1; }
  // At most: two channels of bfloat16 may share an accumulator, here and in the turned images.
  int64_t packed_weights() const { return ceil_div(K, kFilterBlock) * kFilterBlock * C * R * S; }
  // Scratch of a forward task, in accumulators: the turned images, maxima and their positions.
  int64_t forward_input() const { return C * input_rows() * padded_width() * kImageBlock; }
  int64_t forward_output() const {
    return (kFilterBlock * band_rows() * columns() + kImageBlock) * kImageBlock;
  }
  int64_t forward_scratch() const { return forward_input() + 2 * forward_output(); }

  // Backward, only the pixels that a ReLU and its window let through have a gradient: a quarter at
  // most behind windows of 2x2. Each is a scalar; the lanes are (column, channel) of a kernel row.
  int64_t backward_tasks() const { return ceil_div(N, kGradientImages); }
  int64_t patch_row() const { return ceil_div(S * C, kImageBlock) * kImageBlock; }
  int64_t weight_sums() const { return K * R * patch_row(); }  // of one task
  int64_t padded_pixels() const { return padded_height() * padded_width(); }
  int64_t backward_scratch() const {
    const int64_t pixels = padded_pixels() * (C + kSmallChannels) + kImageBlock;
    return pixels + 2 * (K * rows() * columns() + kImageBlock) + K * (rows() + 1);
  }

  static constexpr int64_t kGradientImages = 4;
};

// Forward: weight [K, C, R, S] arranged as [K / 10, C, R, S, 10], of bfloat16 where an instruction
// adds two products as [K / 10, C / 2, R, S, 10, 2]. Backward: as [K, R, S, 16].
SKINFAST_DECLARE_KERNEL(void pack_weight(DType dtype, const PooledConv2d& conv, const void* weight,
                                         void* packed))
SKINFAST_DECLARE_KERNEL(void pack_turned_weight(DType dtype, const PooledConv2d& conv,
                                                const void* weight, void* packed))

// The forward tasks [begin, end). bias [K] or null; output and argmax [N, K, rows, columns], argmax
// null for windows of one pixel.
SKINFAST_DECLARE_KERNEL(void small_conv2d(DType dtype, const PooledConv2d& conv, const void* x,
                                          const void* packed, const void* bias, void* output,
                                          uint8_t* argmax, void* scratch, int64_t begin,
                                          int64_t end))

// What the gradients are computed from, and where to: null where one is not wanted.
struct SmallConv2dGradients {
  const void *grad_output, *output;
  const uint8_t* argmax;
  const void *x, *turned_weight;
  void* grad_x;
  void *weight_sums, *bias_sums;  // [tasks, K, R, patch_row], [tasks, K]
};
// The backward tasks [begin, end).
SKINFAST_DECLARE_KERNEL(void small_conv2d_gradients(DType dtype, const PooledConv2d& conv,
                                                    const SmallConv2dGradients& gradients,
                                                    void* scratch, int64_t begin, int64_t end))
// For the filters [begin, end): grad_weight [K, C, R, S] or null and grad_bias [K] = the sums of
// all tasks, added in order.
SKINFAST_DECLARE_KERNEL(void sum_small_conv2d_gradients(DType dtype, const PooledConv2d& conv,
                                                        const SmallConv2dGradients& gradients,
                                                        void* grad_weight, void* grad_bias,
                                                        int64_t begin, int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "conv2d_relu/conv2d_relu_host.h"
#endif
