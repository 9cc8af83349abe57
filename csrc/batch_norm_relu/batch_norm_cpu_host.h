// The reductions of batch norm on the CPU: threads and memory. For host code only.
#pragma once

#include "batch_norm_relu/batch_norm_host.h"
#include "core/parallel.h"

namespace skinfast {

// Stages of either pass; `reduce` and `combine` are its kernels.
template <typename Call, typename Kernel>
void reduce_tiles(Call& call, const Tensor& x, Kernel reduce) {
  const int64_t tile =
      std::min(kTileRows, call.shape.rows) * std::min(kTileColumns, call.shape.columns);
  const BatchNormTiling tiling = tiling_of(call.shape);
  parallel_for(tiling.row_tiles * tiling.column_tiles, ceil_divide(kElementGrain, tile),
               [&](int64_t begin, int64_t end) { reduce(dtype_of(x), call, begin, end); });
}

template <typename Call, typename Kernel>
void combine_tiles(const Call& call, const Tensor& x, Kernel combine) {
  const BatchNormTiling tiling = tiling_of(call.shape);
  parallel_for(call.shape.channels, ceil_divide(kElementGrain, tiling.row_tiles * tiling.slices),
               [&](int64_t begin, int64_t end) { combine(dtype_of(x), call, begin, end); });
}

inline Tensor new_partials(const BatchNormShape& shape, const Tensor& x, int64_t planes) {
  const BatchNormTiling tiling = tiling_of(shape);
  return new_vector(x, planes * tiling.row_tiles * tiling.slices);
}

}  // namespace skinfast
