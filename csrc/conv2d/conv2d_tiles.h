// Convolutions in float32 on a CPU's bfloat16 tiles (Intel AMX).
//
// A float32 is the sum of three bfloat16, eight bits of the significand each, exactly. Of the nine
// products of the parts of two numbers the three smallest are below 2^-26 of the whole, less than a
// float32 product loses by rounding; the other six are accumulated in float32. So the result is as
// close as that of float32 multiply-adds, and a tile multiplies sixteen times as fast as a vector.
// (Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype For
// Higher-Precision Computations, 2019.) An infinity becomes NaN, for it has no parts.
//
// Every convolution and gradient here is one sum over taps:
//   result[n, i, j] = sum over taps of map[n, i * step + tap] times the tap's weights.
#pragma once

#include "core/isa.h"
#include "core/scalar.h"

namespace skinfast {

// Channels and filters come in panels that are two tiles wide, and so does what is summed over.
constexpr int64_t kTilePanel = 32;

// A place of the kernel: where it lies on the map, and its weights in [filter, tap, channel].
struct TileTap {
  int64_t h, w;
  int64_t weight;  // elements before them in a filter
};

// Sizes of one such sum: over `channels` of every tap at the rows (n, i, j) of the grid [N, I, J].
struct TileConv2d {
  static constexpr int kMaxTaps = 9;
  int64_t N, H, W, channels;     // the map
  int64_t I, J, step_h, step_w;  // the grid on it
  int64_t filter_stride;         // elements of a filter
  int taps;
  TileTap tap[kMaxTaps];

  int64_t rows() const { return N * I * J; }
};

// Where the rows of a grid lie in the result: pixel (i * step_h + h, j * step_w + w) of [N, H, W].
struct TileTarget {
  int64_t H, W, step_h, step_w, h, w, channels;

  // Whether the grid's rows are the result's pixels, one after the other.
  bool is_dense(const TileConv2d& conv) const {
    return step_h == 1 && step_w == 1 && conv.I == H && conv.J == W;
  }
};

// The panels [begin, end) of rows and of columns that a task computes.
struct TileRange {
  int64_t row_begin, row_end, column_begin, column_end;
};

constexpr int64_t kTileDepth = 512;  // summed over at a time
constexpr int64_t kTileRows = 256;   // packed at a time
constexpr int64_t kTileColumns = 128;
// Bytes of a task's scratch, which begins at a cache line: both operands and one panel's result.
constexpr int64_t kTileScratch =
    6 * kTileDepth * (kTileRows + kTileColumns) + 4 * kTilePanel * kTilePanel;

// CPU kernels; they exist where tiles do.
// result = map * weight, summed over a tap's channels, [filter, tap, channel]: the convolution.
// Panels of grid rows by panels of filters.
SKINFAST_DECLARE_KERNEL(void tile_conv2d(const TileConv2d& conv, const TileTarget& target,
                                         const TileRange& range, const float* map,
                                         const float* weight, float* result, void* scratch))
// result = map * weight, summed over a tap's filters: the gradient of the input, whose map is the
// gradient of the output. Panels of grid rows by panels of channels.
SKINFAST_DECLARE_KERNEL(void tile_input_gradient(const TileConv2d& conv, const TileTarget& target,
                                                 const TileRange& range, const float* map,
                                                 const float* weight, float* result, void* scratch))
// grad_weight [filter, tap, channel] = grad_output * map, summed over the grid's rows. Panels of
// filters by panels of taps and channels.
SKINFAST_DECLARE_KERNEL(void tile_weight_gradient(const TileConv2d& conv, int64_t filters,
                                                  const TileRange& range, const float* grad_output,
                                                  const float* map, float* grad_weight,
                                                  void* scratch))

}  // namespace skinfast
