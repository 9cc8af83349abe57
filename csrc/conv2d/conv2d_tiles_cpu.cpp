#include "conv2d/conv2d_tiles.h"

#include "core/transpose.h"

namespace skinfast::SKINFAST_ISA {

#if defined(__AVX512BF16__) && defined(__AMX_BF16__)

namespace {

constexpr int kParts = 3;
constexpr int kSide = 16;                             // rows of a tile; its columns are pairs
constexpr int64_t kTile = kSide * kSide;              // pairs in a tile
constexpr int64_t kPanelBlock = kParts * 2 * kTile;   // pairs in 32 rows of 32 numbers, in parts
constexpr int64_t kBlocks = kTileDepth / kTilePanel;  // such blocks along the sum

typedef uint32_t Pairs __attribute__((vector_size(64)));
typedef vector_t<float> Floats;

// The number's first eight bits, rounded; in the upper half of a lane.
inline Pairs leading(Floats value) {
  return (reinterpret_cast<Pairs>(value) + 0x8000u) & 0xffff0000u;
}

// Two vectors in parts; a lane holds a part of `low` in its lower half and of `high` in its upper.
// Operands pair numbers k and k + 16 of 32: any order serves a sum, if both have the same.
inline void split(Floats low, Floats high, Pairs* parts) {
  for (int part = 0; part < kParts - 1; ++part) {
    const Pairs a = leading(low), b = leading(high);
    parts[part] = (a >> 16) | b;
    low -= reinterpret_cast<Floats>(a);
    high -= reinterpret_cast<Floats>(b);
  }
  // What is left has eight bits at most.
  parts[kParts - 1] =
      (reinterpret_cast<Pairs>(low) >> 16) | (reinterpret_cast<Pairs>(high) & 0xffff0000u);
}

// One half of a block: sixteen rows of `parts`, turned over where kTurned.
template <bool kTurned>
inline void store_half(Pairs (*parts)[kSide], int half, uint32_t* block) {
  for (int part = 0; part < kParts; ++part) {
    Floats* rows = reinterpret_cast<Floats*>(parts[part]);
    if constexpr (kTurned) transpose<float>(rows);
    memcpy(block + (part * 2 + half) * kTile, rows, kTile * sizeof(uint32_t));
  }
}

// 32 rows of 32 numbers that are summed over along the row, turned over: the right operand.
void pack_turned(const float* const* rows, uint32_t* block) {
  for (int half = 0; half < 2; ++half) {
    Pairs parts[kParts][kSide];
    for (int i = 0; i < kSide; ++i) {
      const float* row = rows[half * kSide + i];
      Pairs split_row[kParts];
      split(load_vector(row), load_vector(row + kSide), split_row);
      for (int part = 0; part < kParts; ++part) parts[part][i] = split_row[part];
    }
    store_half<true>(parts, half, block);
  }
}

// 32 rows of 32 numbers that are summed over across the rows: the right operand; turned, the left.
template <bool kTurned>
void pack_across(const float* const* rows, uint32_t* block) {
  for (int half = 0; half < 2; ++half) {
    Pairs parts[kParts][kSide];
    for (int i = 0; i < kSide; ++i) {
      Pairs split_row[kParts];
      split(load_vector(rows[i] + half * kSide), load_vector(rows[i + kSide] + half * kSide),
            split_row);
      for (int part = 0; part < kParts; ++part) parts[part][i] = split_row[part];
    }
    store_half<kTurned>(parts, half, block);
  }
}

// All tiles: 16 rows of 64 bytes.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define SKINFAST_LOAD_LEFT(part)                    \
  _tile_loadd(4, a + ((part) * 2 + 0) * kTile, 64); \
  _tile_loadd(5, a + ((part) * 2 + 1) * kTile, 64)
#define SKINFAST_LOAD_RIGHT(part)                   \
  _tile_loadd(6, b + ((part) * 2 + 0) * kTile, 64); \
  _tile_loadd(7, b + ((part) * 2 + 1) * kTile, 64)
#define SKINFAST_MULTIPLY() \
  _tile_dpbf16ps(0, 4, 6);  \
  _tile_dpbf16ps(1, 4, 7);  \
  _tile_dpbf16ps(2, 5, 6);  \
  _tile_dpbf16ps(3, 5, 7)

// c [32, 32] (+)= a b, over so many blocks of each. The small products first.
void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t blocks, float* c,
                     int64_t row_stride, bool accumulate) {
  const int64_t bytes = row_stride * static_cast<int64_t>(sizeof(float));
  float* lower = c + kSide * row_stride;
  if (accumulate) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + kSide, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + kSide, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t block = 0; block < blocks; ++block, a += kPanelBlock, b += kPanelBlock) {
    SKINFAST_LOAD_LEFT(0);
    SKINFAST_LOAD_RIGHT(2);
    SKINFAST_MULTIPLY();
    SKINFAST_LOAD_RIGHT(1);
    SKINFAST_MULTIPLY();
    SKINFAST_LOAD_LEFT(1);
    SKINFAST_MULTIPLY();
    SKINFAST_LOAD_RIGHT(0);
    SKINFAST_MULTIPLY();
    SKINFAST_LOAD_LEFT(2);
    SKINFAST_MULTIPLY();
    SKINFAST_LOAD_LEFT(0);
    SKINFAST_MULTIPLY();
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kSide, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + kSide, bytes);
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The numbers under padding and behind the last row.
alignas(64) constexpr float kZeros[kTilePanel] = {};

// The rows of one panel of the grid.
struct GridPanel {
  int64_t n[kTilePanel], i[kTilePanel], j[kTilePanel];
  int64_t count;

