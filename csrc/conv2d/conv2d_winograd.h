// 3x3 convolutions of stride 1 in float32 on a CPU by Winograd's minimal filtering, F(2x2, 3x3)
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016): four of the output's
// pixels, a tile, take 16 multiplications for each pair of channels instead of 36.
//
//   output = A^T [ (G g G^T) * (B^T d B) ] A
//
// d are the tile's 4x4 pixels of the map, g the 3x3 weights. The products, component by component,
// are 16 sums over channels for all tiles, so 16 products of matrices, here of panels
// (conv2d_panels.h). The gradient of the input is the same sum with the kernel turned around, that
// of the weight the adjoint of the three transforms around 16 sums over the tiles.
//
// In the sums every pixel under the kernel also meets weights of other places, which cancel: what
// that costs is said in docs/numerics.md.
#pragma once

#include "conv2d/conv2d_panels.h"

namespace skinfast {

// Components of a tile: rows of four. Those of a row share the transform in the first dimension.
constexpr int kWinogradSide = 4, kWinogradComponents = kWinogradSide * kWinogradSide;
constexpr int64_t kWinogradGap = kPanel;  // elements, or all components would share a cache's set

// Maps [N, H, W, C] to [N, H, W, K], padding 1; H and W are even, C and K come in panels.
struct WinogradConv2d {
  static constexpr int64_t kMostChannels = 512;  // for more nobody has measured
  static constexpr int64_t kMostPackedPanels = 4;
  int64_t N, H, W, C, K;

  int64_t tiles() const { return H / 2 * (W / 2); }
  // A tile of one image after the other.
  int64_t rows() const { return N * tiles(); }
  int64_t row_panels() const { return (rows() + kPanel - 1) / kPanel; }
  // Elements of the transformed weights: a panel of [C, 32] for each component and 32 filters.
  int64_t weight_elements() const { return kWinogradComponents * C * K; }

  // Panels of rows that winograd_products packs at a time: as many as a core's cache holds.
  int64_t packed_panels() const { return C <= 64 ? kMostPackedPanels : C <= 128 ? 2 : 1; }
  // Panels of rows that winograd_weight_sums sums over at a time, likewise.
  int64_t summed_panels() const {
    const int64_t wider = C > K ? C : K;
    return wider <= 128 ? 8 : 1024 / wider > 1 ? 1024 / wider : 1;
  }

  // Elements from one component to the next of what those two pack,
  int64_t packed_stride() const { return packed_panels() * kPanel * C + kWinogradGap; }
  int64_t product_stride() const { return packed_panels() * kPanel * kPanel + kWinogradGap; }
  int64_t summed_stride(int64_t channels) const {
    return summed_panels() * kPanel * channels + kWinogradGap;
  }
  // and bytes of a task's scratch, which begins at a cache line.
  int64_t products_scratch() const {
    return 4 * kWinogradComponents * (packed_stride() + product_stride());
  }
  int64_t sums_scratch() const { return 4 * kWinogradSide * (summed_stride(C) + summed_stride(K)); }
};
constexpr int64_t kWinogradBlockStride = kPanel * kPanel + kWinogradGap;
constexpr int64_t kWinogradWeightScratch = 4 * kWinogradComponents * kWinogradBlockStride;

// CPU kernels.
// The weights [K, 3, 3, C] transformed, for the convolution or for the gradient of its input:
// blocks [begin, end) of K / 32 * C / 32.
SKINFAST_DECLARE_KERNEL(void winograd_transform_weight(const WinogradConv2d& conv,
                                                       bool is_input_gradient, const float* weight,
                                                       float* transformed, int64_t begin,
                                                       int64_t end, void* scratch))
// result [N, H, W, K] of map [N, H, W, C], panels [begin, end) of rows. The gradient of the input
// is such a result, C and K exchanged, of the gradient of the output.
SKINFAST_DECLARE_KERNEL(void winograd_products(const WinogradConv2d& conv, const float* map,
                                               const float* transformed, float* result,
                                               int64_t begin, int64_t end, void* scratch))
// sums [16, K, C] over the tiles, items [begin, end) of 16 * K / 32: a component of 32 filters.
SKINFAST_DECLARE_KERNEL(void winograd_weight_sums(const WinogradConv2d& conv,
                                                  const float* grad_output, const float* map,
                                                  float* sums, int64_t begin, int64_t end,
                                                  void* scratch))
// grad_weight [K, 3, 3, C] from those sums, filters [begin, end).
SKINFAST_DECLARE_KERNEL(void winograd_weight_gradient(const WinogradConv2d& conv, const float* sums,
                                                      float* grad_weight, int64_t begin,
                                                      int64_t end))

}  // namespace skinfast
