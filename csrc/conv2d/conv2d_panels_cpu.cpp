#include "conv2d/conv2d_panels.h"

#include "conv2d/conv2d_panels_vectors.h"
#if defined(__AVX512BF16__) && defined(__AMX_BF16__)
#include "conv2d/conv2d_panels_tiles.h"
#endif

namespace skinfast::SKINFAST_ISA {

namespace {

// Calls task(panels) with what multiplies panels of that dtype on this CPU. PanelProducts::can lets
// bfloat16 come only where a CPU multiplies its pairs.
template <typename Task>
void on_panels([[maybe_unused]] DType dtype, const Task& task) {
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) return task(PairPanels());
#if defined(__AMX_BF16__)
  if (cpu_isa() == Isa::kAmxBf16) return task(TilePanels());
#endif
#endif
  task(FloatPanels());
}

template <typename Panels>
constexpr int64_t kBlocks = Panels::kDepth / kPanel;  // along the part of a sum that is packed

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The numbers under padding and behind the last row.
template <typename Number>
alignas(64) constexpr Number kZeros[kPanel] = {};

// The rows of one panel of the grid. Where there are taps to be left out they are a pixel of one
// image after the other, else pixels in the order in which they are stored.
struct GridPanel {
  int64_t n[kPanel], i[kPanel], j[kPanel];
  int64_t count;
  uint32_t taps;  // a bit for each that meets the map at any row

  void set(const PanelConv2d& conv, int64_t first) {
    const bool by_pixel = conv.taps > 1;
    count = smaller(conv.rows() - first, kPanel);
    const int64_t pixel = by_pixel ? first / conv.N : first % (conv.I * conv.J);
    int64_t image = by_pixel ? first % conv.N : first / (conv.I * conv.J), down = pixel / conv.J,
            right = pixel % conv.J;
    for (int64_t k = 0; k < count; ++k) {
      n[k] = image;
      i[k] = down;
      j[k] = right;
      // A division takes longer than a row.
      if (by_pixel) {
        if (++image < conv.N) continue;
        image = 0;
      }
      if (++right < conv.J) continue;
      right = 0;
      if (++down < conv.I) continue;
      down = 0;
      ++image;
    }
    taps = 0;
    for (int tap = 0; tap < conv.taps; ++tap) {
      for (int64_t k = 0; k < count && !meets(tap); ++k) {
        if (is_inside(conv, tap, k)) taps |= 1u << tap;
      }
    }
  }
  bool meets(int64_t tap) const { return taps >> tap & 1u; }
  bool is_inside(const PanelConv2d& conv, int tap, int64_t k) const {
    const int64_t h = i[k] * conv.step_h + conv.tap[tap].h;
    const int64_t w = j[k] * conv.step_w + conv.tap[tap].w;
    return h >= 0 && h < conv.H && w >= 0 && w < conv.W;
  }
  // The pixels under a tap; null in the padding.
  template <typename Number>
  void pixels(const PanelConv2d& conv, int tap, const Number* map, const Number** rows) const {
    for (int64_t k = 0; k < kPanel; ++k) {
      rows[k] = nullptr;
      if (k >= count || !is_inside(conv, tap, k)) continue;
      const int64_t h = i[k] * conv.step_h + conv.tap[tap].h;
      const int64_t w = j[k] * conv.step_w + conv.tap[tap].w;
      rows[k] = map + ((n[k] * conv.H + h) * conv.W + w) * conv.channels;
    }
  }
  // Elements before row k of the result.
  int64_t place(const PanelTarget& target, int64_t k) const {
    const int64_t h = i[k] * target.step_h + target.h, w = j[k] * target.step_w + target.w;
    return ((n[k] * target.H + h) * target.W + w) * target.channels;
  }
  // Elements from one row of the result to the next; 0 where they differ or rows are missing.
  int64_t row_stride(const PanelTarget& target) const {
    if (count < kPanel) return 0;
    const int64_t stride = place(target, 1) - place(target, 0);
    for (int64_t k = 2; k < kPanel; ++k) {
      if (place(target, k) - place(target, k - 1) != stride) return 0;
    }
    return stride;
  }
};

// Calls body(begin, end) for the longest runs of k in [0, count) for which is_met(k).
template <typename IsMet, typename Body>
void for_each_run(int64_t count, const IsMet& is_met, const Body& body) {
  for (int64_t k = 0; k < count;) {
    const int64_t begin = k;
    while (k < count && is_met(k)) ++k;
    if (k > begin) body(begin, k);
    while (k < count && !is_met(k)) ++k;
  }
}

// Pixels under the taps, 32 rows of them summed over along the row: the left operand, in blocks
// [first, first + count) of taps and channels. Those of taps that meet nothing stay as they are.
template <typename Panels>
void pack_pixels(const PanelConv2d& conv, const typename Panels::Number* map,
                 const GridPanel& panel, int64_t first, int64_t count,
                 typename Panels::Element* target) {
  using Number = typename Panels::Number;
  const int64_t channel_blocks = conv.channels / kPanel;
  for (int64_t done = 0; done < count;) {
    const int64_t channel_block = (first + done) % channel_blocks;
    const int64_t blocks = smaller(channel_blocks - channel_block, count - done);
    const int tap = static_cast<int>((first + done) / channel_blocks);
    if (panel.meets(tap)) {
      const Number* pixels[kPanel];
      panel.pixels(conv, tap, map, pixels);
      for (int64_t i = 0; i < kPanel; ++i) {  // a pixel's channels one after the other
        const Number* pixel = pixels[i] ? pixels[i] + channel_block * kPanel : kZeros<Number>;
        for (int64_t k = 0; k < blocks; ++k) {
          Panels::pack_left_row(pixel, i, target + (done + k) * Panels::kBlock);
          if (pixels[i]) pixel += kPanel;
        }
      }
    }
    done += blocks;
  }
}

// Panels of weights packed together: those of one panel are a cache line or two of every page.
constexpr int64_t kColumns = kPackedColumns / kPanel;

template <typename Panels>
struct Scratch {
  using Element = typename Panels::Element;
  static constexpr int64_t kPanelElements = kBlocks<Panels> * Panels::kBlock;
  static_assert((kPackedRows + kPackedColumns) / kPanel * kPanelElements * sizeof(Element) +
                    kPanel * kPanel * sizeof(float) <=
                kPanelScratch);
  Element *left, *right;
  float* sums;