  GridPanel(const TileConv2d& conv, int64_t first)
      : count(smaller(conv.rows() - first, kTilePanel)) {
    int64_t image = first / (conv.I * conv.J), down = first / conv.J % conv.I,
            right = first % conv.J;
    for (int64_t k = 0; k < count; ++k) {
      n[k] = image;
      i[k] = down;
      j[k] = right;
      if (++right < conv.J) continue;  // a division takes longer than a row
      right = 0;
      if (++down < conv.I) continue;
      down = 0;
      ++image;
    }
  }
  // The pixels under a tap; null in the padding.
  void pixels(const TileConv2d& conv, int tap, const float* map, const float** rows) const {
    for (int64_t k = 0; k < kTilePanel; ++k) {
      rows[k] = nullptr;
      if (k >= count) continue;
      const int64_t h = i[k] * conv.step_h + conv.tap[tap].h;
      const int64_t w = j[k] * conv.step_w + conv.tap[tap].w;
      if (h < 0 || h >= conv.H || w < 0 || w >= conv.W) continue;
      rows[k] = map + ((n[k] * conv.H + h) * conv.W + w) * conv.channels;
    }
  }
};

inline void at_channel(const float* const* pixels, int64_t channel, const float** rows) {
  for (int64_t k = 0; k < kTilePanel; ++k) rows[k] = pixels[k] ? pixels[k] + channel : kZeros;
}

// Pixels under the taps, 32 rows of them summed over along the row: the left operand, in blocks
// [first, first + count) of taps and channels.
void pack_pixels(const TileConv2d& conv, const float* map, const GridPanel& panel, int64_t first,
                 int64_t count, uint32_t* target) {
  const int64_t channel_blocks = conv.channels / kTilePanel;
  for (int64_t done = 0; done < count;) {
    const int64_t channel_block = (first + done) % channel_blocks;
    const int64_t blocks = smaller(channel_blocks - channel_block, count - done);
    const float* pixels[kTilePanel];
    panel.pixels(conv, static_cast<int>((first + done) / channel_blocks), map, pixels);
    for (int64_t i = 0; i < kTilePanel; ++i) {  // a pixel's channels one after the other
      const float* pixel = pixels[i] ? pixels[i] + channel_block * kTilePanel : kZeros;
      uint32_t* row = target + done * kPanelBlock + i * kSide;
      for (int64_t k = 0; k < blocks; ++k, row += kPanelBlock) {
        Pairs parts[kParts];
        split(load_vector(pixel), load_vector(pixel + kSide), parts);
        for (int part = 0; part < kParts; ++part) {
          memcpy(row + part * 2 * kTile, &parts[part], sizeof(Pairs));
        }
        if (pixels[i]) pixel += kTilePanel;
      }
    }
    done += blocks;
  }
}

// Panels of weights packed together: those of one panel are a cache line or two of every page.
constexpr int64_t kColumns = kTileColumns / kTilePanel;

struct Scratch {
  uint32_t *left, *right;
  float* corner;

