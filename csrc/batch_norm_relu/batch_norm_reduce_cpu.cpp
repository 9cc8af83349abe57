// The reductions of batch_norm_relu: tiles, then channels.
#include "batch_norm_relu/batch_norm_tiles.h"

namespace skinfast::SKINFAST_ISA {
namespace {

template <typename T>
void reduce_tile(const BatchNormForward& a, const Tile& tile) {
  using A = accumulate_t<T>;
  const int64_t columns = tile.columns;
  const T* x = static_cast<const T*>(a.x) + tile.row * a.shape.columns + tile.column;
  A pivot[kTileColumns] = {}, sum[kTileColumns] = {}, squares[kTileColumns] = {};

  const int64_t pivot_rows = smaller(tile.rows, kPivotRows);
  for (int64_t row = 0; row < pivot_rows; ++row) {
    const T* __restrict px = x + row * a.shape.columns;
    for (int64_t k = 0; k < columns; ++k) pivot[k] += load(px[k]);
  }
  fold_columns(pivot, tile.channels, tile.group);
  for (int64_t k = 0; k < tile.channels; ++k) pivot[k] /= static_cast<A>(pivot_rows * tile.group);
  A buffer[kTileColumns];
  const A* __restrict shift = per_column(pivot, tile.group, 0, columns, buffer);

  for (int64_t row = 0; row < tile.rows; ++row) {
    const T* __restrict px = x + row * a.shape.columns;
    for (int64_t k = 0; k < columns; ++k) {
      const A deviation = load(px[k]) - shift[k];
      sum[k] += deviation;
      squares[k] += deviation * deviation;
    }
  }
  fold_columns(sum, tile.channels, tile.group);
  fold_columns(squares, tile.channels, tile.group);

  const int64_t plane = partial_count(a.shape) * a.shape.channels;
  A* __restrict parts =
      static_cast<A*>(a.partials) + tile.partial * a.shape.channels + tile.channel;
  const A count = static_cast<A>(tile.rows * tile.group);
  for (int64_t k = 0; k < tile.channels; ++k) {
    const Moments<A> moments = shifted_moments(count, pivot[k], sum[k], squares[k]);
    parts[k] = moments.pivot;
    parts[plane + k] = moments.offset;
    parts[2 * plane + k] = moments.m2;
  }
}

// Partial results are merged for this many channels at once, so that reads are contiguous.
constexpr int64_t kStrip = 64;

template <typename A>
void combine(const BatchNormForward& a, int64_t channel, int64_t channels) {
  const BatchNormShape& shape = a.shape;
  const BatchNormTiling tiling = tiling_of(shape);
  const int64_t plane = partial_count(shape) * shape.channels;
  const A* parts = static_cast<const A*>(a.partials) + channel;
  double count = 0, pivot[kStrip] = {}, offset[kStrip] = {}, m2[kStrip] = {};
  for (int64_t row = 0; row < shape.rows; row += kTileRows) {
    for (int64_t slice = 0; slice < tiling.slices; ++slice, parts += shape.channels) {
      const double part =
          static_cast<double>(smaller(kTileRows, shape.rows - row) *
                              smaller(kTileColumns, shape.group - slice * kTileColumns));
      for (int64_t k = 0; k < channels; ++k) {
        const Moments<double> merged =
            merge_moments<double>({count, pivot[k], offset[k], m2[k]},
                                  {part, parts[k], parts[plane + k], parts[2 * plane + k]});
        pivot[k] = merged.pivot;
        offset[k] = merged.offset;
        m2[k] = merged.m2;
      }
      count += part;
    }
  }
  for (int64_t k = 0; k < channels; ++k) {
    set_forward_channel<A>(a, channel + k, pivot[k] + offset[k], m2[k] / count);
  }
}

template <typename A>
void combine_backward(const BatchNormBackward& a, int64_t channel, int64_t channels) {
  const int64_t partials = partial_count(a.shape);
  const int64_t plane = partials * a.shape.channels;
  const A* sums = static_cast<const A*>(a.partials) + channel;
  double sum[kStrip] = {}, dot[kStrip] = {};
  for (int64_t i = 0; i < partials; ++i, sums += a.shape.channels) {
    for (int64_t k = 0; k < channels; ++k) {
      sum[k] += sums[k];
      dot[k] += sums[plane + k];
    }
  }
  for (int64_t k = 0; k < channels; ++k) {
    set_backward_channel<A>(a, channel + k, sum[k], dot[k]);
  }
}

template <typename T, bool kOther, typename A = accumulate_t<T>>
void pass_gradient(const T* __restrict grad_output, const T* __restrict other,
                   const uint8_t* __restrict flags, T* __restrict grad_residual, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    A grad = load(grad_output[k]);
    if (kOther) grad += load(other[k]);
    grad_residual[k] = store<T>(flags[k] != 0 ? grad : A(0));
  }
}

// The gradient of the residual, which is that behind the ReLU, is written a row of the tile before
// the row is summed.
template <typename T>
void reduce_tile_with_residual(const BatchNormBackward& a, const Tile& tile) {
  const T* grad_output = static_cast<const T*>(a.grad_output);
  const T* other = static_cast<const T*>(a.other_grad_output);
  T* grad_residual = static_cast<T*>(a.grad_residual);
  const auto pass = other != nullptr ? &pass_gradient<T, true> : &pass_gradient<T, false>;
  reduce_tile_backward<T, false>(a, tile, [&](int64_t row) -> const T* {
    uint8_t flags[kTileColumns + 8];
    const int64_t first = first_of(a.shape, tile) + row * a.shape.columns;
    unpack_mask(a.mask, first, tile.columns, flags);
    pass(grad_output + first, other != nullptr ? other + first : nullptr, flags,
         grad_residual + first, tile.columns);
    return grad_residual + first;
  });
}

template <typename T, bool kRelu>
void reduce_tile_without_residual(const BatchNormBackward& a, const Tile& tile) {
  const T* grad_output = static_cast<const T*>(a.grad_output) + first_of(a.shape, tile);
  reduce_tile_backward<T, kRelu>(a, tile,
                                 [&](int64_t row) { return grad_output + row * a.shape.columns; });
}

}  // namespace

void batch_norm_reduce(DType dtype, const BatchNormForward& a, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    for (int64_t i = begin; i < end; ++i) reduce_tile<T>(a, tile_at(a.shape, i));
  });
}

void batch_norm_reduce_backward(DType dtype, const BatchNormBackward& a, int64_t begin,
                                int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const auto reduce = a.grad_residual != nullptr ? &reduce_tile_with_residual<T>
                        : a.mask != nullptr        ? &reduce_tile_without_residual<T, true>
                                                   : &reduce_tile_without_residual<T, false>;
    for (int64_t i = begin; i < end; ++i) reduce(a, tile_at(a.shape, i));
  });
}

void batch_norm_combine(DType dtype, const BatchNormForward& a, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    for (int64_t c = begin; c < end && a.training; c += kStrip) {
      combine<A>(a, c, smaller(kStrip, end - c));
    }
    for (int64_t c = begin; c < end && !a.training; ++c) {
      set_forward_channel<A>(a, c, static_cast<const A*>(a.running_mean)[c],
                             static_cast<const A*>(a.running_var)[c]);
    }
  });
}

void batch_norm_combine_backward(DType dtype, const BatchNormBackward& a, int64_t begin,
                                 int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    for (int64_t c = begin; c < end; c += kStrip) {
      combine_backward<accumulate_t<T>>(a, c, smaller(kStrip, end - c));
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA
