// Convolutions on a CPU as products of panels, 32 rows by 32 columns: in float32 on its bfloat16
// tiles where it has them (conv2d_panels_tiles.h), else in vectors (conv2d_panels_vectors.h), and
// in vectors of bfloat16 where it has their products, summed in float32.
//
// Every convolution and gradient here is one sum over taps:
//   result[n, i, j] = sum over taps of map[n, i * step + tap] times the tap's weights.
// Panels pack what they multiply as they go: no patches in memory, no weights reordered. And where
// a panel's rows are one pixel of 32 images, a tap that lies in the padding is left out: of a 3x3
// kernel on 2x2 maps five taps of nine.
#pragma once

#include "core/isa.h"
#include "core/scalar.h"

namespace skinfast {

// Channels and filters come in panels, and so does what is summed over.
constexpr int64_t kPanel = 32;

// A place of the kernel: where it lies on the map, and its weights in [filter, tap, channel].
struct PanelTap {
  int64_t h, w;
  int64_t weight;  // elements before them in a filter
};

// Sizes of one such sum: over `channels` of every tap at the rows (n, i, j) of the grid [N, I, J].
struct PanelConv2d {
  static constexpr int kMaxTaps = 9;
  int64_t N, H, W, channels;     // the map
  int64_t I, J, step_h, step_w;  // the grid on it
  int64_t filter_stride;         // elements of a filter
  int taps;
  PanelTap tap[kMaxTaps];

  int64_t rows() const { return N * I * J; }
};

// Where the rows of a grid lie in the result: pixel (i * step_h + h, j * step_w + w) of [N, H, W].
struct PanelTarget {
  int64_t H, W, step_h, step_w, h, w, channels;
};

// The panels [begin, end) of rows and of columns that a task computes.
struct PanelRange {
  int64_t row_begin, row_end, column_begin, column_end;
};

constexpr int64_t kPackedRows = 256;  // packed at a time
constexpr int64_t kPackedColumns = 128;
// Bytes of a task's scratch, which begins at a cache line: both operands, at most 512 numbers of
// three bfloat16 each deep, and one panel's result; of a bfloat16 result, one panel's for each of
// those packed together and each of the task's columns.
constexpr int64_t kPanelScratch = 6 * 512 * (kPackedRows + kPackedColumns) + 4 * kPanel * kPanel;

// CPU kernels, for float32 and, in kAvx512Bf16, bfloat16.
// result = map * weight, summed over a tap's channels, [filter, tap, channel]: the convolution.
// Panels of grid rows by panels of filters.
SKINFAST_DECLARE_KERNEL(void panel_conv2d(DType dtype, const PanelConv2d& conv,
                                          const PanelTarget& target, const PanelRange& range,
                                          const void* map, const void* weight, void* result,
                                          void* scratch))
// result = map * weight, summed over a tap's filters: the gradient of the input, whose map is the
// gradient of the output. Panels of grid rows by panels of channels.
SKINFAST_DECLARE_KERNEL(void panel_input_gradient(DType dtype, const PanelConv2d& conv,
                                                  const PanelTarget& target,
                                                  const PanelRange& range, const void* map,
                                                  const void* weight, void* result, void* scratch))
// grad_weight [filter, tap, channel] = grad_output * map, summed over the grid's rows. Panels of
// filters by panels of taps and channels.
SKINFAST_DECLARE_KERNEL(void panel_weight_gradient(DType dtype, const PanelConv2d& conv,
                                                   int64_t filters, const PanelRange& range,
                                                   const void* grad_output, const void* map,
                                                   void* grad_weight, void* scratch))

}  // namespace skinfast