  explicit Scratch(void* memory) {
    left = static_cast<uint32_t*>(memory);
    right = left + kTileRows / kTilePanel * kBlocks * kPanelBlock;
    corner = reinterpret_cast<float*>(right + kColumns * kBlocks * kPanelBlock);
  }
};

// A panel of the grid times a panel of columns into the result's pixels, by way of `corner` where
// those don't follow each other or the last are missing.
void multiply_rows(const TileConv2d& conv, const TileTarget& target, int64_t first_row,
                   int64_t column, const uint32_t* a, const uint32_t* b, int64_t blocks,
                   bool accumulate, float* result, float* corner) {
  if (target.is_dense(conv) && first_row + kTilePanel <= conv.rows()) {
    multiply_panels(a, b, blocks, result + first_row * target.channels + column, target.channels,
                    accumulate);
    return;
  }
  const GridPanel panel(conv, first_row);
  float* pixels[kTilePanel];
  for (int64_t k = 0; k < panel.count; ++k) {
    const int64_t h = panel.i[k] * target.step_h + target.h;
    const int64_t w = panel.j[k] * target.step_w + target.w;
    pixels[k] = result + ((panel.n[k] * target.H + h) * target.W + w) * target.channels + column;
    if (accumulate) memcpy(corner + k * kTilePanel, pixels[k], kTilePanel * sizeof(float));
  }
  multiply_panels(a, b, blocks, corner, kTilePanel, accumulate);
  for (int64_t k = 0; k < panel.count; ++k) {
    memcpy(pixels[k], corner + k * kTilePanel, kTilePanel * sizeof(float));
  }
}

// Both products by the grid's rows; pack_right(tap, channel, column, block) packs the weights.
template <typename PackRight>
void multiply_grid(const TileConv2d& conv, const TileTarget& target, const TileRange& range,
                   const float* map, float* result, void* memory, const PackRight& pack_right) {
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  const Scratch scratch(memory);
  const int64_t channel_blocks = conv.channels / kTilePanel;
  const int64_t all_blocks = conv.taps * channel_blocks;
  constexpr int64_t kPanels = kTileRows / kTilePanel;
  for (int64_t row = range.row_begin; row < range.row_end; row += kPanels) {
    const int64_t panels = smaller(kPanels, range.row_end - row);
    for (int64_t first = 0; first < all_blocks; first += kBlocks) {
      const int64_t blocks = smaller(kBlocks, all_blocks - first);
      for (int64_t p = 0; p < panels; ++p) {
        pack_pixels(conv, map, GridPanel(conv, (row + p) * kTilePanel), first, blocks,
                    scratch.left + p * kBlocks * kPanelBlock);
      }
      for (int64_t column = range.column_begin; column < range.column_end; column += kColumns) {
        const int64_t columns = smaller(kColumns, range.column_end - column);
        for (int64_t k = 0; k < blocks; ++k) {
          for (int64_t c = 0; c < columns; ++c) {
            pack_right(static_cast<int>((first + k) / channel_blocks),
                       (first + k) % channel_blocks * kTilePanel, (column + c) * kTilePanel,
                       scratch.right + (c * kBlocks + k) * kPanelBlock);
          }
        }
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t p = 0; p < panels; ++p) {
            multiply_rows(conv, target, (row + p) * kTilePanel, (column + c) * kTilePanel,
                          scratch.left + p * kBlocks * kPanelBlock,
                          scratch.right + c * kBlocks * kPanelBlock, blocks, first > 0, result,
                          scratch.corner);
          }
        }
      }
    }
  }
  _tile_release();
}

}  // namespace

