// The gradient of batch_norm_relu_max_pool2d_cpu.cpp's op.
#include "batch_norm_relu/batch_norm_ranges.h"
#include "batch_norm_relu/batch_norm_tiles.h"
#include "batch_norm_relu_max_pool2d/batch_norm_relu_max_pool2d.h"
#include "max_pool2d/max_pool2d_unpool.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// A part of the matrix [rows, columns] that BatchNormShape describes.
struct Block {
  int64_t row, rows, column, columns;
};

Block block_at(const BatchNormShape& shape, const PoolBlocks& blocks, int64_t index) {
  const int64_t row = index / blocks.column_blocks * blocks.rows;
  const int64_t column = index % blocks.column_blocks * blocks.columns;
  return {row, smaller(blocks.rows, shape.rows - row), column,
          smaller(blocks.columns, shape.columns - column)};
}

// sums [rows, columns]: the block's gradients behind the ReLU, rounded as if they had been stored.
template <typename T>
void unpool_block(const BatchNormBackward& a, const MaxPool2dParams& p, const uint8_t* argmax,
                  const Block& block, accumulate_t<T>* sums) {
  const T* grad_output = static_cast<const T*>(a.grad_output);
  const int64_t pixels = static_cast<int64_t>(p.rows.input) * p.columns.input;
  const int64_t windows = static_cast<int64_t>(p.rows.output) * p.columns.output;
  accumulate_t<T>* out = sums;
  if (p.channels_last) {
    const Offsets offsets(p, block.columns);
    const int64_t end = block.row + block.rows;
    for (int64_t i = block.row; i < end;) {  // pixels, through all images
      const int64_t image = i / pixels;
      const int64_t stop = smaller(end, (image + 1) * pixels);
      const int64_t place = image * windows * p.channels + block.column;
      unpool_pixels(grad_output + place, argmax + place, p, offsets, p.channels, block.columns,
                    i - image * pixels, stop - image * pixels, out);
      out += (stop - i) * block.columns;
      i = stop;
    }
  } else {
    const Offsets offsets(p, 1);
    const int64_t end = block.column + block.columns;
    for (int64_t row = block.row; row < block.row + block.rows; ++row) {
      for (int64_t i = block.column; i < end;) {  // pixels, through an image's planes
        const int64_t plane = i / pixels;
        const int64_t stop = smaller(end, (plane + 1) * pixels);
        const int64_t place = (row * p.channels + plane) * windows;
        unpool_pixels(grad_output + place, argmax + place, p, offsets, 1, 1, i - plane * pixels,
                      stop - plane * pixels, out);
        out += stop - i;
        i = stop;
      }
    }
  }
  if (sizeof(T) == sizeof(*sums)) return;
  for (int64_t i = 0; i < block.rows * block.columns; ++i) sums[i] = load(store<T>(sums[i]));
}

}  // namespace

void batch_norm_relu_max_pool2d_reduce_backward(DType dtype, const BatchNormBackward& a,
                                                const MaxPool2dParams& p, const uint8_t* argmax,
                                                void* scratch, int64_t begin, int64_t end) {
  const PoolBlocks blocks = reduction_blocks(a.shape);
  const BatchNormTiling tiling = tiling_of(a.shape);
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    A* grad = static_cast<A*>(scratch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / blocks.column_blocks * (blocks.rows / kTileRows);
      const int64_t last = smaller(first + blocks.rows / kTileRows, tiling.row_tiles);
      const int64_t column_tile = i % blocks.column_blocks;
      const Tile top = tile_at(a.shape, first * tiling.column_tiles + column_tile);
      const int64_t rows = smaller(blocks.rows, a.shape.rows - top.row);
      unpool_block<T>(a, p, argmax, {top.row, rows, top.column, top.columns}, grad);
      for (int64_t k = first; k < last; ++k) {
        const A* tile_grad = grad + (k - first) * kTileRows * top.columns;
        reduce_tile_backward<T, false>(a, tile_at(a.shape, k * tiling.column_tiles + column_tile),
                                       [&](int64_t row) { return tile_grad + row * top.columns; });
      }
    }
  });
}

void batch_norm_relu_max_pool2d_apply_backward(DType dtype, const BatchNormBackward& a,
                                               const MaxPool2dParams& p, const uint8_t* argmax,
                                               void* scratch, int64_t begin, int64_t end) {
  const PoolBlocks blocks = gradient_blocks(a.shape);
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    const auto apply = a.training ? &apply_backward_range<T, true, false, A>
                                  : &apply_backward_range<T, false, false, A>;
    A* grad = static_cast<A*>(scratch);
    for (int64_t i = begin; i < end; ++i) {
      const Block block = block_at(a.shape, blocks, i);
      unpool_block<T>(a, p, argmax, block, grad);
      // The block is a range of memory: whole rows, or a part of one.
      const int64_t first = block.row * a.shape.columns + block.column;
      const int64_t count = block.rows * block.columns;
      for (int64_t k = 0; k < count; k += kChunk) {
        apply(a, grad + k, first + k, first + smaller(k + kChunk, count));
      }
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA
