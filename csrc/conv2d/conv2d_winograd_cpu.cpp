#include "conv2d/conv2d_winograd.h"

#include "conv2d/conv2d_panels_vectors.h"

namespace skinfast::SKINFAST_ISA {

namespace {

typedef vector_t<float> Floats;
constexpr int64_t L = kLanes<float>;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The transforms in one dimension, `step` vectors from one number to the next.
// B^T: four pixels to four components.
void transform_pixels(const Floats* d, Floats* result, int step) {
  result[0] = d[0] - d[2 * step];
  result[step] = d[step] + d[2 * step];
  result[2 * step] = d[2 * step] - d[step];
  result[3 * step] = d[step] - d[3 * step];
}
// A^T: four components to two pixels of the output.
void transform_products(const Floats* m, int step, Floats* result, int result_step) {
  result[0] = m[0] + m[step] + m[2 * step];
  result[result_step] = m[step] - m[2 * step] - m[3 * step];
}
// G: three weights to four components.
void transform_weights(const Floats* g, int step, Floats* result, int result_step) {
  const Floats ends = 0.5f * (g[0] + g[2 * step]), middle = 0.5f * g[step];
  result[0] = g[0];
  result[result_step] = ends + middle;
  result[2 * result_step] = ends - middle;
  result[3 * result_step] = g[2 * step];
}
// G^T: four components to three weights' gradients.
void transform_sums(const Floats* u, int step, Floats* result, int result_step) {
  const Floats sum = 0.5f * (u[step] + u[2 * step]);
  result[0] = u[0] + sum;
  result[result_step] = 0.5f * (u[step] - u[2 * step]);
  result[2 * result_step] = sum + u[3 * step];
}

// The rows of a panel: a tile of one image after the other.
struct TileRows {
  int64_t n[kPanel], h[kPanel], w[kPanel];  // the image, the tile's first pixel
  int64_t count;

  void set(const WinogradConv2d& conv, int64_t first) {
    count = smaller(conv.rows() - first, kPanel);
    int64_t image = first % conv.N, tile = first / conv.N;
    for (int64_t i = 0; i < count; ++i) {
      n[i] = image;
      h[i] = tile / (conv.W / 2) * 2;
      w[i] = tile % (conv.W / 2) * 2;
      if (++image < conv.N) continue;
      image = 0;
      ++tile;
    }
  }
  // Pixel (r, s) of a row's tile, or around it; null in the padding and behind the last row.
  template <typename T>
  T* pixel(const WinogradConv2d& conv, int64_t channels, T* map, int64_t i, int64_t r,
           int64_t s) const {
    if (i >= count) return nullptr;
    const int64_t y = h[i] + r, x = w[i] + s;
    if (y < 0 || y >= conv.H || x < 0 || x >= conv.W) return nullptr;
    return map + ((n[i] * conv.H + y) * conv.W + x) * channels;
  }
};

// B^T d B of a row's pixels, all channels: row i of the blocks of every component.
void pack_pixels(const WinogradConv2d& conv, const TileRows& rows, const float* map, int64_t i,
                 float* packed, int64_t component_stride) {
  const float* pixels[kWinogradComponents];
  for (int t = 0; t < kWinogradComponents; ++t) {
    pixels[t] = rows.pixel(conv, conv.C, map, i, t / 4 - 1, t % 4 - 1);
  }
  for (int64_t c = 0; c < conv.C; c += L) {
    Floats d[kWinogradComponents];
    for (int t = 0; t < kWinogradComponents; ++t)
      d[t] = pixels[t] ? load_vector(pixels[t] + c) : Floats{};
    Floats down[kWinogradComponents], result[kWinogradComponents];
    for (int s = 0; s < 4; ++s) transform_pixels(d + s, down + s, 4);
    for (int r = 0; r < 4; ++r) transform_pixels(down + 4 * r, result + 4 * r, 1);
    float* target = packed + c / kPanel * FloatPanels::kBlock + i * kPanel + c % kPanel;
    for (int t = 0; t < kWinogradComponents; ++t)
      store_vector(target + t * component_stride, result[t]);
  }
}

// A^T m A of a row's products, 32 columns of them: four pixels of the result.
void unpack_products(const WinogradConv2d& conv, const TileRows& rows, const float* products,
                     int64_t component_stride, int64_t i, int64_t column, float* result) {
  float* targets[4];
  for (int t = 0; t < 4; ++t)
    targets[t] = rows.pixel(conv, conv.K, result, i, t / 2, t % 2) + column;
  for (int64_t c = 0; c < kPanel; c += L) {
    Floats m[kWinogradComponents], down[8], pixels[4];
    for (int t = 0; t < kWinogradComponents; ++t) {
      m[t] = load_vector(products + t * component_stride + i * kPanel + c);
    }
    for (int s = 0; s < 4; ++s) transform_products(m + s, 4, down + s, 4);
    for (int r = 0; r < 2; ++r) transform_products(down + 4 * r, 1, pixels + 2 * r, 1);
    for (int t = 0; t < 4; ++t) store_vector(targets[t] + c, pixels[t]);
  }
}

}  // namespace

void winograd_transform_weight(const WinogradConv2d& conv, bool is_input_gradient,
                               const float* weight, float* transformed, int64_t begin, int64_t end,
                               void* scratch) {
  float* block = static_cast<float*>(scratch);  // of every component, [filter, channel]
  const int64_t filter_panels = conv.K / kPanel, channel_panels = conv.C / kPanel;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t filter = item / channel_panels, channel = item % channel_panels;
    for (int64_t i = 0; i < kPanel; ++i) {
      const float* row = weight + (filter * kPanel + i) * 9 * conv.C + channel * kPanel;
      for (int64_t c = 0; c < kPanel; c += L) {
        Floats g[9], down[12], result[kWinogradComponents];
        for (int t = 0; t < 9; ++t) g[t] = load_vector(row + t * conv.C + c);
        for (int s = 0; s < 3; ++s) transform_weights(g + s, 3, down + s, 3);
        for (int r = 0; r < 4; ++r) transform_weights(down + 3 * r, 1, result + 4 * r, 1);
        for (int t = 0; t < kWinogradComponents; ++t) {
          store_vector(block + t * kWinogradBlockStride + i * kPanel + c, result[t]);
        }
      }
    }
    for (int t = 0; t < kWinogradComponents; ++t) {
      const float* rows[kPanel];
      for (int64_t i = 0; i < kPanel; ++i) rows[i] = block + t * kWinogradBlockStride + i * kPanel;
      if (is_input_gradient) {
        // G turns a kernel around by exchanging its first and last component.
        constexpr int kTurned[] = {3, 1, 2, 0};
        const int turned = 4 * kTurned[t / 4] + kTurned[t % 4];
        FloatPanels::pack_right_across(
            rows, transformed + ((turned * channel_panels + channel) * filter_panels + filter) *
                                    FloatPanels::kBlock);
      } else {
        FloatPanels::pack_right_along(
            rows, transformed + ((t * filter_panels + filter) * channel_panels + channel) *
                                    FloatPanels::kBlock);
      }
    }
  }
}