  explicit Scratch(void* memory) {
    left = static_cast<Element*>(memory);
    right = left + kPackedRows / kPanel * kPanelElements;
    sums = reinterpret_cast<float*>(right + kColumns * kPanelElements);
  }
};

// 32 by 32 sums on their way into the result.
template <typename Panels>
struct Sums {
  using Number = typename Panels::Number;
  static constexpr bool kNarrow = sizeof(Number) < sizeof(float);

  bool is_first, is_last;  // of the parts that are summed one after the other
  int64_t stride;          // between the result's rows, where they can be written as they lie
  float* own;              // 32 by 32, kept from part to part where kNarrow

  // `place` counts the sums of a task. Those that are whole at once need no memory each.
  Sums(bool is_first, bool is_last, int64_t stride, float* memory, int64_t place)
      : is_first(is_first), is_last(is_last), stride(stride), own(memory) {
    if (kNarrow && !(is_first && is_last)) own += place * kPanel * kPanel;
  }

  // multiply(c, row_stride) computes or adds to them; row(k) is row k of the result, of `count`.
  template <typename Multiply, typename Row>
  void add(const Multiply& multiply, int64_t count, const Row& row) const {
    if constexpr (!kNarrow) {
      if (stride != 0) return multiply(row(0), stride);
      for (int64_t k = 0; k < count && !is_first; ++k) {
        memcpy(own + k * kPanel, row(k), kPanel * sizeof(float));
      }
    }
    multiply(own, kPanel);
    if (kNarrow && !is_last) return;
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = 0; j < kPanel; j += kLanes<float>) {
        store_vector(row(k) + j, load_vector(own + k * kPanel + j));
      }
    }
  }
};

// c (+)= the products of the blocks that is_met(k), the left ones packed by pack_left_across where
// kAcross.
template <typename Panels, bool kAcross, typename IsMet>
void multiply_met(const typename Panels::Element* a, const typename Panels::Element* b,
                  int64_t blocks, const IsMet& is_met, float* c, int64_t row_stride,
                  bool accumulate) {
  const auto multiply = [&](int64_t begin, int64_t end) {
    const auto* left = a + begin * Panels::kBlock;
    const auto* right = b + begin * Panels::kBlock;
    if constexpr (kAcross) {
      Panels::multiply_across(left, right, end - begin, c, row_stride, accumulate);
    } else {
      Panels::multiply(left, right, end - begin, c, row_stride, accumulate);
    }
    accumulate = true;
  };
  for_each_run(blocks, is_met, multiply);
  if (!accumulate) multiply(0, 0);  // zeros
}

