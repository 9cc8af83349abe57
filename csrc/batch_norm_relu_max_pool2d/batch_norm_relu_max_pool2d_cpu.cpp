// The forward pass of batch_norm_relu_max_pool2d, and its host functions.
#include "batch_norm_relu_max_pool2d/batch_norm_relu_max_pool2d.h"

#include "batch_norm_relu/batch_norm_ranges.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// The pool of some output rows from `first` on, over nothing but the input rows from `top` on.
MaxPool2dParams pool_of_band(const MaxPool2dParams& p, int first, int rows, int top, int bottom) {
  MaxPool2dParams band = p;
  band.batch = 1;
  band.channels = p.channels_last ? p.channels : 1;
  band.rows.input = bottom - top;
  band.rows.output = rows;
  band.rows.padding = p.rows.padding - first * p.rows.stride + top;
  return band;
}

template <typename T>
void norm_relu_pool_band(DType dtype, const BatchNormForward& a, const MaxPool2dParams& p,
                         uint8_t* argmax, T* scratch, int64_t map, int first, int rows) {
  const int64_t step = p.channels_last ? p.channels : 1;
  const int64_t row_size = p.columns.input * step;
  const int64_t from = int64_t{first} * p.rows.stride - p.rows.padding;
  const int64_t last_tap =
      from + int64_t{rows - 1} * p.rows.stride + int64_t{p.rows.kernel - 1} * p.rows.dilation;
  const int top = from < 0 ? 0 : static_cast<int>(from);
  const int bottom = static_cast<int>(smaller(last_tap + 1, p.rows.input));

  const int64_t begin = (map * p.rows.input + top) * row_size;
  const int64_t end = (map * p.rows.input + bottom) * row_size;
  for (int64_t i = begin; i < end; i += kChunk) {
    apply_range<T, false, true>(a, i, smaller(i + kChunk, end), scratch + (i - begin));
  }
  const int64_t place = (map * p.rows.output + first) * p.columns.output * step;
  T* __restrict output = static_cast<T*>(a.output) + place;
  uint8_t* __restrict positions = argmax + place;
  max_pool2d(dtype, scratch, output, positions, pool_of_band(p, first, rows, top, bottom), 0, rows);
  for (int64_t i = 0; i < rows * p.columns.output * step; ++i) {
    positions[i] = position_or_stopped(load(output[i]), positions[i]);
  }
}

}  // namespace

void batch_norm_relu_max_pool2d(DType dtype, const BatchNormForward& a, const MaxPool2dParams& p,
                                uint8_t* argmax, void* scratch, int64_t begin, int64_t end) {
  const PoolBands bands = bands_of(p);
  SKINFAST_CPU_DISPATCH(dtype, T, {
    for (int64_t i = begin; i < end; ++i) {
      const int first = static_cast<int>(i % bands.per_map) * bands.rows;
      const int rows = static_cast<int>(smaller(bands.rows, p.rows.output - first));
      norm_relu_pool_band(dtype, a, p, argmax, static_cast<T*>(scratch), i / bands.per_map, first,
                          rows);
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "batch_norm_relu/batch_norm_cpu_host.h"
#include "core/scratch.h"

namespace skinfast {
namespace {

FourTensors batch_norm_relu_max_pool2d_cpu(const Tensor& x, const OptionalTensor& weight,
                                           const OptionalTensor& bias,
                                           const OptionalTensor& running_mean,
                                           const OptionalTensor& running_var, bool training,
                                           double eps, const IntPair& kernel_size,
                                           const IntPair& stride, const IntPair& padding,
                                           const IntPair& dilation, bool ceil_mode) {
  return batch_norm_relu_max_pool2d_host(
      {"batch_norm_relu_max_pool2d", x, std::nullopt, weight, bias, running_mean, running_var,
       training, eps, true},
      {kernel_size, stride, padding, dilation, ceil_mode},
      [](BatchNormForward& call, const Tensor& x, const MaxPool2dParams& params, uint8_t* argmax) {
        const Tensor partials = new_partials(call.shape, x, 3);
        call.partials = partials.mutable_data_ptr();
        if (call.training) reduce_tiles(call, x, SKINFAST_KERNEL(batch_norm_reduce));
        combine_tiles(call, x, SKINFAST_KERNEL(batch_norm_combine));
        const PoolBands bands = bands_of(params);
        parallel_for(pool_maps(params) * bands.per_map,
                     std::max<int64_t>(1, kElementGrain / bands.elements),
                     [&](int64_t begin, int64_t end) {
                       void* scratch = thread_scratch(bands.elements * sizeof(double));
                       SKINFAST_KERNEL(batch_norm_relu_max_pool2d)
                       (dtype_of(x), call, params, argmax, scratch, begin, end);
                     });
      });
}

// Call `kernel` on all blocks.
template <typename Kernel>
void for_each_block(const BatchNormBackward& call, const Tensor& x, const MaxPool2dParams& params,
                    const uint8_t* argmax, const PoolBlocks& blocks, Kernel kernel) {
  const int64_t elements = std::min(blocks.rows, call.shape.rows) * blocks.columns;
  parallel_for(blocks.row_blocks * blocks.column_blocks,
               std::max<int64_t>(1, kElementGrain / elements), [&](int64_t begin, int64_t end) {
                 void* scratch = thread_scratch(elements * sizeof(double));
                 kernel(dtype_of(x), call, params, argmax, scratch, begin, end);
               });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_max_pool2d_backward_cpu(
    const Tensor& grad_output, const Tensor& argmax, const Tensor& x, const Tensor& mean,
    const Tensor& variance, const OptionalTensor& weight, bool training, double eps,
    const IntPair& kernel_size, const IntPair& stride, const IntPair& padding,
    const IntPair& dilation, bool ceil_mode, bool needs_grad_x) {
  return batch_norm_relu_max_pool2d_backward_host(
      {"batch_norm_relu_max_pool2d_backward", grad_output, x, argmax, mean, variance, weight,
       training, eps, needs_grad_x, false},
      {kernel_size, stride, padding, dilation, ceil_mode},
      [](BatchNormBackward& call, const Tensor& x, const MaxPool2dParams& params,
         const uint8_t* argmax) {
        const Tensor partials = new_partials(call.shape, x, 2);
        call.partials = partials.mutable_data_ptr();
        for_each_block(call, x, params, argmax, reduction_blocks(call.shape),
                       SKINFAST_KERNEL(batch_norm_relu_max_pool2d_reduce_backward));
        combine_tiles(call, x, SKINFAST_KERNEL(batch_norm_combine_backward));
        if (call.grad_x == nullptr) return;
        for_each_block(call, x, params, argmax, gradient_blocks(call.shape),
                       SKINFAST_KERNEL(batch_norm_relu_max_pool2d_apply_backward));
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("batch_norm_relu_max_pool2d", TORCH_BOX(&batch_norm_relu_max_pool2d_cpu));
  m.impl("batch_norm_relu_max_pool2d_backward",
         TORCH_BOX(&batch_norm_relu_max_pool2d_backward_cpu));
}

}  // namespace skinfast
#endif