void tile_conv2d(const TileConv2d& conv, const TileTarget& target, const TileRange& range,
                 const float* map, const float* weight, float* result, void* scratch) {
  multiply_grid(conv, target, range, map, result, scratch,
                [&](int tap, int64_t channel, int64_t filter, uint32_t* block) {
                  const float* rows[kTilePanel];
                  for (int64_t k = 0; k < kTilePanel; ++k) {
                    rows[k] =
                        weight + (filter + k) * conv.filter_stride + conv.tap[tap].weight + channel;
                  }
                  pack_turned(rows, block);
                });
}

void tile_input_gradient(const TileConv2d& conv, const TileTarget& target, const TileRange& range,
                         const float* map, const float* weight, float* result, void* scratch) {
  multiply_grid(conv, target, range, map, result, scratch,
                [&](int tap, int64_t filter, int64_t channel, uint32_t* block) {
                  const float* rows[kTilePanel];
                  for (int64_t k = 0; k < kTilePanel; ++k) {
                    rows[k] =
                        weight + (filter + k) * conv.filter_stride + conv.tap[tap].weight + channel;
                  }
                  pack_across<false>(rows, block);
                });
}

void tile_weight_gradient(const TileConv2d& conv, int64_t filters, const TileRange& range,
                          const float* grad_output, const float* map, float* grad_weight,
                          void* memory) {
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  const Scratch scratch(memory);
  const int64_t channel_panels = conv.channels / kTilePanel;
  constexpr int64_t kPanels = kTileRows / kTilePanel;
  for (int64_t filter = range.row_begin; filter < range.row_end; filter += kPanels) {
    const int64_t panels = smaller(kPanels, range.row_end - filter);
    for (int64_t first = 0; first < conv.rows(); first += kTileDepth) {
      const int64_t blocks =
          (smaller(kTileDepth, conv.rows() - first) + kTilePanel - 1) / kTilePanel;
      const float *pixels[kBlocks][kTilePanel], *rows[kTilePanel];
      int tap_of_pixels = -1;
      for (int64_t k = 0; k < blocks; ++k) {
        for (int64_t p = 0; p < panels; ++p) {
          for (int64_t i = 0; i < kTilePanel; ++i) {
            const int64_t row = first + k * kTilePanel + i;
            rows[i] = row < conv.rows() ? grad_output + row * filters + (filter + p) * kTilePanel
                                        : kZeros;
          }
          pack_across<true>(rows, scratch.left + (p * kBlocks + k) * kPanelBlock);
        }
      }
      for (int64_t column = range.column_begin; column < range.column_end; ++column) {
        const int tap = static_cast<int>(column / channel_panels);
        const int64_t channel = column % channel_panels * kTilePanel;
        for (int64_t k = 0; k < blocks; ++k) {
          if (tap != tap_of_pixels) {
            GridPanel(conv, first + k * kTilePanel).pixels(conv, tap, map, pixels[k]);
          }
          at_channel(pixels[k], channel, rows);
          pack_across<false>(rows, scratch.right + k * kPanelBlock);
        }
        tap_of_pixels = tap;
        for (int64_t p = 0; p < panels; ++p) {
          multiply_panels(scratch.left + p * kBlocks * kPanelBlock, scratch.right, blocks,
                          grad_weight + (filter + p) * kTilePanel * conv.filter_stride +
                              conv.tap[tap].weight + channel,
                          conv.filter_stride, first > 0);
        }
      }
    }
  }
  _tile_release();
}

#else

void tile_conv2d(const TileConv2d&, const TileTarget&, const TileRange&, const float*, const float*,
                 float*, void*) {}
void tile_input_gradient(const TileConv2d&, const TileTarget&, const TileRange&, const float*,
                         const float*, float*, void*) {}
void tile_weight_gradient(const TileConv2d&, int64_t, const TileRange&, const float*, const float*,
                          float*, void*) {}

#endif

}  // namespace skinfast::SKINFAST_ISA
