// output = maximum over each window of x [N, C, H, W] (paper, the CNN's pools and ResNet's first).
// The position of each maximum is kept as one byte, so the gradient needs neither x nor output.
#pragma once

#include "core/isa.h"
#include "core/scalar.h"

namespace skinfast {

// One axis, rows or columns. Tap k of window o lies at o * stride - padding + k * dilation.
struct PoolAxis {
  int input, output;
  int kernel, stride, padding, dilation;
};

struct MaxPool2dParams {
  int64_t batch, channels;
  PoolAxis rows, columns;
  bool channels_last;
};

struct TapRange {
  int begin, end;
};

// The taps of window `o` that lie inside the input; empty where dilation steps over it all.
SKINFAST_HOST_DEVICE TapRange taps_inside(const PoolAxis& axis, int o) {
  const int begin = o * axis.stride - axis.padding;
  const int first = begin < 0 ? (axis.dilation - 1 - begin) / axis.dilation : 0;
  const bool whole = begin + (axis.kernel - 1) * axis.dilation < axis.input;
  return {first, whole ? axis.kernel : (axis.input - begin + axis.dilation - 1) / axis.dilation};
}

// The windows that reach over the input position `i`, taps and the gaps between them alike.
SKINFAST_HOST_DEVICE TapRange windows_over(const PoolAxis& axis, int i) {
  const int shifted = i + axis.padding;
  const int reach = (axis.kernel - 1) * axis.dilation;
  const int last = shifted / axis.stride;
  if (reach < axis.stride) {  // windows do not overlap: this one or none
    const bool covered = last < axis.output && shifted - last * axis.stride <= reach;
    return {last, covered ? last + 1 : last};
  }
  const int begin = shifted <= reach ? 0 : (shifted - reach + axis.stride - 1) / axis.stride;
  return {begin, last < axis.output ? last + 1 : axis.output};
}

// The tap of window `o` that lies at the input position `i`; -1 where none does.
SKINFAST_HOST_DEVICE int tap_at(const PoolAxis& axis, int o, int i) {
  const int offset = i + axis.padding - o * axis.stride;
  if (axis.dilation == 1) return offset;
  return offset % axis.dilation == 0 ? offset / axis.dilation : -1;
}

// The position in window (oh, ow) of the input pixel (h, w); -1 where it lies in a gap.
SKINFAST_HOST_DEVICE int position_at(const MaxPool2dParams& p, int oh, int ow, int h, int w) {
  const int kh = tap_at(p.rows, oh, h);
  const int kw = tap_at(p.columns, ow, w);
  return kh < 0 || kw < 0 ? -1 : kh * p.columns.kernel + kw;
}

// PyTorch's rule: the first of equal maxima stays, NaN replaces everything. `|` keeps the loops
// free of branches.
template <typename A, typename Index>
SKINFAST_HOST_DEVICE void take_maximum(A value, Index position, A& maximum, Index& argmax) {
  const bool replaces = (value > maximum) | (value != value);
  maximum = replaces ? value : maximum;
  argmax = replaces ? position : argmax;
}

template <typename A>
SKINFAST_HOST_DEVICE A minus_infinity() {
  return -static_cast<A>(__builtin_huge_val());
}

// Whether the windows tile the map: kernel = stride, nothing padded, dilated or hanging over.
SKINFAST_HOST_DEVICE bool tiles(const PoolAxis& axis) {
  return axis.kernel == axis.stride && axis.padding == 0 && axis.dilation == 1 &&
         axis.output * axis.kernel <= axis.input;
}
SKINFAST_HOST_DEVICE bool tiles(const MaxPool2dParams& p) {
  return tiles(p.rows) && tiles(p.columns);
}

// CPU kernels. A map is an image in channels_last, a plane (n, c) in contiguous. Forward, on the
// output rows [begin, end) of all maps; backward, on the same where the windows tile the map, else
// on maps [begin, end), with unpool_scratch's bytes of memory.
SKINFAST_DECLARE_KERNEL(void max_pool2d(DType dtype, const void* x, void* output, uint8_t* argmax,
                                        const MaxPool2dParams& params, int64_t begin, int64_t end))
SKINFAST_DECLARE_KERNEL(void max_pool2d_backward(DType dtype, const void* grad_output,
                                                 const uint8_t* argmax, void* grad, void* scratch,
                                                 const MaxPool2dParams& params, int64_t begin,
                                                 int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include <algorithm>

#include "core/parallel.h"
#include "core/tensor.h"

namespace skinfast {

inline int64_t pool_maps(const MaxPool2dParams& p) {
  return p.batch * (p.channels_last ? 1 : p.channels);
}

// Where windows overlap, bfloat16 gradients are summed in a map of floats.
inline size_t unpool_scratch(const MaxPool2dParams& p, const Tensor& grad) {
  if (tiles(p) || accumulate_dtype(grad) == grad.scalar_type()) return 0;
  return static_cast<size_t>(grad.numel() / pool_maps(p)) * sizeof(float);
}

// How many of the `units` that share a tensor's elements are worth a thread.
inline int64_t pool_grain(int64_t units, const Tensor& tensor) {
  return std::max<int64_t>(1, kElementGrain * units / tensor.numel());
}

using IntPair = std::vector<int64_t>;

constexpr int64_t kLargestExtent = int64_t{1} << 28;  // sums of a few of them fit in an int

inline void check_pair(const char* op, const char* name, const IntPair& pair, int64_t smallest) {
  SKINFAST_CHECK(pair.size() == 2, op, ": ", name, " has ", pair.size(),
                 " values; it needs one, or one each for height and width");
  for (const int64_t value : pair) {
    SKINFAST_CHECK(value >= smallest && value <= kLargestExtent, op, ": ", name, " has ", value,
                   "; it needs at least ", smallest, " and at most ", kLargestExtent);
  }
}

// The output's extent as torch computes it; in ceil_mode the last window may hang over the end
// but never start past it.
inline PoolAxis pool_axis(const char* op, int64_t input, int64_t kernel, int64_t stride,
                          int64_t padding, int64_t dilation, bool ceil_mode) {
  SKINFAST_CHECK(padding <= kernel / 2, op, ": padding has ", padding, " for a kernel of ", kernel,
                 "; it needs at most half the kernel");
  const int64_t reach = dilation * (kernel - 1);
  const int64_t room = input + 2 * padding - reach - 1;
  int64_t output = room < 0 ? 0 : room / stride + 1;
  if (ceil_mode && room + stride - 1 >= 0) {
    output = (room + stride - 1) / stride + 1;
    if ((output - 1) * stride >= input + padding) --output;
  }
  SKINFAST_CHECK(output >= 1, op, ": x has ", input + 2 * padding, " rows or columns, ",
                 2 * padding, " of padding included; a window needs ", reach + 1);
  SKINFAST_CHECK(reach <= kLargestExtent, op, ": kernel_size and dilation span ", reach + 1,
                 "; they need at most ", kLargestExtent);
  return {static_cast<int>(input),  static_cast<int>(output),  static_cast<int>(kernel),
          static_cast<int>(stride), static_cast<int>(padding), static_cast<int>(dilation)};
}

inline MaxPool2dParams max_pool2d_params(const char* op, const std::vector<int64_t>& input_size,
                                         const IntPair& kernel_size, const IntPair& stride,
                                         const IntPair& padding, const IntPair& dilation,
                                         bool ceil_mode, bool channels_last) {
  check_pair(op, "kernel_size", kernel_size, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  const int64_t area = kernel_size[0] * kernel_size[1];
  SKINFAST_CHECK(area <= 255, op, ": kernel_size has ", area,
                 " positions; it needs at most 255, since a position is kept in one byte");
  for (size_t i = 1; i < 4; ++i) {
    SKINFAST_CHECK(input_size[i] >= 1 && input_size[i] <= kLargestExtent, op, ": x has size ",
                   input_size[i], " in dimension ", i, "; it needs at least 1 and at most ",
                   kLargestExtent);
  }
  PoolAxis axes[2];
  for (size_t i = 0; i < 2; ++i) {
    axes[i] = pool_axis(op, input_size[2 + i], kernel_size[i], stride[i], padding[i], dilation[i],
                        ceil_mode);
  }
  return {input_size[0], input_size[1], axes[0], axes[1], channels_last};
}

// `launch(x, output, argmax, params)` sees dense tensors of one layout that are not empty.
template <typename Launch>
std::tuple<Tensor, Tensor> max_pool2d_host(const Tensor& x, const IntPair& kernel_size,
                                           const IntPair& stride, const IntPair& padding,
                                           const IntPair& dilation, bool ceil_mode,
                                           const Launch& launch) {
  constexpr const char* op = "max_pool2d";
  check_floating(op, "x", x);
  check_dim(op, "x", x, 4, "[N, C, H, W], or 3 without N");
  const MemoryFormat layout = layout_of(x);
  const MaxPool2dParams params =
      max_pool2d_params(op, shape_of(x), kernel_size, stride, padding, dilation, ceil_mode,
                        layout == MemoryFormat::ChannelsLast);

  const std::vector<int64_t> shape = {params.batch, params.channels, params.rows.output,
                                      params.columns.output};
  Tensor output = empty_in(x, shape, layout);
  Tensor argmax = empty_in(x, shape, layout, ScalarType::Byte);
  if (x.numel() > 0) launch(dense(x, layout), output, argmax, params);
  return {output, argmax};
}

// The output's size is the gradient's; `ceil_mode` has done its work in it.
// `launch(grad_output, argmax, grad, params)` as above.
template <typename Launch>
Tensor max_pool2d_backward_host(const Tensor& grad_output, const Tensor& argmax,
                                const std::vector<int64_t>& input_size, const IntPair& kernel_size,
                                const IntPair& stride, const IntPair& padding,
                                const IntPair& dilation, bool ceil_mode, bool channels_last,
                                const Launch& launch) {
  constexpr const char* op = "max_pool2d_backward";
  check_floating(op, "grad_output", grad_output);
  check_dtype(op, "argmax", argmax, ScalarType::Byte);
  check_same_device(op, "argmax", argmax, "grad_output", grad_output);
  SKINFAST_CHECK(input_size.size() == 4, op, ": input_size has ", input_size.size(),
                 " values; it needs 4 [N, C, H, W]");
  SKINFAST_CHECK(input_size[0] >= 0, op, ": input_size has ", input_size[0],
                 " in dimension 0; it needs at least 0");
  const MaxPool2dParams params = max_pool2d_params(op, input_size, kernel_size, stride, padding,
                                                   dilation, ceil_mode, channels_last);
  const std::vector<int64_t> shape = {params.batch, params.channels, params.rows.output,
                                      params.columns.output};
  check_shape(op, "grad_output", grad_output, shape);
  check_shape(op, "argmax", argmax, shape);

  const MemoryFormat layout = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor grad = empty_in(grad_output, input_size, layout);
  if (grad.numel() > 0) launch(dense(grad_output, layout), dense(argmax, layout), grad, params);
  return grad;
}

}  // namespace skinfast
#endif
