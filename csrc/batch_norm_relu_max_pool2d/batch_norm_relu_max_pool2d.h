// output = max_pool2d(relu(batch_norm(x))): what stands behind the first convolution of a ResNet.
// Its arithmetic is that of batch_norm_relu and max_pool2d, to the bit. What lies between the two,
// as large as x, is stored neither forward nor backward.
//
// Forward: the moments of each channel; one pass that normalises, rectifies and pools. Backward:
// one pass for both sums of each channel, one that writes the gradient; each finds the pixels'
// gradients from those of the windows anew.
#pragma once

#include "batch_norm_relu/batch_norm_relu.h"
#include "max_pool2d/max_pool2d.h"

namespace skinfast {

// The argmax of a window whose maximum the ReLU's gradient does not pass. No position is as large.
constexpr uint8_t kStopped = 255;

template <typename A, typename Index>
SKINFAST_HOST_DEVICE uint8_t position_or_stopped(A maximum, Index position) {
  return relu_passes(maximum) ? static_cast<uint8_t>(position) : kStopped;
}

// --- CPU kernels -------------------------------------------------------------------------------

// What lies between norm and pool exists for a part of the map at a time, which fits in a cache.
constexpr int64_t kPartElements = 1 << 16;

// The parts of the forward pass: bands of a map's output rows, and the elements under the widest.
// A map is an image in channels_last, a plane (n, c) in contiguous.
struct PoolBands {
  int rows;
  int64_t per_map, elements;
};

SKINFAST_HOST_DEVICE PoolBands bands_of(const MaxPool2dParams& p) {
  const int64_t row = p.columns.input * (p.channels_last ? p.channels : 1);
  const int64_t reach = int64_t{p.rows.kernel - 1} * p.rows.dilation + 1;
  const int64_t fit = (kPartElements / row - reach) / p.rows.stride + 1;
  const int64_t rows = fit < 1 ? 1 : fit < p.rows.output ? fit : p.rows.output;
  const int64_t under = (rows - 1) * p.rows.stride + reach;
  return {static_cast<int>(rows), ceil_divide(p.rows.output, rows),
          (under < p.rows.input ? under : p.rows.input) * row};
}

// The parts of the backward pass, of the matrix that BatchNormShape describes: blocks of rows and
// columns. Those of the reduction are so many of its tiles, one below the other.
struct PoolBlocks {
  int64_t rows, columns, row_blocks, column_blocks;
};

SKINFAST_HOST_DEVICE PoolBlocks reduction_blocks(const BatchNormShape& shape) {
  const BatchNormTiling tiling = tiling_of(shape);
  const int64_t columns = shape.columns < kTileColumns ? shape.columns : kTileColumns;
  const int64_t tiles = ceil_divide(kPartElements, kTileRows * columns);
  return {tiles * kTileRows, columns, ceil_divide(tiling.row_tiles, tiles), tiling.column_tiles};
}

SKINFAST_HOST_DEVICE PoolBlocks gradient_blocks(const BatchNormShape& shape) {
  const bool by_pixels = shape.group == 1;
  const int64_t rows = by_pixels ? ceil_divide(kPartElements, shape.columns) : 1;
  const int64_t columns =
      by_pixels || shape.columns < kPartElements ? shape.columns : kPartElements;
  return {rows, columns, ceil_divide(shape.rows, rows), ceil_divide(shape.columns, columns)};
}

// `scratch` holds a part of T forward, of A backward. Ranges are of bands or blocks. a.mask is
// null; a.output and a.grad_output are those of the windows.
SKINFAST_DECLARE_KERNEL(void batch_norm_relu_max_pool2d(DType dtype, const BatchNormForward& a,
                                                        const MaxPool2dParams& p, uint8_t* argmax,
                                                        void* scratch, int64_t begin, int64_t end))
SKINFAST_DECLARE_KERNEL(void batch_norm_relu_max_pool2d_reduce_backward(
    DType dtype, const BatchNormBackward& a, const MaxPool2dParams& p, const uint8_t* argmax,
    void* scratch, int64_t begin, int64_t end))
SKINFAST_DECLARE_KERNEL(void batch_norm_relu_max_pool2d_apply_backward(
    DType dtype, const BatchNormBackward& a, const MaxPool2dParams& p, const uint8_t* argmax,
    void* scratch, int64_t begin, int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "batch_norm_relu/batch_norm_host.h"

namespace skinfast {

struct PoolArguments {
  const IntPair& kernel_size;
  const IntPair& stride;
  const IntPair& padding;
  const IntPair& dilation;
  bool ceil_mode;
};

inline MaxPool2dParams pool_params(const char* op, const Tensor& x, const PoolArguments& pool) {
  check_dim(op, "x", x, 4, "[N, C, H, W]");
  return max_pool2d_params(op, shape_of(x), pool.kernel_size, pool.stride, pool.padding,
                           pool.dilation, pool.ceil_mode,
                           layout_of(x) == MemoryFormat::ChannelsLast);
}

inline std::vector<int64_t> pooled_shape(const MaxPool2dParams& p) {
  return {p.batch, p.channels, p.rows.output, p.columns.output};
}

// Output, argmax, mean and variance. `launch(forward, x, params, argmax)`
template <typename Launch>
FourTensors batch_norm_relu_max_pool2d_host(const BatchNormInputs& in, const PoolArguments& pool,
                                            const Launch& launch) {
  check_floating(in.op, "x", in.x);
  const MaxPool2dParams params = pool_params(in.op, in.x, pool);
  check_forward(in);
  const MemoryFormat layout = layout_of(in.x);
  Tensor output = empty_in(in.x, pooled_shape(params), layout);
  Tensor argmax = empty_in(in.x, pooled_shape(params), layout, ScalarType::Byte);
  Tensor mean = new_vector(in.x, 1), variance = new_vector(in.x, 1);
  if (in.x.numel() == 0) {
    return {output, argmax, torch::stable::zero_(mean), torch::stable::zero_(variance)};
  }
  with_forward_call(in, output, nullptr, mean, variance,
                    [&](BatchNormForward& call, const Tensor& x) {
                      launch(call, x, params, static_cast<uint8_t*>(argmax.mutable_data_ptr()));
                    });
  return {output, argmax, mean, variance};
}

// The gradients of x, weight and bias; in.mask is the argmax. `launch(backward, x, params, argmax)`
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_max_pool2d_backward_host(
    const BatchNormBackwardInputs& in, const PoolArguments& pool, const Launch& launch) {
  check_floating(in.op, "x", in.x);
  const MaxPool2dParams params = pool_params(in.op, in.x, pool);
  check_backward(in);
  check_shape(in.op, "grad_output", in.grad_output, pooled_shape(params));
  check_same_device(in.op, "argmax", in.mask, "x", in.x);
  check_dtype(in.op, "argmax", in.mask, ScalarType::Byte);
  check_shape(in.op, "argmax", in.mask, pooled_shape(params));
  const auto [grad_x, grad_residual, grad_weight, grad_bias] =
      with_backward_call(in, [&](BatchNormBackward& call, const Tensor& x, const uint8_t* argmax) {
        launch(call, x, params, argmax);
      });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace skinfast
#endif