void winograd_products(const WinogradConv2d& conv, const float* map, const float* transformed,
                       float* result, int64_t begin, int64_t end, void* scratch) {
  const int64_t blocks = conv.C / kPanel, panel_elements = blocks * FloatPanels::kBlock;
  const int64_t stride = conv.packed_stride(), product_stride = conv.product_stride();
  float* packed = static_cast<float*>(scratch);
  float* products = packed + kWinogradComponents * stride;
  TileRows rows[WinogradConv2d::kMostPackedPanels];
  for (int64_t first = begin; first < end; first += conv.packed_panels()) {
    const int64_t panels = smaller(conv.packed_panels(), end - first);
    for (int64_t p = 0; p < panels; ++p) {
      rows[p].set(conv, (first + p) * kPanel);
      for (int64_t i = 0; i < kPanel; ++i) {
        pack_pixels(conv, rows[p], map, i, packed + p * panel_elements, stride);
      }
    }
    for (int64_t column = 0; column < conv.K / kPanel; ++column) {
      for (int t = 0; t < kWinogradComponents; ++t) {
        const float* right = transformed + (t * (conv.K / kPanel) + column) * panel_elements;
        for (int64_t p = 0; p < panels; ++p) {
          FloatPanels::multiply(packed + t * stride + p * panel_elements, right, blocks,
                                products + t * product_stride + p * FloatPanels::kBlock, kPanel,
                                false);
        }
      }
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t i = 0; i < rows[p].count; ++i) {
          unpack_products(conv, rows[p], products + p * FloatPanels::kBlock, product_stride, i,
                          column * kPanel, result);
        }
      }
    }
  }
}