// The weights of 32 filters at a tap, from a channel on.
template <typename Number>
void weight_rows(const PanelConv2d& conv, const Number* weight, int tap, int64_t filter,
                 int64_t channel, const Number** rows) {
  for (int64_t k = 0; k < kPanel; ++k) {
    rows[k] = weight + (filter + k) * conv.filter_stride + conv.tap[tap].weight + channel;
  }
}

// Both products by the grid's rows; pack_right(tap, channel, column, block) packs the weights.
template <typename Panels, typename PackRight>
void multiply_grid(const PanelConv2d& conv, const PanelTarget& target, const PanelRange& range,
                   const typename Panels::Number* map, typename Panels::Number* result,
                   void* memory, const PackRight& pack_right) {
  const Scratch<Panels> scratch(memory);
  constexpr int64_t kElements = Scratch<Panels>::kPanelElements;
  const int64_t channel_blocks = conv.channels / kPanel;
  const int64_t all_blocks = conv.taps * channel_blocks;
  constexpr int64_t kPanels = kPackedRows / kPanel;
  GridPanel grid[kPanels];
  int64_t strides[kPanels];
  for (int64_t row = range.row_begin; row < range.row_end; row += kPanels) {
    const int64_t panels = smaller(kPanels, range.row_end - row);
    uint32_t taps = 0;
    for (int64_t p = 0; p < panels; ++p) {
      grid[p].set(conv, (row + p) * kPanel);
      strides[p] = grid[p].row_stride(target);
      taps |= grid[p].taps;
    }
    for (int64_t first = 0; first < all_blocks; first += kBlocks<Panels>) {
      const int64_t blocks = smaller(kBlocks<Panels>, all_blocks - first);
      for (int64_t p = 0; p < panels; ++p) {
        pack_pixels<Panels>(conv, map, grid[p], first, blocks, scratch.left + p * kElements);
      }
      for (int64_t column = range.column_begin; column < range.column_end; column += kColumns) {
        const int64_t columns = smaller(kColumns, range.column_end - column);
        for (int64_t k = 0; k < blocks; ++k) {
          const int64_t tap = (first + k) / channel_blocks;
          if (!(taps >> tap & 1u)) continue;
          for (int64_t c = 0; c < columns; ++c) {
            pack_right(static_cast<int>(tap), (first + k) % channel_blocks * kPanel,
                       (column + c) * kPanel, scratch.right + c * kElements + k * Panels::kBlock);
          }
        }
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t p = 0; p < panels; ++p) {
            const int64_t place =
                p * (range.column_end - range.column_begin) + column + c - range.column_begin;
            const Sums<Panels> sums{first == 0, first + blocks == all_blocks, strides[p],
                                    scratch.sums, place};
            sums.add(
                [&](float* target_sums, int64_t row_stride) {
                  multiply_met<Panels, false>(
                      scratch.left + p * kElements, scratch.right + c * kElements, blocks,
                      [&](int64_t k) { return grid[p].meets((first + k) / channel_blocks); },
                      target_sums, row_stride, first > 0);
                },
                grid[p].count,
                [&](int64_t k) {
                  return result + grid[p].place(target, k) + (column + c) * kPanel;
                });
          }
        }
      }
    }
  }
}

}  // namespace

void panel_conv2d(DType dtype, const PanelConv2d& conv, const PanelTarget& target,
                  const PanelRange& range, const void* map, const void* weight, void* result,
                  void* scratch) {
  on_panels(dtype, [&]<typename Panels>(const Panels&) {
    using Number = typename Panels::Number;
    multiply_grid<Panels>(
        conv, target, range, static_cast<const Number*>(map), static_cast<Number*>(result), scratch,
        [&](int tap, int64_t channel, int64_t filter, typename Panels::Element* block) {
          const Number* rows[kPanel];
          weight_rows(conv, static_cast<const Number*>(weight), tap, filter, channel, rows);
          Panels::pack_right_along(rows, block);
        });
  });
}

