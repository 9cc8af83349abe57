// Launches batch norm's CUDA kernels, for the ops that share them.
#pragma once

#include "batch_norm_relu/batch_norm_cuda_apply.h"
#include "batch_norm_relu/batch_norm_cuda_reduce.h"
#include "batch_norm_relu/batch_norm_host.h"

namespace skinfast {

constexpr int64_t kMinPerThread = 4;

// How a matrix whose columns are channels is cut: blocks of [y, x] threads, x along vectors of
// `width` columns.
struct RowsGrid {
  dim3 grid, block;
  int64_t rows_per_block;
};

inline RowsGrid rows_grid(const BatchNormShape& shape, int width, int64_t blocks) {
  const int64_t vectors = shape.columns / width;
  unsigned x = 1;
  while (x < kWarpSize && x < vectors) x *= 2;
  const unsigned y = kThreads / x;
  const int64_t column_blocks = ceil_divide(vectors, x);
  const int64_t most = ceil_divide(shape.rows, y * kMinPerThread);
  const int64_t wanted = std::clamp<int64_t>(blocks / column_blocks, 1, most);
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
  // They fill a GPU of 132 multiprocessors once, without a tail.
  constexpr int64_t kBlocks = 132 * Reduction::kResidents;
  const BatchNormShape& shape = reduction.a.shape;
  const cudaStream_t stream = current_stream(x);
  const bool by_rows = shape.group == 1;
  const bool vector =
      is_aligned(pointers...) && (by_rows ? shape.columns : shape.group) % kWidth == 0;
  const int width = vector ? kWidth : 1;

  const RowsGrid rows = rows_grid(shape, width, kBlocks);
  const int64_t vectors = ceil_divide(shape.rows * shape.group, width);
  const int64_t most = ceil_divide(vectors, kThreads * kMinPerThread);
  const int64_t vectors_per_block =
      ceil_divide(vectors, std::clamp<int64_t>(kBlocks / shape.channels, 1, most));
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
         dim3(static_cast<unsigned>(ceil_divide(shape.channels, kCombineChannels))),
         dim3(kCombineChannels, kThreads / kCombineChannels), 0, stream, reduction, parts,
         partials);
}

// `pointers` are those that the pass reads or writes.
template <typename Pass, typename... Pointers>
void apply(const Pass& pass, const Tensor& x, Pointers... pointers) {
  const BatchNormShape& shape = pass.a.shape;
  const cudaStream_t stream = current_stream(x);
  const bool aligned = is_aligned(pointers...);
  if (aligned && shape.group == 1 && shape.columns % kEight == 0) {
    const RowsGrid rows = rows_grid(shape, kEight, kApplyBlocks);
    launch(&apply_rows_kernel<Pass>, rows.grid, rows.block, 0, stream, pass, rows.rows_per_block);
  } else {
    const bool vector = aligned && shape.group % kEight == 0;
    launch(vector ? &apply_kernel<Pass, true> : &apply_kernel<Pass, false>,
           grid_for(ceil_divide(x.numel(), kEight)), kThreads, 0, stream, pass, x.numel());
  }
}

// The batch's statistics, or in evaluation the running ones, and the coefficients they lead to.
template <typename T>
void set_forward_coefficients(const BatchNormForward& call, const Tensor& x) {
  if (call.training) {
    reduce<T>(ForwardReduction<T>{call}, x, call.x);
  } else {
    launch(&evaluation_kernel<accumulate_t<T>>,
           dim3(static_cast<unsigned>(ceil_divide(call.shape.channels, kThreads))), kThreads, 0,
           current_stream(x), call);
  }
}

// The kernels count in 32 bits.
inline void check_elements(const char* op, const Tensor& x) {
  SKINFAST_CHECK(x.numel() < int64_t{1} << 31, op, ": x has ", x.numel(),
                 " elements; on CUDA it needs fewer than 2^31");
}

}  // namespace skinfast