namespace {

// A component of B^T d in one dimension: one pixel and, with a sign, another.
struct PixelPair {
  int first, second;
  float sign;
};
constexpr PixelPair kPixelPairs[] = {{0, 2, -1}, {1, 2, 1}, {2, 1, -1}, {1, 3, -1}};

// A component of A y in one dimension: how often it counts either pixel of the output.
constexpr float kOutputSigns[][2] = {{1, 0}, {1, 1}, {1, -1}, {0, -1}};

// Components (r, 0) to (r, 3) of B^T d B, all channels: row i of the components' blocks.
void pack_component_pixels(const WinogradConv2d& conv, const TileRows& rows, const float* map,
                           int r, int64_t i, float* packed, int64_t component_stride,
                           int64_t channel_stride) {
  const PixelPair pair = kPixelPairs[r];
  const float *first[4], *second[4];
  for (int s = 0; s < 4; ++s) {
    first[s] = rows.pixel(conv, conv.C, map, i, pair.first - 1, s - 1);
    second[s] = rows.pixel(conv, conv.C, map, i, pair.second - 1, s - 1);
  }
  for (int64_t c = 0; c < conv.C; c += L) {
    Floats down[4], result[4];
    for (int s = 0; s < 4; ++s) {
      down[s] = first[s] ? load_vector(first[s] + c) : Floats{};
      if (second[s]) down[s] += pair.sign * load_vector(second[s] + c);
    }
    transform_pixels(down, result, 1);
    float* target = packed + c / kPanel * channel_stride + i * kPanel + c % kPanel;
    for (int s = 0; s < kWinogradSide; ++s) store_vector(target + s * component_stride, result[s]);
  }
}

// Components (r, 0) to (r, 3) of A y A^T, 32 filters: row i of the components' blocks.
void pack_component_gradients(const WinogradConv2d& conv, const TileRows& rows,
                              const float* grad_output, int r, int64_t i, int64_t filter,
                              float* packed, int64_t component_stride) {
  for (int64_t c = 0; c < kPanel; c += L) {
    Floats down[2] = {};
    for (int k = 0; k < 4 && i < rows.count; ++k) {
      const float sign = kOutputSigns[r][k / 2];
      if (sign == 0) continue;
      const float* pixel = rows.pixel(conv, conv.K, grad_output, i, k / 2, k % 2);
      down[k % 2] += sign * load_vector(pixel + filter + c);
    }
    const Floats components[] = {down[0], down[0] + down[1], down[0] - down[1], -down[1]};
    for (int s = 0; s < kWinogradSide; ++s) {
      store_vector(packed + s * component_stride + i * kPanel + c, components[s]);
    }
  }
}

}  // namespace

void winograd_weight_sums(const WinogradConv2d& conv, const float* grad_output, const float* map,
                          float* sums, int64_t begin, int64_t end, void* scratch) {
  const int64_t filter_panels = conv.K / kPanel, channel_panels = conv.C / kPanel;
  const int64_t depth = conv.summed_panels(), panel_elements = depth * FloatPanels::kBlock;
  const int64_t left_stride = conv.summed_stride(conv.K);
  const int64_t right_stride = conv.summed_stride(conv.C);
  float* right = static_cast<float*>(scratch);
  float* left = right + kWinogradSide * right_stride;
  const int64_t row_items = kWinogradSide * filter_panels;  // of a row of components
  while (begin < end) {
    const int r = static_cast<int>(begin / row_items);
    const int64_t row_end = smaller(end, (r + 1) * row_items);
    for (int64_t first = 0; first < conv.row_panels(); first += depth) {
      const int64_t blocks = smaller(depth, conv.row_panels() - first);
      for (int64_t k = 0; k < blocks; ++k) {
        TileRows rows;
        rows.set(conv, (first + k) * kPanel);
        const int64_t block = k * FloatPanels::kBlock;
        for (int64_t i = 0; i < kPanel; ++i) {
          pack_component_pixels(conv, rows, map, r, i, right + block, right_stride, panel_elements);
        }
        // Items of one component after the other: from filter_panels on they are all filters.
        const int64_t filters = smaller(filter_panels, row_end - begin);
        for (int64_t f = 0; f < filters; ++f) {
          const int64_t filter = (begin + f) % filter_panels;
          for (int64_t i = 0; i < kPanel; ++i) {
            pack_component_gradients(conv, rows, grad_output, r, i, filter * kPanel,
                                     left + filter * panel_elements + block, left_stride);
          }
        }
      }
      for (int64_t channel = 0; channel < channel_panels; ++channel) {
        for (int64_t item = begin; item < row_end; ++item) {
          const int64_t t = item / filter_panels, filter = item % filter_panels;
          const int64_t s = t % kWinogradSide;
          FloatPanels::multiply_across(
              left + s * left_stride + filter * panel_elements,
              right + s * right_stride + channel * panel_elements, blocks,
              sums + (t * conv.K + filter * kPanel) * conv.C + channel * kPanel, conv.C, first > 0);
        }
      }
    }
    begin = row_end;
  }
}

void winograd_weight_gradient(const WinogradConv2d& conv, const float* sums, float* grad_weight,
                              int64_t begin, int64_t end) {
  for (int64_t filter = begin; filter < end; ++filter) {
    for (int64_t c = 0; c < conv.C; c += L) {
      Floats u[kWinogradComponents], down[12], g[9];
      for (int t = 0; t < kWinogradComponents; ++t) {
        u[t] = load_vector(sums + (t * conv.K + filter) * conv.C + c);
      }
      for (int s = 0; s < 4; ++s) transform_sums(u + s, 4, down + s, 4);
      for (int r = 0; r < 3; ++r) transform_sums(down + 4 * r, 1, g + 3 * r, 1);
      for (int t = 0; t < 9; ++t) store_vector(grad_weight + (filter * 9 + t) * conv.C + c, g[t]);
    }
  }
}

}  // namespace skinfast::SKINFAST_ISA