void panel_input_gradient(DType dtype, const PanelConv2d& conv, const PanelTarget& target,
                          const PanelRange& range, const void* map, const void* weight,
                          void* result, void* scratch) {
  on_panels(dtype, [&]<typename Panels>(const Panels&) {
    using Number = typename Panels::Number;
    multiply_grid<Panels>(
        conv, target, range, static_cast<const Number*>(map), static_cast<Number*>(result), scratch,
        [&](int tap, int64_t filter, int64_t channel, typename Panels::Element* block) {
          const Number* rows[kPanel];
          weight_rows(conv, static_cast<const Number*>(weight), tap, filter, channel, rows);
          Panels::pack_right_across(rows, block);
        });
  });
}

namespace {

template <typename Panels>
void sum_weight_gradient(const PanelConv2d& conv, int64_t filters, const PanelRange& range,
                         const typename Panels::Number* grad_output,
                         const typename Panels::Number* map, typename Panels::Number* grad_weight,
                         void* memory) {
  using Number = typename Panels::Number;
  const Scratch<Panels> scratch(memory);
  constexpr int64_t kElements = Scratch<Panels>::kPanelElements;
  const PanelTarget output{conv.I, conv.J, 1, 1, 0, 0, filters};
  const int64_t channel_panels = conv.channels / kPanel;
  constexpr int64_t kPanels = kPackedRows / kPanel;
  GridPanel grid[kBlocks<Panels>];
  const Number *pixels[kBlocks<Panels>][kPanel], *rows[kPanel];
  for (int64_t filter = range.row_begin; filter < range.row_end; filter += kPanels) {
    const int64_t panels = smaller(kPanels, range.row_end - filter);
    for (int64_t first = 0; first < conv.rows(); first += Panels::kDepth) {
      const bool is_last = first + Panels::kDepth >= conv.rows();
      const int64_t blocks = (smaller(Panels::kDepth, conv.rows() - first) + kPanel - 1) / kPanel;
      for (int64_t k = 0; k < blocks; ++k) {
        grid[k].set(conv, first + k * kPanel);
        const Number* outputs[kPanel];
        for (int64_t i = 0; i < kPanel; ++i) {
          outputs[i] = i < grid[k].count ? grad_output + grid[k].place(output, i) : nullptr;
        }
        for (int64_t p = 0; p < panels; ++p) {
          for (int64_t i = 0; i < kPanel; ++i) {
            rows[i] = outputs[i] ? outputs[i] + (filter + p) * kPanel : kZeros<Number>;
          }
          Panels::pack_left_across(rows, scratch.left + p * kElements + k * Panels::kBlock);
        }
      }
      int tap_of_pixels = -1;
      for (int64_t column = range.column_begin; column < range.column_end; ++column) {
        const int tap = static_cast<int>(column / channel_panels);
        const int64_t channel = column % channel_panels * kPanel;
        for (int64_t k = 0; k < blocks; ++k) {
          if (!grid[k].meets(tap)) continue;
          if (tap != tap_of_pixels) grid[k].pixels(conv, tap, map, pixels[k]);
          for (int64_t i = 0; i < kPanel; ++i) {
            rows[i] = pixels[k][i] ? pixels[k][i] + channel : kZeros<Number>;
          }
          Panels::pack_right_across(rows, scratch.right + k * Panels::kBlock);
        }
        tap_of_pixels = tap;
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t place =
              p * (range.column_end - range.column_begin) + column - range.column_begin;
          const Sums<Panels> sums{first == 0, is_last, conv.filter_stride, scratch.sums, place};
          sums.add(
              [&](float* target, int64_t row_stride) {
                multiply_met<Panels, true>(
                    scratch.left + p * kElements, scratch.right, blocks,
                    [&](int64_t k) { return grid[k].meets(tap); }, target, row_stride, first > 0);
              },
              kPanel,
              [&](int64_t k) {
                return grad_weight + ((filter + p) * kPanel + k) * conv.filter_stride +
                       conv.tap[tap].weight + channel;
              });
        }
      }
    }
  }
}

}  // namespace

void panel_weight_gradient(DType dtype, const PanelConv2d& conv, int64_t filters,
                           const PanelRange& range, const void* grad_output, const void* map,
                           void* grad_weight, void* scratch) {
  on_panels(dtype, [&]<typename Panels>(const Panels&) {
    using Number = typename Panels::Number;
    sum_weight_gradient<Panels>(conv, filters, range, static_cast<const Number*>(grad_output),
                                static_cast<const Number*>(map), static_cast<Number*>(grad_weight),
                                scratch);
  });
}

}  // namespace skinfast::SKINFAST_ISA
