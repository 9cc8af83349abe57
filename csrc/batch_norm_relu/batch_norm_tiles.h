// Tiles of a reduction, and the sums over a tile that more than one op needs; for kernel code only.
#pragma once

#include "batch_norm_relu/batch_norm_columns.h"

namespace skinfast::SKINFAST_ISA {
namespace {  // one copy for each file: see core/isa.h

// values[k] = the sum of values[k * group .. (k + 1) * group), in a fixed order.
template <typename A>
void fold_columns(A* values, int64_t channels, int64_t group) {
  constexpr int kLanes = 16;
  if (group == 1) return;
  for (int64_t k = 0; k < channels; ++k) {
    const A* own = values + k * group;
    A lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= group; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] += own[i + j];
    }
    A sum = 0;
    for (; i < group; ++i) sum += own[i];
    for (int j = 0; j < kLanes; ++j) sum += lanes[j];
    values[k] = sum;
  }
}

struct Tile {
  int64_t row, rows, column, columns;
  int64_t channel, channels, group;  // group: columns of a channel within the tile
  int64_t partial;                   // the row of the partial results
};

inline Tile tile_at(const BatchNormShape& shape, int64_t index) {
  const BatchNormTiling tiling = tiling_of(shape);
  const int64_t row_tile = index / tiling.column_tiles;
  const int64_t column_tile = index % tiling.column_tiles;
  const int64_t slice = column_tile % tiling.slices;
  const int64_t channel = column_tile / tiling.slices * tiling.channels_per_tile;
  const int64_t channels = smaller(tiling.channels_per_tile, shape.channels - channel);
  const int64_t group = smaller(kTileColumns, shape.group - slice * kTileColumns);
  const int64_t row = row_tile * kTileRows;
  return {.row = row,
          .rows = smaller(kTileRows, shape.rows - row),
          .column = channel * shape.group + slice * kTileColumns,
          .columns = channels * group,
          .channel = channel,
          .channels = channels,
          .group = group,
          .partial = row_tile * tiling.slices + slice};
}

// Where the tile's first element lies.
inline int64_t first_of(const BatchNormShape& shape, const Tile& tile) {
  return tile.row * shape.columns + tile.column;
}

inline int64_t partial_count(const BatchNormShape& shape) {
  const BatchNormTiling tiling = tiling_of(shape);
  return tiling.row_tiles * tiling.slices;
}

// gradient(row) is grad_output's row of the tile, stored in T or A.
template <typename T, bool kRelu, typename Gradient>
void reduce_tile_backward(const BatchNormBackward& a, const Tile& tile, const Gradient& gradient) {
  using A = accumulate_t<T>;
  const int64_t columns = tile.columns;
  A sum[kTileColumns] = {}, dot[kTileColumns] = {}, buffer[kTileColumns];
  uint8_t flags[kTileColumns + 8];
  const A* __restrict mean =
      per_column(static_cast<const A*>(a.mean), a.shape.group, tile.column, columns, buffer);
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t first = first_of(a.shape, tile) + row * a.shape.columns;
    const T* __restrict px = static_cast<const T*>(a.x) + first;
    const auto* pg = gradient(row);
    if (kRelu) unpack_mask(a.mask, first, columns, flags);
    for (int64_t k = 0; k < columns; ++k) {
      const A above = load(pg[k]);
      const A grad = !kRelu || flags[k] != 0 ? above : A(0);
      sum[k] += grad;
      dot[k] += grad * (load(px[k]) - mean[k]);
    }
  }
  fold_columns(sum, tile.channels, tile.group);
  fold_columns(dot, tile.channels, tile.group);

  A* __restrict sums = static_cast<A*>(a.partials) + tile.partial * a.shape.channels + tile.channel;
  A* __restrict dots = sums + partial_count(a.shape) * a.shape.channels;
  for (int64_t k = 0; k < tile.channels; ++k) {
    sums[k] = sum[k];
    dots[k] = dot[k];
  }
}

}  // namespace
}  // namespace skinfast::SKINFAST_ISA
