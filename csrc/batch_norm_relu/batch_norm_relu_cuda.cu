#include "batch_norm_relu/batch_norm_cuda_kernels.h"
#include "batch_norm_relu/batch_norm_host.h"

namespace skinfast {
namespace {

// Blocks that fill any present GPU several times; more would only make more partial results.
constexpr int64_t kTargetBlocks = 132 * 8;
constexpr int64_t kMinPerThread = 4;

// How a matrix whose columns are channels is cut: blocks of [y, x] threads, x along vectors of
// `width` columns.
struct RowsGrid {
  dim3 grid, block;
  int64_t rows_per_block;
};

RowsGrid rows_grid(const BatchNormShape& shape, int width) {
  const int64_t vectors = shape.columns / width;
  unsigned x = 1;
  while (x < kWarpSize && x < vectors) x *= 2;
  const unsigned y = kThreads / x;
  const int64_t column_blocks = ceil_divide(vectors, x);
  const int64_t most = ceil_divide(shape.rows, y * kMinPerThread);
  const int64_t wanted = std::clamp<int64_t>(kTargetBlocks / column_blocks, 1, most);
  const int64_t rows_per_block = ceil_divide(shape.rows, wanted);
  return {dim3(static_cast<unsigned>(column_blocks),
               static_cast<unsigned>(ceil_divide(shape.rows, rows_per_block))),
          dim3(x, y), rows_per_block};
}

// Both stages; `pointers` are those that stage one reads.
template <typename T, typename Reduction, typename... Pointers>
void reduce(const Reduction& reduction, const Tensor& x, Pointers... pointers) {
  constexpr int kWidth = kVectorWidth<T>;
  using Partial = typename Reduction::Partial;
  const BatchNormShape& shape = reduction.a.shape;
  const cudaStream_t stream = current_stream(x);
  const bool by_rows = shape.group == 1;
  const bool vector =
      is_aligned(pointers...) && (by_rows ? shape.columns : shape.group) % kWidth == 0;
  const int width = vector ? kWidth : 1;

  const RowsGrid rows = rows_grid(shape, width);
  const int64_t vectors = shape.rows * shape.group / width;
  const int64_t most = ceil_divide(vectors, kThreads * kMinPerThread);
  const int64_t vectors_per_block =
      ceil_divide(vectors, std::clamp<int64_t>(kTargetBlocks / shape.channels, 1, most));
  const int64_t parts = by_rows ? rows.grid.y : ceil_divide(vectors, vectors_per_block);
  const Tensor workspace = new_vector(x, parts * (sizeof(Partial) / sizeof(accumulate_t<T>)));
  Partial* partials = static_cast<Partial*>(workspace.mutable_data_ptr());

  if (by_rows) {
    launch(vector ? &reduce_rows_kernel<Reduction, kWidth> : &reduce_rows_kernel<Reduction, 1>,
           rows.grid, rows.block, 0, stream, reduction, rows.rows_per_block, partials);
  } else {
    launch(
        vector ? &reduce_channel_kernel<Reduction, kWidth> : &reduce_channel_kernel<Reduction, 1>,
        dim3(static_cast<unsigned>(shape.channels), static_cast<unsigned>(parts)),
        dim3(1, kThreads), 0, stream, reduction, vectors_per_block, partials);
  }
  launch(&combine_kernel<Reduction>,
         dim3(static_cast<unsigned>(ceil_divide(shape.channels, kWarpSize))),
         dim3(kWarpSize, kThreads / kWarpSize), 0, stream, reduction, parts, partials);
}

// `pointers` are those that the pass reads or writes.
template <typename Pass, typename... Pointers>
void apply(const Pass& pass, const Tensor& x, Pointers... pointers) {
  const BatchNormShape& shape = pass.a.shape;
  const cudaStream_t stream = current_stream(x);
  const bool aligned = is_aligned(pointers...);
  if (aligned && shape.group == 1 && shape.columns % kEight == 0) {
    const RowsGrid rows = rows_grid(shape, kEight);
    launch(&apply_rows_kernel<Pass>, rows.grid, rows.block, 0, stream, pass, rows.rows_per_block);
  } else {
    const bool vector = aligned && shape.group % kEight == 0;
    launch(vector ? &apply_kernel<Pass, true> : &apply_kernel<Pass, false>,
           grid_for(ceil_divide(x.numel(), kEight)), kThreads, 0, stream, pass, x.numel());
  }
}

// The kernels count in 32 bits.
void check_elements(const char* op, const Tensor& x) {
  SKINFAST_CHECK(x.numel() < int64_t{1} << 31, op, ": x has ", x.numel(),
                 " elements; on CUDA it needs fewer than 2^31");
}

FourTensors batch_norm_relu_cuda(const Tensor& x, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var, bool training, double eps,
                                 bool relu) {
  return batch_norm_forward_cuda({"batch_norm_relu", x, std::nullopt, weight, bias, running_mean,
                                  running_var, training, eps, relu});
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward_cuda(
    const Tensor& grad_output, const Tensor& x, const Tensor& mask, const Tensor& mean,
    const Tensor& variance, const OptionalTensor& weight, bool training, double eps,
    bool needs_grad_x) {
  const auto [grad_x, grad_residual, grad_weight, grad_bias] =
      batch_norm_backward_cuda({"batch_norm_relu_backward", grad_output, x, mask, mean, variance,
                                weight, training, eps, needs_grad_x, false});
  return {grad_x, grad_weight, grad_bias};
}

void batch_norm_update_cuda(const Tensor& running_mean, const Tensor& running_var,
                            const Tensor& mean, const Tensor& variance, int64_t count,
                            double momentum) {
  batch_norm_update_host(
      running_mean, running_var, mean, variance, count,
      [&](const Tensor& running, const Tensor& batch, double factor) {
        const DeviceGuard guard(running.get_device_index());
        const int64_t channels = running.numel();
        SKINFAST_CUDA_DISPATCH(dtype_of(running), T, {
          launch(&update_kernel<T>, dim3(static_cast<unsigned>(ceil_divide(channels, kThreads))),
                 kThreads, 0, current_stream(running), static_cast<T*>(running.mutable_data_ptr()),
                 running.stride(0), static_cast<const accumulate_t<T>*>(batch.const_data_ptr()),
                 factor, momentum, channels);
        });
      });
}

}  // namespace

FourTensors batch_norm_forward_cuda(const BatchNormInputs& inputs) {
  check_elements(inputs.op, inputs.x);
  return batch_norm_forward_host(inputs, [](BatchNormForward& call, const Tensor& x) {
    const DeviceGuard guard(x.get_device_index());
    SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
      if (call.training) {
        reduce<T>(ForwardReduction<T>{call}, x, call.x);
      } else {
        launch(&evaluation_kernel<accumulate_t<T>>,
               dim3(static_cast<unsigned>(ceil_divide(call.shape.channels, kThreads))), kThreads, 0,
               current_stream(x), call);
      }
      apply(ForwardPass<T>{call}, x, call.x, call.residual, call.output);
    });
  });
}

FourTensors batch_norm_backward_cuda(const BatchNormBackwardInputs& inputs) {
  check_elements(inputs.op, inputs.x);
  return batch_norm_backward_host(inputs, [](BatchNormBackward& call, const Tensor& x) {
    const DeviceGuard guard(x.get_device_index());
    SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
      reduce<T>(BackwardReduction<T>{call}, x, call.grad_output, call.x);
      if (call.grad_x == nullptr) return;
      apply(BackwardPass<T>{call}, x, call.grad_output, call.x, call.grad_x, call.grad_residual);
    });
  });
}

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_norm_relu", TORCH_BOX(&batch_norm_relu_cuda));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward_cuda));
  m.impl("batch_norm_update_", TORCH_BOX(&batch_norm_update_cuda));
}

}  // namespace skinfast
