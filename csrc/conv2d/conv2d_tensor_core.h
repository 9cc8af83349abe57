// Which convolutions the tensor-core kernels take, and how each maps onto them: plain functions of
// shapes, free of torch, CUDA and CUTLASS, so that they are tested on every machine.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>

#include "core/scalar.h"

namespace skinfast {

// A convolution of one group and dilation 1 on channels_last tensors:
// x [N, H, W, C], weight [K, R, S, C], output [N, P, Q, K].
struct TensorCoreConv2d {
  int64_t N, C, H, W;
  int64_t K, R, S;
  int64_t P, Q;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;

  int64_t input_size() const { return N * H * W * C; }
  int64_t weight_size() const { return K * R * S * C; }
  int64_t output_size() const { return N * P * Q * K; }
  bool is_strided() const { return stride_h != 1 || stride_w != 1; }
  // Whether it is a matrix product of x [N * H * W, C] as it is stored.
  bool is_pointwise() const {
    return R == 1 && S == 1 && !is_strided() && pad_h == 0 && pad_w == 0;
  }
};

enum class Conv2dOperation {
  kForward,
  kForwardReLU,
  kForwardAddReLU,
  kForwardStatistics,  // and the mean and variance of each channel of the output
  kInputGradient,
  kInputGradientStatistics,  // behind the ReLU before the convolution; and the batch norm's sums
  kWeightGradient
};
inline constexpr size_t kConv2dOperations = 7;

// Who computes: PyTorch (cuDNN), or one of the tiles [rows, columns] of the implicit matrix product
// that a block of our kernels works on. The persistent ones are for 1x1 kernels on sm_90a.
enum class Conv2dKernel {
  kCudnn,
  kTile128x128,
  kTile128x64,
  kPersistent128x128,
  kPersistent128x64
};

struct Conv2dKernelFacts {
  Conv2dKernel kernel;
  std::string_view name;  // in the table of choices and in SKINFAST_CONV2D
  int64_t rows, columns;
  bool is_persistent;
};

inline constexpr std::array<Conv2dKernelFacts, 5> kConv2dKernels{{
    {Conv2dKernel::kCudnn, "cudnn", 0, 0, false},
    {Conv2dKernel::kTile128x128, "tile128x128", 128, 128, false},
    {Conv2dKernel::kTile128x64, "tile128x64", 128, 64, false},
    {Conv2dKernel::kPersistent128x128, "persistent128x128", 128, 128, true},
    {Conv2dKernel::kPersistent128x64, "persistent128x64", 128, 64, true},
}};

inline constexpr const Conv2dKernelFacts& facts_of(Conv2dKernel kernel) {
  return kConv2dKernels[static_cast<size_t>(kernel)];
}

// An access of our kernels is 16 bytes of channels.
inline constexpr int64_t kTensorCoreChannels = 8;
// Depth of a tile: how far a block goes along the summed dimension at a time.
inline constexpr int64_t kTensorCoreDepth = 32;

inline int64_t padded_channels(int64_t channels) {
  return (channels + kTensorCoreChannels - 1) / kTensorCoreChannels * kTensorCoreChannels;
}

// Whether our kernels for all architectures can compute it. C counts as padded: the forward pass
// and the gradient of the weights pad it with zeros, as the stem's three channels need.
inline bool tensor_cores_take(Conv2dOperation operation, DType dtype,
                              const TensorCoreConv2d& conv) {
  constexpr int64_t kMost = int64_t{1} << 31;  // CUTLASS indexes with 32 bits, in bytes
  constexpr int64_t kMostTaps = 32;            // one bit each of a mask
  if (dtype != DType::kBFloat16 && dtype != DType::kHalf) return false;
  if (conv.input_size() <= 0 || conv.output_size() <= 0) return false;
  if (conv.K % kTensorCoreChannels != 0 || conv.R > kMostTaps || conv.S > kMostTaps) return false;
  TensorCoreConv2d padded = conv;
  padded.C = padded_channels(conv.C);
  const int64_t element = operation == Conv2dOperation::kWeightGradient ? 4 : 2;
  if (padded.input_size() >= kMost / 2 || padded.output_size() >= kMost / 2 ||
      padded.weight_size() >= kMost / element) {
    return false;
  }
  return operation != Conv2dOperation::kInputGradient || padded.C == conv.C;
}

// Whether the persistent ones can, on a device that has them. TMA moves rows of 16 bytes, so both
// numbers of channels are divisible by 8; C is not padded for it.
inline bool persistent_kernels_take(Conv2dOperation operation, DType dtype,
                                    const TensorCoreConv2d& conv) {
  return tensor_cores_take(operation, dtype, conv) && dtype == DType::kBFloat16 &&
         conv.is_pointwise() && padded_channels(conv.C) == conv.C;
}

// The one that gives statistics: a thread has so few columns that their sums stay in registers.
inline constexpr Conv2dKernel kStatisticsKernel = Conv2dKernel::kPersistent128x64;

inline bool kernel_takes(Conv2dKernel kernel, Conv2dOperation operation, DType dtype,
                         const TensorCoreConv2d& conv) {
  if (kernel == Conv2dKernel::kCudnn) return false;
  const bool gives_statistics = operation == Conv2dOperation::kForwardStatistics ||
                                operation == Conv2dOperation::kInputGradientStatistics;
  if (gives_statistics && kernel != kStatisticsKernel) return false;
  return facts_of(kernel).is_persistent ? persistent_kernels_take(operation, dtype, conv)
                                        : tensor_cores_take(operation, dtype, conv);
}

// What they compute: output [slices, rows, columns] = left [rows, slices * depth] times right
// [slices * depth, columns], each slice of the sum by itself. The output lies row by row; so do
// left and right, but for the transposes of what is stored: right forward, left for the weights'
// gradient.
struct PointwiseProduct {
  int64_t rows, columns, depth, slices = 1;
};
inline PointwiseProduct forward_product(const TensorCoreConv2d& c) {
  return {c.N * c.H * c.W, c.K, c.C};
}
inline PointwiseProduct input_gradient_product(const TensorCoreConv2d& c) {
  return {c.N * c.H * c.W, c.C, c.K};
}
// The slices divide N * H * W.
inline PointwiseProduct weight_gradient_product(const TensorCoreConv2d& c, int64_t slices) {
  return {c.K, c.C, c.N * c.H * c.W / slices, slices};
}

// The sums that kStatisticsKernel leaves: one for each tile of rows and each column, the columns
// filled up to whole tiles.
struct StatisticsPartials {
  int64_t tiles, columns;
};
inline StatisticsPartials statistics_partials(const PointwiseProduct& product) {
  const Conv2dKernelFacts& tile = facts_of(kStatisticsKernel);
  return {(product.rows + tile.rows - 1) / tile.rows,
          (product.columns + tile.columns - 1) / tile.columns * tile.columns};
}

// The weights' gradient is a product with few rows and columns over a long sum, N * P * Q: slices
// of that sum are computed by different blocks and added in order. Enough slices to give two blocks
// to each multiprocessor of an H100, none shorter than eight steps of a tile. A function of the
// shape alone, so that every device adds in the same order.
inline int64_t weight_gradient_slices(Conv2dKernel kernel, const TensorCoreConv2d& conv) {
  constexpr int64_t kBlocks = 2 * 132, kLeastSteps = 8;
  const Conv2dKernelFacts& tile = facts_of(kernel);
  const int64_t columns = conv.R * conv.S * conv.C;
  const int64_t tiles =
      ((conv.K + tile.rows - 1) / tile.rows) * ((columns + tile.columns - 1) / tile.columns);
  const int64_t longest = conv.N * conv.P * conv.Q / (kLeastSteps * kTensorCoreDepth);
  int64_t slices = std::max<int64_t>(1, std::min(kBlocks / tiles, longest));
  // The persistent kernels know only slices of one length.
  while (tile.is_persistent && conv.N * conv.P * conv.Q % slices != 0) --slices;
  return slices;
}

// --- the table of choices
// -------------------------------------------------------------------------

// A measured choice; the batches of [2^batch_class, 2^(batch_class + 1)) images share it.
struct Conv2dChoice {
  std::string_view device;  // as CUDA names it
  DType dtype;
  Conv2dOperation operation;
  int batch_class;
  TensorCoreConv2d conv;  // whose N does not count
  Conv2dKernel kernel;
};

inline int batch_class(int64_t images) {
  int result = 0;
  while (images > 1) {
    images /= 2;
    ++result;
  }
  return result;
}

inline bool is_choice_for(const Conv2dChoice& choice, std::string_view device, DType dtype,
                          Conv2dOperation operation, const TensorCoreConv2d& conv) {
  const TensorCoreConv2d& c = choice.conv;
  return choice.operation == operation && choice.dtype == dtype &&
         choice.batch_class == batch_class(conv.N) && c.C == conv.C && c.H == conv.H &&
         c.W == conv.W && c.K == conv.K && c.R == conv.R && c.S == conv.S && c.P == conv.P &&
         c.Q == conv.Q && c.stride_h == conv.stride_h && c.stride_w == conv.stride_w &&
         c.pad_h == conv.pad_h && c.pad_w == conv.pad_w && choice.device == device;
}

// The table's kernel for a convolution; cuDNN where it has none.
template <typename Table>
Conv2dKernel chosen_kernel(const Table& table, std::string_view device, DType dtype,
                           Conv2dOperation operation, const TensorCoreConv2d& conv) {
  for (const Conv2dChoice& choice : table) {
    if (is_choice_for(choice, device, dtype, operation, conv)) return choice.kernel;
  }
  return Conv2dKernel::kCudnn;
}

// The kernel called `wish` (SKINFAST_CONV2D), or where that is empty the table's, if it computes
// the convolution on this device; else cuDNN.
template <typename Table>
Conv2dKernel usable_kernel(const Table& table, std::string_view wish, std::string_view device,
                           bool has_persistent_kernels, Conv2dOperation operation, DType dtype,
                           const TensorCoreConv2d& conv) {
  Conv2dKernel kernel = Conv2dKernel::kCudnn;
  if (wish.empty()) {
    kernel = chosen_kernel(table, device, dtype, operation, conv);
  } else {
    for (const Conv2dKernelFacts& each : kConv2dKernels) {
      if (each.name == wish) kernel = each.kernel;
    }
  }
  const bool is_built = has_persistent_kernels || !facts_of(kernel).is_persistent;
  return is_built && kernel_takes(kernel, operation, dtype, conv) ? kernel : Conv2dKernel::kCudnn;
}

}  // namespace skinfast
